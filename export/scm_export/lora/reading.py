"""Reads LoRA files: ``FILE`` or ``FILE:SCALE`` to the pairs of matrices of each layer. No code from a file is run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from scm_export.checkpoints.from_hub import fetch
from scm_export.checkpoints.reading import reading
from scm_export.checkpoints.safetensors_file import open_safetensors
from scm_export.checkpoints.scm_checkpoint import is_safetensors
from scm_export.checkpoints.tensor_dict import check_tensor_dict, is_finite
from scm_export.checkpoints.torch_file import read_torch_file
from scm_export.errors import CheckpointError, CheckpointNotFoundError
from scm_export.lora.adapter_config import ADAPTER_CONFIG, AdapterScale, read_adapter_scales
from scm_export.lora.keys import PEFT_MODEL, Component, parse_key
from scm_runtime.bundle.checksums import sha256
from scm_runtime.bundle.manifest import LoraSource
from scm_runtime.common.files import open_regular
from scm_runtime.common.message_text import first_line, printable
from scm_runtime.errors import InvalidArgumentError

MAX_RANK = 8192
MAX_SCALE = 1000.0
FACTORS = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}
REMEDY = "Copy or save the LoRA again."


class LoraFile(NamedTuple):
    """A LoRA as a user names it."""

    file: str
    """Path, or repository of the hub."""
    scale: float


class LowRank(NamedTuple):
    """The change of one layer's weight: ``factor * up @ down``, with the kernel of a convolution in ``down``."""

    key: str
    """Name of one of the tensors, for messages."""
    down: Tensor
    """``[rank, in]`` or ``[rank, in, kh, kw]``."""
    up: Tensor
    """``[out, rank]`` or ``[out, rank, 1, 1]``."""
    factor: float
    """alpha / rank."""


@dataclass
class Lora:
    """An open file."""

    source: LoraSource
    """For the manifest."""
    layers: dict[Component, dict[str, LowRank]]
    """By component and name of the layer in the file."""
    notes: tuple[str, ...] = ()
    """What the user should know about assumptions."""
    merged: set[Component] = field(default_factory=set)
    """The components whose layers have been merged into a network."""

    def describe(self) -> str:
        """Short description for messages."""
        return f"the LoRA '{printable(self.source.file)}'"


def parse_lora(given: str | os.PathLike[str]) -> LoraFile:
    """Split ``FILE:SCALE``; the scale is 1 without one. An existing path is not split.

    Raises:
        InvalidArgumentError: the scale is not a number.
    """
    if not isinstance(given, str | os.PathLike):
        raise InvalidArgumentError(f"lora must be files, 'FILE' or 'FILE:SCALE', got {type(given).__name__}")
    text = os.fspath(given)
    file, colon, number = text.rpartition(":")
    if not colon or os.path.lexists(text):
        return LoraFile(text, 1.0)
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not file or not abs(scale) <= MAX_SCALE:
        raise InvalidArgumentError(f"lora must be FILE or FILE:SCALE, with a scale from -{MAX_SCALE:g} to {MAX_SCALE:g} such as 0.8, got {text!r}")
    return LoraFile(file, scale)


def open_lora(given: str | os.PathLike[str], progress: Callable[[str], None] = lambda stage: None) -> Lora:
    """Read the LoRA of ``FILE`` or ``FILE:SCALE``, a ``.safetensors`` file or one that ``torch.save`` wrote.

    Raises:
        InvalidArgumentError: the scale is not a number.
        CheckpointNotFoundError: there is no such file.
        CheckpointError: the file is damaged, has tensors that are not a LoRA's, or NaN or infinity in one.
        HubError: a repository of the hub cannot be read.
    """
    wanted = parse_lora(given)
    found = fetch(wanted.file, None, progress)
    path = found.path
    _check_file(path, wanted.file)
    tensors, metadata = _read(path)
    if not tensors:
        raise CheckpointError(f"the LoRA '{path}' has no tensors. {REMEDY}")
    scales = read_adapter_scales(path, metadata)
    layers: dict[Component, dict[str, LowRank]] = {}
    for (component, name), (key, roles) in _group(tensors, path).items():
        layers.setdefault(component, {})[name] = _low_rank(key, name, roles, scales.get(component), path)
    source = LoraSource(file=found.name, sha256=sha256(path), scale=wanted.scale)
    return Lora(source, layers, _notes(found.name, tensors, bool(scales)))


