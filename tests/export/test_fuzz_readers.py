"""No mutated file crashes a reader, makes it hang, run code, write files or take gigabytes, or raises anything but an ScmError. ``make fuzz`` tries more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz import campaign
from fuzz.campaign import Report, changed_file, try_files
from fuzz.seeds import Target, make_targets
from scm_export.errors import CheckpointError, ExportError

FILES = int(os.environ.get("SCM_FUZZ_FILES", "30"))  # for each kind of file


pytestmark = pytest.mark.filterwarnings("ignore")  # torch's about old formats, and Python's about forks of a process with threads


def test_no_mutated_file_gets_past_a_reader(tmp_path: Path) -> None:
    report = Report()
    for target in make_targets(tmp_path):
        if target.name != "TorchScript":  # refused without trust
            target.read(target.folder)
        try_files(target, 0, range(FILES), report)
    assert not report.failures, "\n".join(map(str, report.failures))
    assert report.tried.total() >= 15 * FILES


def raising(error: BaseException) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        raise error

    return read


OUTCOMES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "returns": (lambda folder: None, None),
    "refuses": (raising(CheckpointError("no")), None),
    "raises": (raising(KeyError("x")), "traceback"),
    "shouts": (raising(ExportError("\x1b[31m")), "message"),
    "babbles": (raising(ExportError("x" * 10_000)), "message"),
    "exits": (raising(SystemExit(0)), "traceback"),
    "crashes": (lambda folder: os.kill(os.getpid(), signal.SIGSEGV), "crashed"),
    "leaves": (lambda folder: os._exit(3), "crashed"),
    "hangs": (lambda folder: time.sleep(60), "hung"),
    "computes": (lambda folder: sum(range(10**10)), "hung"),
    "writes": (lambda folder: (folder / "new").write_bytes(b"x"), "executed"),
    "runs": (lambda folder: os.system("true"), "executed"),
    "allocates": (lambda folder: len(b"x" * (200 << 20)), "memory"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_campaign_notices_what_a_reader_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "MAX_SECONDS", 1)
    monkeypatch.setattr(campaign, "MAX_CPU_SECONDS", 0.5)
    monkeypatch.setattr(campaign, "MAX_GROWTH", 100 << 20)
    (tmp_path / "file").write_bytes(b"data")
    read, kind = OUTCOMES[name]
    report = Report()
    try_files(Target("file", tmp_path, read, ("file",)), 0, range(2), report)
    assert [failure.kind for failure in report.failures] == ([] if kind is None else [kind, kind])
    assert report.tried.total() == 2


def test_an_input_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b'{"a": [1, 2, {"b": "c"}]}')
    target = Target("file", tmp_path, lambda folder: None, ("file.json",))
    made = [changed_file(target, 7, number) for number in range(50)]
    assert made == [changed_file(target, 7, number) for number in range(50)]
    assert len(set(made)) > 20
