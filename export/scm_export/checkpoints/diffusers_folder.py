"""A diffusers folder: a pipeline (``model_index.json`` and one folder per component) or one model (``config.json`` and weights).

Configurations are JSON. Weights are safetensors or, in older folders, ``.bin`` files read with ``weights_only``. No code from either is run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from scm_export.checkpoints.reading import reading
from scm_export.checkpoints.safetensors_file import open_safetensors
from scm_export.checkpoints.tensor_dict import check_tensor_dict
from scm_export.checkpoints.torch_file import read_torch_file
from scm_export.errors import CheckpointError
from scm_runtime.bundle.checksums import sha256
from scm_runtime.common.documents import check_depth
from scm_runtime.common.files import read_limited
from scm_runtime.common.message_text import first_line, printable

PIPELINE, MODEL, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS_NAMES = (
    *("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"),
    *("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"),  # transformers'
)
CARD = "README.md"
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
LICENCE = re.compile(r"^(license|license_name):[ \t]*[\"']?([\w.+-]{1,100})[\"']?[ \t]*\r?$", re.MULTILINE | re.ASCII)
COMPONENT = re.compile(r"\w[\w-]{0,99}", re.ASCII)
SHARD = re.compile(r"\w[\w.-]{0,199}\.(safetensors|bin)", re.ASCII)
MAX_JSON_BYTES = 4 << 20  # an index of 40 000 tensors
MAX_SIZE = 1_000_000  # of any integer in a configuration: the largest published are vocabularies
DOWNLOAD = "Download the folder again."


def is_diffusers_folder(path: Path) -> bool:
    """Return True if a path is the folder of a pipeline or of one model."""
    try:
        return any((path / name).is_file() for name in (PIPELINE, MODEL))
    except OSError:  # a name too long
        return False


class DiffusersFolder:
    """The components of a folder, read on demand. The folder of a single model has one component, named ``""``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: set[Path] = set()

    def fingerprint(self) -> str:
        """SHA-256 over the names and checksums of all files read so far."""
        lines = (f"{file.relative_to(self.path).as_posix()} {sha256(file)}\n" for file in sorted(self._read))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def describe(self) -> str:
        """Short description for error messages."""
        return f"the diffusers folder '{self.path}' ({', '.join(name for name in map(printable, (self.pipeline, *self.classes.values())) if name)})"

    @cached_property
    def index(self) -> dict[str, Any]:
        """Contents of ``model_index.json``; empty for the folder of a single model."""
        return self._json(self.path / PIPELINE) if (self.path / PIPELINE).is_file() else {}

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline, or "" if there is none."""
        return _text(self.index.get("_class_name"))

    @cached_property
    def classes(self) -> dict[str, str]:
        """Class names of the components that exist in the folder, by component name."""
        if not self.index:
            return {"": _text(self._json(self.path / MODEL).get("_class_name"))}
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2 and COMPONENT.fullmatch(name)}
        return {name: _text(value[1]) for name, value in pairs.items() if value[1] is not None and (self.path / name).is_dir()}

    def find(self, *classes: str) -> str | None:
        """Name of the first component of one of these classes, or None if there is none."""
        return next((name for name, found in self.classes.items() if found in classes), None)

    def config(self, component: str) -> dict[str, Any]:
        """Read the configuration of a component.

        Raises:
            CheckpointError: the file cannot be read, has an integer above ``MAX_SIZE``, or is a model's and has a number that is not finite.
        """
        folder = self.path / component
        path = folder / (SCHEDULER if (folder / SCHEDULER).is_file() else MODEL)
        config = self._json(path)
        for name, value in config.items():
            if (size := _largest(value)) > MAX_SIZE:
                raise CheckpointError(f"'{path}': {printable(name)} must be at most {MAX_SIZE}, got {size}. {DOWNLOAD}")
            if path.name == MODEL and not _is_finite(value):
                raise CheckpointError(f"'{path}': {printable(name)} must be finite. {DOWNLOAD}")
        return config

    def files(self, component: str, names: Sequence[str]) -> list[Path]:
        """Return those files of a component that exist among ``names``. They count as read."""
        found = [path for path in (self.path / component / name for name in names) if path.is_file()]
        self._read.update(found)
        return found

    @cached_property
    def licence(self) -> str | None:
        """The licence that the model card, ``README.md``, names in its front matter; None without one."""
        path = self.path / CARD
        try:
            matter = FRONT_MATTER.match(read_limited(path, MAX_JSON_BYTES).decode("utf-8-sig"))
        except (OSError, ValueError):
            return None
        named = dict(LICENCE.findall(matter[1])) if matter else {}
        return named.get("license_name") or named.get("license")

    def weights(self, component: str) -> dict[str, Tensor]:
        """Read the tensors of a model by name, in their stored dtype.

        Raises:
            CheckpointError: there is no file of weights, or one is damaged or would run code.
        """
        files = self._files(component)
        self._read.update(files)
        return {name: tensor for file in files for name, tensor in _tensors(file).items()}

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            value = _decode(read_limited(path, MAX_JSON_BYTES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}' cannot be read: {first_line(error)}. Expected a folder as diffusers saves it.") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"'{path}' must hold a JSON object, got {type(value).__name__}. Expected a folder as diffusers saves it.")
        self._read.add(path)
        return value

    def _files(self, component: str) -> list[Path]:
        folder = self.path / component
        for name in WEIGHTS_NAMES:
            if (folder / name).is_file():
                return [folder / name]
            index = folder / f"{name}.index.json"
            if index.is_file():
                return [folder / shard for shard in _shards(index, self._json(index).get("weight_map"))]
        raise CheckpointError(f"'{folder}' has no weights: expected one of {', '.join(WEIGHTS_NAMES)}, or an index of shards. {DOWNLOAD}")


def _decode(data: bytes) -> Any:
    """Decode JSON as Python writes it: schedulers have settings such as ``-Infinity``. Raises ValueError."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    check_depth(value)
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _largest(value: object) -> int:
    """Return the largest integer in a value, which may be a list; 0 if it has none."""
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, int) else 0


def _is_finite(value: object) -> bool:
    """Return False if a value, which may be a list, has a number that is NaN or infinite."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _shards(index: Path, weight_map: object) -> list[str]:
    """Return the names of the files of weights in an index. Raises CheckpointError if they are not names of files in the same folder."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{index}' must have a weight_map with the file of each tensor. {DOWNLOAD}")
    if wrong := [shard for shard in weight_map.values() if not isinstance(shard, str) or not SHARD.fullmatch(shard)]:
        raise CheckpointError(f"'{index}' must name files beside it, .safetensors or .bin, got {printable(wrong[0])}. {DOWNLOAD}")
    return sorted(set(weight_map.values()))


def _tensors(file: Path) -> dict[str, Tensor]:
    with reading(file, DOWNLOAD):
        if file.suffix == ".safetensors":
            with open_safetensors(file) as opened:
                return dict(opened.tensors())
        return check_tensor_dict(read_torch_file(file), file, DOWNLOAD)
