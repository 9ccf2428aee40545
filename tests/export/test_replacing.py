"""``--force`` replaces a bundle without a moment in which there is none, or the next export restores it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from scm_export import writer
from scm_export.writer import new_bundle
from scm_runtime import OutputError
from scm_runtime.bundle.manifest import MANIFEST
from scm_runtime.common.exchange import exchange
from support import run_python, tree

# Exports to sys.argv[1] on a system that cannot exchange two names, and is killed before the second of the two renames.
KILLED_EXPORT = """
import os, signal, sys
from pathlib import Path
from scm_export import writer
rename = Path.rename
def rename_and_die(path, to):
    rename(path, to)
    os.kill(os.getpid(), signal.SIGKILL)
writer.exchange, Path.rename = lambda *_: False, rename_and_die
with writer.new_bundle(Path(sys.argv[1]), force=True) as new:
    (new.folder / "scm.json").write_text("new")
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "out.scm"
    folder.mkdir()
    (folder / MANIFEST).write_text("earlier")
    return folder


def replace(bundle: Path, *, force: bool = True) -> None:
    with new_bundle(bundle, force=force) as new:
        (new.folder / MANIFEST).write_text("new")


@pytest.fixture
def killed(bundle: Path) -> Path:
    """What an export with --force left that was killed between its two renames: no bundle, and the earlier one under another name."""
    done = run_python(KILLED_EXPORT, bundle, check=False)
    assert done.returncode == -9, done.stderr
    assert not bundle.exists()
    return bundle


def test_the_next_export_restores_the_bundle(killed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(OutputError, match="replace it with --force"):
        replace(killed, force=False)
    assert (killed / MANIFEST).read_text() == "earlier"
    assert f"restored '{killed}'" in caplog.text


def test_the_next_export_restores_the_bundle_before_it_fails(killed: Path) -> None:
    def fail() -> None:
        with new_bundle(killed, force=True):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(killed.parent) == {"out.scm": None, f"out.scm/{MANIFEST}": b"earlier"}


def test_the_next_export_replaces_the_bundle_and_leaves_nothing(killed: Path) -> None:
    replace(killed)
    assert (killed / MANIFEST).read_text() == "new"
    assert [path.name for path in killed.parent.iterdir()] == ["out.scm"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system cannot exchange two names")
def test_the_bundle_is_always_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are exchanged in one operation, not by two renames."""
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            missing.extend([True] if not (bundle / MANIFEST).exists() else [])

    def no_rename(*_: object) -> None:
        raise AssertionError("the names are not exchanged")

    monkeypatch.setattr(Path, "rename", no_rename)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            replace(bundle)
    finally:
        done.set()
        watcher.join()
    assert not missing
    assert [path.name for path in bundle.parent.iterdir()] == ["out.scm"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_link_to_a_bundle_is_replaced_and_its_target_kept(bundle: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(writer, "exchange", lambda *_: False)
    link = bundle.with_name("link.scm")
    link.symlink_to(bundle)
    replace(link)
    assert not link.is_symlink()
    assert (link / MANIFEST).read_text() == "new"
    assert (bundle / MANIFEST).read_text() == "earlier"
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["link.scm", "out.scm"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system cannot exchange two names")
def test_exchange(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "ö\nother"
    one.mkdir()
    other.write_text("text")
    assert exchange(one, other)
    assert one.read_text() == "text"
    assert other.is_dir()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        exchange(one, tmp_path / "nowhere")
