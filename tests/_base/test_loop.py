"""Coroutines from synchronous code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

import pytest

from rmcore._base.loop import BackgroundTask, cancelled_here, own_thread, run_sync


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


async def long(events):
    events.append("started")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        events.append("cancelled")
        raise


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_cancels_the_coroutine():
    # A process started in the background of a shell ignores the signal; this test must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    events = []

    def interrupt():
        while not events:
            time.sleep(0.005)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_sync(long(events))
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == ["started", "cancelled"]


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupt_while_it_is_handed_over_leaves_nothing_running(monkeypatch, begun):
    loop, events, closed = run_sync(the_loop()), [], threading.Event()
    hand_over = loop.call_soon_threadsafe

    def interrupted(callback, *args):
        monkeypatch.undo()
        if begun:
            hand_over(callback, *args)
            hand_over(closed.set)
            assert closed.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
    coro = long(events)
    with pytest.raises(KeyboardInterrupt):
        run_sync(coro)
    assert coro.cr_frame is None, "it is closed or has ended"
    assert events == ["started", "cancelled"][: 2 * begun]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_a_loop_of_its_own():
    run_sync(the_loop())
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(7 if run_sync(asyncio.sleep(0, result=True)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_what_ends_a_process_reaches_its_caller_and_leaves_the_loop_to_the_others():
    async def leaves():
        async with asyncio.TaskGroup() as group:  # a judge's workers are such tasks
            group.create_task(leave())

    async def leave():
        await asyncio.sleep(0)
        sys.exit(3)

    stays = BackgroundTask(asyncio.sleep(0.05, "here"))
    stays.start()
    before = run_sync(the_loop())
    with pytest.raises(SystemExit):
        run_sync(leaves())
    assert stays.result() == "here"
    assert run_sync(the_loop()) is before


def test_a_thread_of_its_own_tells_how_it_ended():
    async def main():
        assert await own_thread(lambda: threading.current_thread().name, "named") == "named"
        with pytest.raises(ZeroDivisionError):
            await own_thread(lambda: 1 / 0, "named")
        with pytest.raises(RuntimeError, match="StopIteration"):
            await own_thread(lambda: next(iter(())), "named")
        release, done = threading.Event(), threading.Event()
        left = own_thread(lambda: release.wait(5) and done.set(), "named")
        left.cancel()
        release.set()
        while not done.is_set():
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert left.cancelled()

    asyncio.run(main())


def test_a_thread_of_its_own_does_not_wait_for_those_of_everybody():
    async def main():
        release = threading.Event()
        loop = asyncio.get_running_loop()
        held = [loop.run_in_executor(None, release.wait, 10) for _ in range(64)]
        assert await asyncio.wait_for(own_thread(lambda: 1, "named"), 5) == 1
        release.set()
        await asyncio.gather(*held)

    asyncio.run(main())


def test_who_is_cancelled_is_told_from_who_meets_a_cancellation():
    async def meets():
        other = asyncio.get_running_loop().create_future()
        other.cancel()
        try:
            await other
        except asyncio.CancelledError:
            return cancelled_here()

    async def is_cancelled():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return cancelled_here()

    async def main():
        task = asyncio.create_task(is_cancelled())
        await asyncio.sleep(0)
        task.cancel()
        return await asyncio.gather(meets(), task)

    assert asyncio.run(main()) == [False, True]
