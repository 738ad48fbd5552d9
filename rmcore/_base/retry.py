"""When to call again, and after how long: pure functions of what came back, without clock, network or state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

from rmcore._base.errors import reject

__all__ = ["RetryPolicy", "backoff_s", "retry_after_s", "retry_delay_s", "should_retry"]

_RETRIED = frozenset({408, 409, 429})
_QUOTA = "insufficient_quota"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient a client is. All times in seconds.

    Attributes:
        max_attempts: calls in all, the first included; 1 means no retry.
        base_s, max_backoff_s: without word from the server the n-th wait is ``base_s · 2ⁿ``, capped.
        jitter: fraction by which a wait of our own is shortened at random, so that callers spread out.
        max_retry_after_s: longest wait that the server may ask for. If it asks for more, the call is given up at once:
            calling earlier would only be refused again.
    """

    max_attempts: int = 5
    base_s: float = 0.5
    max_backoff_s: float = 8.0
    jitter: float = 0.25
    max_retry_after_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            reject("max_attempts", self.max_attempts, "at least 1")
        if not 0 <= self.jitter <= 1:
            reject("jitter", self.jitter, "a fraction in [0, 1]")
        for name in ("base_s", "max_backoff_s", "max_retry_after_s"):
            if not getattr(self, name) >= 0:
                reject(name, getattr(self, name), "seconds, at least 0")


def should_retry(status: int, code: str = "") -> bool:
    """Whether a reply with HTTP ``status`` may turn out well next time; ``code`` is the error's code or type.

    408, 409, 429 and everything from 500 on, but not a used-up quota, which waiting does not refill.
    """
    if status == 429 and code == _QUOTA:
        return False
    return status in _RETRIED or status >= 500


def retry_after_s(headers: Mapping[str, str], wall_s: float) -> float | None:
    """How long the server asks to wait: ``retry-after-ms``, else ``retry-after`` in seconds or as an HTTP date.

    Args:
        headers: with lower-case names, or a mapping that does not mind the case.
        wall_s: the time now, in seconds since the epoch.

    Returns:
        Seconds, at least 0 (a date in the past is 0); ``None`` if the headers say nothing that can be understood.
    """
    ms = _number(headers.get("retry-after-ms"))
    if ms is not None:
        return ms / 1000.0
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None or not value:
        return seconds
    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:  # "-0000": the standard's way of saying UTC
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - wall_s)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def backoff_s(policy: RetryPolicy, attempt: int, unit: float) -> float:
    """Our own wait after failed attempt number ``attempt`` (from 0); ``unit`` is a random number in [0, 1)."""
    # The exponent is capped too: 2.0 ** 2000 would overflow.
    wait = min(policy.max_backoff_s, policy.base_s * 2.0 ** min(attempt, 60))
    return wait * (1.0 - policy.jitter * unit)


def retry_delay_s(
    policy: RetryPolicy, attempt: int, headers: Mapping[str, str], wall_s: float, unit: float
) -> float | None:
    """Seconds to wait before the next try of a call worth retrying; ``None``: give it up.

    ``attempt`` counts the failed tries before this one, from 0. Given up are the last attempt allowed and a server that
    asks for a wait beyond ``policy.max_retry_after_s``.
    """
    if attempt + 1 >= policy.max_attempts:
        return None
    asked = retry_after_s(headers, wall_s)
    if asked is None:
        return backoff_s(policy, attempt, unit)
    return asked if asked <= policy.max_retry_after_s else None


def _number(text: str | None) -> float | None:
    """A finite number that is not negative, or ``None``."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
