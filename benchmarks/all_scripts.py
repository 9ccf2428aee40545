"""Run the benchmarks of the CPU one after another, for at most some minutes. What was measured before is not measured again, so another call goes on.

    make bench            python benchmarks/all_scripts.py short     the small models: at most 20 minutes
    make bench-large      python benchmarks/all_scripts.py large     S, XXL and SANA-Sprint: at most four hours, 16 GB of memory, 20 GB of disk

A script that is still running when the time is over is interrupted, as by Ctrl-C. One that fails does not stop the others.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

FOLDER = Path(__file__).parent
END_S = 60.0  # that a script may take to end its processes
OK, FAILED, INTERRUPTED = "done", "failed", "interrupted"


@dataclass(frozen=True)
class Series:
    """Command lines of scripts, and the time for all."""

    minutes: float
    """After these, the end of a script and the tables may take ``END_S`` each."""
    scripts: tuple[tuple[str, ...], ...]


SERIES = {
    "short": Series(
        18,
        (
            ("teacher.py",),
            ("peers.py", "--preset", "short", "--minutes", "13"),
            ("startup.py",),
            ("cold_start.py",),
            ("host.py",),
            ("ops.py",),
            ("ops.py", "--only", "convolutions"),
            ("export.py",),
            ("breakdown.py", "XXS", "CM", "LCM", "SANA-Sprint"),
            ("session_options.py",),
            ("waiting.py",),
            ("cancelling.py",),
        ),
    ),
    "large": Series(
        238,
        (
            ("teacher.py", "S", "XXL"),
            ("peers.py", "--preset", "large"),
            ("ops.py", "--only", "steps", "--size", "S"),
            ("cold_start.py", "S 64x64x4"),
            ("export.py", "S", "XXL", "SANA-Sprint"),
            ("breakdown.py", "S"),
        ),
    ),
}


def run(script: tuple[str, ...], limit_s: float) -> str:
    """Run a script, interrupt it after some seconds, and return how it ended."""
    process = subprocess.Popen([sys.executable, str(FOLDER / script[0]), *script[1:]])
    try:
        return OK if process.wait(limit_s) == 0 else FAILED
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        end(process)
        return INTERRUPTED
    except KeyboardInterrupt:
        end(process)  # the terminal has interrupted it too
        raise


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for an interrupted script, and kill it if it takes too long."""
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@click.command(help=__doc__.split("\n")[0])
@click.argument("name", type=click.Choice(list(SERIES)))
@click.option("--minutes", type=float, help="By default 18 and 238; at the end two more.")
def main(name: str, minutes: float | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs, and what they start, ignore it
    series = SERIES[name]
    last = time.monotonic() + 60 * (series.minutes if minutes is None else minutes)
    outcomes: dict[str, list[str]] = {OK: [], FAILED: [], INTERRUPTED: []}
    for script in series.scripts:
        line, left = " ".join(script), last - time.monotonic()
        if left < 1:
            outcomes[INTERRUPTED].append(line)
            continue
        click.echo(f"== {time.strftime('%H:%M:%S')} {line}, at most {left / 60:.0f} minutes")
        outcomes[run(script, left)].append(line)
    if (outcome := run(("figures.py",), END_S)) != OK:
        outcomes[FAILED].append(f"figures.py ({outcome}), so the tables of docs/benchmarks.md are not written")
    if rest := outcomes[INTERRUPTED]:
        click.echo(f"The time is over. Call it again for the rest: {'; '.join(rest)}")
    if failed := outcomes[FAILED]:
        raise click.ClickException(f"failed, as its output says: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
