"""The end of a process while graphs run: it ends with 0 and says nothing, whoever has the runs."""

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
import sys, threading, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import numpy as np
from scheduler_control import engine_of, step_started_event
from scm_runtime import Generator
from scm_runtime.common import process

class Teardown:
    "Takes a while after daemon threads may not go on: one that comes back from ONNX Runtime then aborts the process."
    def __del__(self, sleep=time.sleep):
        sleep(2)

def slow_teardown():
    sys.teardown = Teardown()  # goes late, and in any case

process.CALLBACK_WAIT_S = 0.1
EMBEDS = np.ones((2, {toy_bundle.WIDTH}), np.float32)
LONG_LOOP = {{"prompt_embeds": EMBEDS, "guidance_scale": {toy_bundle.SLOW_GUIDANCE}}}
LONG_OPERATOR = {{"prompt_embeds": EMBEDS, "conditioning": {{"score": {toy_bundle.SLOW_SCORE}}}}}

def opened():
    return Generator(sys.argv[1], threads=1, cache_dir=False)

def begins(generator):
    stepped = step_started_event(engine_of(generator))
    def wait():
        assert stepped.wait(60)
        time.sleep(0.2)  # to the middle of the step
    return wait

def in_daemon(call):
    threading.Thread(target=call, daemon=True).start()
"""


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bundle.write_text_bundle(tmp_path_factory.mktemp("slow") / "slow.scm", graphs={"step": toy_bundle.SLOW_STEP})


def ends_quietly(program: str, *arguments: str | Path) -> str:
    """Run it, expect that it ends with 0 and prints nothing to stderr, and return what it printed."""
    done = run_python(PRELUDE + program, *arguments)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("request_", ["LONG_LOOP", "LONG_OPERATOR"])
@pytest.mark.parametrize("how", ["generator.submit(**{})", "in_daemon(lambda: generator(**{}))", "in_daemon(lambda: generator.submit(**{}).exception())"])
def test_a_process_may_end_within_a_step(request_: str, how: str, slow_bundle: Path) -> None:
    """Also where one operator takes longer than the end of the process has patience for code of the user's."""
    slow = "slow_teardown(); " * (request_ == "LONG_OPERATOR")
    ends_quietly(f"{slow}generator = opened(); wait = begins(generator); kept = {how.format(request_)}; wait()", slow_bundle)


def test_a_process_may_end_within_a_step_of_a_generator_that_nobody_keeps(slow_bundle: Path) -> None:
    ends_quietly("generator = opened(); wait = begins(generator); generator.submit(**LONG_LOOP); del generator; wait()", slow_bundle)


@pytest.mark.parametrize("how", ["generator.submit(seed=0, batch_size=256)", "in_daemon(lambda: generator(seed=0, batch_size=256))"])
def test_a_process_may_end_while_the_thread_of_a_cuda_device_computes(how: str) -> None:
    """On a device made of NumPy, whose work is done by sessions on the CPU."""
    ends_quietly(
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


def test_a_job_of_a_cuda_device_is_done_before_the_process_ends() -> None:
    """Also where it is not in ONNX Runtime but in CUDA itself."""
    printed = ends_quietly(
        """
from types import SimpleNamespace
from scm_runtime.engines.cuda.thread import CudaContext

def job():
    begun.set()
    time.sleep(1)
    print("done", flush=True)

begun = threading.Event()
context = CudaContext(0, open_stream=lambda *_: SimpleNamespace(stream_handle=0))
in_daemon(lambda: context.run(job))
assert begun.wait(60)
"""
    )
    assert printed == "done\n"


def test_a_process_may_end_while_a_thread_opens_generators(slow_bundle: Path) -> None:
    ends_quietly(
        """
slow_teardown()

def open_on():
    while True:
        Generator("digits", threads=1, cache_dir=False)
        once.set()

once = threading.Event()
in_daemon(open_on)
assert once.wait(60)
time.sleep(0.1)
""",
        slow_bundle,
    )


def test_a_callback_that_hangs_does_not_hold_up_the_end(slow_bundle: Path) -> None:
    ends_quietly(
        """
def hang(*_):
    hanging.set()
    threading.Event().wait()

hanging, generator = threading.Event(), opened()
futures = [generator.submit(prompt_embeds=EMBEDS, callback_on_step_end=hang), generator.submit(prompt_embeds=EMBEDS)]
in_daemon(lambda: generator(prompt_embeds=EMBEDS, callback_on_step_end=hang))
assert hanging.wait(60)
""",
        slow_bundle,
    )


def test_futures_hear_of_the_end(slow_bundle: Path) -> None:
    printed = ends_quietly(
        """
generator = opened()
wait = begins(generator)
futures = [generator.submit(**LONG_LOOP) for _ in range(2)] + [generator.submit(prompt_embeds=np.ones((3, 5), np.float32))]
for future in futures:
    future.add_done_callback(lambda future: print(type(future.exception()).__name__, flush=True))
wait()
""",
        slow_bundle,
    )
    assert printed.split() == ["GeneratorClosedError"] * 3


def test_a_hook_at_exit_may_call_and_close() -> None:
    """Also one that runs after ours."""
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


def test_a_forked_child_leaves_the_runs_of_its_parent_alone(slow_bundle: Path) -> None:
    """It neither waits for them nor terminates them, whether it closes the Generator or not."""
    printed = ends_quietly(
        """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where there are threads
generator = opened()
wait = begins(generator)
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
def test_ctrl_c_ends_the_command_line_within_a_step(more: tuple[str, ...], slow_bundle: Path, tmp_path: Path) -> None:
    program = """
import sys
sys.argv[0] = "scm-runtime"
from scm_runtime.ort import session
from scm_runtime.cli import main

run = session.Session.__call__

def announced(self, **inputs):
    if self.path.name.startswith("step"):
        print("begins", flush=True)
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
            assert process.stdout.readline() == "begins\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, "Interrupted: nothing was written\n")
    assert not out.exists()
