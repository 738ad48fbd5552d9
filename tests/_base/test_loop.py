"""Coroutines from synchronous code."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from rmcore.judge import run_sync


async def the_loop():
    return asyncio.get_running_loop()


def test_one_loop_serves_all_calls():
    first = run_sync(the_loop())
    found = []
    thread = threading.Thread(target=lambda: found.append(run_sync(the_loop())))
    thread.start()
    thread.join()

    async def inside():
        return run_sync(the_loop())

    assert found == [first]
    assert asyncio.run(inside()) is first


def test_errors_come_through():
    async def fail():
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        run_sync(fail())


def test_its_own_loop_would_wait_for_itself():
    async def inside():
        return run_sync(the_loop())

    with pytest.raises(RuntimeError, match="await"):
        run_sync(inside())


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_cancels_the_coroutine():
    # A process started in the background of a shell ignores the signal; this test must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    events = []

    async def long():
        events.append("started")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    def interrupt():
        while not events:
            time.sleep(0.005)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sync(long())
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == ["started", "cancelled"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_a_loop_of_its_own():
    run_sync(the_loop())
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(7 if run_sync(asyncio.sleep(0, result=True)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
