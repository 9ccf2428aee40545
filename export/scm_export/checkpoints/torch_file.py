"""Reads files that ``torch.save`` wrote: without running code from them, or as torch itself does if the user trusts the file."""

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

from scm_export.checkpoints.archive import check_contents
from scm_export.checkpoints.ignored_objects import ignoring_objects, without_attributes
from scm_export.checkpoints.inert_pickle import Bounded, MalformedPickleError, OversizedPickleError
from scm_export.checkpoints.torch_pickle import UnboundedCallError, check_legacy_pickles, check_zip_pickle
from scm_export.errors import CheckpointError
from scm_runtime.common.files import open_regular
from scm_runtime.common.memory import MORE_MEMORY, is_out_of_memory, out_of_memory_error
from scm_runtime.common.message_text import first_line, printable

TRUST_HINT = "If you trust its author: --trust loads it anyway and runs its code."


def read_torch_file(source: Path, *, trust: bool = False) -> object:
    """Read the object in a ``.pt`` file: plain containers, plain values and tensors; with ``trust``, any object.

    Other objects that training scripts save (``argparse.Namespace``, NumPy values, paths) are replaced by empty placeholders.

    Raises:
        CheckpointError: the file is damaged or, without ``trust``, holds more than tensors and plain values.
        OutOfMemoryError: its tensors do not fit into memory.
    """
    if is_zip(source):
        check_contents(source)
    if not trust:
        _check_pickles(source)
    try:
        with warnings.catch_warnings(), ignoring_objects():
            warnings.simplefilter("ignore")  # torch warns about pickles that it then refuses
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip(source))
    except pickle.UnpicklingError as error:
        if not (name := _callable_in(source, error)):
            raise CheckpointError(f"'{source}' is not a readable .pt file: damaged or of another format. Copy or save it again.") from error
        if trust:
            return _read_trusted(source, name)
        raise _wants_to_run(source, name) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(f"the checkpoint '{source}'", error, MORE_MEMORY) from error
        raise CheckpointError(f"'{source}' is not a readable .pt file: truncated or of another format ({first_line(error)}). Copy or save it again.") from error
    try:
        return without_attributes(content)
    except ValueError as error:
        raise CheckpointError(f"'{source}': {error}. Save it as a plain tensor.") from error


def _check_pickles(source: Path) -> None:
    try:
        (check_zip_pickle if is_zip(source) else check_legacy_pickles)(source)
    except (OversizedPickleError, UnboundedCallError) as error:
        raise CheckpointError(f"'{source}' does not hold only tensors and plain values: {error}. Save it again.") from error
    except MalformedPickleError as error:
        if name := _callable_in(source, pickle.UnpicklingError()):  # a pickle, but not one that torch.save wrote
            raise _wants_to_run(source, name) from error
        raise CheckpointError(f"'{source}' is not a readable {source.suffix or '.pt'} file: {error}. Copy or save it again.") from error


def _wants_to_run(source: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"'{source}' is a pickle that wants to run code ({name}), and was not loaded: it must hold tensors and plain values only. {TRUST_HINT}"
    )


def _read_trusted(source: Path, name: str) -> object:
    try:
        with current_folder_importable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if the code has changed since the file was saved
            return torch.load(source, map_location="cpu", weights_only=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(f"the checkpoint '{source}'", error, MORE_MEMORY) from error
        raise CheckpointError(
            f"'{source}' cannot be loaded even with --trust: {type(error).__name__}: {first_line(error)}. "
            f"It needs {name}: run scm-export where that can be imported, for instance in the folder of the code that made the file."
        ) from error


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Within the block, also import modules from the current folder, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def is_zip(source: Path) -> bool:
    """Return True if a file starts with the signature of a zip archive."""
    with open_regular(source) as file:
        return file.read(4) == b"PK\x03\x04"


def _callable_in(source: Path, error: pickle.UnpicklingError) -> str | None:
    """Name of the function that a refused pickle would have called; None if the file is not a pickle.

    torch names it in its error, except for newer pickle protocols. Their opcodes are searched without running them.
    """
    if named := re.search(r"unsupported (?:global: )?(?:GLOBAL|class) (\S+)", str(error), re.IGNORECASE):
        return printable(named[1])
    try:
        with open_regular(source) as file:
            for operation, argument, _ in pickletools.genops(Bounded(file, source.stat().st_size)):  # type: ignore[arg-type]  # it has the methods that genops uses
                if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE"):
                    return printable(str(argument).replace(" ", ".", 1) if argument else "a function of its own choice")
    except Exception:  # noqa: BLE001 - any failure to parse means that the file is not a pickle
        return None
    return None
