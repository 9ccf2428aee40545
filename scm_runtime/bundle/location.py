"""Location of a bundle: a folder, a bundle embedded in the package, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scm_runtime.bundle import hub
from scm_runtime.bundle.manifest import MANIFEST
from scm_runtime.common.log import log
from scm_runtime.errors import BundleNotFoundError

EMBEDDED = Path(__file__).parents[1] / "bundles"
DIGITS = EMBEDDED / "digits.scm"


class ResolvedBundle(NamedTuple):
    """Location of a bundle."""

    folder: Path
    """Folder with the manifest. Other files of a repository may not have been fetched yet."""
    repository: str | None
    """``org/name`` if the bundle is on the hub."""

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch files of the manifest's commit, if the bundle is on the hub; raises HubError."""
        if self.repository is not None:
            for name in names:
                hub.fetch(self.repository, name, self.folder.name)


def resolve_bundle(bundle: str | os.PathLike[str], revision: str | None = None) -> ResolvedBundle:
    """Resolve the name of an embedded bundle, a path, or ``org/name`` on the hub, whose manifest is then fetched.

    Raises:
        BundleNotFoundError: there is no bundle with that path or name.
        HubNotFoundError, HubError: the hub does not have it, or cannot be reached.
        InvalidArgumentError: a revision was given for a bundle that is not on the hub.
        MissingDependencyError: the bundle is on the hub, and huggingface_hub is not installed.
    """
    repository = hub.repository(bundle, revision)
    if repository is None:
        return ResolvedBundle(find_local(bundle), None)
    manifest = hub.fetch(repository, MANIFEST, revision, hint=f"It is not a bundle. To export a model that scm-export supports: scm-export {repository}")
    return ResolvedBundle(manifest.parent, repository)


def find_local(bundle: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle, from its path or the name of an embedded bundle.

    A string that is the name of an embedded bundle means that bundle, whatever the current folder holds. ``./NAME`` and ``Path`` objects are paths.

    Raises:
        BundleNotFoundError: neither is a folder with a manifest.
    """
    path = Path(bundle)
    if (embedded := _find_embedded(bundle)) is not None:
        if path.exists():
            log.info("%r is the embedded bundle. For the folder of that name here: ./%s", bundle, bundle)
        return embedded
    try:
        if (path / MANIFEST).is_file():
            return path
    except OSError as error:
        raise BundleNotFoundError(f"no bundle at '{path}': {error.strerror}. Expected a folder written by scm-export.") from error
    names = ", ".join(repr(folder.stem) for folder in sorted(EMBEDDED.glob("*.scm"))) or "none"
    wrong = f"has no {MANIFEST}" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise BundleNotFoundError(
        f"no bundle at '{os.fspath(bundle)}': it {wrong}. Expected a folder written by scm-export, the name of an embedded bundle ({names}), "
        f"or a repository of the Hugging Face hub ('org/name').{hub.local_path_hint(bundle)}"
    )


def _find_embedded(bundle: str | os.PathLike[str]) -> Path | None:
    if not isinstance(bundle, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", bundle):
        return None
    folder = EMBEDDED / f"{bundle}.scm"
    return folder if (folder / MANIFEST).is_file() else None
