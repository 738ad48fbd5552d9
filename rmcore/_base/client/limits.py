"""Requests and tokens per minute, kept by all calls of a client together, and what the server's own headers ask for.

**What is guaranteed.** A request counts at the moment it is admitted, with the tokens it reserved. With W =
``window_s`` (a minute), for every window [t, t + W):

- never more than ``requests_per_minute`` requests are admitted in it, those that fail included;
- at each admission, the tokens of all requests admitted in the last W, the new one included, are at most
  ``tokens_per_minute``, each taken as the reply reported them, or as reserved where no reply has told yet.

So the tokens *reserved* never exceed the limit in any window, and if no reply reports more than was reserved, neither
do the tokens *used*. A call that turns out larger than it reserved is counted in full from the moment this is known:
later calls wait for it, but calls already admitted cannot be taken back. Network delays can move requests closer
together on their way; a provider that counts by arrival to the millisecond wants limits a few percent below its own.

Admission is first come, first served, also for a small request behind a large one.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from rmcore._base.client.queue import Waiter, WaitQueue
from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore._base.retry import sent_at_s, time_told_s

__all__ = ["Admission", "Limits", "LimitsState", "RateLimits", "Reservation", "Used", "held_by"]

_PLAIN = re.compile(r"\d{1,12}(?:\.\d{1,9})?", re.ASCII)
_KINDS = ("requests", "tokens")
_RESETS = (
    *((f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}") for kind in _KINDS),
    *((f"anthropic-ratelimit-{kind}-remaining", f"anthropic-ratelimit-{kind}-reset") for kind in _KINDS),
    *((f"{prefix}-remaining", f"{prefix}-reset") for prefix in ("x-ratelimit", "ratelimit")),
)
"""Headers of what remains, and of when there will be more."""
_IETF = re.compile(r"[;,] ?r(?:emaining)?=0[;,] ?(?:t|reset)=(\d{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class LimitsState:
    """A snapshot for reports.

    Attributes:
        requests, tokens: admitted in the last window; 0 where there is no limit, since then nobody counts.
        queued: calls that wait their turn.
        held_s: seconds for which the server asked to be left alone.
        server_requests, server_tokens: the limits the server named last, ``None`` if it named none. They are reported
            and not enforced: their window is not part of the header.
    """

    requests: int
    tokens: int
    queued: int
    held_s: float
    server_requests: int | None
    server_tokens: int | None


class Used(NamedTuple):
    """Tokens that a reply says were used; ``cached`` are among ``prompt``, ``reasoning`` among ``completion``."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0


class Admission(Protocol):
    """Leave to send one request."""

    def settle(self, tokens: int, used: Used | None = None) -> None:
        """Count what the reply says was used, more or less than reserved, from now on; ``used`` by their prices."""

    def unpaid(self) -> None:
        """The endpoint refused it with a status: it counts, and costs no money."""

    def withdraw(self) -> None:
        """Count it no longer: the request was never sent. (One that was sent and failed counts.)"""


@runtime_checkable
class Limits(Protocol):
    """What a client asks before each request: :class:`RateLimits`, or limits that are kept elsewhere for many machines
    (:class:`~rmcore.judge.store.shared_limits.SharedLimits`).
    """

    @property
    def tokens_per_minute(self) -> int | None:
        """No request may be larger."""

    @property
    def state(self) -> LimitsState:
        """A snapshot for reports."""

    async def acquire(self, tokens: int = 0, *, until: float | None = None) -> Admission | str:
        """Leave to send one request now, or the reason why not, by ``until`` on the client's clock."""

    def observe(self, headers: Mapping[str, str]) -> None:
        """Read the ``x-ratelimit-*`` headers of a reply."""

    def hold(self, seconds: float) -> None:
        """Admit nobody for ``seconds``."""


