"""How many requests may be in flight: additive increase, multiplicative decrease, as in TCP.

An endpoint's capacity is not known and changes. The limit starts small, doubles each round trip until the endpoint
first refuses (slow start), then grows by one a round trip (``limit`` successes), and is halved when the endpoint
refuses. After a storm of refusals it doubles again up to half of what it was before the storm. Under a ceiling beyond
64 the step is a 32nd of the ceiling instead of one, so that the way back from half takes 16 round trips of any size: a
judge's round trip takes seconds, and a thousand of them half a training run.

A server with a fixed number of places refuses at the same limit each time. From the second refusal there on, that limit
is tried again only after 8, 16, … 128 round trips, so that a server of two places is not asked for a third one all the
time; once the limit has been passed it is forgotten.

Signals, given with :meth:`Slot.release`:

- ``success``: a complete reply. It makes the limit grow only where at least half of the limit was in use: calls one by
  one say nothing about what else would fit.
- ``refused`` (429, 503, 529): halves, at most once per round trip.
- ``timeout``: a single slow reply is no sign of overload. The limit is halved, at most once per round trip, when of
  the latest ``limit`` requests (or of 20, if the limit is lower) a tenth timed out, and at least three.
- ``neutral``: anything else; frees the slot and changes nothing.

Replies to requests that were sent before the last cut are answers to the old limit and count for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rmcore._base.client.queue import Waiter, WaitQueue
from rmcore._base.numbers import COUNT, check_number

__all__ = ["AdaptiveConcurrency", "ConcurrencyState", "Signal", "Slot"]

_logger = logging.getLogger(__name__)
_TIMEOUT_SHARE, _FEWEST_TIMEOUTS, _SHORTEST_ROUND = 0.1, 3, 20

Signal: TypeAlias = Literal["success", "refused", "timeout", "neutral"]


@dataclass(frozen=True, slots=True)
class ConcurrencyState:
    """A snapshot for reports.

    Attributes:
        limit: requests that may be in flight now; ``ceiling``: at most ever.
        in_flight, queued: requests now, and calls that wait for a slot.
        peak_in_flight: most requests at once so far.
        cuts: how often the limit was halved.
    """

    limit: int
    ceiling: int
    in_flight: int
    queued: int
    peak_in_flight: int
    cuts: int


class AdaptiveConcurrency:
    """Slots for requests, first come, first served, shared by all event loops and threads of the process.

    Args:
        ceiling: the limit never exceeds it, and never falls below 1.
        start: the first limit, or the ceiling if that is lower.

    Raises:
        InputError: an argument is not a positive integer.
    """

    def __init__(self, ceiling: int, *, start: int = 8) -> None:
        for name, value in (("ceiling", ceiling), ("start", start)):
            check_number(name, value, COUNT, "a positive integer")
        self._lock = threading.Lock()
        self._queue = WaitQueue()
        self._ceiling = ceiling
        self._limit = min(start, ceiling)
        self._threshold = ceiling  # below it the limit doubles each round trip
        self._step = max(1, ceiling // 32)  # what it grows by above
        self._credit = 0
        self._wall, self._hits = 0, 0  # the limit that was refused last, and how often it was, again and again
        self._successes_since_cut = 0
        self._outcomes = self._timeouts = 0  # of the latest round trip
        self._in_flight = self._peak = self._cuts = 0

    @property
    def state(self) -> ConcurrencyState:
        """A consistent snapshot."""
        with self._lock:
            return ConcurrencyState(
                self._limit, self._ceiling, self._in_flight, len(self._queue), self._peak, self._cuts
            )

    async def acquire(self, timeout_s: float | None = None) -> Slot | None:
        """A slot, or ``None`` if none came free within ``timeout_s`` seconds. Cancelling leaves the queue.

        Every slot must be released, exactly once.
        """
        with self._lock:
            if self._in_flight < self._limit and self._queue.first() is None:
                return self._take()
            if timeout_s is not None and timeout_s <= 0:
                return None
            waiter = self._queue.join()
        try:
            async with asyncio.timeout(timeout_s):
                while not waiter.granted:
                    waiter.look_again()
                    await waiter.wait()
        except TimeoutError:
            with self._lock:
                self._queue.leave(waiter)
                return self._slot(busy=True) if waiter.granted else None
        except BaseException:
            self._abandon(waiter)
            raise
        with self._lock:
            return self._slot(busy=True)

    def _take(self) -> Slot:
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)
        return self._slot(busy=2 * self._in_flight >= self._limit)

    def _slot(self, *, busy: bool) -> Slot:
        return Slot(self, self._cuts, self._limit, busy=busy)

    def _abandon(self, waiter: Waiter) -> None:
        with self._lock:
            self._queue.leave(waiter)
            if waiter.granted:  # the slot came in the same moment as the cancellation: pass it on
                self._in_flight -= 1
                self._grant()

    def _release(self, slot: Slot, signal: Signal) -> None:
        with self._lock:
            busy = slot.busy or 2 * self._in_flight >= slot.limit
            self._in_flight -= 1
            current = slot.epoch == self._cuts
            if signal != "neutral" and current:
                self._outcomes += 1
                self._timeouts += signal == "timeout"
            if not current:
                pass
            elif signal == "success":
                self._successes_since_cut += 1
                if busy:
                    self._grow()
            elif signal == "refused" or (signal == "timeout" and self._too_many_timeouts):
                self._cut(signal)
            if self._outcomes >= max(self._limit, _SHORTEST_ROUND):
                self._outcomes = self._timeouts = 0
            self._grant()

    @property
    def _too_many_timeouts(self) -> bool:
        return self._timeouts >= max(_FEWEST_TIMEOUTS, math.ceil(_TIMEOUT_SHARE * self._limit))

    def _grow(self) -> None:
        at_the_wall = self._hits > 0 and self._limit + 1 == self._wall
        self._credit += self._limit if self._limit < self._threshold and not at_the_wall else self._step
        needed = self._limit * (8 << min(self._hits - 1, 4)) if at_the_wall else self._limit
        if self._credit >= needed:
            self._credit -= needed
            self._limit = min(self._limit + 1, self._ceiling)
            if self._limit > self._wall:
                self._hits = 0

    def _cut(self, signal: Signal) -> None:
        limit = max(1, self._limit // 2)
        if signal == "refused":
            self._hits = self._hits + 1 if self._limit == self._wall else 0
            self._wall = self._limit
        # Only the first cut of a storm tells what was too much; those that follow without a success between them
        # would take the memory of it down to nothing.
        if self._cuts == 0 or self._successes_since_cut:
            self._threshold = limit
        _logger.debug("judge concurrency %d -> %d (%s)", self._limit, limit, signal)
        self._limit = limit
        self._cuts += 1
        self._credit = self._successes_since_cut = self._outcomes = self._timeouts = 0

    def _grant(self) -> None:
        while self._in_flight < self._limit:
            waiter = self._queue.first()
            if waiter is None:
                return
            self._queue.leave(waiter)
            waiter.granted = True
            self._take()
            waiter.wake()


class Slot:
    """A slot in flight, to be released with what became of the request."""

    __slots__ = ("_owner", "busy", "epoch", "limit")

    def __init__(self, owner: AdaptiveConcurrency, epoch: int, limit: int, *, busy: bool) -> None:
        self._owner: AdaptiveConcurrency | None = owner
        self.epoch = epoch  # how many cuts there had been when it was sent
        self.limit = limit  # when it was taken
        self.busy = busy  # whether half of the limit was in use then

    def sent(self) -> None:
        """To be called when the request goes out, if that is later than :meth:`AdaptiveConcurrency.acquire`."""
        if self._owner is not None:
            self.epoch = self._owner._cuts

    def release(self, signal: Signal = "neutral") -> None:
        """Give the slot back. A second call does nothing."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._release(self, signal)
