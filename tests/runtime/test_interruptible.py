"""Signal handlers that raise in a call of the main thread, at any moment, and the thread that computes for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

import toy_bundle
from scheduler_control import TIMEOUT_S
from scm_runtime import Generator
from scm_runtime.common import interruptible, runs
from scm_runtime.common.interruptible import run_interruptibly
from scm_runtime.common.runs import CancelScope
from scm_runtime.sampling import durations
from support import run_python
from toy_bundle import EMBEDS, FAST, LONG_OPERATOR


class HandlerError(Exception):
    """What the handlers here raise."""


def call_with_handler_at(position: int, call: Callable[[], object]) -> bool:
    """Make a call, and raise HandlerError at the beginning of the function of scm_runtime that it calls as number ``position``.

    Returns:
        False if there are fewer calls.
    """
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal seen
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("scm_runtime."):
            seen += 1
            if seen == position:
                raise HandlerError

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except HandlerError:
        return True
    finally:
        sys.settrace(previous)
    return False


def test_a_handler_that_raises_at_any_moment_of_a_brief_call_leaves_nothing_in_flight(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a run stayed in flight, ``close()`` in another thread would wait for it for ever."""
    monkeypatch.setattr(durations, "BRIEF_S", TIMEOUT_S)
    slow(**FAST)
    position = 1
    while call_with_handler_at(position, lambda: slow(**FAST, timeout=TIMEOUT_S)):
        assert not runs._in_flight, position
        assert runs._current.run is None, position
        assert runs._current.scope is None, position
        position += 1
    assert position > 50, "the call was traced"
    np.testing.assert_allclose(slow(**FAST).array, toy_bundle.sample([1], EMBEDS), atol=1e-6)


@pytest.mark.parametrize("error", [TimeoutError, RuntimeError, HandlerError])
def test_the_error_of_a_handler_in_a_brief_call_is_raised_as_it_is(error: type[Exception], slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler runs when the graph has ended: in the code that turns errors of ONNX Runtime into InferenceError."""

    def handler(*_: object) -> None:
        raise error("from the handler")

    slow(**FAST, num_inference_steps=1)
    monkeypatch.setattr(durations, "BRIEF_S", TIMEOUT_S)
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # the graph takes about a second
        with pytest.raises(error, match="from the handler") as caught:
            slow(**LONG_OPERATOR)
        assert type(caught.value) is error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_second_signal_does_not_leave_a_busy_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one arrives while the first ends the call."""
    started, go, ended = threading.Event(), threading.Event(), threading.Event()

    def function() -> None:
        started.set()
        assert go.wait(TIMEOUT_S)
        time.sleep(0.1)
        ended.set()

    cancel, cancelled = CancelScope.cancel, []

    def interrupted_cancel(scope: CancelScope, error: Any) -> None:
        cancelled.append(scope)
        if len(cancelled) == 1:
            go.set()
            raise HandlerError("second")
        cancel(scope, error)

    def handler(*_: object) -> None:
        raise HandlerError("first")

    monkeypatch.setattr(CancelScope, "cancel", interrupted_cancel)
    main = threading.main_thread().ident
    assert main is not None
    previous = signal.signal(signal.SIGUSR1, handler)

    def send() -> None:
        assert started.wait(TIMEOUT_S)
        signal.pthread_kill(main, signal.SIGUSR1)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(HandlerError, match="first"):
            run_interruptibly(function)
    finally:
        signal.signal(signal.SIGUSR1, previous)
        go.set()
        sender.join()
    assert ended.is_set()
    assert run_interruptibly(threading.current_thread) is not threading.main_thread()


def test_a_call_of_a_handler_inside_a_call_has_a_thread_of_its_own_and_one_is_kept() -> None:
    started, inner = threading.Event(), []

    def outer() -> threading.Thread:
        os.kill(os.getpid(), signal.SIGUSR1)  # the main thread handles it
        assert started.wait(TIMEOUT_S)
        return threading.current_thread()

    def handler(*_: object) -> None:
        inner.append(run_interruptibly(threading.current_thread))
        started.set()

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        thread = run_interruptibly(outer)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert inner[0] not in (thread, threading.main_thread())
    assert len(interruptible._idle) == 1
    assert run_interruptibly(threading.current_thread) in (thread, inner[0])


def test_the_kept_thread_ends_at_exit_and_is_not_used_in_a_forked_child() -> None:
    done = run_python("""
import atexit, os, signal, threading

kept = []
atexit.register(lambda: print("alive" if kept[0].is_alive() else "ended"))  # after the handlers that are registered later
from scm_runtime.common.interruptible import run_interruptibly

kept.append(run_interruptibly(threading.current_thread))
assert kept[0] is not threading.main_thread()
if (pid := os.fork()) == 0:
    signal.alarm(30)  # a call that waits for a thread of the parent would never end
    os._exit(run_interruptibly(lambda: 5))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
""")
    assert done.stdout == "ended\n"


def test_the_number_of_kinds_of_calls_that_are_remembered_is_limited(slow: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "MAX_KINDS", 2)
    assert slow._loop.resource is not None
    remembered = slow._loop.resource._durations._seconds
    for n in (1, 2, 3):
        slow(**{**FAST, "seed": list(range(n))})
        assert 0 < len(remembered) <= 2
