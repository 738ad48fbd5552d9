"""When to call again and after how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore._base.retry import (
    RetryPolicy,
    backoff_s,
    retry_after_s,
    retry_delay_s,
    should_retry,
    time_told_s,
    wait_in_words_s,
)

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize("status", [408, 409, 424, 425, 429, 500, 502, 503, 504, 524, 529])
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
        # of a server and a proxy
        ({"retry-after": "2, 7"}, 7.0),
        ({"retry-after": "2, soon"}, None),
        ({"retry-after": "30s"}, 30.0),
        ({"retry-after": "1m30s"}, 90.0),
        ({"retry-after": "1700000009"}, 9.0),
        ({"retry-after": "1700000009000"}, 9.0),
        ({"retry-after": "2023-11-14T22:13:27Z"}, 7.0),
        ({"retry-after": "2023-11-14T22:13:27.5+00:00"}, 7.5),
        # a server whose clock is an hour ahead of ours
        ({"retry-after": "Tue, 14 Nov 2023 23:13:27 GMT", "date": "Tue, 14 Nov 2023 23:13:20 GMT"}, 7.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:27 GMT", "date": "yesterday"}, 7.0),
        ({"retry-after-ms": "-5", "retry-after": "3"}, 3.0),
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
    assert retry_delay_s(policy, 0, {"retry-after": "0"}, NOW, 0.0) == 0
    assert retry_delay_s(policy, 1, {"retry-after": "0"}, NOW, 0.0) == 1.0, "or all attempts are over in a moment"
    assert retry_delay_s(policy, 1, {"retry-after": "Tue, 14 Nov 2023 22:00:00 GMT"}, NOW, 0.0) == 1.0
    assert retry_delay_s(policy, 2, {}, NOW, 0.0) is None


@pytest.mark.parametrize(
    "bad", [{"max_attempts": 0}, {"jitter": 2}, {"base_s": -1}, {"max_retry_after_s": float("nan")}]
)
def test_bad_policies(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        RetryPolicy(**bad)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("1.5s", 1.5),
        ("20ms", 0.02),
        ("1h2m3s", 3723.0),
        ("2m59.56s", 179.56),
        ("1d", 86400.0),
        ("250us", 2.5e-4),
        ("250µs", 2.5e-4),
        ("7", 7.0),
        ("0", 0.0),
        ("0s", 0.0),
        (" 3s ", 3.0),
        (None, None),
        ("", None),
        ("-1s", None),
        ("-5", None),
        ("1e9", None),
        ("inf", None),
        ("nan", None),
        ("soon", None),
        ("5 s", None),
        ("s", None),
        ("1.2.3s", None),
        ("9" * 400, None),
        ("9" * 400 + "s", None),
        ("1s, 2s", None),
        ("٣s", None),
    ],
)
def test_a_time_told(text, seconds):
    got = time_told_s(text)
    assert got is None if seconds is None else got == pytest.approx(seconds)


@given(st.text(max_size=200))
def test_a_time_told_is_total(text):
    got = time_told_s(text)
    assert got is None or 0 <= got < 1e15


@given(st.text(max_size=200), st.dictionaries(st.sampled_from(["retry-after", "date", "retry-after-ms"]), st.text()))
def test_any_header_and_any_words_are_a_wait_or_none(text, headers):
    for got in (time_told_s(text, NOW), wait_in_words_s(text), retry_after_s(headers, NOW)):
        assert got is None or got >= 0


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Rate limit reached for m in organization o on TPM: Limit 90000. Please try again in 7.66s. Visit …", 7.66),
        ("Please try again in 20ms.", 0.02),
        ("Please try again in 6m0s.", 360.0),
        ("Requests have exceeded call rate limit. Please retry after 26 seconds.", 26.0),
        ("You exceeded your current quota. Please retry in 36.534s.", 36.534),
        ("Too many requests, wait 2 minutes", 120.0),
        ("Retry after 1 second", 1.0),
        ("try again later", None),
        ("retry with fewer tokens", None),
        ("we try hard in 5s", None),
        ("try again in 5 apples", None),
        ("", None),
    ],
)
def test_a_wait_in_words(message, seconds):
    assert wait_in_words_s(message) == (None if seconds is None else pytest.approx(seconds))
