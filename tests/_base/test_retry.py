"""When to call again and after how long."""

from __future__ import annotations

import pytest

from rmcore._base.errors import InputError
from rmcore._base.retry import RetryPolicy, backoff_s, retry_after_s, retry_delay_s, should_retry

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_retried(status):
    assert should_retry(status)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_not_retried(status):
    assert not should_retry(status)


def test_a_used_up_quota_is_not_retried():
    assert not should_retry(429, "insufficient_quota")
    assert should_retry(429, "rate_limit_exceeded")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:27 GMT"}, 7.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:27 -0000"}, 7.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:00:00 GMT"}, 0.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": "Tue, 99 Nov 2023 22:00:00 GMT"}, None),
        ({"retry-after": "9" * 400}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after_s(headers, NOW) == seconds


def test_backoff_doubles_up_to_a_cap_and_is_shortened_at_random():
    policy = RetryPolicy()
    assert [backoff_s(policy, n, 0.0) for n in range(6)] == [0.5, 1, 2, 4, 8, 8]
    assert backoff_s(policy, 10**6, 0.0) == 8
    assert backoff_s(policy, 3, 1.0) == pytest.approx(3.0)


def test_delay():
    policy = RetryPolicy(max_attempts=3, max_retry_after_s=30)
    assert retry_delay_s(policy, 0, {}, NOW, 0.0) == 0.5
    assert retry_delay_s(policy, 0, {"retry-after": "30"}, NOW, 0.0) == 30
    assert retry_delay_s(policy, 0, {"retry-after": "31"}, NOW, 0.0) is None
    assert retry_delay_s(policy, 1, {}, NOW, 0.0) == 1.0
    assert retry_delay_s(policy, 2, {}, NOW, 0.0) is None


@pytest.mark.parametrize(
    "bad", [{"max_attempts": 0}, {"jitter": 2}, {"base_s": -1}, {"max_retry_after_s": float("nan")}]
)
def test_bad_policies(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        RetryPolicy(**bad)
