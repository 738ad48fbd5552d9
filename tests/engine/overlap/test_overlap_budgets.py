"""Encoding and judging at once, and the books of a budget."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from support.overlap import (
    PATIENCE,
    PROMPTS,
    RESPONSES,
    SCORE,
    WIN,
    Books,
)

from rmcore import RewardEngine
from rmcore._base.errors import InputError


@SCORE
def test_each_reservation_is_settled_once_and_in_order(make_engine, score, scripted_judge):
    router = Books(limit=4)
    scores = score(make_engine(scripted_judge(lambda _: WIN), router), PROMPTS, RESPONSES)
    assert router.steps == 1
    assert [reservation for reservation, _ in router.settled] == router.reserved
    assert [usage.calls for _, usage in router.settled] == [1, 1, 1, 1, 0, 0]
    assert scores.summary()["routed"] == 4


def test_hidden_states_are_settled_too(hand_head, scripted_judge):
    router = Books()
    engine = RewardEngine(hand_head([1.0]), scripted_judge(lambda _: WIN), router)
    args = (torch.tensor([[1.0], [2.0], [4.0]]), [3])
    texts = {"prompts": ["p"], "responses": [["a", "b", "a"]]}
    one = engine.score_hidden(*args, **texts)
    two = asyncio.run(engine.score_hidden_async(*args, **texts))
    assert one.to_records() == two.to_records()
    assert [(r.pairs, usage.calls) for r, usage in router.settled] == [(2, 2), (2, 2)]
    assert router.steps == 2


@pytest.mark.parametrize("judge", ["raises", "miscounts", "talks rubbish"])
def test_an_unknown_cost_is_settled_as_unknown(make_engine, judge):
    class Bad:
        async def judge(self, pairs):
            if judge == "raises":
                raise RuntimeError
            return [] if judge == "miscounts" else ["win"] * len(pairs)

    router = Books()
    scores = make_engine(Bad(), router, micro_batch_tokens=100).score(PROMPTS, RESPONSES)
    assert [usage for _, usage in router.settled] == [None]
    assert scores.unaccounted_questions == 6


def test_equal_questions_cost_their_first_reservation(make_engine, scripted_judge):
    router = Books()
    make_engine(scripted_judge(lambda _: WIN), router).score(["p", "p"], [["1 0", "2 0"]] * 2)
    assert [usage.calls for _, usage in router.settled] == [1, 0]


def test_cancelled_calls_are_settled_as_unknown_and_finished_ones_as_what_they_cost(make_engine):
    router = Books()

    class FirstOnly:
        def __init__(self) -> None:
            self.calls = 0

        async def judge(self, pairs):
            self.calls += 1
            if self.calls > 1:
                await asyncio.Event().wait()
            return [WIN] * len(pairs)

    judge = FirstOnly()
    engine = make_engine(judge, router)

    async def run() -> None:
        task = asyncio.create_task(engine.score_async(PROMPTS, RESPONSES))
        while judge.calls < 6:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert [usage for _, usage in router.settled] == [WIN.usage] + [None] * 5


def test_a_reservation_with_a_nonsense_mask_is_settled(make_engine, scripted_judge):
    class Odd(Books):
        def reserve(self, candidates):
            return [True], super().reserve(candidates)[1]

    router = Odd()
    with pytest.raises(InputError, match=r"router\.reserve: got list"):
        make_engine(scripted_judge(lambda _: WIN), router).score(PROMPTS, RESPONSES)
    assert [usage for _, usage in router.settled] == [None]


def test_a_router_whose_books_fail_loses_no_batch(make_engine, scripted_judge, caplog):
    class Torn(Books):
        def settle(self, reservation, usage) -> None:
            super().settle(reservation, usage)
            raise OSError("disk full")

    router = Torn()
    scores = make_engine(scripted_judge(lambda _: WIN), router).score(PROMPTS, RESPONSES)
    assert scores.summary()["decided_by"]["judge"] == 6
    assert len(router.settled) == 6
    assert "router.settle raised" in caplog.text


def test_a_pair_the_head_cannot_score_and_the_budget_does_not_reach(hand_head, scripted_judge):
    judge, router = scripted_judge(lambda _: WIN), Books(limit=1)
    engine = RewardEngine(hand_head([1.0]), judge, router, nonfinite="route")
    hidden = torch.tensor([[1.0], [math.nan], [2.0]])
    scores = engine.score_hidden(hidden, [3], prompts=["p"], responses=[["a", "b", "c"]])
    assert judge.asked == [("a", "b")]
    assert [(d.i, d.j, d.by, d.reason) for d in scores[0].decisions] == [
        (0, 1, "judge", ""),
        (1, 2, "judge_failed", "budget"),
    ]
    assert math.isnan(scores[0].preference[1, 2])
    assert scores[0].preference[0, 2].isfinite()
    assert sum(scores.summary()["decided_by"].values()) == 3
