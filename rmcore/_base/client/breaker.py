"""A circuit breaker: an endpoint that is down is left alone, and tried again by one call at a time.

    closed ──k failures in a row──▶ open ──cool-down over──▶ half-open, ONE probe ──alive──▶ closed
                                     ▲                               │
                                     └──── cool-down doubled ◀─fails─┘

What counts, told with :meth:`Permit.report`:

- *down*: no connection or a broken one, no reply in time, a status from 500 on, and 401. 401 is no outage, but a
  key that is not accepted fails every call alike; 403 may be about one request and does not count.
- *alive*: any other reply, 429 too. An endpoint that says "too many" is there, so a storm of refusals never opens.
- *unknown*: an attempt that its caller cut short.

Failures in a row are of attempts that *began* after the last sign of life. Requests that hang and time out together,
while others went through, are not an outage.

**Waiting or failing.** A server that restarts is back in seconds, and a batch of thousands should not be lost to that;
an endpoint that stays away should not hold up training. So while an outage is younger than ``patience_s`` calls wait
for the probe, as far as their deadlines allow; when it is older they fail at once with ``breaker_open``, and whichever
call comes first after a cool-down is the probe. A refused key (401) is waited for by nobody.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass
from typing import Literal

from rmcore._base.client.queue import Waiter, WaitQueue
from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_numbers

__all__ = ["DEFAULT_BREAKER", "BreakerPolicy", "BreakerState", "CircuitBreaker", "Permit"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to leave an endpoint alone. Times in seconds.

    Attributes:
        failures: so many in a row open the breaker. More than one call's attempts, or a single question that
            upsets the server would shut out all others.
        cooldown_s: from opening to the first probe; doubled by every probe that fails, up to ``max_cooldown_s``.
        patience_s: how long after opening calls wait for a probe to succeed. 0: they fail at once.
    """

    failures: int = 10
    cooldown_s: float = 1.0
    max_cooldown_s: float = 30.0
    patience_s: float = 30.0

    def __post_init__(self) -> None:
        check_numbers(self, COUNT, "failures", expected="a positive integer")
        check_numbers(self, Within(above=0), "max_cooldown_s", expected="seconds above 0")
        check_numbers(self, Within(above=0), "cooldown_s", expected="seconds above 0")
        if self.cooldown_s > self.max_cooldown_s:
            reject("cooldown_s", self.cooldown_s, f"seconds above 0 and at most max_cooldown_s={self.max_cooldown_s}")
        check_numbers(self, Within(least=0), "patience_s", expected="seconds, at least 0")


DEFAULT_BREAKER = BreakerPolicy()


@dataclass(frozen=True, slots=True)
class BreakerState:
    """A snapshot for reports: the ``state``, ``failures`` in a row, how often it ``opened``, calls ``refused``."""

    state: Literal["closed", "open", "half_open"]
    failures: int
    opened: int
    refused: int
    last_failure: str


