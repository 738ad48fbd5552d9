"""Two things at once: the backbone works in one thread, the judge's calls are awaited on an event loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rmcore._base.loop import BackgroundTask, own_thread
from rmcore.engine.judging import ExitError, JudgeQueue

__all__ = ["StoppedError", "run_alongside", "run_alongside_async", "short_turns"]

_TURN_S = 0.0005
_lock = threading.Lock()
_holders = 0
_usual = 0.0


class StoppedError(Exception):
    """Raised by the work itself when it finds that nobody wants its result any more."""


def run_alongside(work: Callable[[], None], queue: JudgeQueue | None) -> None:
    """Do ``work`` in this thread while ``queue`` runs on the background loop; return when both are done.

    If the work raises, or the caller is interrupted, the judge's calls are cancelled before the error goes on. If the
    queue fails, ``queue.broken`` is set; the work then raises :class:`StoppedError` at its next step, and the
    queue's error goes on.
    """
    if queue is None:
        work()
        return
    judging = BackgroundTask(queue.run())
    try:
        judging.start()
        try:
            with short_turns():
                work()
            queue.close()
        except StoppedError:
            pass  # the result says why
        judging.result()
    except ExitError as exit:
        raise exit.error from None
    except BaseException:
        judging.cancel()
        raise


async def run_alongside_async(work: Callable[[], None], queue: JudgeQueue | None, stop: threading.Event) -> None:
    """As :func:`run_alongside`, with the work in a thread of its own and the queue on the running loop.

    Cancelling this cancels the judge's calls, sets ``stop``, at which the work raises :class:`StoppedError` at its
    next step, and waits for both: nothing is left behind.
    """
    working = own_thread(work, "rmcore-score")
    judging = None if queue is None else asyncio.create_task(queue.run())
    both: set[asyncio.Future[None]] = {working} if judging is None else {working, judging}
    try:
        with short_turns():
            await asyncio.wait({working})  # unlike awaiting it, this leaves it alone when it is cancelled
        try:
            working.result()
        except StoppedError:
            pass  # the result says why
        if queue is not None and judging is not None:
            queue.close()
            await asyncio.wait({judging})
            judging.result()
    except ExitError as exit:
        raise exit.error from None
    except BaseException:
        stop.set()
        if judging is not None:
            judging.cancel()
        await _ended(both)
        raise


async def _ended(tasks: set[asyncio.Future[None]]) -> None:
    """Wait until all are done, however often the waiting is cancelled; their errors are looked at, not raised."""
    pending = tasks
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError:
            pending = {task for task in pending if not task.done()}
    for task in tasks:
        if not task.cancelled():
            task.exception()


@contextmanager
def short_turns() -> Iterator[None]:
    """While any thread is inside, threads that want the interpreter lock get it within half a millisecond.

    A forward pass gives the lock up in every kernel and must ask for it again for the next one. Beside a busy thread
    each asking takes the interpreter's switch interval, 5 ms by default, which is far longer than a small kernel. The
    setting is the whole process's; the last one to leave puts back what the first one found.
    """
    global _holders, _usual
    with _lock:
        if _holders == 0:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, _TURN_S))
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                sys.setswitchinterval(_usual)
