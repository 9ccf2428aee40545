"""How good are the digits? Teacher and students, in PyTorch and through their bundles, judged by a classifier that was trained on other digits.

    python examples/digits/evaluate.py                             # three sets of 10 000 samples a row: hours; stop and start it as you like
    python examples/digits/evaluate.py --only "teacher" --seeds 1  # draw for these rows alone, and show all that was drawn so far
    python examples/digits/evaluate.py --out benchmarks/results/quality.json  # then benchmarks/figures.py: README's table
    python examples/digits/evaluate.py --quick                     # one set of 100: does it run?

Recognition: the share of samples classified as the class asked for. Distance, precision and recall: between the classifier's features of the samples and
of the 4 000 digits the generator was trained on, which the classifier has never seen. Copies: samples nearer to a training digit than 99 % of held-out
digits are. No figure alone tells: an undistilled teacher at two steps draws blurred averages, which are easy to recognise. Distances over different
numbers of samples do not compare. Intervals are Student's, 95 %, over the sets. Rows whose checkpoint is not here stay as an earlier run wrote them.
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
FIGURES = {"recognised": "recognised", "frechet": "Fréchet distance", "precision": "precision", "recall": "recall", "near": "nearness", "copies": "copies"}
EXPORT_FIGURES = ("recognised", "frechet", "precision", "recall", "near")  # copies: too few for a ratio

MOST_SETS = 5

Figures = dict[str, float]
"""Of a set of samples, by the names above."""

# What the student must reach: a share of samples recognised as asked, by steps; and a distance, as a share of the undistilled teacher's.
RECOGNISED = {"sCD, 1 step": 0.80, "sCD, 2 steps": 0.85}
DISTANCE = 0.5


def gate_misses(means: dict[str, Figures]) -> list[str]:
    """What is below the gate, in words; an empty list when the student passes. Rows that were not drawn are not judged."""
    missed = [
        f"{name}: {means[name]['recognised']:.3f} recognised, at least {least} asked"
        for name, least in RECOGNISED.items()
        if name in means and means[name]["recognised"] < least
    ]
    student, teacher = means.get("sCD, 2 steps"), means.get(UNDISTILLED)
    if student is not None and teacher is not None and student["frechet"] > DISTANCE * teacher["frechet"]:
        missed.append(f"sCD, 2 steps: distance {student['frechet']:.3f}, at most {DISTANCE} of the undistilled teacher's {teacher['frechet']:.3f} asked")
    return missed


def measure(judge: Judge, levels: Tensor, labels: Tensor, training: Tensor | None = None) -> Figures:
    """All figures of one set of samples, against all training digits or those given."""
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
    """What no sampler can beat: 1 000 training digits against the other 3 000. Held-out digits cannot stand for it, since the judge knows them."""
    (training, targets), _ = load_digits()
    first = torch.cat([(targets == digit).nonzero()[:100, 0] for digit in range(10)])
    rest = torch.ones(len(targets), dtype=torch.bool).index_fill(0, first, False)
    return measure(judge, training[first], targets[first], training[rest])


def export_changes(drawn: dict[tuple[str, str], list[Figures]]) -> dict[str, Figures]:
    """By how much each bundle's figures differ from PyTorch's over the sets that both have, as a share; the largest of all rows, by dtype and figure."""
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
    """What an earlier run judged and this one cannot, for its checkpoint is not here: these rows stay as they were."""
    here = {one.name for one in candidates}
    return [row for row in record.get("rows", []) if record["samples"] == samples and row["sampler"] not in here]


def draw_side_by_side(candidates: list[Candidate], path: Path) -> None:
    """Teacher and students from PyTorch, a row each, columns from the same noise: seeds 0 to 19, classes 0 to 9 twice."""
    labels, seeds = torch.arange(10).repeat(2), torch.arange(20)
    rows = [candidate.draw(labels, seeds) for candidate in candidates if candidate.through == "PyTorch" and candidate.name not in (TEACHER, UNDISTILLED)]
    if not rows:  # left out by --only
        return
    sheet = torch.cat([row[:, 0].permute(1, 0, 2).reshape(28, -1) for row in rows])
    Image.fromarray(sheet.byte().numpy()).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def show(record: dict[str, Any]) -> None:
    table = Table("sampler", "through", "sets", *FIGURES.values(), title=f"{record['samples']:,} samples a set".replace(",", " "))
    table.add_row("real digits", "", "", *(f"{record['real'][figure]:.3f}" for figure in FIGURES))
    for row in record["rows"]:
        shown = (f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else "") for mean, half in map(row["figures"].__getitem__, FIGURES))
        table.add_row(row["sampler"], row["through"], str(row["sets"]), *shown)
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


@click.command(help=__doc__)
@click.option("--student", type=click.Path(dir_okay=False, path_type=Path), default=DIGITS_PT, help="Checkpoint of sCD; by default the one that is shipped.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("runs/digits"), show_default=True, help="Of the training: teacher, sCT.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON; by default results.json in the folder. Sets of samples that it has are not drawn again.")
@click.option("--samples", type=click.IntRange(100), default=10_000, show_default=True, help="Of a set; as many of each class.")
@click.option("--seeds", type=click.IntRange(1, MOST_SETS), default=3, show_default=True, help="Number of sets to draw.")
@click.option("--only", default="", help="Draw for the rows that have this in their name and way, as in 'sCD, 2 steps/fp16'.")
@click.option("--quick", is_flag=True, help="One set of 100 samples of the students: for tests.")
def main(student: Path, folder: Path, out: Path | None, samples: int, seeds: int, only: str, quick: bool) -> None:
    if quick:
        samples, seeds, only = 100, 1, only or "sC"
    if samples % 10:
        raise click.UsageError(f"--samples must be a multiple of 10, as many of each class, got {samples}")
    folder.mkdir(parents=True, exist_ok=True)
    out = out or folder / "results.json"
    judge = load_judge()
    candidates = find_candidates(folder, student)
    if not any(one.name == GUIDED for one in candidates):
        click.echo(f"no teacher in {folder}: its rows, and the gate on the distance, are left out or as they were (train.py makes one)")

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
        raise click.ClickException("below the gate: " + "; ".join(missed))


if __name__ == "__main__":
    main()
