"""``help()`` shows every argument of the methods that pass them on, and the fields of results."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from scm_runtime import DevicePool, Generator, Samples, Span, Timings
from scm_runtime.devices import cuda_driver, placement

CALL = set(inspect.signature(Generator.__call__).parameters) - {"self"}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Generator.submit, CALL),
        (Generator.async_, CALL),
        (Generator.stream, CALL),
        (DevicePool.__call__, CALL),
        (DevicePool.submit, CALL),
        (DevicePool.async_, CALL),
        (DevicePool.stream, CALL),
        (DevicePool.__init__, set(inspect.signature(Generator).parameters) - {"device"}),
        (DevicePool.warmup, set(inspect.signature(Generator.warmup).parameters)),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_help_lists_all_arguments(function: Callable[..., Any], expected: set[str]) -> None:
    parameters = inspect.signature(function).parameters
    assert expected <= set(parameters)
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    defaults = inspect.signature(Generator.__call__).parameters
    for name in expected & set(defaults) - {"self", "batch_size"}:
        assert parameters[name].default == defaults[name].default
    text = pydoc.plain(pydoc.render_doc(function))
    assert all(name in text for name in expected)
    assert "Unpack" not in text
    assert "ForwardRef" not in text


@pytest.mark.parametrize("kind", [Samples, Timings, Span])
def test_help_describes_the_fields_of_results(kind: type) -> None:
    text = pydoc.plain(pydoc.render_doc(kind))
    for name in kind.__dataclass_fields__:  # type: ignore[attr-defined]  # they are dataclasses
        assert f"  {name}: " in text


def test_a_pool_uses_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cuda_unavailable_reason", lambda index=0: "there is no driver")
    with DevicePool("digits") as pool:
        assert [generator.info.device for generator in pool.generators] == ["cpu"]
        assert len(pool(seed=1)) == 1


def test_a_pool_uses_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cuda_unavailable_reason", lambda index=0: None)
    monkeypatch.setattr(
        cuda_driver, "read_driver", lambda: SimpleNamespace(devices=[SimpleNamespace(index=0), SimpleNamespace(index=1), SimpleNamespace(index=2)])
    )
    assert placement.all_devices() == ("cuda:0", "cuda:1", "cuda:2")
