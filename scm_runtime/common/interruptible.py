"""Calls that the main thread can leave: Python runs signal handlers only in the main thread, and there only when it is not inside ONNX Runtime."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from scm_runtime.common.job_thread import JobThread
from scm_runtime.common.runs import CancelScope, current_scope, exit_began, interrupted_error, wait_despite_signals
from scm_runtime.errors import InferenceError

Result = TypeVar("Result")

_idle: list[JobThread] = []  # at most one: starting a thread takes longer than handing it a function
_IDLE_S = 1.0  # after which it ends: a program that has closed its Generators keeps no thread


def run_interruptibly(function: Callable[[], Result], *, brief: bool = False) -> Result:
    """Call a function and return its result. On the main thread, call it in another thread, so that signal handlers run meanwhile.

    A function that is ``brief``, a few milliseconds, is called directly: signals can wait for it, and on a busy machine a change of threads takes as long.

    If a handler raises, as that of Ctrl-C does, the runs of the function are terminated, and the handler's exception is raised once the function has ended.
    At the exit of the process, when runs may begin only on the exiting thread, and where no thread can be started, the function is called directly.
    """
    if brief or threading.current_thread() is not threading.main_thread() or exit_began():
        return function()
    try:
        thread = _idle.pop()
    except IndexError:
        try:
            thread = JobThread("scm-runtime call", idle_s=_IDLE_S, may_end=_retire)
        except InferenceError:  # the system has no more threads
            return function()
    scope = current_scope() or CancelScope()
    job = scope.call(lambda: thread.job(function))

    def end() -> None:
        scope.cancel(interrupted_error)
        if job.withdraw():
            job.end()
        job.wait()

    try:
        thread.put(job)
        job.wait()
    except BaseException:
        wait_despite_signals(end)
        raise
    finally:
        if job.ended and not _idle:  # a signal handler that called a Generator may have left its own
            _idle.append(thread)
    return cast(Result, job.result())


def _retire() -> bool:
    """Take the current thread out of ``_idle``. Returns False if it is not there, because a call has taken it."""
    for thread in list(_idle):
        if thread.is_current:
            try:
                _idle.remove(thread)
            except ValueError:
                return False
            return True
    return False


def _end_idle() -> None:
    while _idle:
        _idle.pop().close()


atexit.register(_end_idle)
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_idle.clear)  # the threads exist only in the parent