class CircuitBreaker:
    """Shared by all calls of a client, on any event loop and thread.

    Args:
        policy: ``None`` lets everything through, always.
        clock: for cool-downs and deadlines.
    """

    def __init__(self, policy: BreakerPolicy | None = None, clock: Clock | None = None) -> None:
        self.policy = policy
        self._clock: Clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._queue = WaitQueue()
        self._state: Literal["closed", "open", "half_open"] = "closed"
        self._failures = self._opened = self._refused = 0
        self._last_failure = ""
        self._last_alive = float("-inf")
        self._outage_began = self._probe_at = 0.0
        self._cooldown = 0.0

    @property
    def state(self) -> BreakerState:
        """A consistent snapshot."""
        with self._lock:
            return BreakerState(self._state, self._failures, self._opened, self._refused, self._last_failure)

    async def enter(self, until: float | None = None) -> Permit | str:
        """A permit to try once, or the reason why not: ``breaker_open``.

        Args:
            until: latest time of starting, on the clock's scale. No wait passes it.
        """
        with self._lock:
            answer = self._look(until, None)
            if answer is not None:
                return answer
            waiter = self._queue.join()
        try:
            while True:
                waiter.look_again()
                with self._lock:
                    now = self._clock.now()
                    first = self._queue.first() is waiter
                    answer = self._look(until, waiter if first else None)
                    if answer is not None:
                        return answer
                    wake_at = self._wake_at()
                if first:
                    wake_at = wake_at if until is None else min(wake_at, until)
                    await waiter.wait_or(self._clock, wake_at - now)
                else:
                    try:
                        async with asyncio.timeout(None if until is None else until - now):
                            await waiter.wait()
                    except TimeoutError:
                        with self._lock:
                            self._refused += 1
                        return "breaker_open"
        finally:
            with self._lock:
                self._queue.leave(waiter)
                self._queue.wake_first()

    def _look(self, until: float | None, first: Waiter | None) -> Permit | str | None:
        """A permit, a refusal, or ``None``: wait. ``first`` is the caller's place if it heads the queue."""
        now = self._clock.now()
        if self._state == "closed":
            return Permit(self, now, probe=False)
        assert self.policy is not None
        old = now >= self._outage_began + self.policy.patience_s or self._last_failure == "http_401"
        if self._state == "open" and now >= self._probe_at and (first is not None or old or not len(self._queue)):
            self._state = "half_open"
            return Permit(self, now, probe=True)
        if old:
            self._refused += 1
            return "breaker_open"
        if until is not None and (now >= until or (self._state == "open" and self._probe_at > until)):
            self._refused += 1
            return "breaker_open"
        return None

    def _wake_at(self) -> float:
        assert self.policy is not None
        patience_ends = self._outage_began + self.policy.patience_s
        return min(self._probe_at, patience_ends) if self._state == "open" else patience_ends

    def _report(self, permit: Permit, alive: bool | None, reason: str) -> None:
        if self.policy is None:
            return
        with self._lock:
            now = self._clock.now()
            if alive:
                self._last_alive = now
                self._failures = 0
                if self._state != "closed":
                    _logger.info("endpoint answers again after %.1f s", now - self._outage_began)
                    self._state = "closed"
                    self._queue.wake_all()
            elif permit.probe:
                if self._state == "half_open":  # otherwise an attempt from before has closed it meanwhile
                    self._state = "open"
                    if alive is None:
                        self._probe_at = now
                    else:
                        self._last_failure = reason
                        self._cooldown = min(2 * self._cooldown, self.policy.max_cooldown_s)
                        self._probe_at = now + self._cooldown
                    self._queue.wake_first()
            elif alive is False and self._state == "closed" and permit.started >= self._last_alive:
                self._failures += 1
                self._last_failure = reason
                if self._failures >= self.policy.failures:
                    self._open(now)

    def _open(self, now: float) -> None:
        assert self.policy is not None
        self._state = "open"
        self._opened += 1
        self._cooldown = self.policy.cooldown_s
        self._outage_began = now
        self._probe_at = now + self._cooldown
        _logger.warning("endpoint failed %d times in a row (%s): pausing", self._failures, self._last_failure)


class Permit:
    """Leave to try once, to be answered with what came of it."""

    __slots__ = ("_owner", "probe", "started")

    def __init__(self, owner: CircuitBreaker, started: float, *, probe: bool) -> None:
        self._owner: CircuitBreaker | None = owner
        self.started = started
        self.probe = probe

    @property
    def holds(self) -> bool:
        """False where the breaker has opened since, so that the attempt should not be made after all."""
        owner = self._owner
        return owner is not None and (self.probe or owner._state == "closed")

    def report(self, alive: bool | None, reason: str = "") -> None:
        """The endpoint was ``alive``, was not (with the ``reason``), or it is not known. A second call does nothing."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._report(self, alive, reason)
