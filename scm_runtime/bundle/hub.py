"""Files of repositories on the Hugging Face hub, from huggingface_hub (the extra ``hub``) and its cache. HF_HOME and HF_HUB_OFFLINE apply.

Also decides whether a name is a repository or a path, for bundles and checkpoints alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scm_runtime.common.installed import install_extras
from scm_runtime.errors import HubError, HubNotFoundError, InvalidArgumentError, MissingDependencyError

# The hub's rules: one slash, no ".." or "--", no dots or dashes at the ends.
REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
ENDINGS = {".scm", ".pt", ".pth", ".pt2", ".pkl", ".ckpt", ".safetensors", ".onnx"}


def repository(given: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Return the repository ``org/name`` that a caller means, or None for a path.

    It is a path if it exists, is not a string, does not have the form ``org/name``, is in a folder that exists, or has the ending of a bundle or
    checkpoint: a mistyped path must not access the network. With a revision it is a repository, unless something of that name exists locally.

    Raises:
        InvalidArgumentError: a revision was given for a path.
    """
    wrong = None
    if not isinstance(given, str) or not REPOSITORY.fullmatch(given):
        wrong = f"got {os.fspath(given)!r}"
    elif os.path.lexists(given):
        wrong = f"{given!r} exists here, and local paths take precedence"
    if revision is not None and (wrong or not revision):
        raise InvalidArgumentError(f"revision {revision!r} is for a repository of the hub, 'org/name': {wrong or 'it is empty'}. Leave the revision out.")
    return None if wrong or (revision is None and _local_path_reason(str(given))) else str(given)


def local_path_hint(given: str | os.PathLike[str]) -> str:
    """Return a sentence for the error about a missing path that could have been a repository; else an empty string."""
    if isinstance(given, str) and REPOSITORY.fullmatch(given) and not os.path.lexists(given) and (reason := _local_path_reason(given)):
        return f" The hub was not asked, because {reason}. Give a revision to ask it, for instance 'main'."
    return ""


def _local_path_reason(given: str) -> str | None:
    """Why ``org/name`` is taken for a path; None if it is not."""
    path = Path(given)
    if path.parent.is_dir():
        return f"there is a folder '{path.parent}' here"
    return f"the name ends in {path.suffix}" if path.suffix.lower() in ENDINGS else None


def fetch(repo: str, name: str, revision: str | None = None, *, hint: str = "") -> Path:
    """Return a file of a repository in the cache, and download it if necessary.

    The hub is not asked if HF_HUB_OFFLINE is set, or if the revision is a commit whose file is cached.

    Args:
        repo: ``org/name``.
        name: file name in the repository.
        revision: branch, tag or commit; None for the main branch.
        hint: remedy for the error message if the repository does not have the file.

    Returns:
        Path in the cache's folder for the commit, ``…/snapshots/<commit>/<name>``.

    Raises:
        HubNotFoundError: there is no such repository, revision or file; or HF_HUB_OFFLINE is set, and it is not cached.
        HubError: the hub denies access or cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _load(repo)
    with _translated_errors(hub, repo, revision, name, hint):
        return Path(hub.hf_hub_download(repo, name, revision=revision))


def snapshot(repo: str, revision: str | None = None, patterns: Sequence[str] | None = None) -> Path:
    """Return the folder of one commit of a repository in the cache, and download the files that match if necessary.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        patterns: patterns of file names, as ``unet/*.json``; None for all files.

    Returns:
        The cache's folder for the commit.

    Raises:
        HubNotFoundError: there is no such repository or revision; or HF_HUB_OFFLINE is set, and it is not cached.
        HubError: the hub denies access or cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _load(repo)
    with _translated_errors(hub, repo, revision):
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=None if patterns is None else list(patterns)))


def blob(path: Path) -> Path | None:
    """Return the target of a link in the cache; None if the path is not a link, or not one of the cache.

    The cache links each file of ``models--org--name/snapshots/<commit>`` to one in ``models--org--name/blobs``, and from huggingface_hub 2 on
    from there to one in the ``blobs`` of the whole cache. Only huggingface_hub creates these links: links in a repository are not followed when it
    is downloaded. A link to any other place is not followed.
    """
    if not path.is_symlink():
        return None
    target, folder = path.resolve(), path.parent.resolve()
    repository = folder.parent.parent
    if folder.parent.name != "snapshots" or not repository.name.startswith("models--") or not target.is_file():
        return None
    return target if any(target.is_relative_to(cache / "blobs") for cache in (repository, repository.parent)) else None


def _load(repo: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingDependencyError(
            f"there is no folder '{repo}' here, and reading a repository of the Hugging Face hub requires huggingface_hub ({error}). Install it:\n"
            f"  {install_extras('hub')}"
        ) from error
    return huggingface_hub


@contextmanager
def _translated_errors(hub: Any, repo: str, revision: str | None, name: str | None = None, hint: str = "") -> Iterator[None]:
    """Turn huggingface_hub's errors into HubError and HubNotFoundError."""
    what = f"the repository '{repo}'" + (f" at revision {revision!r}" if revision else "")
    wanted = f"{name} of {what}" if name else what
    local = f"If a folder was meant: there is no '{repo}' here."
    login = "ask for access on its page, and log in: hf auth login (or set HF_TOKEN)"
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError as error:  # a subclass of RepositoryNotFoundError: must come first
        raise HubError(f"{what} is gated: {login}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubNotFoundError(
            f"there is no repository '{repo}' on the hub that you may read, and no folder '{repo}' here. Check the spelling; if the repository is private, "
            "log in: hf auth login (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubNotFoundError(f"the repository '{repo}' has no revision {revision or 'main'!r}. Give one of its branches, tags or commits.") from error
    except errors.LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError: must come first
        if not hub.constants.HF_HUB_OFFLINE:
            raise _unreachable(wanted, login, local, error) from error
        raise HubNotFoundError(
            f"{wanted} is not in the cache '{hub.constants.HF_HUB_CACHE}', and HF_HUB_OFFLINE is set. Unset it to fetch it, or point HF_HOME at a cache "
            f"that has it. {local}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubNotFoundError(f"{what} has no file {name}. {hint}".rstrip()) from error
    except Exception as error:
        raise _unreachable(wanted, login, local, error) from error


def _unreachable(wanted: str, login: str, local: str, error: BaseException) -> HubError:
    while error.__cause__ is not None:  # the original error
        error = error.__cause__
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
    remedy = f"If access is restricted, {login}" if refused else f"Check the connection, HF_ENDPOINT if you set it, and the free disk space. {local}"
    return HubError(f"{wanted} is not in the cache and cannot be fetched from the hub: {reason.rstrip('.')}. {remedy}")
