"""Calling asynchronous code from synchronous code, whether or not a loop is running in this thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run_sync"]

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0  # the process that started the loop's thread: after a fork the loop is there and the thread is not


def run_sync(coro: Coroutine[Any, Any, T]) -> T:
    """Run ``coro`` to its end on the library's own background loop and return what it returns.

    The loop lives in one daemon thread for the whole process, so clients keep their connections between calls. It is
    safe in a script, inside a running loop (a notebook; that loop then waits) and from several threads. If the wait is
    interrupted (Ctrl-C), the coroutine is cancelled, and has five seconds to clean up, before the interrupt goes on.

    Raises:
        RuntimeError: called from the background loop itself, which would wait for itself for ever.
        BaseException: whatever ``coro`` raises.
    """
    loop = _background_loop()
    if _running_loop() is loop:
        coro.close()
        raise RuntimeError("run_sync: called on its own background loop; await the coroutine instead")
    ended = threading.Event()

    async def runner() -> T:
        try:
            return await coro
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(runner(), loop)
    try:
        return future.result()
    except BaseException:
        if not future.done():
            future.cancel()
            ended.wait(5.0)
        raise


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _background_loop() -> asyncio.AbstractEventLoop:
    """The loop, started on first use and again in a forked child."""
    global _loop, _owner
    with _lock:
        if _loop is None or _loop.is_closed() or _owner != os.getpid():
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="rmcore-judge", daemon=True).start()
        return _loop
