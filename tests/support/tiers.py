"""Tiers of a few lines."""

from __future__ import annotations

import asyncio

from rmcore.judge import Accept, JudgeUsage, Pair, Tier, TieredJudge, Verdict

__all__ = ["FLIP", "LOSS", "TIE", "WIN", "Fake", "ask", "two"]


WIN, LOSS, TIE = Verdict(1.0), Verdict(-1.0), Verdict(0.0)
FLIP = Verdict(0.0, flipped=True)


class Fake:
    """Answers by prompt (or one answer for all), one call counted a pair; an exception is raised."""

    def __init__(self, answers, tokens=1):
        self.answers = answers
        self.tokens = tokens
        self.asked: list[str] = []
        self.batches: list[int] = []
        self.pairs: list[Pair] = []

    async def judge(self, pairs):
        self.batches.append(len(pairs))
        self.pairs += pairs
        self.asked += [str(pair.prompt) for pair in pairs]
        await asyncio.sleep(0)
        return [self.answer(pair) for pair in pairs]

    def answer(self, pair):
        answer = self.answers[pair.prompt] if isinstance(self.answers, dict) else self.answers
        if isinstance(answer, Exception):
            raise answer
        usage = JudgeUsage(calls=1, prompt_tokens=self.tokens, latencies_s=(0.5,))
        return Verdict(answer.preference, answer.reason, answer.flipped, answer.critique, usage, "a-model")


def two(cheap, strong, *, rule=Accept.always, strong_rule=Accept.always, **kwargs):
    return TieredJudge([Tier(cheap, "cheap", accept=rule), Tier(strong, "strong", accept=strong_rule)], **kwargs)


def ask(judge, *pairs):
    return asyncio.run(judge.judge(pairs or (Pair("p", "a", "b"),)))
