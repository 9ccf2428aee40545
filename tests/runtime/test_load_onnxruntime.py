"""``load_onnxruntime`` imports ONNX Runtime with telemetry off. Each test runs a new process with an empty home folder.

With telemetry on, ONNX Runtime starts a thread that reports to Microsoft, writes an identifier into the user's cache folder, and blocks the exit of
forked children.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from support import BLOCK_IMPORTS, run_python

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the threads")

# Records the imports of ONNX Runtime while ACTION runs, then the environment and threads that remain, and forks two children that exit at once.
PROGRAM = """
import json, os, signal, sys, time

seen = []

def watch(event, arguments):
    if event == "import" and arguments[0].split(".")[0] == "onnxruntime":
        seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.addaudithook(watch)
ACTION
report = {"seen": sorted(set(map(str, seen))), "after": os.environ.get("ORT_DISABLE_TELEMETRY"), "ended": {}}
deadline = time.monotonic() + 20
while (threads := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < deadline:
    time.sleep(0.01)  # the thread of a progress bar may need time to end
report["threads"] = threads
for way in ("exits", "returns"):
    pid = os.fork()
    if pid == 0:
        if way == "exits":
            sys.exit(3)
        break
    deadline = time.monotonic() + 60
    while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not done[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    report["ended"][way] = os.waitstatus_to_exitcode(done[1]) if done[0] else "hung"
else:
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)
"""

GENERATOR = """
from scm_runtime import Generator
cache_dir = {"default": None, "none": False, "folder": os.path.expanduser("~/folder")}[sys.argv[3]]
generator = Generator("digits", device=sys.argv[2], cache_dir=cache_dir, threads=1)
generator(seed=1)
"""

# Forks children in three ways, which use the generator or not, and end in three ways. The generator has threads of ONNX Runtime and of the scheduler.
FORKS = """
import itertools, json, multiprocessing, os, signal, sys, threading, time, warnings
from scm_runtime import ForkedError, Generator

warnings.simplefilter("ignore", DeprecationWarning)  # os.fork() warns if there are threads
cache_dir = {"default": None, "none": False, "folder": os.path.expanduser("~/folder")}[sys.argv[3]]
generator = Generator("digits", device=sys.argv[2], cache_dir=cache_dir, threads=2)
generator.submit(seed=1).result(60)

def child(uses, end):
    if uses:
        try:
            generator(seed=1)
        except ForkedError:
            generator.close()
        else:
            os._exit(71)
    if end == "sys.exit":
        sys.exit(3)
    elif end == "os._exit":
        os._exit(3)

def ended(pid):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"

def fork(report, name, *arguments):
    pid = os.fork()
    if pid:
        report[name] = ended(pid)
        return True
    child(*arguments)
    return False  # the child returns to the end of the program, or of the thread

report = {}
for uses, end in itertools.product((False, True), ("sys.exit", "os._exit", "return")):
    if not fork(report, f"fork {uses} {end}", uses, end):
        break
    thread = threading.Thread(target=fork, args=(report, f"thread {uses} {end}", uses, end))
    thread.start()
    thread.join()
    process = multiprocessing.get_context("fork").Process(target=child, args=(uses, end))
    process.start()
    process.join(60)
    report[f"process {uses} {end}"] = "hung" if process.exitcode is None else process.exitcode
    process.kill()
else:
    with open(sys.argv[1], "w") as file:
        json.dump(report, file)
"""

COMMAND = """
import importlib
try:
    importlib.import_module(sys.argv[2]).main(sys.argv[3:])
except SystemExit as end:
    assert end.code == 0, end.code
"""


def fresh_environment(home: Path) -> dict[str, str]:
    """Return the environment of a user who has set no variables. It allows one BLAS thread, so that the test can count the other threads."""
    home.mkdir()
    dropped = {"SCM_CACHE_DIR", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"HOME": str(home), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def check(action: str, home: Path, *arguments: str | Path, folders: set[str], imported: bool = True) -> None:
    """Run an action in a new process, and assert that telemetry left no threads, files, environment variables or hanging children.

    Args:
        action: Python code to run.
        home: Home folder of the process. It is created.
        arguments: Arguments of the code, from ``sys.argv[2]`` on.
        folders: Folders below the home folder that must contain files afterwards. All others must stay empty.
        imported: Whether the action must import ONNX Runtime.
    """
    run_python(PROGRAM.replace("ACTION", action), home.parent / "report.json", *arguments, env=fresh_environment(home), cwd=home.parent)
    report: dict[str, Any] = json.loads((home.parent / "report.json").read_bytes())
    assert report == {"seen": ["1"] if imported else [], "after": None, "threads": 1, "ended": {"exits": 3, "returns": 0}}
    files = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    assert {file for file in files if not any(file.is_relative_to(folder) for folder in folders)} == set()
    assert all(any(file.is_relative_to(folder) for file in files) for folder in folders), "each expected folder must contain files"


@linux
@pytest.mark.parametrize("cache", ["default", "folder", "none"])
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_generator_does_not_turn_telemetry_on(device: str, cache: str, tmp_path: Path) -> None:
    check(GENERATOR, tmp_path / "home", device, cache, folders={"default": {".cache/scm-runtime"}, "folder": {"folder"}, "none": set[str]()}[cache])


@linux
@pytest.mark.parametrize("cache", ["default", "folder", "none"])
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_every_forked_child_ends(device: str, cache: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_python(FORKS, tmp_path / "report.json", device, cache, env=fresh_environment(home), cwd=tmp_path)
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_bytes())
    assert len(report) == 18
    # A thread that raises SystemExit ends without an exit code.
    expected = {name: 0 if name.endswith("return") or (name.startswith("thread") and name.endswith("sys.exit")) else 3 for name in report}
    assert report == expected
    files = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    assert {file.parts[0] for file in files} <= {".cache", "folder"}
    assert all(file.is_relative_to(".cache/scm-runtime") for file in files if file.parts[0] == ".cache")


@linux
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "digits", "-o", "x.png", "--device", "cpu"],
        ["inspect", "digits"],
        ["smoke", "digits", "--device", "cpu"],
        ["bench", "digits", "--device", "cpu", "--batch-sizes", "1", "--steps", "1", "--seconds", "0"],
        ["doctor"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_does_not_turn_telemetry_on(arguments: list[str], tmp_path: Path) -> None:
    imports = arguments[0] != "inspect"
    writes_cache = arguments[0] not in ("inspect", "doctor")
    check(COMMAND, tmp_path / "home", "scm_runtime.cli", *arguments, folders={".cache/scm-runtime"} if writes_cache else set(), imported=imports)


@linux
def test_an_export_does_not_turn_telemetry_on(tmp_path: Path) -> None:
    """An export imports ONNX Runtime before it opens the checkpoint and before PyTorch and other packages, which may import ONNX Runtime too."""
    check(COMMAND.replace("== 0", "== 2"), tmp_path / "home", "scm_export.cli", "missing.pt", "-o", "x.scm", folders=set())


def test_without_onnxruntime_every_way_to_open_a_bundle_names_the_pip_command(tmp_path: Path) -> None:
    program = """
Block.error = ModuleNotFoundError
from scm_runtime import DevicePool, Generator, MissingDependencyError, cli

for device in ("cpu", "auto"):
    for cache_dir in (None, sys.argv[2], False):
        for opener, device_argument in ((Generator, {"device": device}), (DevicePool, {"devices": [device]})):
            try:
                opener("digits", cache_dir=cache_dir, **device_argument)
            except MissingDependencyError as error:
                assert "pip install 'onnxruntime>=" in str(error), error
            else:
                raise AssertionError("no error")
for command in (["smoke", "digits"], ["generate", "digits", "-o", sys.argv[3]], ["bench", "digits"]):
    try:
        cli.main([*command, "--device", "cpu"])
    except SystemExit as end:
        assert end.code == 1, end.code
"""
    done = run_python(BLOCK_IMPORTS + program, "onnxruntime", tmp_path / "folder", tmp_path / "x.png", env=fresh_environment(tmp_path / "home"))
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == ["Error: ONNX Runtime cannot be imported (onnxruntime was imported). Install it:"] * 3
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.png").exists()


@linux
def test_too_little_memory_for_the_library_is_not_taken_for_a_missing_package() -> None:
    printed = run_python(
        """
import resource
import numpy
from scm_runtime import OutOfMemoryError
from scm_runtime.common.load_onnxruntime import load_onnxruntime

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 8_000_000  # the library takes more than twice as much
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    load_onnxruntime()
except OutOfMemoryError as error:
    print(error)
"""
    )
    assert "memory" in printed.stdout
    assert "pip install" not in printed.stdout


@pytest.mark.parametrize("how", ["raise KeyboardInterrupt", "raise ImportError('initialization failed') from KeyboardInterrupt()"])
def test_an_interrupted_import_is_an_interrupt_and_can_be_repeated(how: str, tmp_path: Path) -> None:
    """The second form is raised by an extension module that is interrupted during its initialization."""
    program = """
import os, sys
from scm_runtime.common.load_onnxruntime import load_onnxruntime

class Interrupted:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "onnxruntime.capi._pybind_state":
            HOW

sys.meta_path.insert(0, Interrupted)
try:
    load_onnxruntime()
except KeyboardInterrupt:
    sys.meta_path.remove(Interrupted)
assert "ORT_DISABLE_TELEMETRY" not in os.environ
assert load_onnxruntime().__version__
"""
    run_python(program.replace("HOW", how), env=fresh_environment(tmp_path / "home"))
