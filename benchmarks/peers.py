"""How fast are the alternatives? Two steps from the same noise to the same final state, with the same weights, by scm_runtime and its peers.

    python benchmarks/peers.py                             digits and XXS at batch 1, on the CPU
    python benchmarks/peers.py --all                       all models and peers: hours, of which XXL takes one; 16 GB of memory, 20 GB of disk (TMPDIR)
    python benchmarks/peers.py --device cuda --sizes S,XXL --batch-sizes 1,8,64 --steps 1

Each peer runs in its own process, which loads the model and samples on command; the processes take turns. In addition to latency: memory of the process,
time from its start to the first result with empty caches, and install size. Each peer uses the best settings in its documentation, which the results name
(``_peers/catalogue.py``). Results are compared with PyTorch's in float32; a peer that computes something else is not timed. A peer that is not installed or
fails is reported, and does not affect the others. Rows that are not measured stay in the results if they are from this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from _common import save, stored_figures
from _peers.case import Case
from _peers.catalogue import PEERS, Peer
from _peers.client import worker_environment
from _peers.machine import gpu, physical_cores
from _peers.rounds import Plan, Row
from _peers.sizes import DISK_WEIGHTS, SIZES, available_bytes, memory_shortage, preparing_bytes

STAGES = ("checkpoint", "bundle", "plain")
FEW = ("digits", "XXS")
CUDA_BATCH_SIZES = (1, 8, 64)


class NotPreparedError(RuntimeError):
    """The models of a size cannot be prepared on this machine."""


def show_progress(line: str) -> None:
    print(line, flush=True)


@contextmanager
def prepared(size: str, samples: int, steps: int, device: str, work: Path | None) -> Iterator[Case]:
    """Prepare the models of a size, in a temporary folder or in ``work``, which is kept.

    Raises:
        NotPreparedError: there is too little memory or disk space, or the preparation fails.
    """
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        folder = Path(temporary) / size if work is None else work / f"{size}-{device}-{samples}-{steps}"
        if not (folder / "case.json").exists():
            _check_room(size, folder.parent)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for stage in STAGES:
                show_progress(f"  making the {stage}")
                _run_stage(stage, folder, size, samples, steps, device)
        yield Case.load(folder)


def _check_room(size: str, parent: Path) -> None:
    """Raise NotPreparedError if memory or disk space do not suffice, before minutes are spent."""
    parent.mkdir(parents=True, exist_ok=True)
    if reason := memory_shortage(preparing_bytes(SIZES[size]), f"making {SIZES[size].title}", available_bytes()):
        raise NotPreparedError(reason)
    need, free = DISK_WEIGHTS * SIZES[size].weights_bytes, shutil.disk_usage(parent).free
    if need > free:
        raise NotPreparedError(f"making {SIZES[size].title} needs about {need / 1e9:.0f} GB of disk, and '{parent}' has {free / 1e9:.0f} GB free: set TMPDIR")


def _run_stage(stage: str, folder: Path, size: str, samples: int, steps: int, device: str) -> None:
    options = ["--samples", str(samples), "--steps", str(steps), "--device", device]
    command = [sys.executable, "-m", "_peers.prepare", stage, str(folder), size, *options]
    done = _python(command, folder)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotPreparedError(f"making the {stage} of {SIZES[size].title} failed: {said[-1].strip() if said else f'exit code {done.returncode}'}")


def _python(command: Sequence[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **worker_environment(scratch, physical_cores()), "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def measure_peak_rates(device: str, threads: int) -> dict[str, float] | None:
    """Return the peak rates of the machine, or None without PyTorch."""
    program = f"import json; from _peers.machine import peak_rates; print(json.dumps(peak_rates({device!r}, {threads})))"
    with tempfile.TemporaryDirectory() as scratch:
        done = _python([sys.executable, "-c", program], Path(scratch))
    return None if done.returncode else dict(json.loads(done.stdout))


def chosen_peers(device: str, names: Sequence[str], *, everything: bool) -> list[Peer]:
    """Return the named peers, or those that run by default."""
    return [peer for peer in PEERS[device].values() if (peer.name in names if names else everything or peer.always)]


def row_name(size: str, n: int, steps: int) -> str:
    return f"{size}, batch {n}" + ("" if steps == 2 else f", {steps} step{'s' * (steps > 1)}")


def measure_size(
    size: str, batch_sizes: Sequence[int], steps: int, peers: Sequence[Peer], plan: Plan, work: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of one size as they are measured."""
    with prepared(size, max(batch_sizes), steps, plan.device, work) as case, tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        for n in batch_sizes:
            show_progress(f"{SIZES[size].title}, batch {n}, {steps} steps")
            start = time.perf_counter()
            found = Row(case, SIZES[size], n, plan, Path(scratch) / str(n), lambda line: show_progress(line)).measure(peers)
            facts = {"parameters": case.facts.parameters, "flop_per_sample": case.facts.flop}
            about = {
                "date": datetime.now(UTC).date().isoformat(),
                "size": size,
                "title": SIZES[size].title,
                "batch_size": n,
                "steps": steps,
                "threads": plan.threads,
            }
            yield row_name(size, n, steps), {**about, **facts, "took_s": round(time.perf_counter() - start), "peers": found}


