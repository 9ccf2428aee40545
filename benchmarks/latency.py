"""Is the bundle as fast as the network it came from? Two steps, seeds to pixels, against PyTorch eager, interleaved.

Both do all of the work: noise, two network evaluations, pixels. PyTorch runs the folded network in float32 under inference_mode.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from _common import interleaved, keep

from scm_export import export, ops
from scm_export.checkpoints import Checkpoint, SamplerSpec, load_checkpoint, save_checkpoint
from scm_export.families import build_model
from scm_export.networks.edm2 import PRESETS, UNet, UNetConfig
from scm_export.parametrisation import sample
from scm_runtime import Generator

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "digits.pt"
# sCM's changes on the XXS width, at 32x32x4.
XXS = replace(PRESETS["XXS"], img_resolution=32, time_embedding="positional", modulation="scale-shift")


def random_checkpoint(config: UNetConfig, path: Path) -> Path:
    """A checkpoint with random weights: latency does not depend on their values."""
    torch.manual_seed(0)
    net = UNet(config)
    torch.nn.init.ones_(net.out_gain)
    save_checkpoint(Checkpoint(family="edm2", config=asdict(config), sampler=SamplerSpec(), weights=net.state_dict()), path)
    return path


def eager(checkpoint: Path, labels: list[int]) -> Callable[[], object]:
    model = build_model(load_checkpoint(checkpoint))
    step, seeds, classes = model.step, torch.arange(len(labels)), torch.tensor(labels)

    @torch.inference_mode()
    def run() -> object:
        noises = [ops.philox_normal(seeds, draw, model.sample_shape) for draw in range(3)]
        x = sample(step, noises, model.times[2], model.initial_scale, {"class_labels": classes})
        return model.decode(x).numpy()

    return run


def main() -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {"digits 28x28": DIGITS, "XXS 32x32x4": random_checkpoint(XXS, Path(folder) / "xxs.pt")}
        for name, checkpoint in checkpoints.items():
            bundle = export(checkpoint, Path(folder) / f"{checkpoint.stem}.scm", verify=False, steps=()).path
            for batch_size in (1, 8):
                labels = list(range(batch_size))
                with Generator(bundle) as generate:
                    candidates: dict[str, Callable[[], object]] = {
                        "scm_runtime": partial(generate, labels, seed=0, output_type="np"),
                        "PyTorch eager": eager(checkpoint, labels),
                    }
                    found = interleaved(candidates, repeats=40 if name.startswith("digits") else 12)
                ratio = found["PyTorch eager"]["median_ms"] / found["scm_runtime"]["median_ms"]
                figures[f"{name}, batch {batch_size}"] = {**found, "PyTorch / scm_runtime": ratio}
    keep("latency", figures)


if __name__ == "__main__":
    main()
