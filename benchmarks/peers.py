"""How fast are the alternatives? Two steps from the same noise to the same final state, with the same weights, by scm_runtime and its peers.

    python benchmarks/peers.py                             digits and XXS at batch 1, on the CPU
    python benchmarks/peers.py --preset short              the small models at batch 1 and 8: starts nothing after 20 minutes
    python benchmarks/peers.py --preset large              S and XXL at batch 1 and 8: 16 GB of memory, 20 GB of disk
    python benchmarks/peers.py --all                       all models and peers: hours
    python benchmarks/peers.py --device cuda --sizes S,XXL --batch-sizes 1,8,64 --steps 1

Each peer runs in its own process, which loads the model and samples on command; the processes take turns. In addition to latency: memory of the process,
time from its start to the first result with empty caches, and install size. Each peer uses the best settings in its documentation, which the results name
(``_peers/catalogue.py``). Results are compared with PyTorch's in float32; a peer that computes something else is not timed. A peer that is not installed,
fails or takes too long is reported, and does not affect the others. The figures of a peer are written as soon as they are valid; another run measures only
what is missing, was measured with another version of the peer or another build of scm_runtime, or exceeded a lower limit (``--patience``). When a peer of
a row is measured, the row's figures of other builds are removed, because one row does not compare builds. Peers that may be the fastest are measured
first, those that take long to start after them. The models are kept in ``build/peers``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from _common import AGAIN, Cells
from _peers.catalogue import ANCHOR, PEERS, Peer, install_own
from _peers.installed import versions
from _peers.machine import gpu, physical_cores
from _peers.preparing import FOLDER, NotPreparedError, measure_peak_rates, prepared
from _peers.presets import PRESETS, Preset
from _peers.rounds import TOO_LONG, Plan, Row, without_figures
from _peers.sizes import SIZES

USUAL = Preset(("digits", "XXS"), (1,), seconds=15, min_rounds=3, cell_s=1800, minutes=float("inf"))
CUDA_BATCH_SIZES = (1, 8, 64)


def show_progress(line: str) -> None:
    print(line, flush=True)


def chosen_peers(device: str, names: Sequence[str], *, everything: bool) -> list[Peer]:
    """Return the named peers, or those that run by default, and the one that all are compared with."""
    return [peer for peer in PEERS[device].values() if peer.name == ANCHOR or (peer.name in names if names else everything or peer.always)]


def row_name(size: str, n: int, steps: int) -> str:
    return f"{size}, batch {n}" + ("" if steps == 2 else f", {steps} step{'s' * (steps > 1)}")


class Measurement:
    """Measures the cells that are missing, until the time is over."""

    def __init__(self, cells: Cells, plan: Plan, steps: int, peers: Sequence[Peer], minutes: float, work: Path) -> None:
        self.cells, self.plan, self.steps, self.peers, self.work = cells, plan, steps, peers, work
        self._end = time.monotonic() + 60 * minutes
        self._not_prepared: set[str] = set()

    def measure(self, batch_sizes: dict[str, Sequence[int]]) -> bool:
        """Measure batch sizes of models, all with the peers of one place before those of the next; return whether there was time for all."""
        for place in sorted({peer.place for peer in self.peers}):
            for size, numbers in batch_sizes.items():
                for n in numbers:
                    row = row_name(size, n, self.steps)
                    wanted = [peer for peer in self.peers if peer.place == place and not self._is_measured(row, peer)]
                    installed = [peer for peer in wanted if peer.missing() is None]
                    if installed and time.monotonic() > self._end:
                        return False
                    if installed and size not in self._not_prepared:
                        self._row(size, n, installed, max(numbers))
                    for peer in wanted:
                        if reason := peer.missing():
                            self._note_missing(row, peer, reason)
        return True

    def _is_measured(self, row: str, peer: Peer) -> bool:
        """Return whether this version of a peer was measured, or has exceeded a limit that is not lower than that of this run."""
        path = ("rows", row, "peers", peer.name)
        if not self.cells.is_measured(*path):
            return False
        found: dict[str, Any] = self.cells.get(*path)
        if found["status"] == TOO_LONG and found["limit_s"] < self.plan.cell_s:
            return False
        return found.get("versions") == versions(peer.distributions, peer.packages)

    def _note_missing(self, row: str, peer: Peer, reason: str) -> None:
        show_progress(f"{row}: {peer.name}: missing: {reason}")
        if self.cells.get("rows", row) is not None:
            self._keep(row, peer.name, without_figures(peer, "missing", reason))

    def _row(self, size: str, n: int, peers: Sequence[Peer], samples: int) -> None:
        """Measure some peers with one size and batch size."""
        try:
            case = prepared(size, samples, self.steps, self.plan.device, self.work, show_progress)
        except NotPreparedError as error:
            show_progress(f"{SIZES[size].title}: {error}")
            self.cells.note("not_measured", size, value=str(error))
            self._not_prepared.add(size)
            return
        self.cells.note("not_measured", size, value=None)
        name, start = row_name(size, n, self.steps), time.monotonic()
        show_progress(f"{SIZES[size].title}, batch {n}, {self.steps} steps")
        kept = self.cells.get("rows", name) or {}
        about = {
            "size": size,
            "title": SIZES[size].title,
            "batch_size": n,
            "steps": self.steps,
            "threads": self.plan.threads,
            "parameters": case.facts.parameters,
            "flop_per_sample": case.facts.flop,
        }
        # Figures of another build would be compared with those of this one.
        current = {peer: found for peer, found in kept.get("peers", {}).items() if self.cells.is_current("rows", name, "peers", peer)}
        self.cells.note("rows", name, value={**about, "took_s": kept.get("took_s", 0) if current else 0, "peers": current})
        anchor = None if any(peer.name == ANCHOR for peer in peers) else PEERS[self.plan.device][ANCHOR]
        with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
            keep = partial(self._keep, name)
            Row(case, SIZES[size], n, self.plan, Path(scratch) / "workers", show_progress, keep).measure(peers, anchor)
        self.cells.note("rows", name, "took_s", value=self.cells.get("rows", name, "took_s") + round(time.monotonic() - start))

    def _keep(self, row: str, peer: str, figures: dict[str, Any]) -> None:
        self.cells.keep("rows", row, "peers", peer, figures={**figures, "date": datetime.now(UTC).date().isoformat()})


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


def in_order(device: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures with rows and peers in the order of the tables."""
    sizes, names = list(SIZES), list(PEERS[device])

    def place(row: tuple[str, Any]) -> tuple[int, int, int]:
        return sizes.index(row[1]["size"]), row[1]["batch_size"], row[1]["steps"]

    def rank(peer: tuple[str, Any]) -> int:
        return names.index(peer[0]) if peer[0] in names else len(names)

    rows = dict(sorted(figures.get("rows", {}).items(), key=place))
    return {**figures, "rows": {name: {**row, "peers": dict(sorted(row["peers"].items(), key=rank))} for name, row in rows.items()}}


