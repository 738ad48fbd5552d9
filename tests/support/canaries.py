"""A judge that knows what canaries are, and streams for it."""

from __future__ import annotations

import asyncio
import logging
import random

from rmcore.judge import (
    CANARY_ID,
    CANARY_KINDS,
    CanaryJudge,
    JudgeUsage,
    Pair,
    Verdict,
)

__all__ = ["REAL", "Oracle", "own", "pair", "pairs", "run", "stream"]


REAL = "The tide follows the moon because its gravity pulls the near side of the ocean harder than the far side. " * 2


def pair(k=0, **kwargs):
    return Pair(f"question {k}?", f"{REAL} ({k})", f"{REAL[::-1]} ({k})", id=f"real-{k}", **kwargs)


def pairs(n):
    return [pair(k) for k in range(n)]


class Oracle:
    """Knows the real response by its text, and fails on the kinds told, always or at a rate."""

    def __init__(self, fails=(), rate=1.0, seed=0, calls=1):
        self.fails, self.rate, self.rng, self.calls = set(fails), rate, random.Random(seed), calls
        self.batches: list[list[Pair]] = []

    @property
    def canaries(self):
        return [p for batch in self.batches for p in batch if p.id.startswith(CANARY_ID)]

    async def judge(self, batch):
        self.batches.append(list(batch))
        await asyncio.sleep(0)
        return [self.answer(p) for p in batch]

    def answer(self, p):
        usage = JudgeUsage(calls=self.calls, prompt_tokens=10, latencies_s=(0.1,))
        if not p.id.startswith(CANARY_ID):
            return Verdict(0.5, usage=usage)
        kind = p.id.split(":")[1]
        longer_first = len(p.first) > len(p.second)
        real_first = own(p, p.first) if kind == "other_prompt" else longer_first != (kind == "spoof")
        bad = kind in self.fails and self.rng.random() < self.rate
        return Verdict(1.0 if real_first != bad else -1.0, usage=usage)


def own(p, text):
    return text.endswith(p.prompt.removeprefix("question ").removesuffix("?").join("()"))


def run(judge, batch):
    return asyncio.run(judge.judge(batch))


def stream(rate, seed, canaries):
    """(canaries until the first alarm or None) for a judge that fails every kind at a rate."""
    judge = CanaryJudge(Oracle(CANARY_KINDS, rate, seed), every=1, seed=seed)

    async def main():
        for k in range(canaries):
            await judge.judge([pair(k)])
            if judge.alarmed:
                return k + 1
        return None

    logging.disable(logging.CRITICAL)
    try:
        return asyncio.run(main())
    finally:
        logging.disable(logging.NOTSET)
