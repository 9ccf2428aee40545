"""A process that exits while graphs run exits with code 0 and prints nothing, whichever thread runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import toy_bundle
from support import ROOT, run_python

PRELUDE = f"""
import asyncio, sys, threading, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import numpy as np
from scheduler_control import engine_of, step_started_event
from scm_runtime import Generator, GeneratorClosedError
from scm_runtime.common import process

class Teardown:
    "Delays the teardown of the interpreter. A daemon thread that returns from ONNX Runtime during that time would abort the process."
    def __del__(self, sleep=time.sleep):
        sleep(2)

def slow_teardown():
    sys.teardown = Teardown()  # attributes of sys are deleted late, and always

process.CALLBACK_WAIT_S = 0.1
EMBEDS = np.ones((2, {toy_bundle.WIDTH}), np.float32)
LONG_LOOP = {{"prompt_embeds": EMBEDS, "guidance_scale": {toy_bundle.SLOW_GUIDANCE}}}
LONG_OPERATOR = {{"prompt_embeds": EMBEDS, "conditioning": {{"score": {toy_bundle.SLOW_SCORE}}}}}

def open_generator():
    return Generator(sys.argv[1], threads=1, cache_dir=False)

def wait_for_step(generator):
    step_started = step_started_event(engine_of(generator))
    def wait():
        assert step_started.wait(60)
        time.sleep(0.2)  # until the middle of the step
    return wait

def in_daemon(call):
    def run():
        try:
            call()
        except GeneratorClosedError:  # what waits for a future gets it; a direct call ends its thread instead
            pass

    threading.Thread(target=run, daemon=True).start()
"""


def exits_quietly(program: str, *arguments: str | Path) -> str:
    """Run a program, assert that it exits with code 0 and prints nothing to stderr, and return its stdout."""
    done = run_python(PRELUDE + program, *arguments)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("request_", ["LONG_LOOP", "LONG_OPERATOR"])
@pytest.mark.parametrize(
    "how",
    [
        "generator.submit(**{})",
        "generator.submit(**{}, timeout=300)",
        "in_daemon(lambda: generator(**{}))",
        "in_daemon(lambda: generator(**{}, timeout=300))",
        "in_daemon(lambda: generator.submit(**{}).exception())",
        "in_daemon(lambda: asyncio.run(generator.async_(**{})))",
        "in_daemon(lambda: list(generator.stream(1, **{})))",
    ],
)
def test_a_process_can_exit_during_a_step(request_: str, how: str, slow_bundle: Path) -> None:
    """LONG_OPERATOR takes longer than CALLBACK_WAIT_S, the time limit for user code at exit."""
    slow = "slow_teardown(); " * (request_ == "LONG_OPERATOR")
    exits_quietly(f"{slow}generator = open_generator(); wait = wait_for_step(generator); kept = {how.format(request_)}; wait()", slow_bundle)


def test_a_process_can_exit_during_a_step_of_a_deleted_generator(slow_bundle: Path) -> None:
    exits_quietly("generator = open_generator(); wait = wait_for_step(generator); generator.submit(**LONG_LOOP); del generator; wait()", slow_bundle)


@pytest.mark.parametrize("how", ["generator.submit(seed=0, batch_size=256)", "in_daemon(lambda: generator(seed=0, batch_size=256))"])
def test_a_process_can_exit_while_the_thread_of_a_cuda_device_computes(how: str) -> None:
    """Uses a fake CUDA device in NumPy, whose sessions run on the CPU."""
    exits_quietly(
        f"""
from runtime.fake_cuda import PLACEMENT, FakeSession, Machine
slow_teardown()
from scm_runtime import generator as module
from scm_runtime.engines.cuda import stream as cuda
from scm_runtime.engines.cuda.open_engine import open_cuda_engine

machine, computes, compute = Machine(), threading.Event(), FakeSession.__call__
cuda._import_cuda, module.resolve_device = machine.modules, lambda *_: PLACEMENT
open_cuda_engine.__kwdefaults__["open_session"] = machine.open_session

def announced(session, **inputs):
    computes.set()
    return compute(session, **inputs)

FakeSession.__call__ = announced
generator = Generator("digits", device="cuda", dtype="fp32", native_ops=False, cuda_graph=False, cache_dir=False, max_batch_size=256)
kept = {how}
assert computes.wait(60)
time.sleep(0.5)
"""
    )


def test_a_process_exits_after_the_running_job_of_a_cuda_device() -> None:
    """The exit also waits for a job that is in CUDA and not in ONNX Runtime."""
    printed = exits_quietly(
        """
