"""The measurement: peers are loaded at the same time and run in turn, round after round, so that noise affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _peers.case import Case
from _peers.catalogue import ANCHOR, LARGEST_ERROR, Peer
from _peers.client import Worker, WorkerFailedError, WorkerTimeoutError
from _peers.installed import install_bytes, versions
from _peers.machine import gpu_bytes_used
from _peers.sizes import BASE_BYTES, Size, available_bytes, memory_shortage

PAUSE_S = 0.02  #       between turns, so that the threads of the last peer go to sleep
TURN_MS = 250.0  #      target duration of a turn, if a call is shorter
MAX_CALLS_PER_TURN = 20  #      maximum number of calls per turn
SHORT_MS = 1000.0  #    a turn of shorter calls begins with an untimed one
TRIAL_ROUNDS = 3

TOO_LONG = "not measured"
"""Status of a peer that exceeds its limit, which its figures name as ``limit_s``."""

Progress = Callable[[str], None]
Keep = Callable[[str, dict[str, Any]], None]
"""Keeps the figures of a peer, by its name."""


def without_figures(peer: Peer, status: str, reason: str) -> dict[str, Any]:
    """Return what is kept of a peer that has no figures."""
    return {"status": status, "reason": reason, "dtype": peer.dtype, "versions": versions(peer.distributions, peer.packages)}


@dataclass(frozen=True)
class Plan:
    """How long to measure, and where."""

    device: str
    threads: int
    seconds: float
    """Duration of the rounds of one group of peers, once all are loaded."""
    rounds: int | None
    """Exact number of rounds, in place of ``seconds``."""
    min_rounds: int
    """Minimum number of rounds, however long they take."""
    cell_s: float
    """Limit of one peer: the seconds of its start, with all variants, and of its turns."""

    @property
    def least_rounds(self) -> int:
        """Number of rounds after which the figures of a peer are valid."""
        return self.min_rounds if self.rounds is None else self.rounds


@dataclass(eq=False)
class Candidate:
    """A running peer with one of its variants."""

    peer: Peer
    options: dict[str, Any]
    worker: Worker
    facts: dict[str, Any]
    """What its figures say about it, besides times and memory."""
    turns: list[list[float]] = field(default_factory=list)
    """Milliseconds of each call, by round."""
    ratios: list[float] = field(default_factory=list)
    """Median of its turn divided by that of the anchor in the same round, by round."""
    last_ms: float = 0.0
    """Approximate milliseconds of a call."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes after its last turn."""
    spent_s: float = 0.0
    """Seconds of its start and its turns."""

    @property
    def times(self) -> list[float]:
        return [value for turn in self.turns for value in turn]

    def turn(self) -> None:
        """Run for one turn."""
        start = time.monotonic()
        short = self.last_ms < SHORT_MS
        count = max(1, min(MAX_CALLS_PER_TURN, round(TURN_MS / self.last_ms)))
        turn = self.worker.draw(int(short), count)
        self.memory = self.worker.memory()
        self.last_ms = statistics.median(turn)
        self.turns.append(turn)
        self.spent_s += time.monotonic() - start
        time.sleep(PAUSE_S)


