"""Questions to a store and replies for it."""

from __future__ import annotations

from rmcore.judge import JudgeUsage, Verdict
from rmcore.judge.store.records import Question, Reply

__all__ = ["HIT", "PAID", "never", "question", "reply"]


PAID = JudgeUsage(calls=1, attempts=1, prompt_tokens=100, completion_tokens=7, seconds=0.5, latencies_s=(0.5,))
HIT = JudgeUsage(cache_hits=1)


def question(text: str = "p", first: str = "a", second: str = "b", **how: object) -> Question:
    given = {"judge": "http://j/v1", "model": "m", "parameters": {"temperature": 0}, "template": "t1"} | how
    return Question.of(**given, prompt=text, first=first, second=second)


def reply(preference: float | None = 1.0, reason: str = "", *, replied: bool = True, **rest: object) -> Reply:
    return Reply(Verdict(preference, reason, critique="because", usage=PAID), replied=replied, **rest)


async def never():
    raise AssertionError("asked again")
