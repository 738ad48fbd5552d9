"""Synchronous and asynchronous code that call each other: a loop of the library's own, and threads of a call's own."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

__all__ = ["BackgroundTask", "background_loop", "cancelled_here", "own_thread", "run_sync"]

T = TypeVar("T")

_CLEANUP_S = 5.0
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_owner = 0  # the process that started the loop's thread: after a fork the loop is there and the thread is not


class BackgroundTask(Generic[T]):
    """A coroutine for the background loop, so that the thread that started it can do something else meanwhile.

    The loop lives in one daemon thread for the whole process, so clients keep their connections between calls. It is
    safe in a script, inside a running loop (a notebook) and from several threads. An interrupt (Ctrl-C) may come at any
    moment: make it, then :meth:`start` it inside a ``try`` that ends with :meth:`cancel`.

    Raises:
        RuntimeError: made on the background loop itself, where waiting for the result would be for ever.
    """

    def __init__(self, coro: Coroutine[Any, Any, T]) -> None:
        self._loop = background_loop()
        if _running_loop() is self._loop:
            coro.close()
            raise RuntimeError("run_sync: called on its own background loop; await the coroutine instead")
        self._coro: Coroutine[Any, Any, T] | None = coro
        self._task: asyncio.Task[T] | None = None
        self._future: Future[T] = Future()

    def start(self) -> None:
        """Hand it to the loop and return at once."""
        self._loop.call_soon_threadsafe(self._begin)

    def result(self) -> T:
        """Wait for its end; what it returned or raised."""
        return self._future.result()

    def cancel(self) -> None:
        """Cancel it unless it is done, and give it five seconds to clean up; one that was not started never is."""
        if not self._future.done():
            self._loop.call_soon_threadsafe(self._cancel_task)
            wait([self._future], _CLEANUP_S)

    def _begin(self) -> None:
        if self._coro is not None:
            self._task = self._loop.create_task(self._coro)
            self._coro = None
            self._task.add_done_callback(self._ended)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif self._coro is not None:  # the loop was never told of it
            self._coro.close()
            self._coro = None
            self._future.cancel()
            self._future.set_running_or_notify_cancel()

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


def run_sync(coro: Coroutine[Any, Any, T]) -> T:
    """Run ``coro`` to its end on the background loop (:class:`BackgroundTask`) and return what it returns.

    If the wait is interrupted (Ctrl-C), the coroutine is cancelled, and has five seconds to clean up, before the
    interrupt goes on.

    Raises:
        RuntimeError: called from the background loop itself.
        BaseException: whatever ``coro`` raises.
    """
    task = BackgroundTask(coro)
    try:
        task.start()
        return task.result()
    except BaseException:
        task.cancel()
        raise


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop, started on first use, again in a forked child, and again should its thread have died."""
    global _loop, _thread, _owner
    with _lock:
        alive = _thread is not None and _thread.is_alive() and _owner == os.getpid()
        if _loop is None or _loop.is_closed() or not alive:
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            _thread = threading.Thread(target=_run, args=(_loop,), name="rmcore-judge", daemon=True)
            _thread.start()
        return _loop


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop for as long as the process lives.

    What a task raises to end the process (``sys.exit`` in a judge, say) is its caller's to be told; asyncio ends the
    loop with it, and everybody else on it would wait for ever.
    """
    while True:
        try:
            loop.run_forever()
        except (KeyboardInterrupt, SystemExit):
            continue
        return


def cancelled_here() -> bool:
    """Whether the running task is being cancelled, so that a ``CancelledError`` at hand is meant for it.

    One that comes out of something that was awaited, and that somebody else cancelled, is an error like any other: let
    through, it would end this task without a word.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def own_thread(work: Callable[[], T], name: str, *, daemon: bool = False) -> asyncio.Future[T]:
    """Run ``work`` in a new thread, in this context; a future of the running loop that is done when the thread is.

    For what may take long. The loop's executor has a few threads for everybody: whoever comes while they are busy waits
    for strangers, and a call that was cancelled keeps its thread to the end.

    Args:
        work: what to run. It goes on if the future is cancelled.
        name: of the thread.
        daemon: whether the process may end before it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def finish(found: Callable[[], T], error: BaseException | None) -> None:
        thread.join()  # it has nothing left to do
        if future.cancelled():
            return
        if error is None:
            future.set_result(found())
        else:  # a future refuses StopIteration
            future.set_exception(RuntimeError(repr(error)) if isinstance(error, StopIteration) else error)

    def run() -> None:
        result: list[T] = []
        error: BaseException | None = None
        try:
            result.append(context.run(work))
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(finish, result.pop, error)
        except RuntimeError:  # the loop was closed meanwhile: nobody is left to be told
            pass

    thread = threading.Thread(target=run, name=name, daemon=daemon)
    thread.start()
    return future
