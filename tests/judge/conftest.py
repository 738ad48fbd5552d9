"""A clock that does not wait, recorded verdicts, and judges without keys."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import httpx
import pytest
from support.clocks import clock, untimed, virtual

from rmcore.judge import ChatJudge, ClientOptions, JudgePrompt, Pair, RecordedJudge, Verdict

__all__ = ["clock", "virtual"]

untimed()

PAIR = Pair("p-win", "a", "b")
ROWS = [
    {"prompt": "p-win", "first": "a", "second": "b", "verdict": "win", "order": "ab"},
    {"prompt": "p-win", "first": "a", "second": "b", "verdict": "win", "order": "ba"},
    {"prompt": "p-loss", "first": "a", "second": "b", "verdict": "loss", "order": "ab"},
    {"prompt": "p-loss", "first": "a", "second": "b", "verdict": "loss", "order": "ba"},
    {"prompt": "p-tie", "first": "a", "second": "b", "verdict": "tie", "order": "ab"},
    {"prompt": "p-tie", "first": "a", "second": "b", "verdict": "tie", "order": "ba"},
    # the judge prefers whatever is shown first
    {"prompt": "p-flip", "first": "a", "second": "b", "verdict": "win", "order": "ab"},
    {"prompt": "p-flip", "first": "a", "second": "b", "verdict": "loss", "order": "ba"},
    {"prompt": "p-soft", "first": "a", "second": "b", "verdict": "win", "order": "ab"},
    {"prompt": "p-soft", "first": "a", "second": "b", "verdict": "tie", "order": "ba"},
    {"prompt": "p-half", "first": "a", "second": "b", "verdict": "win", "order": "ab"},
    {"prompt": "p-half", "first": "a", "second": "b", "verdict": None, "order": "ba"},
    {"prompt": "p-null", "first": "a", "second": "b", "verdict": None, "order": "ab"},
    {"prompt": "p-null", "first": "a", "second": "b", "verdict": None, "order": "ba"},
    {"prompt": "p-one", "first": "a", "second": "b", "verdict": "win"},
    {"prompt": [{"role": "user", "content": "p-chat"}], "first": "a", "second": "b", "verdict": "loss"},
]


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return [dict(row) for row in ROWS]


@pytest.fixture
def recorded(rows) -> RecordedJudge:
    return RecordedJudge.from_rows(rows)


@pytest.fixture
def pairs(rows) -> list[Pair]:
    """Every recorded pair once, then every one exchanged, then one that nobody recorded."""
    unique = {json.dumps(row["prompt"]): Pair(row["prompt"], row["first"], row["second"]) for row in rows}
    given = list(unique.values())
    return [*given, *(Pair(p.prompt, p.second, p.first) for p in given), Pair("unheard of", "x", "y")]


@pytest.fixture
def make_judge(clock) -> Iterator[Callable[..., ChatJudge]]:
    """A keyless judge at a URL, on the fake clock, with foreseeable random words; closed when the test is over."""
    made: list[ChatJudge] = []

    def make(base_url: str = "http://127.0.0.1:9/v1", **kwargs: object) -> ChatJudge:
        given = {"api_key_env": None, "clock": clock, "random_source": random.Random(0)} | kwargs
        options = {name: given.pop(name) for name in [f.name for f in fields(ClientOptions)] if name in given}
        made.append(ChatJudge(base_url, "judge-model", client=ClientOptions(**options), **given))
        return made[-1]

    yield make
    for judge in made:
        judge.close()


@pytest.fixture
def mock_judge(make_judge) -> Callable[..., ChatJudge]:
    """A judge whose endpoint is a function of the request."""

    def make(handler: Callable[[httpx.Request], httpx.Response], **kwargs: object) -> ChatJudge:
        return make_judge(transport=httpx.MockTransport(handler), **kwargs)

    return make


@pytest.fixture
def ask() -> Callable[..., Any]:
    """Judge the pairs given, or a standard one, and close the judge: a list of verdicts, or the one."""

    def run(judge: ChatJudge, *pairs: Pair) -> Any:
        async def judge_and_close() -> list[Verdict]:
            async with judge:
                return await judge.judge(pairs or (PAIR,))

        verdicts = asyncio.run(judge_and_close())
        return verdicts if pairs else verdicts[0]

    return run


@pytest.fixture
def chat_reply() -> Callable[..., httpx.Response]:
    """A completion for a request: its message, in which $win, $loss and $tie are the request's own labels."""

    def reply(request: httpx.Request, message: str | Mapping[str, object], **choice: object) -> httpx.Response:
        labels = JudgePrompt.parse(json.loads(request.content)["messages"]).labels
        fields = {"content": message} if isinstance(message, str) else dict(message)
        for name, value in fields.items():
            if isinstance(value, str):
                for word in ("win", "loss", "tie"):
                    value = value.replace(f"${word}", getattr(labels, word))
                fields[name] = value
        body = {"choices": [{"message": fields, "finish_reason": "stop"} | choice]}
        return httpx.Response(200, json=body)

    return reply


@pytest.fixture
def secret(monkeypatch) -> str:
    key = "sk-test-0123456789abcdefSECRET"
    monkeypatch.setenv("RMCORE_TEST_KEY", key)
    return key
