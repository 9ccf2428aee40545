"""This project's own checkpoint: one file with everything a sampler needs. Documented in docs/checkpoint-format.md.

``.pt`` is a ``torch.save`` of plain containers and tensors, read with ``weights_only``; ``.safetensors`` holds the same, the header as JSON
in its metadata under the key "scm".
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import re
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scm_runtime.errors import CheckpointError, CheckpointNotFoundError, OutputError
from scm_runtime.files import whole_file

FORMAT, VERSION = "scm-checkpoint", 1

T_LIMIT = math.pi / 2 + 1e-4  # some samplers round pi/2 up
Positive = Annotated[float, Meta(gt=0)]


class SamplerSpec(Struct, kw_only=True, forbid_unknown_fields=True):
    """How the network was trained to be sampled."""

    parametrisation: Literal["trigflow", "trigflow-negated", "edm", "flow", "x0"] = "trigflow"
    solver: Literal["consistency", "ddim"] = "consistency"
    """How a step moves: to the data and back into fresh noise, or along the ODE without noise (diffusion teachers, segments)."""
    sigma_data: Positive = 0.5
    initial_scale: Positive | None = None
    """The state starts as this times standard normal noise; None = sigma_data."""
    times: dict[str, tuple[float, ...]] | None = None
    """Times by step count, each with its end; None = the paper's for one and two steps."""
    pixel_scale: float = 127.5
    """Pixel level = x * pixel_scale + pixel_offset, x in the model's own scale; the defaults are for data in [-1, 1]."""
    pixel_offset: float = 127.5
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    """Of the autoencoder's latents, by channel, before they were scaled to sigma_data: z = x * latent_std / sigma_data + latent_mean."""

    def validate(self) -> None:
        """Check what the types alone cannot say. Raises ValueError."""
        for name in ("sigma_data", "initial_scale", "pixel_scale", "pixel_offset"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or (name == "pixel_scale" and value == 0)):
                raise ValueError(f"sampler.{name} must be finite{' and not 0' * (name == 'pixel_scale')}, got {value}")
        for count, times in (self.times or {}).items():
            steps = int(count) if count.isdecimal() else 0
            if steps < 1 or len(times) != steps + 1:
                raise ValueError(f"sampler.times must give a step count of at least 1 one time more than steps, got {count!r} with {len(times)}")
            if not all(0 <= t <= T_LIMIT for t in times) or any(a <= b for a, b in pairwise(times)):
                raise ValueError(f"sampler.times must be TrigFlow's, decreasing and in [0, {T_LIMIT:.4f}], got {list(times)} for {count} steps")
        if len({times[-1] for times in (self.times or {}).values()}) > 1:
            raise ValueError("sampler.times must have the same end for every step count")
        if self.times == {}:
            raise ValueError("sampler.times must hold at least one step count, got none; leave it out for the paper's times")


class Checkpoint(Struct, kw_only=True, forbid_unknown_fields=True):
    """A checkpoint's contents. ``weights`` are the ones to sample with: the moving average, where training kept one."""

    format: str = FORMAT
    version: int = VERSION
    family: str
    config: dict[str, Any]
    sampler: SamplerSpec
    label_names: tuple[str, ...] | None = None
    licence: str | None = None
    weights: dict[str, Any]

    def describe(self) -> str:
        """A few words for messages."""
        return f"the checkpoint of the family {self.family!r}"


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint whole or not at all; the ending, ``.pt`` or ``.safetensors``, chooses the format.

    Raises:
        CheckpointError: another ending.
        OutputError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in (".pt", ".safetensors"):
        raise CheckpointError(f"'{target}' must end in .pt or .safetensors")
    header = {name: msgspec.to_builtins(getattr(checkpoint, name)) for name in checkpoint.__struct_fields__ if name != "weights"}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
    try:
        with whole_file(target) as part:
            if target.suffix == ".pt":
                torch.save({**header, "weights": weights}, part)
            else:
                save_file(weights, part, {"scm": msgspec.json.encode(header).decode()})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OutputError(f"cannot write '{target}': {error}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint. No code from the file is run.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: no such format, damaged, or more than tensors and plain values in it.
    """
    source = Path(path)
    try:
        with source.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        wrong = {FileNotFoundError: "the file does not exist", IsADirectoryError: "it is a folder"}.get(type(error), error.strerror or str(error))
        missing = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        raise (CheckpointNotFoundError if missing else CheckpointError)(
            f"no checkpoint at '{source}': {wrong}. Expected a .pt or .safetensors file."
        ) from error
    if not start:
        raise CheckpointError(f"'{source}' is empty. Copy or save the checkpoint again.")
    raw = _read_safetensors(source) if source.suffix == ".safetensors" or start[8:9] == b"{" else _read_pt(source)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CheckpointError(
            f"'{source}' is not a scm-checkpoint: it must hold a dict with format = {FORMAT!r}, family, config, sampler and weights. "
            "Write one with scm_export.checkpoints.save_checkpoint (docs/checkpoint-format.md)."
        )
    if raw.get("version") != VERSION:
        raise CheckpointError(
            f"'{source}' has checkpoint version {raw.get('version')!r}, this scm-export reads version {VERSION}. Upgrade: pip install -U scm-runtime"
        )
    try:
        checkpoint = msgspec.convert(raw, Checkpoint)
        checkpoint.sampler.validate()
    except ValueError as error:
        raise CheckpointError(f"'{source}' does not hold what a scm-checkpoint must: {error} (docs/checkpoint-format.md)") from error
    strange = [name for name, tensor in checkpoint.weights.items() if not isinstance(tensor, Tensor)]
    if strange:
        raise CheckpointError(f"'{source}': weights must be tensors, got {type(checkpoint.weights[strange[0]]).__name__} for {strange[0]!r}")
    return checkpoint


def _read_pt(source: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it then refuses
            return torch.load(source, map_location="cpu", weights_only=True, mmap=_is_zip(source))
    except pickle.UnpicklingError as error:
        if name := _callable_in(source, error):
            raise CheckpointError(
                f"'{source}' is a pickle that wants to run code ({name}), and was not loaded: it must hold tensors and plain values only."
            ) from error
        raise CheckpointError(f"'{source}' is not a readable .pt file: damaged or of another format. Copy or save it again.") from error
    except Exception as error:
        raise CheckpointError(
            f"'{source}' is not a readable .pt file: truncated or of another format ({_first_line(error)}). Copy or save it again."
        ) from error


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


def _is_zip(source: Path) -> bool:
    with source.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_safetensors(source: Path) -> Mapping[str, object]:
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            header = msgspec.json.decode(metadata["scm"]) if "scm" in metadata else {}
            return {**header, "weights": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError, msgspec.DecodeError, TypeError) as error:
        raise CheckpointError(f"'{source}' is not a readable .safetensors file: {_first_line(error)}. Copy or save it again.") from error
