"""Reads what ``torch.save`` wrote, without running code from it, or, when the user trusts the file, as torch itself would."""

from __future__ import annotations

import pickle
import pickletools
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scm_export.checkpoints.archive import check_contents, check_storages
from scm_export.checkpoints.ignored_objects import ignoring_objects, without_attributes
from scm_export.errors import CheckpointError

TRUST = "Only if you trust whoever made it: --trust loads it all the same, running its code."


def read_torch_file(source: Path, *, trust: bool = False) -> object:
    """The object in a ``.pt`` file: plain containers, plain values and tensors; with ``trust``, anything.

    What training scripts save beside them (``argparse.Namespace``, NumPy's values, paths) is there as objects that hold nothing.

    Raises:
        CheckpointError: damaged, or without ``trust`` more than tensors and plain values.
    """
    if is_zip(source):
        check_contents(source)
        check_storages(source)
    try:
        with warnings.catch_warnings(), ignoring_objects():
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip(source))
    except pickle.UnpicklingError as error:
        if not (name := _callable_in(source, error)):
            raise CheckpointError(f"'{source}' is not a readable .pt file: damaged or of another format. Copy or save it again.") from error
        if trust:
            return _read_trusted(source, name)
        raise CheckpointError(
            f"'{source}' is a pickle that wants to run code ({name}), and was not loaded: it must hold tensors and plain values only. {TRUST}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"'{source}' is not a readable .pt file: truncated or of another format ({first_line(error)}). Copy or save it again.") from error
    try:
        return without_attributes(content)
    except ValueError as error:
        raise CheckpointError(f"'{source}': {error}. Save it as a plain tensor.") from error


def _read_trusted(source: Path, name: str) -> object:
    try:
        with current_folder_importable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of code that has changed since
            return torch.load(source, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(
            f"'{source}' cannot be loaded even with --trust: {type(error).__name__}: {first_line(error)}. "
            f"It needs {name}: run scm-export where that can be imported, for instance in the folder of the code that made the file."
        ) from error


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Within the block modules are also looked for in the current folder, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def is_zip(source: Path) -> bool:
    """Whether a file begins as a zip archive."""
    with source.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _callable_in(source: Path, error: pickle.UnpicklingError) -> str | None:
    """What a refused pickle would have called, if it is a pickle: torch names it, except in newer protocols, which are searched without running them."""
    if named := re.search(r"unsupported (?:global: )?(?:GLOBAL|class) (\S+)", str(error), re.IGNORECASE):
        return named[1]
    try:
        with source.open("rb") as file:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE"):
                    return str(argument or "a function of its own choice")
    except Exception:  # noqa: BLE001 - not a pickle, then
        return None
    return None