def show(rows: dict[str, Any]) -> None:
    """Print the rows to the terminal."""
    for name, row in rows.items():
        show_progress(f"\n{name}")
        for peer, found in row.get("peers", {}).items():
            if found["status"] != "ok":
                show_progress(f"  {peer:28} {found['status']}: {found['reason']}")
                continue
            ratio = f"x {found['times_as_long']:5.2f}" if "times_as_long" in found else " " * 7
            show_progress(
                f"  {peer:28} {found['median_ms']:9.1f} ms  {ratio}  p95 {found['p95_ms']:9.1f}  min {found['min_ms']:9.1f}  "
                f"{found['peak_bytes'] / 1e6:7.0f} MB  first {found['cold_start_s']:6.1f} s  {found['settings']}"
            )


def _in_order(rows: dict[str, Any]) -> dict[str, Any]:
    """Return the rows in the order of the tables."""
    sizes = list(SIZES)
    return dict(sorted(rows.items(), key=lambda item: (sizes.index(item[1]["size"]), item[1]["batch_size"], item[1]["steps"])))


def _split_names(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()] if value else []


def _check_names(names: Sequence[str], known: Sequence[str], what: str) -> None:
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"there is no {what} {', '.join(map(repr, unknown))}; there are: {'; '.join(known)}")


@click.command(help=__doc__.split("\n")[0])
@click.option("--sizes", callback=_split_names, help=f"Any of {', '.join(SIZES)}; by default {', '.join(FEW)}.")
@click.option("--batch-sizes", callback=_split_names, help="By default 1; with --all 1,8, of XXL 1; on a GPU 1,8,64.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@click.option("--peers", "names", callback=_split_names, help="By name, separated by commas; an unknown name lists them.")
@click.option("--all", "everything", is_flag=True, help="All sizes and peers, unless other options select some.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seconds", type=float, default=15.0, show_default=True, help="Duration of the rounds of one size and batch size.")
@click.option("--rounds", type=click.IntRange(1), help="Exact number of rounds, in place of --seconds.")
@click.option("--least-rounds", "min_rounds", type=click.IntRange(1), default=3, show_default=True, help="Minimum number of rounds, however long they take.")
@click.option("--threads", type=click.IntRange(1), help="By default the number of physical cores that this process may use.")
@click.option("--patience", "timeout", type=float, default=1800.0, show_default=True, help="Seconds to wait for an answer before a peer is reported as failed.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder in which the models are kept for the next run.")
def main(
    sizes: list[str],
    batch_sizes: list[str],
    steps: int,
    names: list[str],
    everything: bool,
    device: str,
    seconds: float,
    rounds: int | None,
    min_rounds: int,
    threads: int | None,
    timeout: float,
    work: Path | None,
) -> None:
    _check_names(sizes, list(SIZES), "size")
    names = _join_names(names, list(PEERS[device]))
    _check_names(names, list(PEERS[device]), f"peer for {device}")
    if device == "cuda" and gpu() is None:
        raise click.ClickException("--device cuda: no NVIDIA GPU was found (nvidia-smi is missing, or lists none). Without one: --device cpu")
    try:
        batches = [int(n) for n in batch_sizes]
    except ValueError as error:
        raise click.BadParameter(f"--batch-sizes must be whole numbers separated by commas, got {','.join(batch_sizes)}") from error
    if any(n < 1 for n in batches):
        raise click.BadParameter(f"--batch-sizes must be at least 1, got {','.join(batch_sizes)}")
    plan = Plan(device, threads or physical_cores(), seconds, rounds, min_rounds, timeout)
    peers, result = chosen_peers(device, names, everything=everything), "peers" if device == "cpu" else "peers-cuda"
    figures = stored_figures(result)
    figures["roof"] = measure_peak_rates(device, plan.threads)
    figures["gpu"] = gpu() if device == "cuda" else None
    figures.setdefault("rows", {})
    figures.setdefault("not_measured", {})
    new: dict[str, Any] = {}
    for size in sizes or (list(SIZES) if everything else FEW):
        figures["not_measured"].pop(size, None)
        try:
            usual = CUDA_BATCH_SIZES if device == "cuda" else SIZES[size].cpu_batch_sizes if everything else (1,)
            for name, row in measure_size(size, batches or usual, steps, peers, plan, work):
                new[name] = row
                figures["rows"] = _in_order({**figures["rows"], name: row})
                save(result, figures)
        except NotPreparedError as error:
            show_progress(f"{SIZES[size].title}: {error}")
            figures["not_measured"][size] = str(error)
            save(result, figures)
    show(new)


def _join_names(parts: list[str], known: list[str]) -> list[str]:
    """Join the parts of names that contain commas."""
    found: list[str] = []
    for part in parts:
        if found and f"{found[-1]}, {part}" in known:
            found[-1] = f"{found[-1]}, {part}"
        else:
            found.append(part)
    return found


if __name__ == "__main__":
    main()
