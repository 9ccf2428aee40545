"""Calls that the main thread can leave: Python runs signal handlers only in the main thread, and there only when it is not inside ONNX Runtime."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from scm_runtime.common.job_thread import JobThread
from scm_runtime.common.runs import CancelScope, current_scope, exit_began, interrupted_error, wait_despite_signals
from scm_runtime.errors import InferenceError

Result = TypeVar("Result")

_helper: JobThread | None = None


def run_interruptibly(function: Callable[[], Result]) -> Result:
    """Call a function and return its result. On the main thread, call it in a helper thread, so that signal handlers run meanwhile.

    If a handler raises, as that of Ctrl-C does, the runs of the function are terminated, and the handler's exception is raised once the function has ended.
    """
    helper = _helper_thread() if threading.current_thread() is threading.main_thread() else None
    if helper is None:
        return function()
    scope = current_scope() or CancelScope()
    with scope.active():
        job = helper.job(function)
    try:
        helper.put(job)
        job.wait()
    except BaseException:
        scope.cancel(interrupted_error)
        if not job.withdraw():
            wait_despite_signals(job.wait)
        raise
    return cast(Result, job.result())


def _helper_thread() -> JobThread | None:
    """Return the helper thread, or None where no thread can be started and at the exit of the process, when runs may begin only on the exiting thread."""
    global _helper
    if exit_began():
        return None
    if _helper is None:
        try:
            _helper = JobThread("scm-runtime main")
        except InferenceError:
            return None
    return _helper


def _forget_helper() -> None:
    global _helper
    _helper = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget_helper)
