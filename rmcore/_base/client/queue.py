"""Queueing across event loops and threads: what rate limits, slots and the circuit breaker have in common."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from rmcore._base.clock import Clock

__all__ = ["WaitQueue", "Waiter"]


class Waiter:
    """One task's place in a queue. It belongs to the loop it was made on; :meth:`wake` may be called from any thread.

    A wake says "look again", no more: who waits checks what it waits for under its owner's lock each time.
    """

    __slots__ = ("_future", "granted", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.granted = False
        self._future: asyncio.Future[None] = self.loop.create_future()

    def wake(self) -> None:
        """Let it look again."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self.loop:
            self._set()
            return
        try:
            self.loop.call_soon_threadsafe(self._set)
        except RuntimeError:
            pass  # its loop was closed; WaitQueue.first skips it

    def look_again(self) -> None:
        """Forget earlier wakes. To be called before the check, so that a wake after the check is not lost."""
        if self._future.done():
            self._future = self.loop.create_future()

    async def wait(self) -> None:
        """Until woken."""
        await self._future

    async def wait_or(self, clock: Clock, seconds: float) -> None:
        """Until woken, or until ``seconds`` of ``clock`` have passed."""
        sleeping = self.loop.create_task(clock.sleep(seconds))
        try:
            await asyncio.wait((sleeping, self._future), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not self.loop.is_closed():  # closed under us: there is nothing left to stop
                sleeping.cancel()

    def _set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


class WaitQueue:
    """First come, first served. Not locked: its owner's lock guards it."""

    def __init__(self) -> None:
        self._waiters: OrderedDict[Waiter, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiters)

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self._waiters

    def join(self) -> Waiter:
        """A new place at the end, for the running task."""
        waiter = Waiter()
        self._waiters[waiter] = None
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Give the place up; does nothing if it is gone already."""
        self._waiters.pop(waiter, None)

    def first(self) -> Waiter | None:
        """Who is next. Places of loops that were closed are dropped, or they would block the queue for ever."""
        while self._waiters:
            waiter = next(iter(self._waiters))
            if not waiter.loop.is_closed():
                return waiter
            del self._waiters[waiter]
        return None

    def wake_first(self) -> None:
        """Let the first look again."""
        waiter = self.first()
        if waiter is not None:
            waiter.wake()

    def wake_all(self) -> None:
        """Let everybody look again, in order."""
        for waiter in list(self._waiters):
            waiter.wake()
