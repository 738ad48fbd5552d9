"""When to call again, and after how long: pure functions of what came back, without clock, network or state."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from rmcore._base.numbers import COUNT, Within, check_numbers

__all__ = [
    "RetryPolicy",
    "backoff_s",
    "retry_after_s",
    "retry_delay_s",
    "sent_at_s",
    "should_retry",
    "time_told_s",
    "wait_in_words_s",
]

_RETRIED = frozenset({408, 409, 424, 425, 429})
_QUOTA = "insufficient_quota"
_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ns|us|µs|μs|ms|s|m|h|d))+", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|μs|ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PLAIN = re.compile(r"\d{1,15}(?:\.\d{1,9})?", re.ASCII)
_EPOCH_S, _EPOCH_MS = 1e9, 1e12
"""From here on a number is a point in time, since 1970: as a wait it would be 30 years."""
_IN_WORDS = re.compile(
    r"(?i)\b(?:try again|retry|retry your request|wait)[ :]{1,2}(?:in|after|for)?:? ?"
    r"((?:\d{1,6}(?:\.\d{1,9})?(?:ms|s|m|h)){1,4}\b|\d{1,6}(?:\.\d{1,9})? ?(?:seconds?|secs?|minutes?|mins?)\b)"
)
_WORDS = re.compile(r"([\d.]+) ?(sec|min)", re.ASCII)


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
        check_numbers(self, COUNT, "max_attempts", expected="at least 1")
        check_numbers(self, Within(least=0, most=1), "jitter", expected="a fraction in [0, 1]")
        check_numbers(self, Within(least=0), "base_s", "max_backoff_s", expected="seconds, at least 0")
        patient = Within(least=0, finite=False)  # inf: as long as it asks for
        check_numbers(self, patient, "max_retry_after_s", expected="seconds, at least 0, or inf")


def should_retry(status: int, code: str = "") -> bool:
    """Whether a reply with HTTP ``status`` may turn out well next time; ``code`` is the error's code or type.

    408, 409, 424 (a model that failed behind its gateway), 425, 429 and everything from 500 on, but not a used-up
    quota, which waiting does not refill.
    """
    if status == 429 and code == _QUOTA:
        return False
    return status in _RETRIED or status >= 500


def retry_after_s(headers: Mapping[str, str], wall_s: float) -> float | None:
    """How long the server asks to wait: ``retry-after-ms``, else ``retry-after`` as :func:`time_told_s` reads it.

    Of several numbers (a server and a proxy have both set the header) the largest counts. A point in time is compared
    with the reply's own ``date`` where it has one, so that this machine's clock may be wrong.

    Args:
        headers: with lower-case names, or a mapping that does not mind the case.
        wall_s: the time now, in seconds since the epoch.

    Returns:
        Seconds, at least 0 (a date in the past is 0); ``None`` if the headers say nothing that can be understood.
    """
    ms = _number(headers.get("retry-after-ms"))
    if ms is not None:
        return ms / 1000.0
    value = headers.get("retry-after") or ""
    seconds = time_told_s(value, sent_at_s(headers, wall_s))
    if seconds is None and "," in value:
        several = [_number(part) for part in value.split(",")]
        return None if None in several else max(number for number in several if number is not None)
    return seconds


def sent_at_s(headers: Mapping[str, str], wall_s: float | None) -> float | None:
    """When a reply was sent, by its own ``date``, or else ``wall_s``: what points in time in it are compared with."""
    sent = _point_in_time(headers.get("date") or "")
    return wall_s if sent is None else sent


def time_told_s(text: str | None, wall_s: float | None = None) -> float | None:
    """Seconds from now that a header means: so many, a duration (``6m0s``, ``1.5s``, ``20ms``, ``1h2m3s``), or a point
    in time, as an HTTP date, by RFC 3339, or as seconds or milliseconds since 1970.

    Args:
        text: the header's value.
        wall_s: the time now, in seconds since the epoch; without it points in time say nothing.

    Returns:
        Seconds, at least 0; ``None`` for anything else: a missing, negative, endless or unreadable value.
    """
    text = (text or "").strip()[:64]
    number = _number(text)
    if number is not None:
        if number < _EPOCH_S:
            return number
        if wall_s is None or not _PLAIN.fullmatch(text):
            return None
        return max(0.0, (number / 1000 if number >= _EPOCH_MS else number) - wall_s)
    if _DURATION.fullmatch(text):
        return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
    at = None if wall_s is None else _point_in_time(text)
    return None if at is None or wall_s is None else max(0.0, at - wall_s)


def wait_in_words_s(message: str) -> float | None:
    """Seconds that an error's message asks to wait ("Please try again in 7.66s", "retry after 26 seconds"), if any."""
    found = _IN_WORDS.search(message)
    if found is None:
        return None
    words = _WORDS.match(found[1])
    return time_told_s(found[1]) if words is None else float(words[1]) * (60.0 if words[2].lower() == "min" else 1.0)


def _point_in_time(text: str) -> float | None:
    """Seconds since the epoch of an HTTP date or an RFC 3339 time."""
    try:
        date = datetime.fromisoformat(text) if text[:4].isdigit() else parsedate_to_datetime(text)
        if date.tzinfo is None:  # "-0000": the standard's way of saying UTC
            date = date.replace(tzinfo=UTC)
        return date.timestamp()
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
    asks for a wait beyond ``policy.max_retry_after_s``. One that asks for none is asked again at once, and from then on
    after waits of our own, or all attempts would be over in a moment.
    """
    if attempt + 1 >= policy.max_attempts:
        return None
    asked = retry_after_s(headers, wall_s)
    if asked is None or (asked == 0 and attempt > 0):
        return backoff_s(policy, attempt, unit)
    return asked if asked <= policy.max_retry_after_s else None


def _number(text: str | None) -> float | None:
    """A finite number that is not negative, or ``None``."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
