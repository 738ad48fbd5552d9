"""Calling asynchronous code from synchronous code, whether or not a loop is running in this thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

__all__ = ["BackgroundTask", "background_loop", "run_sync", "start_sync"]

T = TypeVar("T")

_CLEANUP_S = 5.0
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_owner = 0  # the process that started the loop's thread: after a fork the loop is there and the thread is not


class BackgroundTask(Generic[T]):
    """A coroutine at work on the background loop while the thread that started it does something else."""

    def __init__(self, coro: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        self._future: Future[T] = Future()
        loop.call_soon_threadsafe(self._begin, coro)

    def result(self) -> T:
        """Wait for its end; what it returned or raised. If the wait is interrupted, :meth:`cancel` comes first."""
        try:
            return self._future.result()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel it unless it is done, and give it five seconds to clean up."""
        if not self._future.done():
            self._loop.call_soon_threadsafe(self._cancel_task)
            wait([self._future], _CLEANUP_S)

    def _begin(self, coro: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(coro)
        self._task.add_done_callback(self._ended)

    def _cancel_task(self) -> None:
        assert self._task is not None, "callbacks of a loop run in the order they came"
        self._task.cancel()

    def _ended(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self._future.cancel()
            self._future.set_running_or_notify_cancel()
            return
        error = task.exception()
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())


def start_sync(coro: Coroutine[Any, Any, T]) -> BackgroundTask[T]:
    """Start ``coro`` on the library's own background loop and return at once.

    The loop lives in one daemon thread for the whole process, so clients keep their connections between calls. It is
    safe in a script, inside a running loop (a notebook) and from several threads.

    Raises:
        RuntimeError: called from the background loop itself, where waiting for the result would be for ever.
    """
    loop = background_loop()
    if _running_loop() is loop:
        coro.close()
        raise RuntimeError("run_sync: called on its own background loop; await the coroutine instead")
    return BackgroundTask(coro, loop)


def run_sync(coro: Coroutine[Any, Any, T]) -> T:
    """Run ``coro`` to its end on the background loop (:func:`start_sync`) and return what it returns.

    If the wait is interrupted (Ctrl-C), the coroutine is cancelled, and has five seconds to clean up, before the
    interrupt goes on.

    Raises:
        RuntimeError: called from the background loop itself.
        BaseException: whatever ``coro`` raises.
    """
    return start_sync(coro).result()


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop, started on first use, again in a forked child, and again should its thread have died."""
    global _loop, _thread, _owner
    with _lock:
        alive = _thread is not None and _thread.is_alive() and _owner == os.getpid()
        if _loop is None or _loop.is_closed() or not alive:
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            _thread = threading.Thread(target=_loop.run_forever, name="rmcore-judge", daemon=True)
            _thread.start()
        return _loop


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
