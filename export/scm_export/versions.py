"""Versions of other packages that the exporter is known to fail with, and versions it has been tested with.

They are checked first, because the error of a translation that fails minutes later does not name its cause. Packages are not imported for this.
"""

from __future__ import annotations

import logging
import re
from typing import NamedTuple

from scm_runtime.common.installed import installed_version
from scm_runtime.errors import MissingDependencyError

logger = logging.getLogger("scm_export")


class Requirement(NamedTuple):
    """Lowest supported version of a package, and the reason."""

    package: str
    minimum: str
    reason: str
    torch: str | None = None
    """Applies only with this version of torch or a newer one; None for all versions."""
    distributions: tuple[str, ...] = ()
    """Names of the distributions that contain the package; by default the package's name."""


REQUIREMENTS = (
    Requirement("torch", "2.10", "older versions corrupt memory when they read some files of weights (CVE-2026-24747)"),
    Requirement("onnx", "1.21", "older versions read and write files outside a model's folder (CVE-2026-34445, CVE-2026-27489)"),
    Requirement("onnxscript", "0.7.2", "older versions cannot translate what torch 2.13 traces", torch="2.13"),
    Requirement(
        "onnxruntime",
        "1.30",
        "1.29 ends the process when it opens some float16 graphs, older versions have no float64 Sin and Cos on the CPU",
        distributions=("onnxruntime", "onnxruntime-gpu"),
    ),
)
TESTED = {"torch": "2.13", "onnxscript": "0.7"}  # newest release series; the two must be compatible


def check_versions() -> None:
    """Check the installed packages against REQUIREMENTS.

    Raises:
        MissingDependencyError: a package is too old; the message lists all such packages and the pip command that upgrades them.
    """
    torch = installed_version("torch")
    problems, upgrades = [], []
    for needed in REQUIREMENTS:
        if needed.torch is not None and (torch is None or _parse(torch) < _parse(needed.torch)):
            continue
        for name in needed.distributions or (needed.package,):
            found = installed_version(name)
            if found is not None and _parse(found) < _parse(needed.minimum):
                with_torch = "" if needed.torch is None else f" with torch {torch}"
                problems.append(f"{name} {found} cannot be used{with_torch}: {needed.reason}. It must be at least {needed.minimum}.")
                upgrades.append(f"'{name}>={needed.minimum}'")
    if problems:
        raise MissingDependencyError("\n".join([*problems, f"  pip install {' '.join(upgrades)}"]))


def warn_about_untested_versions() -> None:
    """Log a warning if torch or onnxscript is newer than the release series that this exporter has been tested with."""
    newer = [f"{name} {found}" for name, tested in TESTED.items() if (found := installed_version(name)) is not None and _parse(found)[:2] > _parse(tested)]
    if newer:
        logger.warning(
            "%s: newer than what this exporter has been tested with (%s). If the network cannot be translated, that may be the reason. The tested versions:\n"
            "  pip install %s",
            ", ".join(newer),
            ", ".join(f"{name} {tested}" for name, tested in TESTED.items()),
            " ".join(f"'{name}~={tested}.0'" for name, tested in TESTED.items()),
        )


def _parse(version: str) -> tuple[int, ...]:
    """Release number without suffixes: (2, 13, 0) for "2.13.0+cpu"."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
