"""Reads mutated files in child processes and reports what a reader may not do: crash, hang, raise anything but an ScmError, write, run, take gigabytes.

Every input follows from the campaign's seed, its target's name and its number. As a program (``make fuzz``) it runs for a time, and writes each input
that failed into a folder.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, get_args

from fuzz.mutations import mutate
from fuzz.seeds import Target, make_targets
from scm_runtime.errors import ScmError

BATCH = 100  # files per child process
MAX_SECONDS, MAX_CPU_SECONDS = 60, 8  # per file
MAX_GROWTH = 512 << 20  # bytes that reading one file may add to the resident memory
MAX_ADDRESS_SPACE = 3 << 29  # bytes beyond those of the parent; larger allocations fail and do not burden the machine

MAX_MESSAGE = 5000  # characters

Kind = Literal["executed", "crashed", "hung", "traceback", "memory", "message"]
"""What a reader did; "message": refused a file with a message that is too long, or would change a terminal's state."""

# What a reader never does, by the names of Python's audit events.
FORBIDDEN_EVENTS: tuple[str, ...] = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn", "webbrowser.open", "socket.connect"),
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil."),
)


@dataclass(frozen=True)
class Failure:
    """An input that a reader did not survive."""

    target: str
    number: int
    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.target} {self.number}: {self.detail}"


@dataclass
class Report:
    """Results of a campaign."""

    tried: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)

    def summary(self) -> str:
        counts = Counter(failure.kind for failure in self.failures)
        return f"{self.tried.total()} files tried, {self.refused} refused; " + ", ".join(f"{kind} {counts[kind]}" for kind in get_args(Kind))


def changed_file(target: Target, seed: int, number: int) -> tuple[str, bytes]:
    """The file of one input: its path relative to the target's folder, and its contents."""
    chance = Random(f"{seed} {target.name} {number}")
    name = chance.choice(target.mutable)
    return name, mutate(name, (target.folder / name).read_bytes(), chance)


def try_files(target: Target, seed: int, numbers: range, report: Report) -> None:
    """Read the inputs with these numbers, in as many child processes as it takes."""
    while numbers:
        done = _child(target, seed, numbers, report)
        report.tried[target.name] += done
        numbers = numbers[done:]


def _child(target: Target, seed: int, numbers: range, report: Report) -> int:
    """Read inputs in a new process. Returns how many it read, the one that ended it included."""
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "input"
        shutil.copytree(target.folder, copy)
        child = os.fork()
        if child == 0:
            os.close(read_end)
            _run_child(target, seed, numbers, copy, write_end)
        os.close(write_end)
        with os.fdopen(read_end, "r") as pipe:
            lines = pipe.read().splitlines()
        status = os.waitpid(child, 0)[1]
    done = sum(line == "start" for line in lines)
    number = numbers[0] - 1
    for line in lines:
        what, _, detail = line.partition(" ")
        if what == "start":
            number += 1
        elif what == "refused":
            report.refused += 1
        elif what != "read":
            report.failures.append(Failure(target.name, number, what, detail))  # type: ignore[arg-type]  # the child writes only kinds
    if os.WIFSIGNALED(status):
        ended = signal.Signals(os.WTERMSIG(status))
        kind: Kind = "hung" if ended in (signal.SIGALRM, signal.SIGPROF) else "crashed"
        report.failures.append(Failure(target.name, number, kind, ended.name))
    elif status:
        report.failures.append(Failure(target.name, number, "crashed", f"exit code {os.waitstatus_to_exitcode(status)}"))
    return max(done, 1)


def _run_child(target: Target, seed: int, numbers: range, folder: Path, write_end: int) -> None:
    """Read inputs and write a line for each event. Does not return."""
    code = 1
    try:
        _limit_process()
        forbidden: list[str] = []
        reading = [False]
        if not target.writes:
            sys.addaudithook(lambda event, arguments: forbidden.append(shown(event, arguments)) if reading[0] and is_forbidden(event, arguments) else None)
        for number in numbers:
            name, data = changed_file(target, seed, number)
            original = (folder / name).read_bytes()
            (folder / name).write_bytes(data)
            os.write(write_end, b"start\n")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
            reading[0] = True
            outcome = _read(target, folder)
            reading[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > MAX_GROWTH:
                outcome += f"\nmemory {grown >> 20} MiB"
            if forbidden:
                outcome += f"\nexecuted {forbidden[0]}"
                forbidden.clear()
            os.write(write_end, f"{outcome}\n".encode("utf-8", "backslashreplace"))
            if target.writes:
                shutil.rmtree(folder)
                shutil.copytree(target.folder, folder)
            else:
                (folder / name).write_bytes(original)
            if grown > MAX_GROWTH:
                break  # the next input starts with little memory again
        code = 0
    except BaseException:  # noqa: BLE001 - a forked child must not return into the caller
        traceback.print_exc()
    finally:
        os._exit(code)


def _limit_process() -> None:
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    logging.disable()
    faulthandler.disable()
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + MAX_ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for received in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(received, signal.SIG_DFL)


def _read(target: Target, folder: Path) -> str:
    try:
        target.read(folder)
    except ScmError as error:
        message = str(error)
        if not message.replace("\n", "").replace("\t", "").isprintable() or len(message) > MAX_MESSAGE:
            return f"message of {len(message)} characters: {message[:300]!a}"
        return "refused"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
        place = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in place if "scm_" in frame.filename] or place
        at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        return f"traceback {type(error).__name__} at {at}: {' '.join(str(error).split())[:200]}"
    return "read"


def is_forbidden(event: str, arguments: tuple[object, ...]) -> bool:
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        return (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or (
            isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and arguments[0] != os.devnull
        )
    return event.startswith(FORBIDDEN_EVENTS)


def shown(event: str, arguments: tuple[object, ...]) -> str:
    return ascii((event, arguments))[:300]


# ----------------------------------------------------------------------------
# The program.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--only", help="part of the names of the targets to try")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        targets = [target for target in make_targets(Path(folder)) if (given.only or "") in target.name]
        report, end = Report(), time.monotonic() + given.seconds
        for target, numbers in _rounds(targets):
            if time.monotonic() > end:
                break
            known = len(report.failures)
            try_files(target, given.seed, numbers, report)
            for failure in report.failures[known:]:
                print(failure, flush=True)  # noqa: T201 - the program's output
                name, data = changed_file(target, given.seed, failure.number)
                kept = given.out / f"{target.name.replace(' ', '-')}-{given.seed}-{failure.number}" / Path(name).name
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data)
    print(report.summary())  # noqa: T201 - the program's output
    sys.exit(bool(report.failures))


def _rounds(targets: Sequence[Target]) -> Iterator[tuple[Target, range]]:
    first = 0
    while True:
        for target in targets:
            yield target, range(first, first + BATCH)
        first += BATCH


if __name__ == "__main__":
    main()
