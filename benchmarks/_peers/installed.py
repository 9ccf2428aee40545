"""Size of an installation on disk: the files of a distribution and of all its dependencies, in this environment or in that of another interpreter."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EDITABLE = {"scm-runtime": ("scm_runtime",)}  # its RECORD lists no modules; the exporter is not needed to run a bundle


def install_bytes(requirements: tuple[str, ...], packages: Path | None = None) -> int | None:
    """Return the size of the requirements and their dependencies; None if one of them is not installed.

    Args:
        requirements: names of distributions, with extras.
        packages: the folder of the packages (site-packages) of another environment; None for this one.
    """
    try:
        return sum(_own_bytes(name, packages) for name in sorted(_closure(requirements, packages)))
    except metadata.PackageNotFoundError:
        return None


def versions(requirements: tuple[str, ...], packages: Path | None = None) -> dict[str, str]:
    """Return the versions of the requirements that are installed."""
    found = {}
    for text in requirements:
        name = Requirement(text).name
        try:
            found[name] = _distribution(name, packages).version
        except metadata.PackageNotFoundError:
            continue
    return found


def _distribution(name: str, packages: Path | None) -> metadata.Distribution:
    if packages is None:
        return metadata.distribution(name)
    wanted = canonicalize_name(name)
    for found in metadata.distributions(path=[str(packages)]):
        if canonicalize_name(found.metadata["Name"]) == wanted:
            return found
    raise metadata.PackageNotFoundError(name)


def _closure(requirements: tuple[str, ...], packages: Path | None) -> set[str]:
    """Return the names of all required distributions whose markers apply to this environment."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in _distribution(requirement.name, packages).requires or ():
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return {name for name, _ in seen}


@cache
def _own_bytes(name: str, packages: Path | None) -> int:
    distribution = _distribution(name, packages)
    total = 0
    for file in distribution.files or ():
        if file.suffix != ".pyc":
            total += file.size if file.size is not None else _size(Path(str(file.locate())))
    for module in EDITABLE.get(name, ()):
        spec = find_spec(module)
        folders = {Path(folder).resolve() for folder in (spec.submodule_search_locations if spec is not None else None) or ()}
        listed = {Path(str(file.locate())).resolve() for file in distribution.files or ()}
        paths = {path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        total += sum(map(_size, paths - listed))
    return total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
