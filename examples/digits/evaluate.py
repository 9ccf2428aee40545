"""How good are the digits? Evaluates teacher and students, in PyTorch and through bundles, with a classifier that was trained on other digits.

    python examples/digits/evaluate.py                             # three sets of 10 000 samples per row: hours; can be stopped and resumed
    python examples/digits/evaluate.py --only "teacher" --seeds 1  # sample only these rows, and show all results so far
    python examples/digits/evaluate.py --out benchmarks/results/quality.json  # then benchmarks/figures.py: the table in docs/benchmarks.md
    python examples/digits/evaluate.py --quick                     # one set of 100: does it run?

Recognized: the share of samples that are classified as the requested class. Distance, precision and recall compare the classifier's features of the
samples with those of the 4 000 digits that the generator was trained on and the classifier was not. Copies: samples closer to a training digit than 99 %
of held-out digits are. No metric is sufficient alone: a teacher at two steps, not distilled, generates blurred averages, which are easy to classify.
Distances over different numbers of samples are not comparable. Intervals are Student's, 95 %, over the sets. Rows without a checkpoint here keep the
values of an earlier run.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from candidates import GUIDED, TEACHER, UNDISTILLED, Candidate, find_candidates
from data import load_digits
from judge import Judge, assess, load_judge
from metrics import frechet_distance, mean_and_interval, memorised, precision_recall

DIGITS_PT = Path(__file__).parent / "digits.pt"
FIGURES = {"recognised": "recognized", "frechet": "Fréchet distance", "precision": "precision", "recall": "recall", "near": "nearness", "copies": "copies"}
EXPORT_FIGURES = ("recognised", "frechet", "precision", "recall", "near")  # copies: too few for a ratio

MOST_SETS = 5

Figures = dict[str, float]
"""Metrics of one set of samples, by the names above."""

# Targets of the student: the share of samples classified as requested, and the distance as a share of that of the teacher that was not distilled.
RECOGNISED = {"sCD, 1 step": 0.80, "sCD, 2 steps": 0.85}
DISTANCE = 0.5


def gate_misses(means: dict[str, Figures]) -> list[str]:
    """Return a message for each target that the student misses. Rows that were not sampled are not checked."""
    missed = [
        f"{name}: {means[name]['recognised']:.3f} recognized, at least {least} required"
        for name, least in RECOGNISED.items()
        if name in means and means[name]["recognised"] < least
    ]
    student, teacher = means.get("sCD, 2 steps"), means.get(UNDISTILLED)
    if student is not None and teacher is not None and student["frechet"] > DISTANCE * teacher["frechet"]:
        missed.append(f"sCD, 2 steps: distance {student['frechet']:.3f}, at most {DISTANCE} of the undistilled teacher's {teacher['frechet']:.3f} allowed")
    return missed


def measure(judge: Judge, levels: Tensor, labels: Tensor, training: Tensor | None = None) -> Figures:
    """Return all metrics of one set of samples, compared with all training digits or those given."""
    (digits, _), (held_out, _) = load_digits()
    real = training_features(judge) if training is None else assess(judge, training)[0]
    training = digits if training is None else training
    features, classes = assess(judge, levels)
    precision, recall = precision_recall(real, features)
    near = memorised(levels, training, held_out)
    return {
        "recognised": (classes == labels).double().mean().item(),
        "frechet": frechet_distance(features, real),
        "precision": precision,
        "recall": recall,
        "near": near.median_ratio,
        "copies": near.copies,
    }


@cache
def training_features(judge: Judge) -> Tensor:
    """Features ``[4000, 64]`` of the training digits, the same for every set of samples."""
    (digits, _), _ = load_digits()
    return assess(judge, digits)[0]


def measure_real(judge: Judge) -> Figures:
    """Return the metrics of real digits: 1 000 training digits against the other 3 000. Held-out digits do not qualify: the judge was trained on them."""
    (training, targets), _ = load_digits()
    first = torch.cat([(targets == digit).nonzero()[:100, 0] for digit in range(10)])
    rest = torch.ones(len(targets), dtype=torch.bool).index_fill(0, first, False)
    return measure(judge, training[first], targets[first], training[rest])


def export_changes(drawn: dict[tuple[str, str], list[Figures]]) -> dict[str, Figures]:
    """Return the largest relative difference between bundles and PyTorch over all rows, by dtype and metric, for the sets that both have."""
    changes: dict[str, Figures] = {}
    for (name, through), sets in drawn.items():
        pairs = list(zip(sets, drawn.get((name, "PyTorch"), []), strict=False))
        if through == "PyTorch" or not pairs:
            continue
        largest = changes.setdefault(through, dict.fromkeys(EXPORT_FIGURES, 0.0))
        for figure in EXPORT_FIGURES:
            ours, torchs = (sum(pair[way][figure] for pair in pairs) for way in (0, 1))
            if torchs:
                largest[figure] = max(largest[figure], abs(ours / torchs - 1))
    return changes


def absent_rows(record: dict[str, Any], samples: int, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Return the rows of an earlier run whose checkpoints are not here. They are kept unchanged."""
    here = {one.name for one in candidates}
    return [row for row in record.get("rows", []) if record["samples"] == samples and row["sampler"] not in here]


