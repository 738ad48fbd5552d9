"""A bad group in a server's batch changes nothing for its batch mates: routing, judge calls, budgets."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from rmcore import AdaptiveRouter, BudgetRouter, RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.groups import GroupScore
from rmcore.engine.routing import Budget
from rmcore.integrations.server.batching import BatchScorer
from rmcore.judge.base import JudgeUsage, Verdict

GROUPS = 20
BAD = {"over-long": ["good " * 200, "bad", "odd", "kind"], "not finite": ["good", "stone cloud", "bad", "odd"]}
ROUTERS = {
    "fraction": lambda: BudgetRouter(0.1),
    "budget a step": lambda: AdaptiveRouter(1.0, budget=Budget(12, "pairs", per="step")),
}


class Counting:
    """Prefers the longer text and keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, str, str]] = []

    async def judge(self, pairs):
        self.asked += [(pair.prompt, pair.first, pair.second) for pair in pairs]
        return [Verdict(1.0 if len(p.first) > len(p.second) else -1.0, usage=JudgeUsage(calls=1)) for p in pairs]


@pytest.fixture
def score(reward_model, monkeypatch):
    """Groups through a batch scorer, all in one batch; → outcomes, questions, engine, scorer."""
    encode, rows_of = reward_model.encode_group, reward_model.hidden_rows
    spoilt: list[int] = []

    def encode_group(prompt, responses, **options):
        encoded = encode(prompt, responses, **options)
        if "stone cloud" in responses:
            spoilt.append(id(encoded))
        return encoded

    def hidden_rows(groups, **options):
        rows, first = rows_of(groups, **options), 0
        for group in groups:
            if id(group) in spoilt:
                rows[first] = torch.nan
            first += len(group)
        return rows

    monkeypatch.setattr(reward_model, "encode_group", encode_group)
    monkeypatch.setattr(reward_model, "hidden_rows", hidden_rows)

    def run(groups, router):
        judge = Counting()
        engine = RewardEngine(reward_model, judge, router)

        async def main():
            scorer = BatchScorer(engine, max_groups=64, max_wait_s=0)
            calls = (scorer.score(prompt, responses) for prompt, responses in groups)
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60), scorer

        results, scorer = asyncio.run(main())
        return results, judge.asked, engine, scorer

    return run


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("at", [0, 7, GROUPS])
def test_its_batch_mates_are_routed_and_judged_as_if_it_were_not_there(score, some_texts, kind, router, at):
    rng = random.Random(5)
    groups = [(f"red house {k}", some_texts(rng, 4)) for k in range(GROUPS)]
    clean, asked, engine, scorer = score(groups, ROUTERS[router]())
    spoilt, asked_too, engine_too, scorer_too = score([*groups[:at], ("p", BAD[kind]), *groups[at:]], ROUTERS[router]())
    error = spoilt.pop(at)
    assert isinstance(error, InputError)
    assert ("NaN or Inf in 1 of 4 rows" if kind == "not finite" else "tokens, expected at most 64") in str(error)
    assert scorer_too.stats.failed_groups == 1
    assert sum(int(group.routed.sum()) // 2 for group in clean) == len(asked) == 12
    assert asked_too == asked
    for one, two in zip(clean, spoilt, strict=True):
        assert isinstance(two, GroupScore)
        assert torch.equal(one.routed, two.routed)
        assert [(d.i, d.j, d.by) for d in one.decisions] == [(d.i, d.j, d.by) for d in two.decisions]
        assert torch.allclose(one.preference, two.preference, atol=1e-5)
    assert scorer.stats.usage == scorer_too.stats.usage
    assert scorer.stats.pairs == scorer_too.stats.pairs
    assert scorer.stats.batches == scorer_too.stats.batches == 1
    if router == "budget a step":
        assert engine.router.budgets[0].stats() == engine_too.router.budgets[0].stats()
