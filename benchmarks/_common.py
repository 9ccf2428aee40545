"""Shared by the benchmarks: description of the machine, interleaved timing, storage of results.

A result file is written again after each measurement, so an interrupted run loses at most the measurement it was in, and the next run continues: ``Cells``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

MAX_ISA = os.environ.get("SCM_OPS_MAX_ISA")  # limits the native library's kernels, as an older processor would
RESULTS = Path(os.environ.get("SCM_BENCH_RESULTS") or Path(__file__).parent / "results" / (f"max-isa-{MAX_ISA}" if MAX_ISA else ""))
"""Folder of the results of one machine; docs/benchmarks.md shows those of the default folder and of amd-zen4."""


def machine() -> dict[str, object]:
    """Return the hardware and the package versions that results are stored with."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    versions = {name: version for name in ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "onnx") if (version := _version(name))}
    limit = {"max_isa": MAX_ISA} if MAX_ISA else {}
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), **limit, "python": platform.python_version(), **versions}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def interleaved(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Time the candidates in turn, round after round, so that noise affects all alike. Returns milliseconds."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median_ms": statistics.median(values), "min_ms": min(values)} for name, values in times.items()}


# ----------------------------------------------------------------------------
# Results, cell by cell

AGAIN = click.option("--again", is_flag=True, help="Measure again what was measured before with the same packages, native library and sources.")
UNFINISHED = ("missing", "skipped")
"""Values of ``status`` of cells that the next run tries again: their reasons depend on the moment."""


@cache
def build() -> str:
    """Return what the figures depend on, besides packages: hashes of the native library and of the sources of scm_runtime and scm_export."""
    from scm_runtime.ort.native_ops import find_library

    native, sources = find_library(), hashlib.sha256()
    for package in ("scm_runtime", "scm_export"):
        spec = find_spec(package)
        for folder in sorted((spec.submodule_search_locations if spec else None) or ()):
            for path in sorted(Path(folder).rglob("*.py")):
                sources.update(f"{package}/{path.relative_to(folder)}\n".encode() + path.read_bytes())
    library = hashlib.sha256(native.path.read_bytes()).hexdigest()[:12] if native else "none"
    return f"library {library}, sources {sources.hexdigest()[:12]}"


class Cells:
    """The figures of one script in ``NAME.json``. A cell is one measurement, named by its path in the figures.

    A cell is measured if the file has it from this machine, with the same packages, native library, sources and settings. Cells of an older build stay in the
    file until they are measured again or a script removes them; those of another machine or of other versions of packages do not.
    """

    def __init__(
        self,
        name: str,
        *,
        again: bool = False,
        about: Mapping[str, object] | None = None,
        order: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        **settings: object,
    ) -> None:
        """Read nothing yet: the file is read and written at each cell. Scripts with different files may run at the same time.

        Args:
            name: of the file, without its extension.
            again: regard a cell as measured only if this object has measured it.
            about: the machine; by default ``machine()``.
            order: returns the figures in the order in which they are written.
            settings: what else a cell depends on, for instance the number of threads.
        """
        self._path, self._again, self._about, self._order = RESULTS / f"{name}.json", again, dict(about or machine()), order
        self._stamp = ", ".join([build(), *(f"{key} {value}" for key, value in settings.items())])
        self._new: set[str] = set()

    def get(self, *path: str) -> Any:
        """Return what the file has at a path, of whatever build, or None."""
        found: Any = self._read()["figures"]
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def is_current(self, *path: str) -> bool:
        """Return whether a cell was measured with this build and these settings."""
        return self.get(*path) is not None and self._read()["measured_with"].get(" / ".join(path)) == self._stamp

    def is_measured(self, *path: str) -> bool:
        """Return whether a cell need not be measured."""
        if self._again and " / ".join(path) not in self._new:
            return False
        found = self.get(*path)
        unfinished = isinstance(found, dict) and found.get("status") in UNFINISHED
        return not unfinished and self.is_current(*path)

    def keep(self, *path: str, figures: object) -> None:
        """Write a cell to the file."""
        kept = self._read()
        _folder(kept["figures"], path)[path[-1]] = figures
        kept["measured_with"][" / ".join(path)] = self._stamp
        self._new.add(" / ".join(path))
        self._write(kept)

    def measure(self, *path: str, by: Callable[[], object], show: bool = True) -> None:
        """Measure a cell, write it to the file and print it, if ``show``; do nothing if it is measured."""
        cell = " / ".join(path)
        if self.is_measured(*path):
            print(f"{cell}: measured before (--again measures it again)", flush=True)
            return
        self.keep(*path, figures=by())
        print(f"{cell}: {json.dumps(self.get(*path)) if show else 'measured'}", flush=True)

    def note(self, *path: str, value: object) -> None:
        """Write something that is not measured; None removes it."""
        kept = self._read()
        place = _folder(kept["figures"], path)
        place[path[-1]] = value
        if value is None:
            del place[path[-1]]
        self._write(kept)

    def _read(self) -> dict[str, Any]:
        kept = read_json(self._path)
        if kept.get("machine") != self._about:
            return {"figures": {}, "measured_with": {}}
        return {"figures": kept["figures"], "measured_with": kept.get("measured_with", {})}

    def _write(self, kept: Mapping[str, Any]) -> None:
        content = {"machine": self._about, "figures": self._order(kept["figures"]), "measured_with": kept["measured_with"]}
        write_whole(self._path, json.dumps(content, indent=2) + "\n")


def _folder(figures: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return the dict that has, or will have, what is at a path."""
    for key in path[:-1]:
        figures = figures.setdefault(key, {})
    return figures


def stored_figures(name: str) -> dict[str, Any]:
    """Return the figures of ``NAME.json`` in the results folder if they are from this machine, else an empty dict."""
    kept = read_json(RESULTS / f"{name}.json")
    return dict(kept["figures"]) if kept.get("machine") == machine() else {}


def save(name: str, figures: object) -> str:
    """Write ``NAME.json`` to the results folder, and return its text."""
    text = json.dumps({"machine": machine(), "figures": figures}, indent=2)
    write_whole(RESULTS / f"{name}.json", text + "\n")
    return text


def save_and_print(name: str, figures: object) -> None:
    """Save the figures, and print them."""
    print(save(name, figures))


def write_whole(path: Path, text: str) -> None:
    """Write a file in one operation, so that an interrupted run leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file; an empty dict if there is none, or if it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