def _split_names(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()] if value else []


def _check_names(names: Sequence[str], known: Sequence[str], what: str) -> None:
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"there is no {what} {', '.join(map(repr, unknown))}; there are: {'; '.join(known)}")


def _preset(context: click.Context, parameter: click.Parameter, value: str | None) -> Preset:
    return PRESETS[value] if value else USUAL


@click.command(help=__doc__.split("\n")[0])
@click.option("--preset", type=click.Choice(list(PRESETS)), callback=_preset, help="Models, batch sizes and durations, unless other options give them.")
@click.option("--sizes", callback=_split_names, help=f"Any of {', '.join(SIZES)}; by default {', '.join(USUAL.sizes)}.")
@click.option("--batch-sizes", callback=_split_names, help="By default 1; with --all 1,8, of XXL 1; on a GPU 1,8,64.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--peers",
    "names",
    callback=_split_names,
    help="By name, separated by commas; an unknown name lists them. The others stay in a row, except figures of another build of scm_runtime.",
)
@click.option("--all", "everything", is_flag=True, help="All sizes and peers, unless other options select some.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seconds", type=float, help=f"Duration of the rounds of one size and batch size; by default {USUAL.seconds:.0f}.")
@click.option("--rounds", type=click.IntRange(1), help="Exact number of rounds, in place of --seconds.")
@click.option("--least-rounds", "min_rounds", type=click.IntRange(1), help=f"Minimum number of rounds, however long they take; by default {USUAL.min_rounds}.")
@click.option("--minutes", type=float, help="Start nothing after this time: another run continues.")
@click.option("--threads", type=click.IntRange(1), help="By default the number of physical cores that this process may use.")
@click.option("--patience", "cell_s", type=float, help=f"Seconds for a peer in one row, after which it is given up; by default {USUAL.cell_s:.0f}.")
@click.option("--work", type=click.Path(path_type=Path), default=FOLDER, help="Folder in which the models are kept.")
@click.option("--install", is_flag=True, help="First install the peers that need an environment of their own, into build/peers.")
@AGAIN
def main(
    preset: Preset,
    sizes: list[str],
    batch_sizes: list[str],
    steps: int,
    names: list[str],
    everything: bool,
    device: str,
    seconds: float | None,
    rounds: int | None,
    min_rounds: int | None,
    minutes: float | None,
    threads: int | None,
    cell_s: float | None,
    work: Path,
    install: bool,
    again: bool,
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
    chosen = replace(
        preset,
        sizes=tuple(sizes or (SIZES if everything else preset.sizes)),
        seconds=preset.seconds if seconds is None else seconds,
        min_rounds=min_rounds or preset.min_rounds,
        minutes=preset.minutes if minutes is None else minutes,
        cell_s=cell_s or preset.cell_s,
    )
    plan = Plan(device, threads or physical_cores(), chosen.seconds, rounds, chosen.min_rounds, chosen.cell_s)
    peers = chosen_peers(device, names, everything=everything)
    if install:
        install_own(peers)
    cells = Cells("peers" if device == "cpu" else "peers-cuda", again=again, order=partial(in_order, device), threads=plan.threads)
    cells.measure("roof", by=lambda: measure_peak_rates(device, plan.threads))
    cells.note("gpu", value=gpu() if device == "cuda" else None)
    wanted = dict(_batch_sizes(chosen, batches, device, everything=everything))
    done = Measurement(cells, plan, steps, peers, chosen.minutes, work).measure(wanted)
    rows = cells.get("rows") or {}
    show({name: rows[name] for size, numbers in wanted.items() for n in numbers if (name := row_name(size, n, steps)) in rows})
    if not done:
        show_progress(f"\nThe {chosen.minutes:g} minutes are over, and not everything is measured. Call it again for the rest.")


def _batch_sizes(chosen: Preset, batches: Sequence[int], device: str, *, everything: bool) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield each size with its batch sizes."""
    for size in chosen.sizes:
        usual = CUDA_BATCH_SIZES if device == "cuda" else SIZES[size].cpu_batch_sizes if everything else chosen.batch_sizes
        yield size, batches or usual


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