class Row:
    """Measures one size and batch size."""

    def __init__(self, case: Case, size: Size, n: int, plan: Plan, scratch: Path, show_progress: Progress, keep: Keep) -> None:
        """Prepare to measure. ``keep`` gets the figures of a peer as soon as they are valid, and again after each further round."""
        self.case, self.size, self.n, self.plan, self.scratch, self.show_progress, self.keep = case, size, n, plan, scratch, show_progress, keep
        self._anchor: Candidate | None = None
        self._only_for_comparison: Peer | None = None
        self._starts = 0

    def measure(self, peers: Sequence[Peer], anchor: Peer | None = None) -> None:
        """Measure peers. ``anchor`` runs with them for comparison, if it is not among them, and its own figures are not kept again."""
        self._only_for_comparison = anchor
        waiting = [peer for peer in peers if self._is_here(peer)]
        if anchor is not None and waiting:
            waiting.insert(0, anchor)
        try:
            while waiting:
                waiting = self._group(waiting)
        finally:
            if self._anchor is not None:
                self._anchor.worker.close()

    def _is_here(self, peer: Peer) -> bool:
        if reason := peer.missing():
            self._report(peer, "missing", reason)
        elif peer.families is not None and self.case.facts.family not in peer.families:
            self._report(peer, "not for this model", f"diffusers has no pipeline for the family {self.case.facts.family}")
        else:
            return True
        return False

    def _report(self, peer: Peer, status: str, reason: str) -> None:
        self.show_progress(f"  {peer.name}: {status}: {reason}")
        if peer is not self._only_for_comparison:
            limit = {"limit_s": self.plan.cell_s} if status == TOO_LONG else {}
            self.keep(peer.name, {**without_figures(peer, status, reason), **limit})

    # -- A group: the anchor and as many others as fit into memory ----------------------------------------------------------

    def _group(self, waiting: list[Peer]) -> list[Peer]:
        """Measure the first peers that fit into memory together, and return the rest."""
        running: list[Candidate] = [self._anchor] if self._anchor is not None else []
        group: list[Candidate] = []
        try:
            while waiting:
                need = waiting[0].memory * self.size.weights_bytes + BASE_BYTES
                if reason := memory_shortage(need, waiting[0].name, available_bytes()):
                    if group:
                        break  # it is measured after this group has ended
                    self._report(waiting.pop(0), "skipped", reason)
                    continue
                peer = waiting.pop(0)
                if (found := self._start(peer)) is not None:
                    group.append(found)
                    if peer.name == ANCHOR:
                        self._anchor = found
            self._rounds([*running, *group])
        finally:
            for candidate in group:
                if candidate is not self._anchor:
                    candidate.worker.close()
        return waiting

    def _start(self, peer: Peer) -> Candidate | None:
        """Start the peer with the variant that is fastest on this machine."""
        found: list[Candidate] = []
        start, failure = time.monotonic(), ("failed", "nothing to run")
        for options in peer.variants if self.size.trial else peer.variants[:1]:
            try:
                found.append(self._open(peer, options, start + self.plan.cell_s))
            except WorkerTimeoutError:
                failure = TOO_LONG, f"it takes more than {self.plan.cell_s:.0f} s"
            except WorkerFailedError as error:
                failure = "failed", str(error)
        if len(found) > 1:
            failure = self._try(found, start) or failure
        if not found:
            self._report(peer, *failure)
            return None
        best = min(found, key=lambda candidate: min(map(statistics.median, candidate.turns), default=candidate.last_ms))
        for candidate in found:
            if candidate is not best:
                candidate.worker.close()
        best.turns.clear()
        best.spent_s = time.monotonic() - start
        if not best.worker.error_share <= LARGEST_ERROR[peer.dtype]:
            best.worker.close()
            self._report(peer, "wrong", f"its result is off by {best.worker.error_share:.2g} of the reference, more than {LARGEST_ERROR[peer.dtype]:.2g}")
            return None
        self.show_progress(f"  {peer.name}: ready, first result after {best.worker.cold_start_s:.1f} s, {_settings(best.options)}")
        return best

    def _open(self, peer: Peer, options: Mapping[str, Any], end: float) -> Candidate:
        spec = {
            "opener": peer.opener,
            "folder": str(self.case.folder),
            "batch_size": self.n,
            "threads": self.plan.threads,
            "device": self.plan.device,
            "options": dict(options),
        }
        self._starts += 1
        before = gpu_bytes_used() if self.plan.device == "cuda" else None
        worker = Worker(spec, self.scratch / str(self._starts), end - time.monotonic(), peer.environment, peer.python)
        after = gpu_bytes_used() if before is not None else None
        facts = {
            "dtype": peer.dtype,
            "settings": f"{self.plan.threads} threads, {_settings(options)}" if self.plan.device == "cpu" else _settings(options),
            "versions": versions(peer.distributions, peer.packages),
            **({"gpu_bytes": after - before} if before is not None and after is not None else {}),
            "cold_start_s": worker.cold_start_s,
            "install_bytes": install_bytes(peer.distributions, peer.packages),
            "error_share": worker.error_share,
            "largest_error_share": LARGEST_ERROR[peer.dtype],
        }
        return Candidate(peer, dict(options), worker, facts, last_ms=worker.first_ms)

    def _try(self, found: list[Candidate], start: float) -> tuple[str, str] | None:
        """Run some turns of all variants of a peer, and remove those that fail; return the status and reason of the last failure."""
        failure = None
        for _ in range(TRIAL_ROUNDS if max(candidate.last_ms for candidate in found) < SHORT_MS else 1):
            for candidate in list(found):
                candidate.spent_s = time.monotonic() - start  # the limit is that of all variants together
                if candidate.spent_s >= self.plan.cell_s:
                    return failure
                failure = self._turn(candidate, found) or failure
        return failure

    def _rounds(self, running: list[Candidate]) -> None:
        """Let the candidates take turns; one leaves when it has reached its limit, and all end with the anchor if there is nothing else."""
        end, done, plan = time.perf_counter() + self.plan.seconds, 0, self.plan
        while running and (done < plan.rounds if plan.rounds is not None else done < plan.min_rounds or time.perf_counter() < end):
            for candidate in [candidate for candidate in running if candidate is not self._anchor and self._cannot_go_on(candidate)]:
                running.remove(candidate)
            if not any(candidate.peer is not self._only_for_comparison for candidate in running):
                break
            for candidate in list(running):
                if failure := self._turn(candidate, running):
                    self._end_early(candidate, *failure)
            done += 1
            anchor = self._anchor if self._anchor in running else None
            for candidate in running:
                if anchor is not None and candidate is not anchor:
                    candidate.ratios.append(statistics.median(candidate.turns[-1]) / statistics.median(anchor.turns[-1]))
                if done >= plan.least_rounds:
                    self._keep(candidate)

    def _cannot_go_on(self, candidate: Candidate) -> bool:
        """Return whether another turn would exceed the limit; keep what was measured until then."""
        if candidate.spent_s + candidate.last_ms / 1e3 <= self.plan.cell_s:
            return False
        if candidate.turns:
            self._keep(candidate)
        else:
            self._report(candidate.peer, TOO_LONG, f"its start and one call take more than {self.plan.cell_s:.0f} s")
        return True

    def _turn(self, candidate: Candidate, running: list[Candidate]) -> tuple[str, str] | None:
        """Run one turn of a candidate. If it fails, remove it from the list, and return a status and the reason."""
        left = self.plan.cell_s - (0.0 if candidate is self._anchor else candidate.spent_s)  # the anchor runs as long as the others do
        candidate.worker.timeout = max(1.0, left)
        try:
            candidate.turn()
        except WorkerFailedError as error:
            running.remove(candidate)
            candidate.worker.close(timeout=0)
            if candidate is self._anchor:
                self._anchor = None
            return TOO_LONG if isinstance(error, WorkerTimeoutError) else "failed", f"while drawing: {error}"
        return None

    def _end_early(self, candidate: Candidate, status: str, reason: str) -> None:
        """Keep what was measured before a turn exceeded the limit; report other failures."""
        if status == TOO_LONG and candidate.turns:
            self.show_progress(f"  {candidate.peer.name}: ended after {len(candidate.turns)} rounds: {reason}")
            self._keep(candidate)
        else:
            self._report(candidate.peer, status, reason)

    def _keep(self, candidate: Candidate) -> None:
        """Keep the figures of a candidate."""
        if candidate.peer is self._only_for_comparison:
            return
        figures = {
            "status": "ok",
            **candidate.facts,
            **summary(candidate.times, self.n),
            "rounds": len(candidate.turns),
            **({"times_as_long": statistics.median(candidate.ratios)} if candidate.ratios else {}),
            **candidate.memory,
        }
        self.keep(candidate.peer.name, figures)


def summary(times: Sequence[float], n: int) -> dict[str, float]:
    """Summarize the milliseconds of calls that generate n samples each."""
    ordered = sorted(times)
    median = statistics.median(ordered)
    return {
        "median_ms": median,
        "p95_ms": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "min_ms": ordered[0],
        "samples_per_s": n / median * 1e3,
        "draws": len(ordered),
    }


def _settings(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"
