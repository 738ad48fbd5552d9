"""How an endpoint is called: one frozen object, which a judge and a remote backbone take alike."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rmcore._base.client.breaker import DEFAULT_BREAKER, BreakerPolicy
from rmcore._base.client.limits import Limits
from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import JudgeError
from rmcore._base.numbers import COUNT, Within
from rmcore._base.retry import RetryPolicy

if TYPE_CHECKING:
    import httpx

__all__ = ["ClientOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Bounds and patience of calls: a judge's, over HTTP and by a ``complete`` of your own alike, and a backbone's.

    Args:
        concurrency: requests in flight at most, over all event loops and concurrent calls. How many there really are
            is found out by trying (:mod:`rmcore._base.client.concurrency`). A call that waits to try again does not
            take up a slot. 1 for a model in this process, which answers one at a time anyway.
        first_concurrency: requests in flight at first. The default suits a server of unknown size: a small one of one's
            own has a slot or two, and to a large one a few more round trips are nothing. Give more where the capacity
            is known.
        timeout_s: seconds for one attempt, connection and whole reply together.
        retry: see :class:`~rmcore._base.retry.RetryPolicy`.
        requests_per_minute, tokens_per_minute: limits of our own, ``None`` for none; attempts count, failed ones too.
            Their exact meaning is in :mod:`rmcore._base.client.limits`. Whatever they are, a server's
            ``x-ratelimit-*`` headers, and ``retry-after`` on 429 and 503, hold back all calls.
        limits: instead of the two: a :class:`~rmcore._base.client.limits.RateLimits` that judges of one key share, or
            a :class:`~rmcore.judge.store.shared_limits.SharedLimits` that machines do.
        breaker: when to leave a failing endpoint alone (:class:`~rmcore._base.client.breaker.BreakerPolicy`);
            ``None``: never.
        max_reply_bytes: a longer reply is dropped while it comes in and fails with ``reply_too_large``.
        transport: an ``httpx.AsyncBaseTransport`` instead of the network. It must suit every loop it is used on.
        clock: for deadlines and waits.
        random_source: draws jitter, and the markers and labels of questions; without it these come from the operating
            system and cannot be foreseen.

    Raises:
        JudgeError: a value is unusable.
    """

    concurrency: int = 16
    first_concurrency: int = 4
    timeout_s: float = 60.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    limits: Limits | None = None
    breaker: BreakerPolicy | None = DEFAULT_BREAKER
    max_reply_bytes: int = 4 << 20
    transport: httpx.AsyncBaseTransport | None = None
    clock: Clock = field(default_factory=SystemClock)
    random_source: random.Random | None = None

    def __post_init__(self) -> None:
        units = {"concurrency": "requests", "first_concurrency": "requests", "timeout_s": "seconds"}
        for name, unit in (units | {"max_reply_bytes": "bytes"}).items():
            value = getattr(self, name)
            if value not in Within(whole=unit != "seconds", above=0):
                raise JudgeError(f"{name}: got {value!r:.40}, expected a positive number of {unit}")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value not in COUNT:
                raise JudgeError(f"{name}: got {value!r:.40}, expected a positive integer, or None")
        for name, value, kind in (
            ("retry", self.retry, RetryPolicy),
            ("limits", self.limits, Limits),
            ("breaker", self.breaker, BreakerPolicy),
        ):
            if not isinstance(value, kind) and (value is not None or name == "retry"):
                raise JudgeError(f"{name}: got {type(value).__name__}, expected a {kind.__name__}")
        if self.limits is not None and (self.requests_per_minute, self.tokens_per_minute) != (None, None):
            raise JudgeError("limits: got them and requests_per_minute or tokens_per_minute, expected one or the other")