class RateLimits:
    """A sliding window over requests and tokens, shared by all event loops and threads of the process.

    Args:
        requests_per_minute, tokens_per_minute: ``None``: no limit of our own.
        max_hold_s: longest pause that a server's header can bring about; what asks for more gets this.
        window_s: the window's length.
        clock: the source of time.

    Raises:
        InputError: an argument is unusable.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        *,
        max_hold_s: float = 60.0,
        window_s: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        for name, value in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            if value is not None:
                check_number(name, value, COUNT, "a positive integer, or None")
        check_number("max_hold_s", max_hold_s, Within(least=0), "seconds, at least 0")
        check_number("window_s", window_s, Within(above=0), "seconds above 0")
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self._max_hold = max_hold_s
        self._window = window_s
        self._clock: Clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._queue = WaitQueue()
        self._entries: deque[Reservation] = deque()  # the admitted of the last window, oldest first
        self._requests = self._tokens = 0  # sums over _entries
        self._hold_until = -math.inf
        self._server: dict[str, int] = {}

    @property
    def state(self) -> LimitsState:
        """A consistent snapshot."""
        with self._lock:
            now = self._clock.now()
            self._expire(now)
            held = max(0.0, self._hold_until - now)
            told = self._server
            return LimitsState(
                self._requests, self._tokens, len(self._queue), held, told.get("requests"), told.get("tokens")
            )

    async def acquire(self, tokens: int = 0, *, until: float | None = None) -> Reservation | str:
        """Leave to send one request now, or the reason why not.

        Args:
            tokens: reserved for it: prompt and completion.
            until: on the clock's scale; no wait passes it.

        Returns:
            A :class:`Reservation`; or ``deadline``; or ``over_token_limit`` for a request larger than
            ``tokens_per_minute`` altogether, which could wait for ever.
        """
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            reject("tokens", repr(tokens), "a non-negative integer")
        if self.tokens_per_minute is not None and tokens > self.tokens_per_minute:
            return "over_token_limit"
        with self._lock:
            now = self._clock.now()
            if until is not None and now > until:
                return "deadline"
            if self._queue.first() is None and self._ready_at(tokens, now)[1] <= now:
                return self._admit(tokens, now)
            waiter = self._queue.join()
        try:
            return await self._wait(waiter, tokens, until)
        finally:
            with self._lock:
                self._queue.leave(waiter)
                self._queue.wake_first()

    def observe(self, headers: Mapping[str, str]) -> None:
        """Read the rate-limit headers of a reply: where nothing remains, calls are held until the reset.

        What cannot be understood is ignored; see :func:`held_by` for what can.
        """
        for kind in _KINDS:
            limit = headers.get(f"x-ratelimit-limit-{kind}", "")
            if _PLAIN.fullmatch(limit):
                self._server[kind] = int(float(limit))
        seconds = held_by(headers, self._clock.wall())
        if seconds is not None:
            self.hold(seconds)

    def hold(self, seconds: float) -> None:
        """Admit nobody for ``seconds``, at most ``max_hold_s``. An earlier, longer hold stays."""
        with self._lock:
            until = self._clock.now() + min(seconds, self._max_hold)
            if until > self._hold_until:
                self._hold_until = until
                self._queue.wake_first()  # it looks again and goes on waiting, longer

    # Everything below runs under the lock, except where it awaits.

    async def _wait(self, waiter: Waiter, tokens: int, until: float | None) -> Reservation | str:
        while True:
            waiter.look_again()
            with self._lock:
                now = self._clock.now()
                first = self._queue.first() is waiter
                certain, ready = self._ready_at(tokens, now) if first else (now, math.inf)
                if ready <= now and (until is None or now <= until):
                    return self._admit(tokens, now)
            if until is not None and (now >= until or certain > until):
                return "deadline"
            if first:
                # Tokens may be given back earlier, which wakes us.
                await waiter.wait_or(self._clock, (ready if until is None else min(ready, until)) - now)
            else:
                try:
                    async with asyncio.timeout(None if until is None else until - now):
                        await waiter.wait()
                except TimeoutError:
                    return "deadline"

    def _ready_at(self, tokens: int, now: float) -> tuple[float, float]:
        """When a request of ``tokens`` can be admitted: not before, and surely, if nobody gives tokens back."""
        self._expire(now)
        certain = max(now, self._hold_until)
        too_many = 0 if self.requests_per_minute is None else self._requests + 1 - self.requests_per_minute
        too_much = 0 if self.tokens_per_minute is None else self._tokens + tokens - self.tokens_per_minute
        ready = certain
        for entry in self._entries:
            if too_many <= 0 and too_much <= 0:
                break
            ready = max(ready, entry.time + self._window)
            if too_many > 0:
                certain = ready
            too_many -= 1
            too_much -= entry.tokens
        return certain, ready

    def _expire(self, now: float) -> None:
        while self._entries and self._entries[0].time + self._window <= now:
            entry = self._entries.popleft()
            entry.counted = False
            self._requests -= 1
            self._tokens -= entry.tokens

    def _admit(self, tokens: int, now: float) -> Reservation:
        entry = Reservation(self, now, tokens)
        if self.requests_per_minute is not None or self.tokens_per_minute is not None:
            entry.counted = True
            self._entries.append(entry)
            self._requests += 1
            self._tokens += tokens
        return entry

    def _settle(self, entry: Reservation, tokens: int) -> None:
        with self._lock:
            if entry.counted:
                self._tokens += tokens - entry.tokens
                if tokens < entry.tokens:
                    self._queue.wake_first()
            entry.tokens = tokens

    def _withdraw(self, entry: Reservation) -> None:
        with self._lock:
            if entry.counted:
                entry.counted = False
                self._entries.remove(entry)
                self._requests -= 1
                self._tokens -= entry.tokens
                self._queue.wake_first()


class Reservation:
    """One admitted request: its ``time`` of admission on the clock's scale, and the ``tokens`` it counts with."""

    __slots__ = ("_owner", "counted", "time", "tokens")

    def __init__(self, owner: RateLimits, time: float, tokens: int) -> None:
        self._owner = owner
        self.time = time
        self.tokens = tokens
        self.counted = False

    def settle(self, tokens: int, used: Used | None = None) -> None:
        """Count what the reply says was used, more or less than reserved, from now on."""
        self._owner._settle(self, tokens)

    def unpaid(self) -> None:
        """Nothing: money is not counted here."""

    def withdraw(self) -> None:
        """Count it no longer: the request was never sent. (One that was sent and failed counts.)"""
        self._owner._withdraw(self)


def held_by(headers: Mapping[str, str], wall_s: float | None = None) -> float | None:
    """Seconds until the last reset of what a reply's rate-limit headers say is used up; ``None`` if nothing.

    Read are ``x-ratelimit-*`` (with and without a kind), ``anthropic-ratelimit-*``, and the IETF's ``ratelimit-*`` and
    ``ratelimit``, with resets as :func:`~rmcore._base.retry.time_told_s` reads them, at the reply's own date or else at
    ``wall_s``.
    """
    wall_s = sent_at_s(headers, wall_s)
    resets = [
        time_told_s(headers.get(reset), wall_s)
        for left, reset in _RESETS
        if _PLAIN.fullmatch(found := headers.get(left, "")) and float(found) == 0
    ]
    resets += [float(seconds) for seconds in _IETF.findall(headers.get("ratelimit", "")[:400])]
    return max((seconds for seconds in resets if seconds is not None), default=None)
