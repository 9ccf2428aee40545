"""pytest -p stub.plugin: run tests that need a GPU on the stub. A test fails if the log shows a fault."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stub.recording import Recording

if "SCM_STUB_LOG" not in os.environ:
    raise pytest.UsageError("stub.plugin needs SCM_STUB_LOG, the file of the stub's log. make test-stub sets it.")
LOG = Path(os.environ["SCM_STUB_LOG"])


def pytest_configure() -> None:
    # Imported here: torch takes seconds, and needs the log's variable.
    from stub import torch_cuda

    torch_cuda.install()


@pytest.fixture(autouse=True)
def recording(request: pytest.FixtureRequest) -> Iterator[Recording]:
    """What the stub logs during the test. A sign of a fault fails the test, unless ``@pytest.mark.stub_faults(kinds…)`` expects it."""
    recording = Recording(LOG)
    yield recording
    marker = request.node.get_closest_marker("stub_faults")
    expected = () if marker is None else marker.args
    unexpected = [line for line in recording.faults() if line.kind not in expected]
    assert not unexpected, f"the stub's log has {len(unexpected)} signs of faults, the first of them {unexpected[:3]}"
