"""One chat completion: bounded in time, size, number and rate, tried again when that can help.

This file knows attempts and nothing of pairs or verdicts, nor of HTTP (exchange.py). Every attempt of a call goes
through the same four gates:

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
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from rmcore._base.clock import Clock
from rmcore._base.retry import retry_after_s, retry_delay_s
from rmcore.judge import large
from rmcore.judge.base import JudgeUsage
from rmcore.judge.client.breaker import BreakerState, CircuitBreaker
from rmcore.judge.client.causes import ConnectionFailedError
from rmcore.judge.client.concurrency import AdaptiveConcurrency, ConcurrencyState
from rmcore.judge.client.exchange import OVERLOAD, Attempt, Exchange, HttpExchange, Send
from rmcore.judge.client.latency import LatencyEstimate
from rmcore.judge.client.limits import LimitsState, RateLimits
from rmcore.judge.client.options import ClientOptions
from rmcore.judge.client.overflow import Overflow
from rmcore.judge.client.reply import Completion, read_completion
from rmcore.judge.client.tokens import believable

__all__ = ["ChatClient", "ClientState"]

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


class ChatClient:
    """Completions from one exchange, within ``options``. Safe to use from several event loops and threads.

    Args:
        exchange: how one request is made.
        options: see :class:`~rmcore.judge.client.options.ClientOptions`.

    A copy made by pickling, and a forked process, start with limits, slots and breaker of their own; limits that were
    shared become the same numbers for each client.

    Raises:
        InputError: a limit is no positive integer.
    """

    def __init__(self, exchange: Exchange, options: ClientOptions | None = None) -> None:
        options = options or ClientOptions()
        self.exchange = exchange
        limits = options.limits
        if limits is not None:
            numbers = {name: getattr(limits, name) for name in ("requests_per_minute", "tokens_per_minute")}
            options = replace(options, limits=None, **numbers)
        self.options = options
        self._random = options.random_source or random.Random()
        self._start_afresh()
        if limits is not None:
            self._limits = limits

    @classmethod
    def over_http(cls, base_url: str, api_key_env: str | None, options: ClientOptions | None = None) -> ChatClient:
        """Of an OpenAI-compatible endpoint: see :class:`~rmcore.judge.client.exchange.HttpExchange`."""
        options = options or ClientOptions()
        return cls(HttpExchange(base_url, api_key_env, options), options)

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
        self._limits = RateLimits(options.requests_per_minute, options.tokens_per_minute, clock=options.clock)
        self._latency = LatencyEstimate()
        self._completions: deque[int] = deque(maxlen=64)  # tokens of the latest replies
        self._lock = threading.Lock()  # guards the next two and the one above
        self._calls = self._attempts = 0

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a copy sent to another process opens connections of its own."""
        own = ("_slots", "_breaker", "_limits", "_latency", "_completions", "_lock")
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

    async def complete(
        self, payload: Mapping[str, object], *, deadline: float | None = None, tokens_estimate: int | None = None
    ) -> Completion:
        """Send ``payload`` and return the reply, or a completion without choice that says why there is none.

        Never raises because of the network or the server; cancellation goes through and ends the request.

        Args:
            payload: the request, JSON values.
            deadline: on ``clock.now()``'s scale. No attempt is begun that is not likely to end before it, none outlives
                it, and no wait is begun that would pass it.
            tokens_estimate: what one attempt may use, prompt and completion, for ``tokens_per_minute``. Default: a
                quarter of the payload's bytes and its ``max_tokens`` or ``max_completion_tokens``; without those, the
                largest of the latest completions. The reply's own count replaces it.
        """
        key, reason = self.exchange.secret()
        if reason:
            return Completion(None, reason, f"environment variable {getattr(self.exchange, 'api_key_env', None)}")
        self._check_process()
        # ASCII: a lone surrogate is escaped instead of failing here.
        body = (await large.call(large.ascii_json, payload)).encode("ascii")
        tokens = self._tokens(payload, body) if tokens_estimate is None else tokens_estimate
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
            _logger.debug("judge call failed (%s), next try in %.2f s", attempt.reason, delay)
            await self.clock.sleep(delay)
        with self._lock:
            self._calls += 1
        seconds = self.clock.now() - started
        usage = JudgeUsage(calls=1, attempts=attempts, seconds=seconds, latencies_s=(seconds,))
        if last.body is None:
            overflow = last.overflow
            if last.reason == "over_token_limit":  # as of a model whose context is no larger than that
                overflow = Overflow(self._limits.tokens_per_minute, tokens)
            return Completion(None, last.reason, last.detail, usage if attempts else JudgeUsage(), overflow=overflow)
        completion = read_completion(last.body, usage, key)
        completion = replace(completion, usage=believable(completion.usage, payload, len(body), len(last.body)))
        self._settle(last, completion.usage)
        return completion

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
                    with self.exchange.session() as send:  # making a connection takes time that is not the server's
                        result = await self._exchange_in_time(send, request, deadline)
                    result.reservation = reservation
                    return result
                finally:
                    permit.report(result.alive if result.sent else None, result.reason)
        finally:
            slot.release(result.signal if result.sent else "neutral")

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
            return Attempt(reason="connection", detail=str(error), retry=not error.lasting)
        except OSError:
            return Attempt(reason="connection", retry=True)
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

    def _tokens(self, payload: Mapping[str, object], body: bytes) -> int:
        """What one attempt may use, from above rather than from below."""
        given = [payload.get(name) for name in ("max_tokens", "max_completion_tokens")]
        most = [value for value in given if isinstance(value, int) and value > 0]
        if most:
            return len(body) // 4 + max(most)
        with self._lock:
            return len(body) // 4 + max(self._completions, default=0)

    def _settle(self, attempt: Attempt, usage: JudgeUsage) -> None:
        used = usage.prompt_tokens + usage.completion_tokens
        if used and attempt.reservation is not None:
            attempt.reservation.settle(used)
            with self._lock:
                self._completions.append(usage.completion_tokens)

    def _until(self, deadline: float | None) -> float | None:
        """The latest moment at which beginning an attempt makes sense."""
        return None if deadline is None else deadline - self._latency.expected_s(self.clock.now())
