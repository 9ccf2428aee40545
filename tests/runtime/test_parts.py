"""Unfinished files and folders of killed processes are removed by the next process that writes there; those of living processes stay."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from scm_export.writer import new_bundle
from scm_runtime import Samples, Timings
from scm_runtime.common import parts
from scm_runtime.common.files import whole_file
from scm_runtime.common.parts import locked_part, sweep, sweep_once, system_id
from support import tree

WRITER = """
import sys, time
from pathlib import Path
from scm_runtime.common.parts import locked_part

with locked_part(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as part:
    (part / "weights.bin" if part.is_dir() else part).write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _nothing_is_swept_yet() -> None:
    sweep_once.cache_clear()


@contextmanager
def writing(target: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes a part."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(target), kind], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def parts_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".part-" in path.name]


def save(path: Path) -> None:
    Samples(np.zeros((1, 4, 4, 3), np.uint8), (0,), {}, Timings(0, (0,), 0, 0)).save(path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_part_stays_while_its_process_lives_and_goes_when_it_was_killed(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with writing(tmp_path / "out.png", kind) as process:
        (part,) = parts_in(tmp_path)
        sweep(tmp_path)
        save(tmp_path / "other.png")
        assert parts_in(tmp_path) == [part]
        process.kill()
        process.wait()
        assert parts_in(tmp_path) == [part]
        sweep_once.cache_clear()
        with caplog.at_level(logging.INFO, logger="scm_runtime"):
            save(tmp_path / "out.png")
        assert sorted(tree(tmp_path)) == ["other.png", "out.png"]
        assert [record.levelname for record in caplog.records if part in record.getMessage()] == ["INFO"]


def test_the_next_export_sweeps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "out.scm"
    target.mkdir()
    old = tmp_path / ".out.scm.old-0123456789ab"
    old.mkdir()
    (old / "weights.bin").write_bytes(b"replaced")
    other = tmp_path / ".other.scm.old-0123456789ab"
    other.mkdir()
    with writing(tmp_path / "living.scm", "folder"), writing(target, "folder") as process:
        process.kill()
        process.wait()
        assert len(parts_in(tmp_path)) == 2
        with caplog.at_level(logging.INFO), new_bundle(target, force=True) as writer:
            (writer.folder / "scm.json").write_text("{}")
        (left,) = parts_in(tmp_path)
        assert left.startswith(".living.scm.part-")
        assert not old.exists()
        assert other.exists(), "the only copy of another bundle"
        assert "out.scm.old-" in caplog.text


def test_parts_of_other_systems_are_removed_by_their_age(tmp_path: Path) -> None:
    other = "00000000" if system_id() != "00000000" else "11111111"
    fresh, old = tmp_path / f".a.png.part-{other}-0123456789ab", tmp_path / f".b.scm.part-{other}-0123456789ab"
    fresh.touch()
    old.mkdir()
    (old / "weights.bin").touch()
    past = time.time() - parts.MAX_AGE_S - 60
    os.utime(old, (past, past))
    sweep(tmp_path)
    assert fresh.exists()
    assert old.exists(), "its weights were written just now"
    os.utime(old / "weights.bin", (past, past))
    sweep(tmp_path)
    assert fresh.exists()
    assert not old.exists()


def test_without_locks_a_part_of_this_system_is_removed_by_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "fcntl", None)
    with locked_part(tmp_path / "a.png") as part:
        sweep(tmp_path)
        assert part.exists()
        os.utime(part, (0, 0))
        sweep(tmp_path)
        assert not part.exists()


def test_files_with_similar_names_stay(tmp_path: Path) -> None:
    names = ["out.part", ".out.part-1", f"x.part-{system_id()}-0123456789ab", f".a.png.part-{system_id()}-0123456789abc"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "kept").touch()
    link = tmp_path / f".a.png.part-{system_id()}-0123456789ab"
    link.symlink_to(tmp_path / "kept")
    os.mkfifo(tmp_path / f".b.png.part-{system_id()}-0123456789ab")
    sweep(tmp_path)
    assert set(names) <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "kept").exists()
    assert link.is_symlink()


def test_a_part_that_another_process_sweeps_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = parts._lock
    removed: list[Path] = []

    def late(descriptor: int | None) -> bool | None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        return original(descriptor)

    monkeypatch.setattr(parts, "_lock", late)
    with whole_file(tmp_path / "a.txt") as part:
        part.write_text("complete")
    assert tree(tmp_path) == {"a.txt": b"complete"}
    assert removed


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    save(tmp_path / f"{'a' * 251}.png")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("program", ["scm-runtime", "scm-export"])
def test_a_signal_cleans_up_as_ctrl_c_does(program: str, name: str, tmp_path: Path, tiny_bundle: Path, small_checkpoint: Path) -> None:
    """The process pauses while it writes, and gets the signal twice, as from a terminal that closes."""
    code = """
import sys, time
from scm_runtime import samples

def pause(*_, **__):
    print("writing", flush=True)
    time.sleep(600)

if sys.argv[1] == "scm-runtime":
    from scm_runtime.cli import main
    samples.Path.replace = pause
else:
    from scm_export import exporter
    from scm_export.cli import main
    exporter.trace_step = pause
main(sys.argv[2:])
"""
    out = str(tmp_path / "new" / ("a.png" if program == "scm-runtime" else "a.scm"))
    arguments = ["generate", str(tiny_bundle), "-o", out] if program == "scm-runtime" else [str(small_checkpoint), "-o", out, "--no-verify", "--steps", ""]
    with subprocess.Popen([sys.executable, "-c", code, program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            assert len(parts_in(tmp_path / "new")) == 1
            for _ in range(2):
                process.send_signal(getattr(signal, name))
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + getattr(signal, name)
    assert stderr.splitlines()[-1] == f"Ended by {name}: {'nothing' if program == 'scm-runtime' else 'no bundle'} was written"
    assert "Traceback" not in stderr
    assert tree(tmp_path) == {"new": None}


def test_nohup_still_ignores_sighup() -> None:
    code = """
import os, signal
from scm_runtime.cli import commands, main

signal.signal(signal.SIGHUP, signal.SIG_IGN)
commands.print_json = lambda document: (os.kill(os.getpid(), signal.SIGHUP), print("went on"))
main(["inspect", "digits", "--json"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_library_installs_no_signal_handlers(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    save(tmp_path / "a.png")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_a_link_stays_and_the_file_it_refers_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("folder/real.png")
    save(tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "folder" / "real.png").read_bytes().startswith(b"\x89PNG")


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    save(pipe)
    reader.join(60)
    assert read[0].startswith(b"\x89PNG")
    assert pipe.is_fifo()