def draw_side_by_side(candidates: list[Candidate], path: Path) -> None:
    """Save an image of the PyTorch samplers, one row each; columns have the same noise: seeds 0 to 19, classes 0 to 9 twice."""
    labels, seeds = torch.arange(10).repeat(2), torch.arange(20)
    rows = [candidate.draw(labels, seeds) for candidate in candidates if candidate.through == "PyTorch" and candidate.name not in (TEACHER, UNDISTILLED)]
    if not rows:  # left out by --only
        return
    sheet = torch.cat([row[:, 0].permute(1, 0, 2).reshape(28, -1) for row in rows])
    Image.fromarray(sheet.byte().numpy()).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def show(record: dict[str, Any]) -> None:
    table = Table("sampler", "through", "sets", *FIGURES.values(), title=f"{record['samples']:,} samples per set".replace(",", " "))
    table.add_row("real digits", "", "", *(f"{record['real'][figure]:.3f}" for figure in FIGURES))
    for row in record["rows"]:
        shown = (f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else "") for mean, half in map(row["figures"].__getitem__, FIGURES))
        table.add_row(row["sampler"], row["through"], str(row["sets"]), *shown)
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


@click.command(help=__doc__)
@click.option("--student", type=click.Path(dir_okay=False, path_type=Path), default=DIGITS_PT, help="Checkpoint of sCD; by default the shipped one.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/digits"), show_default=True, help="Training folder, with teacher and sCT.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file; by default results.json in the folder. Sets it already has are not sampled again.")
@click.option("--samples", type=click.IntRange(100), default=10_000, show_default=True, help="Samples per set, equally many of each class.")
@click.option("--seeds", type=click.IntRange(1, MOST_SETS), default=3, show_default=True, help="Number of sets.")
@click.option("--only", default="", help="Sample only rows whose name contains this text, as in 'sCD, 2 steps/fp16'.")
@click.option("--quick", is_flag=True, help="One set of 100 samples of the students, for tests.")
def main(student: Path, folder: Path, out: Path | None, samples: int, seeds: int, only: str, quick: bool) -> None:
    if quick:
        samples, seeds, only = 100, 1, only or "sC"
    if samples % 10:
        raise click.UsageError(f"--samples must be a multiple of 10 (the number of classes), got {samples}")
    folder.mkdir(parents=True, exist_ok=True)
    out = out or folder / "results.json"
    judge = load_judge()
    candidates = find_candidates(folder, student)
    if not any(one.name == GUIDED for one in candidates):
        click.echo(f"no teacher in {folder}: its rows and the check of the distance are skipped or kept from an earlier run (train.py makes one)")

    earlier = json.loads(out.read_text()) if out.exists() else {}
    kept: dict[str, Figures] = earlier.get("sets", {})
    about_run = {"samples": samples, "torch": torch.__version__, "machine": platform.machine()}
    record: dict[str, Any] = {**about_run, "real": measure_real(judge), "rows": absent_rows(earlier, samples, candidates)}
    drawn: dict[tuple[str, str], list[Figures]] = {}
    labels = torch.arange(10).repeat(samples // 10)
    for one in candidates:
        keys = [f"{one.name}/{one.through}/{one.weights_sha256[:16]}/{samples}/{index}" for index in range(MOST_SETS)]
        for index, key in enumerate(keys):
            if key not in kept and index < seeds and only in f"{one.name}/{one.through}":
                kept[key] = measure(judge, one.draw(labels, torch.arange(samples) + index * samples), labels)
                click.echo(f"{key}: {kept[key]}")
                out.write_text(json.dumps({**record, "sets": kept}, indent=2) + "\n")
        sets = [kept[key] for key in keys if key in kept]
        if sets:
            drawn[one.name, one.through] = sets
            figures = {figure: mean_and_interval([found[figure] for found in sets]) for figure in FIGURES}
            shown = {figure: (mean, half if len(sets) > 1 else None) for figure, (mean, half) in figures.items()}  # JSON has no NaN
            about = {"sampler": one.name, "through": one.through, "checkpoint_sha256": one.checkpoint_sha256, "sets": len(sets)}
            record["rows"].append({**about, "figures": shown})

    record["rows"].sort(key=lambda row: not row["sampler"].startswith("teacher"))
    record["export_changes"] = export_changes(drawn)
    out.write_text(json.dumps({**record, "sets": kept}, indent=2) + "\n")
    draw_side_by_side(candidates, folder / "side-by-side.png")
    show(record)
    click.echo(f"largest change by the export: {record['export_changes']}")
    click.echo(f"wrote {out}")
    torchs = {row["sampler"]: {figure: mean for figure, (mean, _) in row["figures"].items()} for row in record["rows"] if row["through"] == "PyTorch"}
    if missed := gate_misses(torchs):
        raise click.ClickException("below the targets: " + "; ".join(missed))


if __name__ == "__main__":
    main()