def _check_file(path: Path, given: str) -> None:
    try:
        with open_regular(path):
            pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(f"no LoRA at '{given}': the file does not exist. Expected a file, or a repository of the hub.") from error
    except (OSError, ValueError) as error:
        wrong = (
            "it is a folder. Give the file in it."
            if isinstance(error, IsADirectoryError)
            else f"{getattr(error, 'strerror', None) or first_line(error)}. {REMEDY}"
        )
        raise CheckpointError(f"the LoRA '{given}' cannot be read: {wrong}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and, of a safetensors file, the metadata."""
    with reading(path, REMEDY):
        with open_regular(path) as file:
            start = file.read(16)
        if is_safetensors(path, start):
            with open_safetensors(path) as opened:
                return dict(opened.tensors()), opened.metadata()
        return check_tensor_dict(read_torch_file(path), path, REMEDY), {}


def _group(tensors: dict[str, Tensor], path: Path) -> dict[tuple[Component, str], tuple[str, dict[str, Tensor]]]:
    """Collect the tensors of each layer: by component and name, the first key and the tensors by role."""
    layers: dict[tuple[Component, str], tuple[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        try:
            component, name, role = parse_key(key)
        except ValueError as error:
            raise CheckpointError(f"the key '{printable(key)}' of the LoRA '{path}' {error}.") from error
        _, roles = layers.setdefault((component, name), (key, {}))
        if role in roles:
            raise CheckpointError(f"the LoRA '{path}' has two tensors for one factor of a layer; the second is '{printable(key)}'. {REMEDY}")
        if tensor.is_complex():
            raise CheckpointError(f"the LoRA '{path}' must have real numbers, got {tensor.dtype} in '{printable(key)}'. {REMEDY}")
        if not is_finite(tensor.float() if tensor.dtype.itemsize == 1 else tensor):  # torch cannot examine float8
            raise CheckpointError(f"the LoRA '{path}' must be finite, got NaN or infinity in '{printable(key)}'. {REMEDY}")
        roles[role] = tensor
    return layers


def _low_rank(key: str, name: str, roles: dict[str, Tensor], scale: AdapterScale | None, path: Path) -> LowRank:
    """Return the change of one layer from its tensors. Raises CheckpointError if they do not belong together."""
    what = f"the layer of '{printable(key)}' in the LoRA '{path}'"
    if missing := [role for role in ("down", "up") if role not in roles]:
        raise CheckpointError(f"{what} must have two factors, missing {' and '.join(FACTORS[role] for role in missing)}. {REMEDY}")
    rank = _check_factors(roles["down"], roles["up"], what)
    factor = 1.0 if scale is None else scale.factor(name, rank)
    if (alpha := roles.get("alpha")) is not None:
        if alpha.numel() != 1:
            raise CheckpointError(f"{what} must have one number as alpha, got {list(alpha.shape)}. {REMEDY}")
        factor = float(alpha) / rank
    return LowRank(key, roles["down"], roles["up"], factor)


def _check_factors(down: Tensor, up: Tensor, what: str) -> int:
    """Return the rank of a layer. Raises CheckpointError if its factors do not have one."""
    for tensor in (down, up):
        if not tensor.is_floating_point():
            raise CheckpointError(f"{what} must be of a floating dtype, got {tensor.dtype}. {REMEDY}")
        if tensor.ndim not in (2, 4):
            raise CheckpointError(f"{what} must have matrices or kernels of a Conv2d, got {list(tensor.shape)}: other layers are not supported.")
    rank = down.shape[0]
    if rank != up.shape[1]:
        raise CheckpointError(f"{what} must have one rank, got {rank} in {list(down.shape)} and {up.shape[1]} in {list(up.shape)}. {REMEDY}")
    if not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{what} must have a rank from 1 to {MAX_RANK}, got {rank}. {REMEDY}")
    if up.ndim == 4 and up.shape[2:] != (1, 1):
        raise CheckpointError(f"{what} must have a second convolution of 1x1, got {list(up.shape)}: other kernels are not supported.")
    return rank


def _notes(name: str, tensors: dict[str, Tensor], has_config: bool) -> tuple[str, ...]:
    if has_config or not any(key.startswith(PEFT_MODEL) for key in tensors) or any(key.endswith(".alpha") for key in tensors):
        return ()
    return (f"PEFT's {ADAPTER_CONFIG} is not beside '{printable(name)}': its alpha is taken to be its rank. If it is not, give alpha / rank as the scale",)