from types import SimpleNamespace
from scm_runtime.engines.cuda.thread import CudaContext

def job():
    started.set()
    time.sleep(1)
    print("done", flush=True)

started = threading.Event()
context = CudaContext(0, open_stream=lambda *_: SimpleNamespace(stream_handle=0))
in_daemon(lambda: context.run(job))
assert started.wait(60)
"""
    )
    assert printed == "done\n"


def test_a_process_can_exit_while_a_thread_opens_generators(slow_bundle: Path) -> None:
    exits_quietly(
        """
slow_teardown()

def open_repeatedly():
    while True:
        Generator("digits", threads=1, cache_dir=False)
        once.set()

once = threading.Event()
in_daemon(open_repeatedly)
assert once.wait(60)
time.sleep(0.1)
""",
        slow_bundle,
    )


def test_a_callback_that_hangs_does_not_block_the_exit(slow_bundle: Path) -> None:
    exits_quietly(
        """
def hang(*_):
    hanging.set()
    threading.Event().wait()

hanging, generator = threading.Event(), open_generator()
futures = [generator.submit(prompt_embeds=EMBEDS, callback_on_step_end=hang), generator.submit(prompt_embeds=EMBEDS)]
in_daemon(lambda: generator(prompt_embeds=EMBEDS, callback_on_step_end=hang))
assert hanging.wait(60)
""",
        slow_bundle,
    )


def test_pending_futures_get_an_error_at_exit(slow_bundle: Path) -> None:
    printed = exits_quietly(
        """
generator = open_generator()
wait = wait_for_step(generator)
futures = [generator.submit(**LONG_LOOP) for _ in range(2)] + [generator.submit(prompt_embeds=np.ones((3, 5), np.float32))]
for future in futures:
    future.add_done_callback(lambda future: print(type(future.exception()).__name__, flush=True))
wait()
""",
        slow_bundle,
    )
    assert printed.split() == ["GeneratorClosedError"] * 3


def test_an_atexit_hook_may_call_and_close() -> None:
    """The hook is registered before scm_runtime is imported, so it runs after the hook of scm_runtime."""
    printed = run_python(
        """
import atexit

def hook():
    print(len(generator(seed=[1, 2, 3])))
    generator.close()

atexit.register(hook)
from scm_runtime import Generator
generator = Generator("digits", cache_dir=False)
generator.submit(seed=1).result(60)
"""
    )
    assert (printed.stdout, printed.stderr) == ("3\n", "")


def test_a_forked_child_does_not_affect_the_runs_of_its_parent(slow_bundle: Path) -> None:
    """The child neither waits for the runs nor terminates them, whether it closes the Generator or not."""
    printed = exits_quietly(
        """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # os.fork() warns if there are threads
generator = open_generator()
wait = wait_for_step(generator)
running = generator.submit(**LONG_OPERATOR, output_type="latent", num_inference_steps=1)
wait()
for close in (True, False):
    pid = os.fork()
    if not pid:
        if close:
            generator.close()
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
print(running.result(60).array.shape)
""",
        slow_bundle,
    )
    assert printed.split() == ["(1,", "2,", "4,", "6)"]


@pytest.mark.parametrize("more", [(), ("--num-images", "3")])
def test_ctrl_c_ends_the_command_during_a_step(more: tuple[str, ...], slow_bundle: Path, tmp_path: Path) -> None:
    program = """
import sys
sys.argv[0] = "scm-runtime"
from scm_runtime.ort import session
from scm_runtime.cli import main

run = session.Session.__call__

def announced(self, **inputs):
    if self.path.name.startswith("step"):
        print("step", flush=True)
    return run(self, **inputs)

session.Session.__call__ = announced
main()
"""
    np.save(tmp_path / "embeds.npy", np.ones((2, toy_bundle.WIDTH), np.float32))
    out = tmp_path / "out.png"
    arguments = [
        "generate",
        slow_bundle,
        "-o",
        out,
        "--prompt-embeds",
        tmp_path / "embeds.npy",
        "--guidance-scale",
        str(toy_bundle.SLOW_GUIDANCE),
        "--threads",
        "1",
        *more,
    ]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "SCM_CACHE_DIR": ""}) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "step\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (130, "Interrupted: nothing was written\n")
    assert not out.exists()
