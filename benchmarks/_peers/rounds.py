"""The measurement: peers that are loaded side by side draw in turn, round after round, so that a noisy machine disturbs all alike."""

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
from _peers.sizes import BASE_BYTES, Size, available_bytes, lacking

PAUSE_S = 0.02  #       between turns: threads of the last one fall asleep
TURN_MS = 250.0  #      that a turn lasts at least, where a draw is shorter
MOST_DRAWS = 20  #      in a turn
SHORT_MS = 1000.0  #    a draw this short is preceded by one that is not counted
TRIAL_ROUNDS = 3

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How long to measure, and where."""

    device: str
    threads: int
    seconds: float
    """For the rounds of one size and batch size, once all are loaded."""
    rounds: int | None
    """Exactly so many instead."""
    least_rounds: int
    """However long they take."""
    patience: float
    """Seconds to wait for an answer."""


@dataclass(eq=False)
class Candidate:
    """One peer with one of its variants, running."""

    peer: Peer
    options: dict[str, Any]
    worker: Worker
    gpu_bytes: int | None
    turns: list[list[float]] = field(default_factory=list)
    """Milliseconds, by round."""
    ratios: list[float] = field(default_factory=list)
    """Of its turns to the anchor's in the same round."""
    last_ms: float | None = None
    """Of a draw, about."""

    @property
    def times(self) -> list[float]:
        return [value for turn in self.turns for value in turn]

    def turn(self) -> None:
        """Draw for a moment."""
        if self.last_ms is None:
            self.last_ms = self.worker.draw(0, 1)[0]
        short = self.last_ms < SHORT_MS
        count = max(1, min(MOST_DRAWS, round(TURN_MS / self.last_ms)))
        turn = self.worker.draw(int(short), count)
        self.last_ms = statistics.median(turn)
        self.turns.append(turn)
        time.sleep(PAUSE_S)


class Row:
    """The figures of one size and batch size."""

    def __init__(self, case: Case, size: Size, n: int, plan: Plan, scratch: Path, tell: Tell) -> None:
        self.case, self.size, self.n, self.plan, self.scratch, self.tell = case, size, n, plan, scratch, tell
        self.peers: dict[str, dict[str, Any]] = {}
        self._anchor: Candidate | None = None
        self._starts = 0

    def measure(self, peers: Sequence[Peer]) -> dict[str, dict[str, Any]]:
        """Figures by the peer's name; of one that cannot run, its status and the reason."""
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
        self.tell(f"  {peer.name}: {status}: {reason}")
        self.peers[peer.name] = {"status": status, "reason": reason, "dtype": peer.dtype}

    # -- A group: the anchor and as many others as there is memory for --------------------------------------------------

    def _group(self, waiting: list[Peer]) -> list[Peer]:
        """Measure the first of them, and return the rest."""
        running: list[Candidate] = [self._anchor] if self._anchor is not None else []
        group: list[Candidate] = []
        try:
            while waiting:
                need = waiting[0].memory * self.size.weights_bytes + BASE_BYTES
                if reason := lacking(need, waiting[0].name, available_bytes()):
                    if group:
                        break  # when those of this group have ended
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
        """The peer with the variant that is fastest here."""
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
        self.peers.pop(peer.name, None)  # another variant failed
        best = min(found, key=lambda candidate: min(map(statistics.median, candidate.turns), default=0.0))
        for candidate in found:
            if candidate is not best:
                candidate.worker.close()
        best.turns.clear()
        if not best.worker.error_share <= LARGEST_ERROR[peer.dtype]:
            best.worker.close()
            self._report(peer, "wrong", f"its result is off by {best.worker.error_share:.2g} of the reference, more than {LARGEST_ERROR[peer.dtype]:.2g}")
            return None
        self.tell(f"  {peer.name}: ready, first result after {best.worker.cold_start_s:.1f} s, {_settings(best.options)}")
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
        worker = Worker(spec, self.scratch / str(self._starts), self.plan.patience, peer.environment)
        after = gpu_bytes_used() if before is not None else None
        return Candidate(peer, dict(options), worker, after - before if before is not None and after is not None else None)

    def _rounds(self, running: list[Candidate]) -> None:
        end, done = time.perf_counter() + self.plan.seconds, 0
        while running and (done < self.plan.rounds if self.plan.rounds is not None else done < self.plan.least_rounds or time.perf_counter() < end):
            self._turns(running)
            done += 1
            anchor = next((candidate for candidate in running if candidate.peer.name == ANCHOR), None)
            for candidate in running:
                if anchor is not None and candidate is not anchor:
                    candidate.ratios.append(statistics.median(candidate.turns[-1]) / statistics.median(anchor.turns[-1]))

    def _turns(self, running: list[Candidate]) -> None:
        """One turn of each; those that fail are taken out of the list."""
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
        """Its figures, and the end of its process."""
        peer = candidate.peer
        try:
            if peer.name in self.peers:  # it failed
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
    """Of draws of n samples each, in milliseconds."""
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
