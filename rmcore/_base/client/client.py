"""One request through the gates: bounded in time, size, number and rate, tried again when that can help.

This file knows attempts, and nothing of what is asked, nor of HTTP (exchange.py). Every attempt of a call goes through
the same four gates:

    a slot in flight  →  the circuit breaker  →  the rate limits  →  the request
    (concurrency.py)     (breaker.py)            (limits.py)         (exchange.py)

and reports back to each what became of it. All four are shared by every call of a client, whatever event loop or thread
it comes from. No wait passes a call's deadline, and a reply that would come after it is not bought: an attempt is not
begun unless the median of the latest attempts fits in before the deadline (latency.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from rmcore._base.client.breaker import BreakerState, CircuitBreaker
from rmcore._base.client.causes import ConnectionFailedError, connection_trouble
from rmcore._base.client.concurrency import AdaptiveConcurrency, ConcurrencyState
from rmcore._base.client.exchange import OVERLOAD, Attempt, Exchange, Send
from rmcore._base.client.latency import LatencyEstimate
from rmcore._base.client.limits import Admission, Limits, LimitsState, RateLimits
from rmcore._base.client.options import ClientOptions
from rmcore._base.clock import Clock
from rmcore._base.loop import cancelled_here
from rmcore._base.retry import retry_after_s, retry_delay_s

__all__ = ["Call", "Client", "ClientState"]

_logger = logging.getLogger(__name__)

_Request: TypeAlias = tuple[Mapping[str, object], bytes, str]
"""Payload, the same as JSON, key."""


@dataclass(frozen=True, slots=True)
class ClientState:
    """A snapshot for reports: calls ended, attempts made, and the state of each gate."""

    calls: int
    attempts: int
    expected_s: float
    concurrency: ConcurrencyState
    breaker: BreakerState
    limits: LimitsState


@dataclass(frozen=True, slots=True)
class Call:
    """What became of a call: its last attempt (of none that was sent, why not), attempts sent, seconds in all."""

    last: Attempt
    attempts: int
    seconds: float


class Client:
    """Requests to one exchange, within ``options``. Safe to use from several event loops and threads.

    Args:
        exchange: how one request is made.
        options: see :class:`~rmcore._base.client.options.ClientOptions`.

    A copy made by pickling, and a forked process, start with limits, slots and breaker of their own; limits that were
    shared become the same numbers for each client, unless they are kept outside the process.

    Raises:
        InputError: a limit is no positive integer.
    """

    _limits: Limits

    def __init__(self, exchange: Exchange, options: ClientOptions | None = None) -> None:
        options = options or ClientOptions()
        self.exchange = exchange
        limits = options.limits
        if isinstance(limits, RateLimits):  # of this process: a copy elsewhere cannot share them
            numbers = {name: getattr(limits, name) for name in ("requests_per_minute", "tokens_per_minute")}
            options = replace(options, limits=None, **numbers)
        self.options = options
        self._random = options.random_source or random.Random()
        self._start_afresh()
        if limits is not None:
            self._limits = limits

    @property
    def clock(self) -> Clock:
        """The clock of deadlines."""
        return self.options.clock

    def _start_afresh(self) -> None:
        """Everything that belongs to one process: locks, connections, and what was learnt about the endpoint."""
        options = self.options
        self._process = os.getpid()
        self._slots = AdaptiveConcurrency(options.concurrency, start=options.first_concurrency)
        self._breaker = CircuitBreaker(options.breaker, options.clock)
        self._limits = options.limits or RateLimits(
            options.requests_per_minute, options.tokens_per_minute, clock=options.clock
        )
        self._latency = LatencyEstimate()
        self._lock = threading.Lock()  # guards the next two
        self._calls = self._attempts = 0

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a copy sent to another process opens connections of its own."""
        own = ("_slots", "_breaker", "_limits", "_latency", "_lock")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_afresh()

    @property
    def state(self) -> ClientState:
        """How calls are doing right now."""
        expected = self._latency.expected_s(self.clock.now())
        return ClientState(
            self._calls, self._attempts, expected, self._slots.state, self._breaker.state, self._limits.state
        )

    async def call(
        self, payload: Mapping[str, object], body: bytes, key: str, *, deadline: float | None = None, tokens: int = 0
    ) -> Call:
        """Send one request, tried again as the options say. Never raises because of the network or the server;
        cancellation goes through and ends the request.

        Args:
            payload: the request, JSON values.
            body: the same as JSON.
            key: the exchange's secret, as it is now.
            deadline: on ``clock.now()``'s scale. No attempt is begun that is not likely to end before it, none outlives
                it, and no wait is begun that would pass it.
            tokens: what one attempt may use, for ``tokens_per_minute``.
        """
        self._check_process()
        started, attempts = self.clock.now(), 0
        last: Attempt | None = None
        while True:
            attempt = await self._attempt((payload, body, key), deadline, tokens)
            if not attempt.sent:
                last = last or attempt  # what the endpoint did tells more than why it was not asked again
                break
            attempts, last = attempts + 1, attempt
            if attempt.body is not None or not attempt.retry:
                break
            wall, unit = self.clock.wall(), self._random.random()
            delay = retry_delay_s(self.options.retry, attempts - 1, attempt.headers, wall, unit)
            until = self._until(deadline)
            if delay is None or (until is not None and self.clock.now() + delay >= until):
                break
            _logger.debug("call failed (%s), next try in %.2f s", attempt.reason, delay)
            await self.clock.sleep(delay)
        with self._lock:
            self._calls += 1
        return Call(last, attempts, self.clock.now() - started)

    async def aclose(self) -> None:
        """Close the connections of every loop that still runs. The client can be used again; it then reconnects."""
        self._check_process()
        await self.exchange.aclose()

    def _check_process(self) -> None:
        if self._process != os.getpid():  # the loops that its connections belong to run in another process
            self.exchange.start_afresh()
            self._start_afresh()

    async def _attempt(self, request: _Request, deadline: float | None, tokens: int) -> Attempt:
        """Through the gates, then one exchange. Whatever ends it, each gate gets back what it gave."""
        until = self._until(deadline)
        left = None if until is None else until - self.clock.now()
        if left is not None and left <= 0:
            return Attempt(reason="deadline", sent=False)
        slot = await self._slots.acquire(left)
        if slot is None:
            return Attempt(reason="deadline", sent=False)
        result = Attempt(sent=False)
        try:
            while True:
                permit = await self._breaker.enter(self._until(deadline))
                if isinstance(permit, str):
                    return Attempt(reason=permit, detail=self._breaker.state.last_failure, sent=False)
                try:
                    reservation = await self._limits.acquire(tokens, until=self._until(deadline))
                    if isinstance(reservation, str):
                        return Attempt(reason=reservation, sent=False)
                    if not permit.holds:  # the breaker opened while this call was queued for the limits
                        reservation.withdraw()
                        continue
                    slot.sent()
                    result = await self._sent(reservation, request, deadline)
                    result.reservation = reservation
                    if result.body is None and result.status >= 400:
                        reservation.unpaid()
                    return result
                finally:
                    permit.report(result.alive if result.sent else None, result.reason)
        finally:
            slot.release(result.signal if result.sent else "neutral")

    async def _sent(self, reservation: Admission, request: _Request, deadline: float | None) -> Attempt:
        """One exchange on a connection; where not even that can be had, for want of files say, nothing is counted."""
        with ExitStack() as stack:
            try:  # making a connection takes time that is not the server's
                send = stack.enter_context(self.exchange.session())
            except OSError as error:
                reservation.withdraw()
                trouble = connection_trouble(error, self.exchange.place)
                return self._unconnected(trouble)
            return await self._exchange_in_time(send, request, deadline)

    async def _exchange_in_time(self, send: Send, request: _Request, deadline: float | None) -> Attempt:
        """One exchange, at most ``timeout_s`` long, not past the deadline, and seen by limits and latency."""
        with self._lock:
            self._attempts += 1
        began = self.clock.now()
        left = None if deadline is None else deadline - began
        cut = left is not None and left < self.options.timeout_s
        try:
            async with asyncio.timeout(left if cut else self.options.timeout_s):
                result = await send(*request)
        except TimeoutError:
            self._latency.add(self.clock.now() - began, self.clock.now(), complete=False)
            waited = f"no whole reply within {left if cut else self.options.timeout_s:.3g} s"
            return Attempt(reason="deadline" if cut else "timeout", detail=waited, retry=not cut)
        except ConnectionFailedError as error:
            return self._unconnected(error)
        except OSError:
            return Attempt(reason="connection", retry=True)
        except asyncio.CancelledError:
            if cancelled_here():
                raise
            return Attempt(reason="error_CancelledError")  # of something that the transport or function waited for
        except Exception as error:  # a transport or a function of the user's own may raise anything
            # The type only: messages of HTTP libraries can quote headers, and one of them holds the key.
            return Attempt(reason=f"error_{type(error).__name__}")
        self._limits.observe(result.headers)
        if result.body is not None:
            self._latency.add(self.clock.now() - began, self.clock.now())
        elif result.retry and result.status in OVERLOAD:
            asked = retry_after_s(result.headers, self.clock.wall())
            if asked is not None and asked <= self.options.retry.max_retry_after_s:
                self._limits.hold(asked)  # one call was refused, all are meant
        return result

    def _unconnected(self, error: ConnectionFailedError) -> Attempt:
        return Attempt(reason="connection", detail=str(error), retry=not error.lasting, local=error.local)

    def _until(self, deadline: float | None) -> float | None:
        """The latest moment at which beginning an attempt makes sense."""
        return None if deadline is None else deadline - self._latency.expected_s(self.clock.now())
