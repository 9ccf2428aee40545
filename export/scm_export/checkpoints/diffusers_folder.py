"""A diffusers folder: a pipeline (``model_index.json`` and one folder per component) or one model (``config.json`` and weights).

Configurations are JSON. Weights are safetensors or, in older folders, ``.bin`` files read with ``weights_only``. No code from either is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from scm_export.checkpoints.torch_file import read_torch_file
from scm_export.errors import CheckpointError
from scm_runtime.bundle.checksums import sha256
from scm_runtime.common.message_text import first_line

PIPELINE, MODEL, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")


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
        return f"the diffusers folder '{self.path}' ({', '.join(name for name in (self.pipeline, *self.classes.values()) if name)})"

    @cached_property
    def index(self) -> dict[str, Any]:
        """Contents of ``model_index.json``; empty for the folder of a single model."""
        return self._json(self.path / PIPELINE) if (self.path / PIPELINE).is_file() else {}

    @property
    def pipeline(self) -> str:
        """Class name of the pipeline, or "" if there is none."""
        return str(self.index.get("_class_name", ""))

    @cached_property
    def classes(self) -> dict[str, str]:
        """Class names of the components that exist in the folder, by component name."""
        if not self.index:
            return {"": str(self._json(self.path / MODEL).get("_class_name", ""))}
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}
        return {name: str(value[1]) for name, value in pairs.items() if value[1] is not None and (self.path / name).is_dir()}

    def find(self, *classes: str) -> str | None:
        """Name of the first component of one of these classes, or None if there is none."""
        return next((name for name, found in self.classes.items() if found in classes), None)

    def config(self, component: str) -> dict[str, Any]:
        """Read the configuration of a component.

        Raises:
            CheckpointError: the file cannot be read.
        """
        folder = self.path / component
        return self._json(folder / (SCHEDULER if (folder / SCHEDULER).is_file() else MODEL))

    def weights(self, component: str) -> dict[str, Tensor]:
        """Read the tensors of a model by name, in their stored dtype.

        Raises:
            CheckpointError: there is no file of weights, or one is damaged or would run code.
        """
        files = self._files(component)
        self._read.update(files)
        return {name: tensor for file in files for name, tensor in _tensors(file)}

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}' cannot be read: {error}. Expected a folder as diffusers saves it.") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"'{path}' must hold a JSON object, got {type(value).__name__}")
        self._read.add(path)
        return value

    def _files(self, component: str) -> list[Path]:
        folder = self.path / component
        for name in WEIGHTS_NAMES:
            if (folder / name).is_file():
                return [folder / name]
            index = folder / f"{name}.index.json"
            if index.is_file():
                shards = sorted(set(self._json(index).get("weight_map", {}).values()))
                if any(Path(shard).name != shard for shard in shards):
                    raise CheckpointError(f"'{index}' must name files beside it, got {', '.join(shards[:3])}")
                return [folder / shard for shard in shards]
        raise CheckpointError(f"'{folder}' has no weights: expected one of {', '.join(WEIGHTS_NAMES)}, or an index of shards. Download the folder again.")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield name, opened.get_tensor(name)
        else:
            raw = read_torch_file(file)
            if not isinstance(raw, dict):
                raise CheckpointError(f"'{file}' must hold a dict of tensors by name, got a {type(raw).__name__}. Download it again.")
            for name, tensor in raw.items():
                if not isinstance(name, str) or not isinstance(tensor, Tensor):
                    raise CheckpointError(f"'{file}' must hold tensors by name, got a {type(tensor).__name__} for {str(name)[:200]!r}. Download it again.")
                yield name, tensor
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"'{file}' is not a readable file of weights: {first_line(error)}. Download it again.") from error
