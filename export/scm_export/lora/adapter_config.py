"""The scale of PEFT's adapters, whose configuration is not among the tensors: in ``adapter_config.json`` or in the metadata of diffusers' files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from scm_export.errors import CheckpointError
from scm_export.lora.keys import COMPONENTS, Component, split_component
from scm_runtime.common.documents import decode_json, read_json
from scm_runtime.common.message_text import first_line, printable

ADAPTER_CONFIG = "adapter_config.json"  # beside PEFT's adapter_model.safetensors
METADATA = "lora_adapter_metadata"  # key in the metadata of safetensors files that diffusers writes

_LITERAL = re.compile(r"\^?[\w.-]{1,500}\$?")


class AdapterScale(NamedTuple):
    """What PEFT's LoraConfig says about the scale of the layers of one component."""

    alpha: float
    patterns: dict[str, float]
    """Other values of alpha, by the end of a layer's name."""
    rank_stabilized: bool

    def factor(self, layer: str, rank: int) -> float:
        """Factor of the product of a layer's two matrices: alpha / rank, or alpha / sqrt(rank) if it is rank-stabilized (arXiv 2312.03732)."""
        alpha = next((value for end, value in self.patterns.items() if layer == end or layer.endswith(f".{end}")), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_adapter_scales(file: Path, metadata: dict[str, str]) -> dict[Component, AdapterScale]:
    """Read the configurations of a LoRA file: from the file's metadata, or from the file beside it. Empty if there are none.

    Raises:
        CheckpointError: a configuration is not valid, or has what is not supported.
    """
    beside = file.with_name(ADAPTER_CONFIG)
    try:
        if METADATA in metadata:
            fields: dict[Component, dict[str, Any]] = {}
            for key, value in _require_object(decode_json(metadata[METADATA])).items():
                component, name = split_component(key)
                fields.setdefault(component, {})[name] = value
            return {component: _scale(config) for component, config in fields.items()}
        if file.name.startswith("adapter_model.") and beside.is_file():
            return dict.fromkeys(COMPONENTS, _scale(_require_object(read_json(beside))))
    except (OSError, ValueError) as error:
        where = f"the metadata of '{file}'" if METADATA in metadata else f"'{beside}'"
        raise CheckpointError(f"{where} is not the configuration of a LoRA: {first_line(error)}. Save the LoRA again.") from error
    return {}


def _scale(config: dict[str, Any]) -> AdapterScale:
    if config.get("use_dora"):
        raise ValueError("use_dora is set: DoRA is not supported")
    alpha: Any = config.get("lora_alpha")
    patterns = _require_object(config.get("alpha_pattern") or {})
    for name, value in (("lora_alpha", alpha), *patterns.items()):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{printable(name)} must be a number, got {printable(value)}")
    if unknown := [name for name in patterns if not _LITERAL.fullmatch(name)]:
        raise ValueError(f"alpha_pattern must have names of layers, got the pattern '{printable(unknown[0])}'")
    return AdapterScale(float(alpha), {name.strip("^$"): float(value) for name, value in patterns.items()}, bool(config.get("use_rslora")))


def _require_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, got a {type(value).__name__}")
    return value
