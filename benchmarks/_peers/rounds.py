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
from _peers.client import Worker, WorkerFailedError
from _peers.installed import install_bytes, versions
from _peers.machine import gpu_bytes_used
from _peers.sizes import BASE_BYTES, Size, available_bytes, memory_shortage

PAUSE_S = 0.02  #       between turns, so that the threads of the last peer go to sleep
TURN_MS = 250.0  #      target duration of a turn, if a call is shorter
MAX_CALLS_PER_TURN = 20  #      maximum number of calls per turn
SHORT_MS = 1000.0  #    a turn of shorter calls begins with an untimed one
TRIAL_ROUNDS = 3

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How long to measure, and where."""

    device: str
    threads: int
    seconds: float
    """Duration of the rounds of one size and batch size, once all peers are loaded."""
    rounds: int | None
    """Exact number of rounds, in place of ``seconds``."""
    min_rounds: int
    """Minimum number of rounds, however long they take."""
    timeout: float
    """Seconds to wait for a peer's answer."""


@dataclass(eq=False)
class Candidate:
    """A running peer with one of its variants."""

    peer: Peer
    options: dict[str, Any]
    worker: Worker
    gpu_bytes: int | None
    turns: list[list[float]] = field(default_factory=list)
    """Milliseconds of each call, by round."""
    ratios: list[float] = field(default_factory=list)
    """Median of its turn divided by that of the anchor in the same round, by round."""
    last_ms: float | None = None
    """Approximate milliseconds of a call."""

    @property
    def times(self) -> list[float]:
        return [value for turn in self.turns for value in turn]

    def turn(self) -> None:
        """Run for one turn."""
        if self.last_ms is None:
            self.last_ms = self.worker.draw(0, 1)[0]
        short = self.last_ms < SHORT_MS
        count = max(1, min(MAX_CALLS_PER_TURN, round(TURN_MS / self.last_ms)))
        turn = self.worker.draw(int(short), count)
        self.last_ms = statistics.median(turn)
        self.turns.append(turn)
        time.sleep(PAUSE_S)


class Row:
    """Measures one size and batch size."""

    def __init__(self, case: Case, size: Size, n: int, plan: Plan, scratch: Path, show_progress: Progress) -> None:
        self.case, self.size, self.n, self.plan, self.scratch, self.show_progress = case, size, n, plan, scratch, show_progress
        self.peers: dict[str, dict[str, Any]] = {}
        self._anchor: Candidate | None = None
        self._starts = 0

    def measure(self, peers: Sequence[Peer]) -> dict[str, dict[str, Any]]:
        """Return the figures by name of the peer; for a peer that cannot run, its status and the reason."""
        waiting = [peer for peer in peers if self._is_here(peer)]
        try:
            while waiting:
                waiting = self._group(waiting)
        finally:
            if self._anchor is not None:
                self._finish(self._anchor)
        return {peer.name: self.peers[peer.name] for peer in peers}

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
        self.peers[peer.name] = {"status": status, "reason": reason, "dtype": peer.dtype}

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
            if group:
                self._rounds([*running, *group])
        finally:
            for candidate in group:
                if candidate is not self._anchor:
                    self._finish(candidate)
        return waiting

    def _start(self, peer: Peer) -> Candidate | None:
        """Start the peer with the variant that is fastest on this machine."""
        found: list[Candidate] = []
        reason = "nothing to run"
        for options in peer.variants if self.size.trial else peer.variants[:1]:
            try:
                found.append(self._open(peer, options))
            except WorkerFailedError as error:
                reason = str(error)
        if len(found) > 1:
            for _ in range(TRIAL_ROUNDS):
                self._turns(found)
        if not found:
            if peer.name not in self.peers:
                self._report(peer, "failed", reason)
            return None
        self.peers.pop(peer.name, None)  # remove the report of a variant that failed
        best = min(found, key=lambda candidate: min(map(statistics.median, candidate.turns), default=0.0))
        for candidate in found:
            if candidate is not best:
                candidate.worker.close()
        best.turns.clear()
        if not best.worker.error_share <= LARGEST_ERROR[peer.dtype]:
            best.worker.close()
            self._report(peer, "wrong", f"its result is off by {best.worker.error_share:.2g} of the reference, more than {LARGEST_ERROR[peer.dtype]:.2g}")
            return None
        self.show_progress(f"  {peer.name}: ready, first result after {best.worker.cold_start_s:.1f} s, {_settings(best.options)}")
        return best

    def _open(self, peer: Peer, options: Mapping[str, Any]) -> Candidate:
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
        worker = Worker(spec, self.scratch / str(self._starts), self.plan.timeout, peer.environment)
        after = gpu_bytes_used() if before is not None else None
        return Candidate(peer, dict(options), worker, after - before if before is not None and after is not None else None)

    def _rounds(self, running: list[Candidate]) -> None:
        end, done = time.perf_counter() + self.plan.seconds, 0
        while running and (done < self.plan.rounds if self.plan.rounds is not None else done < self.plan.min_rounds or time.perf_counter() < end):
            self._turns(running)
            done += 1
            anchor = next((candidate for candidate in running if candidate.peer.name == ANCHOR), None)
            for candidate in running:
                if anchor is not None and candidate is not anchor:
                    candidate.ratios.append(statistics.median(candidate.turns[-1]) / statistics.median(anchor.turns[-1]))

    def _turns(self, running: list[Candidate]) -> None:
        """Run one turn of each candidate, and remove those that fail from the list."""
        for candidate in list(running):
            try:
                candidate.turn()
            except WorkerFailedError as error:
                running.remove(candidate)
                candidate.turns.clear()
                candidate.worker.close()
                if candidate is self._anchor:
                    self._anchor = None
                self._report(candidate.peer, "failed", f"while drawing: {error}")

    def _finish(self, candidate: Candidate) -> None:
        """Record the figures of a candidate, and end its process."""
        peer = candidate.peer
        try:
            if peer.name in self.peers:  # it has failed
                return
            memory = candidate.worker.memory()
            self.peers[peer.name] = {
                "status": "ok",
                "dtype": peer.dtype,
                "settings": f"{self.plan.threads} threads, {_settings(candidate.options)}" if self.plan.device == "cpu" else _settings(candidate.options),
                "versions": versions(peer.distributions),
                **summary(candidate.times, self.n),
                **({"times_as_long": statistics.median(candidate.ratios)} if candidate.ratios else {}),
                **memory,
                **({"gpu_bytes": candidate.gpu_bytes} if candidate.gpu_bytes is not None else {}),
                "cold_start_s": candidate.worker.cold_start_s,
                "install_bytes": install_bytes(peer.distributions),
                "error_share": candidate.worker.error_share,
                "largest_error_share": LARGEST_ERROR[peer.dtype],
            }
        except WorkerFailedError as error:
            self._report(peer, "failed", f"at its end: {error}")
        finally:
            candidate.worker.close()


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
