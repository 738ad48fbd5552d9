"""Answers kept for requests that are made again: the work is done once, whoever asks and however often."""

from __future__ import annotations

import asyncio
import contextvars
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore.integrations.server.members import BusyError, ConflictError

__all__ = ["ReplyStore"]


@dataclass(frozen=True, slots=True)
class _Kept:
    digest: bytes
    body: bytes
    until: float


class ReplyStore:
    """Keeps bodies of successful answers by key, for a time and within a number of bytes, the latest ones.

    Args:
        keep_s: seconds an answer is kept.
        max_bytes: of all kept answers together.
        clock: a seam for tests.
    """

    def __init__(self, keep_s: float, max_bytes: int, clock: Clock | None = None) -> None:
        check_number("keep_s", keep_s, Within(least=0), "seconds, at least 0")
        check_number("max_bytes", max_bytes, COUNT, "at least 1")
        self.keep_s, self.max_bytes = keep_s, max_bytes
        self.replayed = 0
        self._clock: Clock = clock or SystemClock()
        self._running: dict[Hashable, tuple[bytes, asyncio.Task[bytes]]] = {}
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._bytes = 0

    async def once(self, key: Hashable, digest: bytes, work: Callable[[], Awaitable[bytes]]) -> tuple[bytes, bool]:
        """The answer of ``key``, and whether it was there (or under way) already.

        The work goes on if its callers go away, since they may come again. A failure is not kept.

        Args:
            key: what the caller calls the request.
            digest: of the request's content.
            work: makes the answer.

        Raises:
            ConflictError: the key was used for another content.
            BusyError: the work was cancelled, by none of those who asked for it.
        """
        self._forget_old()
        kept, running = self._kept.get(key), self._running.get(key)
        if kept is None and running is None:
            # In a context of its own: what is called in that of a request may be cancelled with it (Ray Serve does).
            task = asyncio.create_task(_run(work), name="rmcore reply", context=contextvars.Context())
            self._running[key] = (digest, task)
            task.add_done_callback(lambda done: self._finish(key, digest, done))
            return await _outcome(task), False
        if digest != (kept.digest if kept is not None else running[0] if running is not None else b""):
            raise ConflictError("Idempotency-Key: got one that was used for another request, expected a new one")
        self.replayed += 1
        if kept is not None:
            return kept.body, True
        assert running is not None
        return await _outcome(running[1]), True

    def _finish(self, key: Hashable, digest: bytes, task: asyncio.Task[bytes]) -> None:
        del self._running[key]
        if not task.cancelled() and task.exception() is None:
            self._kept[key] = _Kept(digest, task.result(), self._clock.now() + self.keep_s)
            self._bytes += len(task.result())
            self._forget_old()

    def _forget_old(self) -> None:
        now = self._clock.now()
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            if oldest.until > now and self._bytes <= self.max_bytes:
                return
            self._bytes -= len(oldest.body)
            del self._kept[key]


async def _run(work: Callable[[], Awaitable[bytes]]) -> bytes:
    return await work()


async def _outcome(task: asyncio.Task[bytes]) -> bytes:
    """What a task comes to. It is left alone where the waiting is cancelled."""
    await asyncio.wait({task})
    if task.cancelled():
        raise BusyError("the work for this request was cancelled", 1.0)
    return task.result()
