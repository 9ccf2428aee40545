"""Files of repositories on the Hugging Face hub, through huggingface_hub (the extra ``hub``) and its cache: HF_HOME and HF_HUB_OFFLINE hold.

What is a repository, and what is a path, is decided here for bundles and checkpoints alike.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scm_runtime.errors import HubError, HubNotFoundError, InvalidArgumentError, MissingDependencyError

# As the hub has it: one slash, no ".." or "--", dots and dashes not at the ends.
REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
ENDINGS = {".scm", ".pt", ".pth", ".pt2", ".pkl", ".ckpt", ".safetensors", ".onnx"}


def repository(given: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """The repository ``org/name`` that a caller means, or None for a path.

    A path is what exists, whatever is no string, has not the form ``org/name``, lies in a folder that exists, or ends as files of ours do: a
    mistyped path must not reach for the network. A revision says that a repository is meant, if nothing of that name exists here.

    Raises:
        InvalidArgumentError: a revision of what is no repository.
    """
    wrong = None
    if not isinstance(given, str) or not REPOSITORY.fullmatch(given):
        wrong = f"got {os.fspath(given)!r}"
    elif os.path.lexists(given):
        wrong = f"{given!r} exists here, and what exists here comes first"
    if revision is not None and (wrong or not revision):
        raise InvalidArgumentError(f"revision {revision!r} is for a repository of the hub, 'org/name': {wrong or 'it is empty'}. Leave the revision out.")
    return None if wrong or (revision is None and _local_path_reason(str(given))) else str(given)


def local_path_hint(given: str | os.PathLike[str]) -> str:
    """A sentence for the error about a path that is not there, where it could have been a repository; else nothing."""
    if isinstance(given, str) and REPOSITORY.fullmatch(given) and not os.path.lexists(given) and (reason := _local_path_reason(given)):
        return f" The hub was not asked, as {reason}; with a revision it is, for instance 'main'."
    return ""


def _local_path_reason(given: str) -> str | None:
    path = Path(given)
    if path.parent.is_dir():
        return f"there is a folder '{path.parent}' here"
    return f"the name ends in {path.suffix}" if path.suffix.lower() in ENDINGS else None


def fetch(repo: str, name: str, revision: str | None = None, *, hint: str = "") -> Path:
    """One file of a repository, in the cache. Asks the hub unless HF_HUB_OFFLINE is set, or the revision is a commit whose file is cached.

    Args:
        repo: ``org/name``.
        name: of the file, in the repository.
        revision: branch, tag or commit; None for the main branch.
        hint: what to do if the repository has no such file.

    Returns:
        Its path in the cache's folder for the commit, ``…/snapshots/<commit>/<name>``.

    Raises:
        HubNotFoundError: no such repository, revision or file; or offline, and it is not cached.
        HubError: the hub refuses or cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _load(repo)
    with _translated_errors(hub, repo, revision, name, hint):
        return Path(hub.hf_hub_download(repo, name, revision=revision))


def snapshot(repo: str, revision: str | None = None, patterns: Sequence[str] | None = None) -> Path:
    """The folder of one commit of a repository, with at least the files that match.

    Args:
        repo: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        patterns: of file names, as ``unet/*.json``; None for all files.

    Returns:
        The cache's folder for the commit.

    Raises:
        HubNotFoundError: no such repository or revision; or offline, and it is not cached.
        HubError: the hub refuses or cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = _load(repo)
    with _translated_errors(hub, repo, revision):
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=None if patterns is None else list(patterns)))


def blob(path: Path) -> Path | None:
    """The file that a link in the cache stands for; None for what is no file of the cache, or no link.

    The cache links each file of ``models--org--name/snapshots/<commit>`` to one in ``models--org--name/blobs``, or, from huggingface_hub 2 on,
    from there to one in the ``blobs`` of the whole cache. Only huggingface_hub makes links there: links in a repository are not followed when it
    is downloaded. A link to anywhere else is none of its, and is not followed here.
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
            f"there is no folder '{repo}' here, and to read a repository of the Hugging Face hub takes huggingface_hub ({error}). Install it:\n"
            "  pip install 'scm-runtime[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def _translated_errors(hub: Any, repo: str, revision: str | None, name: str | None = None, hint: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into this project's errors."""
    what = f"the repository '{repo}'" + (f" at revision {revision!r}" if revision else "")
    wanted = f"{name} of {what}" if name else what
    local = f"If a folder was meant: there is no '{repo}' here."
    login = "ask for access on its page, and log in: hf auth login (or set HF_TOKEN)"
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError as error:  # before RepositoryNotFoundError, which it is too
        raise HubError(f"{what} is gated: {login}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubNotFoundError(
            f"there is no repository '{repo}' on the hub that you may read, and no folder '{repo}' here. Mind the spelling; if the repository is private, "
            "log in: hf auth login (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubNotFoundError(f"the repository '{repo}' has no revision {revision or 'main'!r}. Give one of its branches, tags or commits.") from error
    except errors.LocalEntryNotFoundError as error:  # before EntryNotFoundError, which it is too
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
    while error.__cause__ is not None:  # what happened first
        error = error.__cause__
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
    remedy = f"If it is not for all, {login}" if refused else f"Check the connection, HF_ENDPOINT if you set it, and the room on the disk. {local}"
    return HubError(f"{wanted} is not in the cache and cannot be fetched from the hub: {reason.rstrip('.')}. {remedy}")
