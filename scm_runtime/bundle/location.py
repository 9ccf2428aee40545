"""Where a bundle is: a folder, one of the package's own, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scm_runtime.bundle import hub
from scm_runtime.bundle.manifest import MANIFEST
from scm_runtime.errors import BundleNotFoundError

EMBEDDED = Path(__file__).parents[1] / "bundles"


class ResolvedBundle(NamedTuple):
    """Where a bundle is."""

    folder: Path
    """With the manifest in it; the other files of a repository may not have been fetched yet."""
    repository: str | None
    """On the hub: ``org/name``."""

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch files of the commit that the manifest is from, where the bundle is on the hub; raises HubError."""
        if self.repository is not None:
            for name in names:
                hub.fetch(self.repository, name, self.folder.name)


def resolve_bundle(bundle: str | os.PathLike[str], revision: str | None = None) -> ResolvedBundle:
    """A bundle given by path, by name for one inside the package, or as ``org/name`` for one on the hub, whose manifest is then fetched.

    Raises:
        BundleNotFoundError: there is none at that path, nor one of that name.
        HubNotFoundError, HubError: the hub has none, or cannot be asked.
        InvalidArgumentError: a revision is given for what is not on the hub.
        MissingDependencyError: it is on the hub, and huggingface_hub is not installed.
    """
    repository = hub.repository(bundle, revision)
    if repository is None:
        return ResolvedBundle(find_local(bundle), None)
    manifest = hub.fetch(repository, MANIFEST, revision, hint=f"It is no bundle. To make one of a model that scm-export reads: scm-export {repository}")
    return ResolvedBundle(manifest.parent, repository)


def find_local(bundle: str | os.PathLike[str]) -> Path:
    """Folder of a bundle given by path, or by name for one inside the package.

    Raises:
        BundleNotFoundError: there is no folder with a manifest at either place.
    """
    path = Path(bundle)
    try:
        if (path / MANIFEST).is_file():
            return path
    except OSError as error:
        raise BundleNotFoundError(f"no bundle at '{path}': {error.strerror}. Expected a folder written by scm-export.") from error
    embedded = EMBEDDED / f"{bundle}.scm"
    if re.fullmatch(r"[A-Za-z0-9_-]+", str(bundle)) and (embedded / MANIFEST).is_file():
        return embedded
    names = ", ".join(repr(folder.stem) for folder in sorted(EMBEDDED.glob("*.scm"))) or "none"
    wrong = f"has no {MANIFEST}" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise BundleNotFoundError(
        f"no bundle at '{path}': it {wrong}. Expected a folder written by scm-export, the name of an embedded bundle ({names}), "
        f"or a repository of the Hugging Face hub ('org/name').{hub.local_path_hint(bundle)}"
    )
