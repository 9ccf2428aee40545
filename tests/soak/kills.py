"""Kills exports and generations at random moments. Nothing may be lost or damaged, and the next complete run must leave no trace of the killed ones.

    python tests/soak/kills.py 200            200 kills with SIGKILL, SIGTERM, SIGHUP and SIGINT; results go to benchmarks/results/kills.json

A round kills one command several times and then lets it end. After each kill, the file or bundle at the destination must be the old or the new one, complete.
After the round, the destination's folder must hold nothing else, nor the cache any unfinished entry.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scm_runtime.bundle.checksums import check_files
from scm_runtime.bundle.manifest import MANIFEST, read_manifest
from scm_runtime.errors import BundleError

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
KILLS_PER_ROUND = 4
EXPORT_SHARE = 0.25  # of the rounds; an export takes ten times as long as a generation
MAX_WAIT_S = 120.0
BIN = Path(sys.executable).parent


@dataclass
class Kills:
    """A run of kills. Started by ``main`` and by test_kills.py."""

    folder: Path
    seed: int = 0
    checkpoint: Path | None = None
    """Checkpoint to export; None to kill generations only."""
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What was lost, damaged or left."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._env = {**os.environ, "HOME": str(self.folder / "home"), "SCM_CACHE_DIR": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        (self.folder / "home").mkdir()

    def run(self, kills: int) -> None:
        """Kill commands ``kills`` times."""
        while self.counts["kills"] < kills:
            if self.checkpoint and self._rng.random() < EXPORT_SHARE:
                self._round("export", self._export_command(), self._is_whole_bundle)
            else:
                name, arguments = self._rng.choice([("grid.png", ()), ("images/", ("--num-images", "40")), ("one.jpg", ())])
                if self._rng.random() < 0.5:
                    shutil.rmtree(self.folder / "cache", ignore_errors=True)  # then the cache is being written
                self._round(name, [BIN / "scm-runtime", "generate", "digits", "--seed", "7", "--labels", "1,2,3", *arguments], self._are_whole_images)

    def _export_command(self) -> list[str | Path]:
        assert self.checkpoint is not None
        return [BIN / "scm-export", self.checkpoint, "--force", "--steps", "1"]

    def _round(self, name: str, command: list[str | Path], is_whole: Callable[[Path], bool]) -> None:
        """Complete a command, kill it some times, complete it again, and look for what was left."""
        folder = self.folder / "results" / name.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        command = [*command, "-o", f"{target}/" if name.endswith("/") else target]
        duration = self._complete(command)
        expected = fingerprint(folder)
        for _ in range(KILLS_PER_ROUND):
            number = self._rng.choice(SIGNALS)
            if self._kill(command, folder, number, duration):
                self.counts["kills"] += 1
                self.counts[f"{name.strip('/')}: {signal.Signals(number).name}"] += 1
            if not is_whole(target):
                self.wrong.append(f"{name}: lost or damaged after {signal.Signals(number).name}: {sorted(names(folder))}")
        self._complete(command)
        if not is_whole(target) or fingerprint(folder).keys() != expected.keys():
            self.wrong.append(f"{name}: left after the next run: {sorted(fingerprint(folder).keys() ^ expected.keys())}")
        if name != "export" and fingerprint(folder) != expected:
            self.wrong.append(f"{name}: other images after the next run")
        if parts := [str(path) for path in (self.folder / "cache").rglob("*") if "part" in path.name]:
            self.wrong.append(f"{name}: unfinished entries in the cache: {parts}")

    def _complete(self, command: list[str | Path]) -> float:
        start = time.monotonic()
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False, timeout=MAX_WAIT_S)
        if done.returncode:
            self.wrong.append(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}")
        return time.monotonic() - start

    def _kill(self, command: list[str | Path], folder: Path, number: int, duration: float) -> bool:
        """Kill a command at a random time, half of the times soon after it has begun to write. Returns False if it had ended before."""
        with running(command, self._env) as process:
            if self._rng.random() < 0.5:
                wait(process, self._rng.random() * duration)
            else:
                before = names(folder)
                while process.poll() is None and names(folder) == before:
                    time.sleep(0.002)
                wait(process, self._rng.random() * duration * 0.2)
            was_running = process.poll() is None
            process.send_signal(number)
            try:
                process.wait(MAX_WAIT_S)
            except subprocess.TimeoutExpired:
                self.wrong.append(f"{command}: still running {MAX_WAIT_S:.0f} s after {signal.Signals(number).name}")
            assert process.stderr is not None
            if "Traceback" in process.stderr.read().decode(errors="replace"):
                self.wrong.append(f"{command}: a traceback after {signal.Signals(number).name}")
        return was_running

    def _is_whole_bundle(self, bundle: Path) -> bool:
        try:
            check_files(bundle, read_manifest(bundle))
        except BundleError:
            return False
        return (bundle / MANIFEST).is_file()

    def _are_whole_images(self, target: Path) -> bool:
        """Return True if each visible file is complete: its last bytes are those of a PNG or JPEG file."""
        ends = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}
        files = [target] if target.is_file() else [path for path in target.glob("*") if not path.name.startswith(".")]
        return bool(files) and all(path.read_bytes().endswith(ends[path.suffix]) for path in files)


def names(folder: Path) -> set[str]:
    """Return the names in a folder, hidden ones included."""
    return {path.name for path in folder.iterdir()}


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, hidden ones included, by its relative path."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def running(command: list[str | Path], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, and leave no process of it behind."""
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for some seconds, or until the process ends."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def main() -> None:
    """Run as a program. Arguments: number of kills and seed."""
    numbers = [int(argument) for argument in sys.argv[1:]]
    kills, seed = numbers[0] if numbers else 200, numbers[1] if len(numbers) > 1 else 0
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "benchmarks")]
    from _common import save_and_print

    from conftest import write_tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        run = Kills(Path(folder), seed, write_tiny_checkpoint(Path(folder) / "tiny.pt", channel_mult=(1,)))
        run.run(kills)
    figures: dict[str, Any] = {"seed": seed, "counts": dict(sorted(run.counts.items())), "wrong": run.wrong}
    save_and_print("kills", figures)
    if run.wrong:
        sys.exit("\n".join(run.wrong))


if __name__ == "__main__":
    main()
