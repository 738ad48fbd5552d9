"""Token counts that cannot be true are not used, and the call is one of unknown cost."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore.judge import Pair
from rmcore.judge.base import JudgeUsage
from rmcore.judge.client.tokens import believable

COUNTS = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens")


def _counts(usage: JudgeUsage) -> list[int]:
    return [getattr(usage, name) for name in COUNTS]


@pytest.mark.parametrize(
    ("counts", "payload", "believed"),
    [
        ({"prompt_tokens": 900, "completion_tokens": 200}, {}, True),
        ({"prompt_tokens": 900, "completion_tokens": 2**53 - 1}, {}, False),
        ({"prompt_tokens": 2**53 - 1, "completion_tokens": 3}, {}, False),
        ({"prompt_tokens": 3_000, "completion_tokens": 3}, {}, True),  # a long template of the server's
        ({"prompt_tokens": 9_000, "completion_tokens": 3}, {}, False),
        ({"completion_tokens": 100}, {"max_tokens": 100}, True),
        ({"completion_tokens": 1_000}, {"max_tokens": 100}, False),
        ({"completion_tokens": 1_000}, {"max_completion_tokens": 100}, False),
        ({"completion_tokens": 1_000, "reasoning_tokens": 950}, {"max_tokens": 100}, True),
        ({"completion_tokens": 60_000, "reasoning_tokens": 59_000}, {}, True),
        ({"completion_tokens": 1 << 30, "reasoning_tokens": 1 << 30}, {"max_tokens": 100}, False),
    ],
)
def test_counts_are_bounded_by_what_was_sent_and_received(caplog, counts, payload, believed):
    usage = JudgeUsage(calls=1, attempts=2, seconds=3.0, cached_tokens=1, **counts)
    found = believable(usage, payload, sent=1_000, received=4_000)
    assert (found == usage) == believed
    assert ("not used" in caplog.text) != believed
    if not believed:
        assert _counts(found) == [0, 0, 0, 0]
        assert (found.calls, found.attempts, found.seconds) == (1, 2, 3.0)


@given(
    *[st.integers(0, 2**53 - 1)] * 3, st.integers(1, 10**6), st.integers(0, 10**6), st.none() | st.integers(1, 10**5)
)
def test_what_is_believed_is_bounded(prompt, completion, reasoning, sent, received, limit):
    usage = JudgeUsage(prompt_tokens=prompt, completion_tokens=completion, reasoning_tokens=reasoning)
    found = believable(usage, {} if limit is None else {"max_tokens": limit}, sent, received)
    assert found.prompt_tokens <= sent + 4_096
    assert found.completion_tokens <= received + (1 << 18)


def test_a_call_with_impossible_counts_has_no_price(ask, mock_judge, chat_reply):
    def handler(request):
        body = json.loads(chat_reply(request, "<verdict>$win</verdict>").content)
        return httpx.Response(200, json=body | {"usage": {"prompt_tokens": 300, "completion_tokens": 2**53 - 1}})

    judge = mock_judge(handler, prices={"judge-model": {"prompt": 1.0, "completion": 1.0}}, orders="one")
    (verdict,) = ask(judge, Pair("p", "a", "b"))
    assert verdict.preference is not None
    assert (verdict.usage.cost, verdict.usage.unpriced_calls, verdict.usage.completion_tokens) == (0.0, 1, 0)
