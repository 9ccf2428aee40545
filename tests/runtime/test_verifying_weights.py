"""The weights of a bundle, which are hashed while its graphs are opened."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler_control import TIMEOUT_S
from scm_runtime import BundleIntegrityError, Generator
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import WEIGHTS
from scm_runtime.common.background import StoppedError
from scm_runtime.engines import open_bundle
from scm_runtime.engines.host import HostEngine
from scm_runtime.errors import DeviceError, InferenceError, OutOfMemoryError


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with weights of which one bit is wrong."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "damaged.scm")
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (bundle / WEIGHTS).write_bytes(data)
    return bundle


class SlowHash:
    """Hashing that lasts until it is stopped."""

    def __init__(self) -> None:
        self.started, self.ended = threading.Event(), threading.Event()

    def __call__(self, path: Path, between_chunks: Callable[[], None]) -> str:
        self.started.set()
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while time.monotonic() < deadline:
                between_chunks()
                time.sleep(0.001)
        finally:
            self.ended.set()
        return sha256(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DeviceError("no GPU"), OutOfMemoryError("too large")], ids=lambda error: type(error).__name__)
def test_hashing_ends_if_opening_is_interrupted_or_the_device_fails(error: BaseException, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowHash()

    def fail(*_: object) -> None:
        assert slow.started.wait(TIMEOUT_S)
        raise error

    def digest(path: Path, between_chunks: Callable[[], None] | None) -> str:
        return slow(path, between_chunks) if path.name == WEIGHTS and between_chunks else sha256(path)

    monkeypatch.setattr(open_bundle, "sha256", digest)
    monkeypatch.setattr(open_bundle, "open_with_native_ops", fail)
    with pytest.raises(type(error)):
        Generator(tiny_bundle, cache_dir=False)
    assert slow.ended.wait(TIMEOUT_S / 2)


def test_damaged_weights_are_the_error_if_opening_fails_too(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InferenceError("a node has wrong weights")

    monkeypatch.setattr(open_bundle, "open_with_native_ops", fail)
    with pytest.raises(BundleIntegrityError, match="must have SHA-256") as caught:
        Generator(damaged)
    assert isinstance(caught.value.__context__, InferenceError)


def test_the_error_of_opening_is_raised_if_the_weights_are_right(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InferenceError("a node is wrong")

    monkeypatch.setattr(open_bundle, "open_with_native_ops", fail)
    with pytest.raises(InferenceError, match="a node is wrong"):
        Generator(tiny_bundle)


def test_the_engine_is_closed_if_the_weights_are_damaged(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[HostEngine] = []
    monkeypatch.setattr(HostEngine, "close", lambda engine: closed.append(engine))
    with pytest.raises(BundleIntegrityError, match="must have SHA-256"):
        Generator(damaged)
    assert len(closed) == 1


def test_no_thread_is_started_for_weights_that_are_not_verified(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_bundle, "Background", None)
    Generator(damaged, verify_integrity=False).close()


def test_weights_are_verified_if_no_thread_can_be_started(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(BundleIntegrityError, match="must have SHA-256"):
        Generator(damaged, threads=1)


def test_a_stopped_hash_reads_no_further(tmp_path: Path) -> None:
    path, chunks = tmp_path / "file", []

    def stop() -> None:
        chunks.append(1)
        raise StoppedError

    path.write_bytes(bytes(1 << 20))
    with pytest.raises(StoppedError):
        sha256(path, stop)
    assert len(chunks) == 1
