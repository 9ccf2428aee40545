"""How good are the digits? 1 000 samples, 100 a class, judged by a classifier that was trained on other digits.

    python examples/digits/evaluate.py                 # the student's bundle, and the teacher where its weights are at hand

Recognition: the share of samples classified as the class asked for. Distance: Fréchet distance between the classifier's features of the
samples and of the 4 000 digits the generator was trained on, which the classifier has never seen. Neither alone tells: an undistilled
teacher at two steps draws blurred averages, which are easy to recognise.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data import load_digits, to_pixels
from judge import assess, frechet_distance, load_judge
from samplers import TWO_STEPS, autoguided, ddim, sample_consistency
from scm_runtime import Generator
from train import new_network

PER_CLASS = 100
CHUNK = 250


# What the student must reach: a share of samples recognised as asked, by steps; and a distance, as a share of the undistilled teacher's.
RECOGNISED = {"student, 1 step": 0.80, "student, 2 steps": 0.85}
DISTANCE = 0.5


def gate_misses(rows: dict[str, dict[str, float]]) -> list[str]:
    """What is below the gate, in words; an empty list when the student passes."""
    missed = [
        f"{name}: {rows[name]['recognised']:.3f} recognised, at least {least} asked" for name, least in RECOGNISED.items() if rows[name]["recognised"] < least
    ]
    teacher = rows.get("teacher, not distilled, 2 steps")
    if teacher is not None and rows["student, 2 steps"]["frechet"] > DISTANCE * teacher["frechet"]:
        missed.append(
            f"student, 2 steps: distance {rows['student, 2 steps']['frechet']:.3f}, at most {DISTANCE} of the teacher's {teacher['frechet']:.3f} asked"
        )
    return missed


def through_bundle(bundle: str, labels: Tensor, steps: int) -> Tensor:
    """Float levels ``[N, 1, 28, 28]`` drawn by the runtime, seeds 0 to N - 1."""
    with Generator(bundle) as generate:
        seeds = range(len(labels))
        chunks = [
            generate(labels[i : i + CHUNK].numpy(), seed=list(seeds[i : i + CHUNK]), num_inference_steps=steps, output_type="np").array
            for i in range(0, len(labels), CHUNK)
        ]
    return torch.cat([torch.from_numpy(chunk) for chunk in chunks]).permute(0, 3, 1, 2).float()


@click.command(help=__doc__)
@click.option("--bundle", default="digits", show_default=True, help="The student: a bundle's folder or the embedded one.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/digits"), show_default=True, help="Of the training: judge and teacher.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/digits/results.json"), show_default=True)
def main(bundle: str, folder: Path, out: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    judge = load_judge(folder / "judge.pt")
    (images, targets), _ = load_digits()
    real, found = assess(judge, images)
    labels = torch.arange(10).repeat(PER_CLASS)

    samplers: dict[str, Callable[[], Tensor]] = {
        "student, 1 step": lambda: through_bundle(bundle, labels, 1),
        "student, 2 steps": lambda: through_bundle(bundle, labels, 2),
    }
    if (folder / "teacher.state.pt").exists():
        device = torch.device("cpu")
        teacher = new_network(device, torch.load(folder / "teacher.state.pt", weights_only=True)["ema"])
        snapshot = new_network(device, torch.load(folder / "teacher.snapshot.pt", weights_only=True))
        teacher.compute_dtype = snapshot.compute_dtype = torch.float32
        guided = autoguided(teacher, snapshot, 2.5)
        samplers |= {
            "teacher, not distilled, 2 steps": lambda: to_pixels(sample_consistency(teacher, labels, TWO_STEPS, seed=1)),
            "teacher, DDIM 32 steps": lambda: to_pixels(ddim(teacher, labels, 32, seed=1)),
            "teacher with autoguidance, DDIM 32 steps": lambda: to_pixels(ddim(guided, labels, 32, seed=1)),
        }

    else:
        click.echo(f"no teacher in {folder}: its rows, and the gate on the distance, are left out (train.py makes one)")

    # What no sampler can beat: digits of the training set against the rest of it.
    first = torch.cat([(targets == digit).nonzero()[:PER_CLASS, 0] for digit in range(10)])
    rest = torch.ones(len(targets), dtype=torch.bool).index_fill(0, first, False)
    rows = {
        "real digits": {
            "recognised": (found == targets).float().mean().item(),
            "frechet": frechet_distance(real[first], real[rest]),
        }
    }
    for name, draw in samplers.items():
        features, classes = assess(judge, draw())
        rows[name] = {"recognised": (classes == labels).float().mean().item(), "frechet": frechet_distance(features, real)}

    missed = gate_misses(rows)
    table = Table("sampler", "recognised as asked", "Fréchet distance", title="1 000 samples, 100 a class")
    for name, row in rows.items():
        table.add_row(name, f"{row['recognised']:.3f}", f"{row['frechet']:.3f}")
    Console().print(table)
    with Generator(bundle) as generate:
        source = generate.manifest.source
    record = {"samples": len(labels), "checkpoint_sha256": source.sha256, "torch": torch.__version__, "machine": platform.machine(), "results": rows}
    out.write_text(json.dumps(record, indent=2) + "\n")
    click.echo(f"wrote {out}")
    if missed:
        raise click.ClickException("below the gate: " + "; ".join(missed))


if __name__ == "__main__":
    main()
