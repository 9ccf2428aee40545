"""Versions of installed packages."""

from __future__ import annotations

import re


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    from importlib import metadata  # 20 ms, a third of importing scm_runtime

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install_extras(*extras: str) -> str:
    """Return the pip command that installs what extras of this package require. It names the packages, as this one is installed from a clone or a file."""
    from importlib import metadata

    try:
        lines = metadata.requires("scm-runtime") or []
    except metadata.PackageNotFoundError:
        lines = []
    packages = [line.partition(";")[0].strip() for line in lines if any(re.search(rf"""extra == ['"]{extra}['"]""", line) for extra in extras)]
    if not packages:
        return f"pip install '.[{','.join(extras)}]' in a clone of scm-runtime"
    return "pip install " + " ".join(f"'{package}'" for package in packages)
