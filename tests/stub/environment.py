"""Complete the environment of ``make test-stub``: what its tests import besides onnxruntime-gpu.

    .venv/bin/python tests/stub/environment.py build/stub

Installing PyTorch a second time would take minutes and gigabytes. The folder ``packages`` holds links to the packages of the running interpreter without
ONNX Runtime's build for the CPU, and to the sources of this checkout. ``cmake --install`` puts the native library for the stub there. A ``.pth`` file adds
the folder to the environment ``venv``, after its own packages.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDDEN = ("onnxruntime", "scm_runtime", "scm_export", "__pycache__", "_editable_", "__editable__", "cuda", "nvidia")


def main(build: Path) -> None:
    """Make ``build``/packages anew, except for the native library, and add it to the environment ``build``/venv."""
    packages, library = build / "packages", build / "packages" / "scm_runtime" / "_native"
    kept = library.rename(build / "_native") if library.is_dir() else None
    shutil.rmtree(packages, ignore_errors=True)
    (packages / "scm_runtime").mkdir(parents=True)
    for path in map(Path, sys.path):
        if path.name == "site-packages":
            _link_all(path, packages)
    _link_all(ROOT / "scm_runtime", packages / "scm_runtime", hidden=("_native", "__pycache__"))
    (packages / "scm_export").symlink_to(ROOT / "export" / "scm_export")
    if kept is not None:
        kept.rename(library)
    site = build / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (site / "packages.pth").write_text(f"{packages.resolve()}\n", encoding="utf-8")


def _link_all(source: Path, target: Path, hidden: tuple[str, ...] = HIDDEN) -> None:
    """Link the entries of a folder that are not hidden and not in the target yet."""
    for entry in source.iterdir():
        if not entry.name.startswith(hidden) and entry.suffix != ".pth" and not (target / entry.name).is_symlink():
            (target / entry.name).symlink_to(entry.resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
