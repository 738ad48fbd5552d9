"""One chat completion over HTTP: authorised, bounded in time, size, number and rate, tried again when that can help.

This file knows HTTP and nothing of pairs or verdicts. Every attempt of a call goes through the same four gates:

    a slot in flight   →  the circuit breaker  →  the rate limits  →  the request
    (concurrency.py)      (breaker.py)            (limits.py)         (connections.py)

and reports back to each what became of it. All four are shared by every call of a client, whatever event loop or thread
it comes from. No wait passes a call's deadline, and a reply that would come after it is not bought: an attempt is not
begun unless the median of the latest attempts fits in before the deadline (latency.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import JudgeError
from rmcore._base.http import Connections, check_base_url
from rmcore._base.retry import RetryPolicy, retry_after_s, retry_delay_s, should_retry
from rmcore.judge.base import JudgeUsage
from rmcore.judge.client.breaker import DEFAULT_BREAKER, BreakerPolicy, BreakerState, CircuitBreaker
from rmcore.judge.client.concurrency import AdaptiveConcurrency, ConcurrencyState, Signal
from rmcore.judge.client.latency import LatencyEstimate
from rmcore.judge.client.limits import LimitsState, RateLimits, Reservation
from rmcore.judge.client.reply import Completion, error_code, error_detail, read_completion

if TYPE_CHECKING:
    import httpx

__all__ = ["ChatClient", "ClientState"]

_logger = logging.getLogger(__name__)
_MAX_ERROR_BODY = 65_536
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OVERLOAD = frozenset({429, 503, 529})


@dataclass(slots=True)
class _Attempt:
    """What one try came to: a ``body`` to read, or a ``reason`` why there is none."""

    body: bytes | None = None
    reason: str = ""
    detail: str = ""
    retry: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 0
    sent: bool = True
    reservation: Reservation | None = None

    @property
    def signal(self) -> Signal:
        """What it says about how many requests the endpoint bears."""
        if self.body is not None:
            return "success"
        if self.reason == "timeout":
            return "timeout"
        return "refused" if self.status in _OVERLOAD and self.retry else "neutral"

    @property
    def alive(self) -> bool | None:
        """What it says about the endpoint being there at all; ``None``: nothing."""
        if self.reason in ("timeout", "connection"):
            return False
        if not self.status:
            return None
        return self.status < 500 and self.status != 401


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
    """Posts to ``{base_url}/chat/completions``. Safe to use from several event loops, each with its own connections.

    Args:
        base_url: as in ``https://api.openai.com/v1``; http or https, without credentials, query or fragment.
        api_key_env: environment variable that holds the bearer key, read at every call and kept nowhere; ``None``
            sends no key.
        concurrency: requests in flight at most, over all event loops. How many there are is found out: see
            :mod:`rmcore.judge.client.concurrency`. A call that waits to try again does not take up a slot.
        timeout_s: for one attempt, connection and whole reply together.
        max_reply_bytes: a longer reply is dropped while it comes in.
        retry: see :class:`~rmcore._base.retry.RetryPolicy`.
        requests_per_minute, tokens_per_minute: limits of our own, ``None`` for none; attempts count, failed ones too.
            Their exact meaning is told in :mod:`rmcore.judge.client.limits`. Whatever they are, a server's
            ``x-ratelimit-*`` headers, and ``retry-after`` on 429 and 503, hold back all calls.
        limits: instead of the two numbers: limits kept together with other clients, of the same key say.
        breaker: see :class:`~rmcore.judge.client.breaker.BreakerPolicy`; ``None`` for no circuit breaker.
        transport: an ``httpx.AsyncBaseTransport`` instead of the network. It must suit every loop it is used on.
        clock, random_source: for deadlines and waits, and for jitter.

    A copy made by pickling, and a forked process, start with limits, slots and breaker of their own; limits that were
    shared become the same numbers for each client.

    Raises:
        JudgeError: an argument is unusable.
        InputError: so is a limit.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str | None,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        max_reply_bytes: int = 4 << 20,
        retry: RetryPolicy | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        limits: RateLimits | None = None,
        breaker: BreakerPolicy | None = DEFAULT_BREAKER,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
        random_source: random.Random | None = None,
    ) -> None:
        self.base_url, self._loopback = check_base_url(base_url)
        if api_key_env is not None and not _ENV_NAME.fullmatch(api_key_env):
            # The value is not shown: it may be the key itself, passed by mistake.
            raise JudgeError("api_key_env: got no variable name, expected the NAME of an environment variable or None")
        if concurrency < 1 or not timeout_s > 0 or max_reply_bytes < 1:
            raise JudgeError("concurrency, timeout_s and max_reply_bytes: got one that is not positive")
        if breaker is not None and not isinstance(breaker, BreakerPolicy):
            raise JudgeError(f"breaker: got {type(breaker).__name__}, expected a BreakerPolicy or None")
        if limits is not None and (requests_per_minute, tokens_per_minute) != (None, None):
            raise JudgeError("limits: got them and requests_per_minute or tokens_per_minute, expected one or the other")
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.max_reply_bytes = max_reply_bytes
        self.retry = retry or RetryPolicy()
        self.requests_per_minute = requests_per_minute if limits is None else limits.requests_per_minute
        self.tokens_per_minute = tokens_per_minute if limits is None else limits.tokens_per_minute
        self.breaker = breaker
        self.clock: Clock = clock or SystemClock()
        self._transport = transport
        self._random = random_source or random.Random()
        self._start_afresh()
        if limits is not None:
            self._limits = limits

    def _start_afresh(self) -> None:
        """Everything that belongs to one process: locks, connections, and what was learnt about the endpoint."""
        self._process = os.getpid()
        self._slots = AdaptiveConcurrency(self.concurrency)
        self._breaker = CircuitBreaker(self.breaker, self.clock)
        self._limits = RateLimits(self.requests_per_minute, self.tokens_per_minute, clock=self.clock)
        self._latency = LatencyEstimate()
        self._completions: deque[int] = deque(maxlen=64)  # tokens of the latest replies
        self._lock = threading.Lock()  # guards the next two and the one above
        self._calls = self._attempts = 0
        # trust_env: a proxy cannot reach this machine's own servers
        self._connections = Connections(
            timeout_s=self.timeout_s, trust_env=not self._loopback, transport=self._transport
        )

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a copy sent to another process opens connections of its own."""
        own = ("_slots", "_breaker", "_limits", "_latency", "_completions", "_lock", "_connections")
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
        """Post ``payload`` and return the reply, or a completion without choice that says why there is none.

        Never raises because of the network or the server; cancellation goes through and ends the request.

        Args:
            payload: the JSON body.
            deadline: on ``clock.now()``'s scale. No attempt is begun that is not likely to end before it, none outlives
                it, and no wait is begun that would pass it.
            tokens_estimate: what one attempt may use, prompt and completion, for ``tokens_per_minute``. Default: a
                quarter of the payload's bytes and its ``max_tokens`` or ``max_completion_tokens``; without those, the
                largest of the latest completions. The reply's own count replaces it.
        """
        key, reason = self._key()
        if reason:
            return Completion(None, reason, f"environment variable {self.api_key_env}")
        if self._process != os.getpid():
            self._start_afresh()
        body = json.dumps(payload).encode("ascii")  # ASCII: a lone surrogate is escaped instead of failing here
        tokens = self._tokens(payload, body) if tokens_estimate is None else tokens_estimate
        started, attempts = self.clock.now(), 0
        last: _Attempt | None = None
        while True:
            attempt = await self._attempt(body, key, deadline, tokens)
            if not attempt.sent:
                last = last or attempt  # what the endpoint did tells more than why it was not asked again
                break
            attempts, last = attempts + 1, attempt
            if attempt.body is not None or not attempt.retry:
                break
            delay = retry_delay_s(self.retry, attempts - 1, attempt.headers, self.clock.wall(), self._random.random())
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
            return Completion(None, last.reason, last.detail, usage if attempts else JudgeUsage())
        completion = read_completion(last.body, usage, key)
        self._settle(last, completion.usage)
        return completion

    async def aclose(self) -> None:
        """Close the connections of every loop that still runs. The client can be used again; it then reconnects."""
        if self._process != os.getpid():
            self._start_afresh()  # the loops that these connections belong to run in another process
        await self._connections.aclose()

    async def _attempt(self, body: bytes, key: str, deadline: float | None, tokens: int) -> _Attempt:
        """Through the gates, then one exchange. Whatever ends it, each gate gets back what it gave."""
        until = self._until(deadline)
        left = None if until is None else until - self.clock.now()
        if left is not None and left <= 0:
            return _Attempt(reason="deadline", sent=False)
        slot = await self._slots.acquire(left)
        if slot is None:
            return _Attempt(reason="deadline", sent=False)
        result = _Attempt(sent=False)
        try:
            while True:
                permit = await self._breaker.enter(self._until(deadline))
                if isinstance(permit, str):
                    return _Attempt(reason=permit, detail=self._breaker.state.last_failure, sent=False)
                try:
                    reservation = await self._limits.acquire(tokens, until=self._until(deadline))
                    if isinstance(reservation, str):
                        return _Attempt(reason=reservation, sent=False)
                    if not permit.holds:  # the breaker opened while this call was queued for the limits
                        reservation.withdraw()
                        continue
                    slot.sent()
                    with self._connections.here().client() as client:  # making one takes time that is not the server's
                        result = await self._exchange_in_time(client, body, key, deadline)
                    result.reservation = reservation
                    return result
                finally:
                    permit.report(result.alive if result.sent else None, result.reason)
        finally:
            slot.release(result.signal if result.sent else "neutral")

    async def _exchange_in_time(
        self, client: httpx.AsyncClient, body: bytes, key: str, deadline: float | None
    ) -> _Attempt:
        """One exchange, at most ``timeout_s`` long, not past the deadline, and seen by limits and latency."""
        import httpx

        with self._lock:
            self._attempts += 1
        began = self.clock.now()
        left = None if deadline is None else deadline - began
        cut = left is not None and left < self.timeout_s
        try:
            async with asyncio.timeout(left if cut else self.timeout_s):
                result = await self._exchange(client, body, key)
        except (TimeoutError, httpx.TimeoutException):
            self._latency.add(self.clock.now() - began, self.clock.now(), complete=False)
            return _Attempt(reason="deadline" if cut else "timeout", retry=not cut)
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError, OSError):
            return _Attempt(reason="connection", retry=True)
        except Exception as error:  # a transport of the user's own may raise anything
            # The type only: messages of HTTP libraries can quote headers, and one of them holds the key.
            return _Attempt(reason=f"error_{type(error).__name__}")
        self._limits.observe(result.headers)
        if result.body is not None:
            self._latency.add(self.clock.now() - began, self.clock.now())
        elif result.retry and result.status in _OVERLOAD:
            asked = retry_after_s(result.headers, self.clock.wall())
            if asked is not None and asked <= self.retry.max_retry_after_s:
                self._limits.hold(asked)  # one call was told, all are meant
        return result

    async def _exchange(self, client: httpx.AsyncClient, body: bytes, key: str) -> _Attempt:
        # Uncompressed, so that the size limit is a limit on memory: a compressed reply can unfold a thousandfold.
        sent = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        if key:
            sent["authorization"] = f"Bearer {key}"
        url = self.base_url + "/chat/completions"
        async with client.stream("POST", url, content=body, headers=sent) as response:
            if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                return _Attempt(reason="bad_encoding", headers=response.headers, status=response.status_code)
            failed = response.status_code != 200
            limit = _MAX_ERROR_BODY if failed else self.max_reply_bytes
            content, complete = bytearray(), True
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > limit:
                    complete = False
                    break
        status, headers = response.status_code, response.headers
        if not failed:
            if complete:
                return _Attempt(body=bytes(content), headers=headers, status=status)
            return _Attempt(reason="reply_too_large", headers=headers, status=status)
        code = error_code(bytes(content))
        reason = code if code == "insufficient_quota" else f"http_{status}"
        detail = error_detail(bytes(content[:limit]), key)
        return _Attempt(None, reason, detail, should_retry(status, code), headers, status)

    def _tokens(self, payload: Mapping[str, object], body: bytes) -> int:
        """What one attempt may use, from above rather than from below."""
        given = [payload.get(name) for name in ("max_tokens", "max_completion_tokens")]
        most = [value for value in given if isinstance(value, int) and value > 0]
        if most:
            return len(body) // 4 + max(most)
        with self._lock:
            return len(body) // 4 + max(self._completions, default=0)

    def _settle(self, attempt: _Attempt, usage: JudgeUsage) -> None:
        used = usage.prompt_tokens + usage.completion_tokens
        if used and attempt.reservation is not None:
            attempt.reservation.settle(used)
            with self._lock:
                self._completions.append(usage.completion_tokens)

    def _key(self) -> tuple[str, str]:
        """The key as the environment has it now, and a reason if there is none that can be sent."""
        if self.api_key_env is None:
            return "", ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            return "", "no_api_key"
        # Anything else cannot stand in a header; an HTTP library would refuse it in a message that quotes it.
        return (key, "") if key.isascii() and key.isprintable() else ("", "bad_api_key")

    def _until(self, deadline: float | None) -> float | None:
        """The latest moment at which beginning an attempt makes sense."""
        return None if deadline is None else deadline - self._latency.expected_s(self.clock.now())
