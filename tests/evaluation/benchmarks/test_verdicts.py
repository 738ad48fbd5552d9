"""A live judge behind a routing table: what it is asked, what it costs, what a store and a budget do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.engine.routing import Budget
from rmcore.evaluation.benchmarks import BENCHMARKS
from rmcore.evaluation.benchmarks.choice import choose, pair_scores
from rmcore.evaluation.benchmarks.item import CountedPairs, Item
from rmcore.evaluation.benchmarks.routing import routing_table
from rmcore.evaluation.benchmarks.scoring import Answers
from rmcore.evaluation.benchmarks.verdicts import LiveVerdicts, Verdicts, label_verdicts, recorded_verdicts
from rmcore.judge import ChatJudge, PriceTable, RecordedJudge, ReplayServer

JUDGEBENCH = BENCHMARKS["judgebench"]
COUNT = 100
PRICES = PriceTable({"m": {"prompt": 1.0, "completion": 4.0}})


def answers(count: int = COUNT) -> Answers:
    """The model is wrong on every fifth pair and most uncertain of those."""
    rng = np.random.default_rng(0)
    items = tuple(Item(str(k), f"prompt {k}", ("good", "bad"), (1.0, 0.0), "livecodebench") for k in range(count))
    wrong = np.arange(count) % 5 == 0
    margin = np.where(wrong, -1.0, 1.0)
    scores = tuple(np.array([m, 0.0]) for m in margin)
    return Answers(CountedPairs(items), margin, 1.5 + wrong + 0.1 * rng.random(count), scores)


def recorded(count: int = COUNT) -> RecordedJudge:
    """Right in both orders; of two orders that contradict each other on every tenth pair; none on the last."""
    rows = []
    for k in range(count - 1):
        there = {"prompt": f"prompt {k}", "first": "good", "second": "bad", "verdict": "win"}
        rows += [there, there | {"order": "ba", "verdict": "loss" if k % 10 == 1 else "win"}]
    rows.append({"prompt": f"prompt {count - 1}", "first": "good", "second": "bad", "verdict": None})
    return RecordedJudge.from_rows(rows)


def live(said: Answers, url: str, store: Path | None = None, **options: object) -> LiveVerdicts:
    judge = ChatJudge(url, "m", None, judge_id="j", store=store, prices=PRICES)
    return LiveVerdicts(said.pairs, judge, "m", prices=PRICES, **options)  # type: ignore[arg-type]


def test_a_live_judge_is_asked_what_the_table_needs_and_no_more() -> None:
    said = answers()
    with ReplayServer(recorded()) as server:
        asked = live(said, server.base_url)
        table = routing_table(JUDGEBENCH, said, asked, budgets=(0.02, 0.1), replicates=0)
        needed = 10 + 10  # those routed by the larger budget, and as many at random, which may be the same
        assert 10 < asked.asked.sum() <= needed
        assert server.requests == 2 * asked.asked.sum()
        assert [row.name for row in table.rows] == ["no judge", "2%", "10%"], "no line with every pair"
        assert "random routing is a single draw" in table.to_markdown()
        assert table.rows[2].scores[0].routed == pytest.approx((80 + 10) / 100, abs=1e-9)
        whole = routing_table(JUDGEBENCH, said, asked, budgets=(0.1,), every=True, replicates=0)
        assert server.requests == 2 * COUNT, "the rest, and nothing again"
    assert whole.rows[-1].name == "every pair"
    assert whole.rows[-1].failed == 1
    known = recorded_verdicts(said.pairs, recorded())
    np.testing.assert_array_equal(asked.preference, known.preference)
    np.testing.assert_array_equal(asked.orders, known.orders)
    assert asked.flips == known.flips == (10, 99)
    assert "contradicts itself when the order is exchanged in 10 of 99 pairs" in whole.to_markdown()


def test_what_it_cost_stands_in_the_table_also_when_a_store_answers(tmp_path: Path) -> None:
    said = answers(20)
    store = tmp_path / "v.db"
    tables = []
    with ReplayServer(recorded(20)) as server:
        for _ in range(2):
            asked = live(said, server.base_url, store)
            tables.append(routing_table(JUDGEBENCH, said, asked, budgets=(0.2,), every=True, replicates=0))
            asked.judge.close()  # type: ignore[attr-defined]
        assert server.requests == 40, "the second run buys nothing"
    assert (asked.bought.calls, asked.bought.cache_hits) == (0, 40)
    first, second = (table.rows[1].spent for table in tables)
    assert first == second
    assert first.calls == 8
    assert first.prompt_tokens > 8 * 10
    assert first.cost == pytest.approx((first.prompt_tokens + 4 * first.completion_tokens) / 1e6)
    assert tables[0].rows[0].spent.cost == 0
    text = tables[1].to_markdown()
    assert "| routing | pairs | judge calls | prompt tokens | completion tokens | judge seconds | cost, USD |" in text
    assert "judge_prompt_tokens" in tables[1].to_csv().splitlines()[0]
    free = routing_table(JUDGEBENCH, said, label_verdicts(said.pairs), replicates=0)
    assert "prompt tokens" not in free.to_markdown()


def test_how_far_a_judge_goes_by_the_place(tmp_path: Path) -> None:
    """The better response is shown first in half of all answers, so that being right is no lean."""
    count = 40
    words = ["flip to the first"] * 8 + ["flip to the second"] * 2 + ["tie, then the first"] * 4 + ["right"] * 26
    rows = []
    for k, word in enumerate(words):
        there, back = {"flip to the first": ("win", "loss"), "flip to the second": ("loss", "win")}.get(
            word, ("win", "tie" if word.startswith("tie") else "win")
        )
        pair = {"prompt": f"prompt {k}", "first": "good", "second": "bad"}
        rows += [pair | {"verdict": there}, pair | {"order": "ba", "verdict": back}]
    judge, said = RecordedJudge.from_rows(rows), answers(count)
    known = recorded_verdicts(said.pairs, judge)
    np.testing.assert_array_equal(known.lean, [1.0] * 8 + [-1.0] * 2 + [0.5] * 4 + [0.0] * 26)
    with ReplayServer(judge) as server:
        asked = live(said, server.base_url, tmp_path / "v.db")
        table = routing_table(JUDGEBENCH, said, asked, budgets=(), every=True, replicates=300)
        asked.judge.close()  # type: ignore[attr-defined]
        blind = live(said, server.base_url)  # without a store the two orders are not known apart
        assert routing_table(JUDGEBENCH, said, blind, budgets=(), every=True, replicates=0).position is None
    np.testing.assert_array_equal(asked.lean, known.lean)
    lean = table.position
    assert lean is not None
    assert (lean.share, lean.pairs) == (pytest.approx(0.5 + 0.5 * 8 / count), count)
    assert 0.5 < lean.low < lean.share < lean.high < 0.75
    told = "answers in both orders of 40 pairs, 60.0% [5"
    assert told in table.to_markdown()
    assert table.to_dict()["position"]["share"] == pytest.approx(0.6)
    assert label_verdicts(said.pairs).lean.shape == (count,)
    free = routing_table(JUDGEBENCH, said, label_verdicts(said.pairs), replicates=0)
    assert free.position is None
    assert "shown first" not in free.to_markdown()


def test_the_models_own_seconds_stand_beside_the_judges() -> None:
    said = replace(answers(4), seconds=2.5, tokens=np.full(4, 300.0))
    with ReplayServer(recorded(5)) as server:
        table = routing_table(JUDGEBENCH, said, live(said, server.base_url), budgets=(), every=True, replicates=0)
    text = table.to_markdown()
    assert "| judge seconds | cost, USD | model seconds |" in text
    assert all(line.endswith("| 2.5 |") for line in text.splitlines() if line.startswith("| every pair | 4 | 8 |"))
    assert "The model read 1,200 tokens in 2.5 s" in text
    assert table.to_csv().splitlines()[0].endswith(",model_seconds")
    assert table.to_csv().splitlines()[1].endswith(",2.5")
    assert table.to_dict()["model_tokens"] == 1200


def test_equal_questions_are_asked_once_and_budgets_hold() -> None:
    said = answers(40)
    twice = Answers(
        CountedPairs(said.pairs.items + said.pairs.items),
        np.tile(said.margin, 2),
        np.tile(said.uncertainty, 2),
        said.scores + said.scores,
    )
    with ReplayServer(recorded(40)) as server:
        asked = live(twice, server.base_url)
        asked.ask(np.arange(80))
        assert server.requests == 80
        assert asked.complete
        bound = live(said, server.base_url, budgets=[Budget(20, "calls", max_per_pair=2)])
        table = routing_table(JUDGEBENCH, said, bound, budgets=(0.1, 0.5), replicates=0)
        assert server.requests == 80 + 20
    assert bound.asked.sum() == 10
    assert [row.name for row in table.rows] == ["no judge"]
    assert "10%, 50% left out, as the budget of 20 calls ended with" in table.to_markdown()


def test_a_judge_is_not_told_by_the_order_which_response_is_better() -> None:
    said = answers(60)
    with ReplayServer({}) as server:  # knows nothing, so every pair fails; what counts is what it is shown
        asked = live(said, server.base_url)
    assert 15 < sum(pair.first == "good" for pair in asked._pair) < 45
    assert len(asked) == 60


def test_what_learns_buys_its_verdicts_as_it_goes() -> None:
    said = answers()
    with ReplayServer(recorded()) as server:
        asked = live(said, server.base_url)
        (choice,) = choose(said, asked, "learned", budgets=(0.2,))
        assert server.requests == 2 * len(choice.rows) == 40
    assert len(set(choice.rows.tolist())) == 20
    wrong = said.margin[choice.rows] < 0
    assert wrong.mean() > 0.6, "it has found out that u tells the errors"
    table = routing_table(JUDGEBENCH, said, label_verdicts(said.pairs), by="learned", budgets=(0.2,), replicates=0)
    assert table.rows[1].scores[0].routed > table.rows[1].scores[0].random


def test_scores_that_the_model_does_not_know_are_refused() -> None:
    said = answers(10)
    assert pair_scores(said, "error_probability").shape == (10,)
    for by, told in (("novelty", "without that column"), ("length", "one of learned, u")):
        with pytest.raises(InputError, match=told):
            pair_scores(said, by)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="verdicts: got 3, expected 10"):
        Verdicts.of(said.pairs, np.ones(3))
