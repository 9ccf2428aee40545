"""Calls that the main thread can leave: Python runs signal handlers only in the main thread, and there only when it is not inside ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar, cast

from scm_runtime.common.job_thread import Job
from scm_runtime.common.runs import CancelScope, current_scope, exit_began, interrupted_error, wait_despite_signals

Result = TypeVar("Result")

UNKNOWN_THREAD = 0  # no thread has this identifier


def run_interruptibly(function: Callable[[], Result]) -> Result:
    """Call a function and return its result. On the main thread, call it in a thread of its own, so that signal handlers run meanwhile.

    If a handler raises, as that of Ctrl-C does, the runs of the function are terminated, and the handler's exception is raised once the function has ended.
    At the exit of the process, when runs may begin only on the exiting thread, and where no thread can be started, the function is called directly.
    """
    if threading.current_thread() is not threading.main_thread() or exit_began():
        return function()
    scope = current_scope() or CancelScope()
    with scope.active():
        job = Job(function, UNKNOWN_THREAD)
    thread = threading.Thread(target=job.call, name="scm-runtime call", daemon=True)  # the exit of the process waits for jobs
    try:
        job.begin()
        if not _started(thread):
            job.end()
            return function()
        job.wait()
    except BaseException:
        scope.cancel(interrupted_error)
        if not job.withdraw():
            wait_despite_signals(job.wait)
        raise
    thread.join()
    return cast(Result, job.result())


def _started(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # the system has no more threads
        return False
    return True
