"""The benchmark's side of the protocol: starts workers, sends commands, and ends them."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

PACKAGE = Path(__file__).parent
# The benchmarks folder must not be on a worker's path: some of its scripts have the names of packages (cuda).
PROGRAM = """
import sys, types
package = types.ModuleType("_peers")
package.__path__ = [sys.argv.pop(1)]
sys.modules["_peers"] = package
from _peers.worker import main
main()
"""


class WorkerFailedError(RuntimeError):
    """A worker ended, did not answer in time, or reported an error."""


class WorkerTimeoutError(WorkerFailedError):
    """A worker did not answer in time."""


class Worker:
    """A process that runs one peer."""

    def __init__(self, spec: dict[str, Any], scratch: Path, timeout: float, environment: dict[str, str] | None = None, python: Path | None = None) -> None:
        """Start the process and wait for its first result.

        Args:
            spec: the argument of ``worker.py``.
            scratch: an empty folder for its log and its caches, so that every start is a cold start.
            timeout: seconds to wait for an answer.
            environment: additional environment variables of the process.
            python: the interpreter; by default this one.

        Raises:
            WorkerFailedError: there is no first result.
        """
        scratch.mkdir(parents=True)
        self._log, self.timeout = scratch / "log.txt", timeout
        start = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-c", PROGRAM, str(PACKAGE), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env={**os.environ, **worker_environment(scratch, spec["threads"]), **(environment or {})},
                start_new_session=True,  # to end its compiler processes too
            )
        try:
            ready = self._answer()
        except BaseException:
            self.close(timeout=0)
            raise
        self.cold_start_s = time.perf_counter() - start
        self.error_share, self.first_ms = float(ready["error_share"]), float(ready["first_ms"])

    def draw(self, warm: int, count: int) -> list[float]:
        """Return the milliseconds of each of ``count`` calls, after ``warm`` untimed ones."""
        return [float(value) for value in self._ask(f"draw {warm} {count}")["ms"]]

    def memory(self) -> dict[str, int]:
        """Return the peak and the current memory in bytes."""
        return {name: int(value) for name, value in self._ask("memory").items()}

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n".encode())
        except OSError as error:
            raise WorkerFailedError(self._how_it_ended()) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, self.timeout)):
                raise WorkerTimeoutError(f"no answer within {self.timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailedError(self._how_it_ended())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerFailedError(answer["failed"])
        return answer

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        why = " (the system may have run out of memory)" if code == -signal.SIGKILL else ""
        return f"the process ended with {what}{why}{': ' + said[-1].strip()[:300] if said else ''}"

    def close(self, timeout: float = 20) -> None:
        """End the process and its children; kill them if they have not ended within ``timeout`` seconds."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout)  # it ends when its input is closed
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def worker_environment(scratch: Path, threads: int) -> dict[str, str]:
    """Return the variables for compiler caches, and for the threads of libraries that have no argument for their number."""
    return {
        "SCM_CACHE_DIR": str(scratch / "scm"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
