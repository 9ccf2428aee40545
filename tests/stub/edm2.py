"""Bundles of EDM2 with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

Dtype = Literal["fp32", "fp16", "bf16"]
Export = Callable[[Dtype], Path]


def export_preset(preset: str, dtype: Dtype, folder: Path) -> Path:
    """Export a preset of EDM2 into a folder, which keeps its checkpoint for other dtypes. Returns the bundle."""
    from scm_export import export
    from scm_export.checkpoints import Checkpoint, SamplerSpec, save_checkpoint
    from scm_export.networks.edm2 import PRESETS, UNet

    checkpoint = folder / f"{preset}.pt"
    if not checkpoint.exists():
        config = PRESETS[preset]
        save_checkpoint(Checkpoint(family="edm2", config=asdict(config), sampler=SamplerSpec(), weights=UNet(config).state_dict()), checkpoint)
    return export(checkpoint, folder / f"{preset}-{dtype}.scm", dtype=None if dtype == "fp32" else dtype, latents=True, verify=False).path
