"""Run stages one after another, each within its time, and keep the outcome of each as it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from _first_gpu.stages import ROOT, Command, Stage

TAIL_LINES = 25  # of the output, in the record of a stage
OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"

Outcome = dict[str, Any]
"""``status``, ``seconds``, and ``reason`` or the last lines of the ``output``."""


def run_stages(
    stages: Sequence[Stage],
    outcomes: dict[str, Outcome],
    *,
    limit_s: float,
    environment: Mapping[str, str],
    keep: Callable[[], None],
    say: Callable[[str], None],
    left_out: Collection[str] = (),
) -> None:
    """Run the stages that have not succeeded yet.

    Args:
        stages: in their order.
        outcomes: those of an earlier run by stage; each stage that ends replaces its own.
        limit_s: time for all stages. A stage that does not get its own limit before it is over gets the rest.
        environment: environment variables of the commands.
        keep: called after each stage, to store the outcomes.
        say: shows a line.
        left_out: names of stages that are not run now.
    """
    end = time.monotonic() + limit_s
    for stage in stages:
        if outcomes.get(stage.name, {}).get("status") == OK:
            say(f"{stage.name}: done before")
            continue
        missing = [name for name in stage.needs if outcomes.get(name, {}).get("status") != OK]
        left = min(stage.limit_s, end - time.monotonic())
        unavailable = "left out" if stage.name in left_out else stage.unavailable
        reason = unavailable or (f"needs {', '.join(missing)}" if missing else "no time was left" if left < 1 else None)
        if reason is not None:
            outcomes[stage.name] = {"status": SKIPPED, "seconds": 0.0, "reason": reason}
        else:
            say(f"{stage.name}: at most {left:.0f} s")
            outcome = outcomes[stage.name] = run_stage(stage.commands, left, environment)
            if outcome["status"] == OK and stage.expects not in "\n".join(outcome["output"]):
                outcome |= {"status": FAILED, "reason": f"the output has no {stage.expects.strip()!r}"}
        ended = outcomes[stage.name]
        say(", ".join((f"{stage.name}: {ended['status']}", *([ended["reason"]] if "reason" in ended else []), f"{ended['seconds']:.0f} s")))
        keep()


def run_stage(commands: Sequence[Command], limit_s: float, environment: Mapping[str, str]) -> Outcome:
    """Run commands in the root of the repository until one fails, or the time is over."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        status = OK
        for command in commands:
            status = _run(command, limit_s - (time.monotonic() - start), output, environment)
            if status != OK:
                break
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "output": lines[-TAIL_LINES:]}


def _run(command: Command, limit_s: float, output: Any, environment: Mapping[str, str]) -> str:
    try:
        # A session of its own: the processes that the command has started end with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True)
    except OSError as error:
        output.write(f"{command[0]}: {error}\n".encode())
        return FAILED
    try:
        return OK if process.wait(max(limit_s, 0.1)) == 0 else FAILED
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
