"""Canaries: the right pairs with the right known answers, seen by nobody outside, and an alarm that means something."""

from __future__ import annotations

import asyncio

import pytest
from support.canaries import REAL, Oracle, pair, pairs, run

from rmcore._base.errors import InputError
from rmcore.judge import (
    CANARY_ID,
    CANARY_KINDS,
    Accept,
    CanaryJudge,
    Judge,
    JudgeUsage,
    MonitoredJudge,
    Pair,
    Tier,
    TieredJudge,
    Verdict,
)
from rmcore.judge.question.rules import rule_verdict
from rmcore.judge.wrappers.canary_pairs import SPOOF_MARGIN, Canary, CanaryMaker

# -- the pairs ---------------------------------------------------------------------------------------------------------


def made(kind, source=None, seed=0):
    maker = CanaryMaker((kind,), seed)
    for k in range(1, 4):
        maker.remember(pair(k))
    return maker.make(source or pair())


@pytest.mark.parametrize("kind", CANARY_KINDS)
def test_a_canary_sets_a_real_response_against_what_must_lose(kind):
    for seed in range(20):
        check_canary(kind, seed)


def check_canary(kind, seed):
    source = pair(uncertainty=1.7, preference=2.0, deadline=9.0)
    canary = made(kind, source, seed)
    real, other = (canary.pair.first, canary.pair.second)[:: 1 if canary.real_first else -1]
    assert real == source.first, "the response that the head prefers"
    assert canary.pair.prompt == source.prompt
    assert (canary.pair.uncertainty, canary.pair.deadline, canary.pair.preference) == (1.7, 9.0, None)
    assert canary.pair.id == f"canary:{kind}:0"
    assert rule_verdict(canary.pair) is None, "a rule would answer without the judge, and nothing would be tested"
    assert other != real
    if kind == "truncated":
        assert real.startswith(other)
        assert 0.3 * len(real) < len(other) <= 0.5 * len(real)
        assert other[-1].isalnum()
        assert real[len(other)].isalnum(), "it ends within a word"
    elif kind == "spoof":
        assert other.startswith(real)
        assert len(other) > len(real)
    elif kind == "other_prompt":
        assert other in {pair(k).first for k in range(1, 4)}
    else:
        assert len(other) < 45


def test_the_places_and_the_texts_vary():
    for kind in CANARY_KINDS:
        canaries = [made(kind, seed=seed) for seed in range(60)]
        assert 15 <= sum(c.real_first for c in canaries) <= 45, kind
    assert len({made("master_key", seed=seed).pair.second for seed in range(60)}) > 4


@pytest.mark.parametrize("preference", [None, float("nan"), 0.0])
def test_without_the_heads_word_either_response_may_be_the_real_one(preference):
    source = pair(preference=preference)
    starts = {made("spoof", source, seed).pair.first.startswith(source.first) for seed in range(30)}
    assert starts == {True, False}
    assert made("empty", pair(preference=-1.0)).pair.first != pair().first


@pytest.mark.parametrize("kind", CANARY_KINDS)
def test_a_response_too_short_for_a_kind_makes_none(kind):
    assert made(kind, Pair("q", "42", "")) is None
    assert made(kind, Pair("q", 42, None)) is None


def test_another_prompts_response_is_never_of_the_same_prompt_nor_the_same_text():
    maker = CanaryMaker(("other_prompt",), 0)
    chat = [{"role": "user", "content": "question 0?"}]
    maker.remember(Pair(chat, REAL, REAL))
    assert maker.make(Pair([{"role": "user", "content": "question 0?", "name": None}], REAL + "!", REAL + "?")) is None
    maker.remember(Pair("another", REAL + "!", REAL + "!"))
    assert maker.make(Pair(chat, REAL + "!", REAL + "!")) is None
    maker.remember(Pair(42, REAL + "!!", ""))  # no prompt at all
    assert maker.make(Pair(chat, REAL + "!", REAL + "!")) is None
    assert maker.make(Pair(chat, REAL + "~", REAL + "~")).pair.first in (REAL + "~", REAL + "!")


@pytest.mark.parametrize(
    ("kind", "preference", "passed"),
    [
        ("empty", 1.0, True),
        ("empty", 0.1, True),
        ("empty", 0.0, False),
        ("empty", -1.0, False),
        ("spoof", 1.0, True),
        ("spoof", 0.0, True),
        ("spoof", -SPOOF_MARGIN, True),
        ("spoof", -0.5, False),
        ("spoof", None, None),
        ("empty", None, None),
    ],
)
def test_what_passes(kind, preference, passed):
    verdict = Verdict(preference)
    assert Canary(pair(), kind, True).passed(verdict) is passed
    if preference is not None:
        assert Canary(pair(), kind, False).passed(Verdict(-preference)) is passed


# -- the wrapper -------------------------------------------------------------------------------------------------------


def test_one_canary_after_every_n_pairs_over_batches_and_all_kinds_in_turn():
    oracle = Oracle()
    judge = CanaryJudge(oracle, every=5)
    assert isinstance(judge, Judge)
    counts = []
    for size in (3, 3, 14, 0, 1, 39):
        before = len(oracle.canaries)
        verdicts = run(judge, pairs(size))
        assert [v.preference for v in verdicts] == [0.5] * size
        counts.append(len(oracle.canaries) - before)
    assert counts == [0, 1, 3, 0, 0, 8]
    kinds = [p.id.split(":")[1] for p in oracle.canaries]
    assert kinds[:6] == list(CANARY_KINDS)
    stats = judge.stats()
    assert (stats["pairs"], stats["kinds"]["all"]["asked"], stats["kinds"]["all"]["failed"]) == (60, 12, 0)


def test_the_inner_judge_sees_the_real_pairs_exactly_as_they_came():
    oracle = Oracle()
    given = pairs(20)
    run(CanaryJudge(oracle, every=4), given)
    assert oracle.batches[0] == given
    assert all(p.id.startswith(CANARY_ID) for p in oracle.batches[1])


def test_equal_streams_give_equal_canaries_and_another_seed_gives_others():
    def stream(seed):
        oracle = Oracle()
        judge = CanaryJudge(oracle, every=2, seed=seed)
        for start in range(0, 60, 20):
            run(judge, pairs(60)[start : start + 20])
        return oracle.canaries

    assert stream(3) == stream(3)
    assert stream(3) != stream(4)


def test_a_pair_that_is_too_short_leaves_the_canary_to_the_next():
    oracle = Oracle()
    judge = CanaryJudge(oracle, every=2)
    run(judge, [Pair("q", "42", "43")] * 7)
    assert oracle.canaries == []
    run(judge, [pair()])
    assert len(oracle.canaries) == 1, "one, not the four that fell due"


def test_cost_is_in_the_total_and_apart():
    judge = CanaryJudge(Oracle(), every=5)
    verdicts = run(judge, pairs(20))
    total = JudgeUsage.total(v.usage for v in verdicts)
    assert (total.calls, total.prompt_tokens, len(total.latencies_s)) == (24, 240, 24)
    assert [v.usage.calls for v in verdicts] == [1, 1, 1, 1, 2] * 4
    usage = judge.stats()["usage"]
    assert (usage["calls"], usage["prompt_tokens"]) == (4, 40)
    assert "latencies_s" not in usage


@pytest.mark.parametrize("how", ["raise", "miscount", "no_verdict", "nonsense"])
def test_canaries_that_break_the_judge_cost_the_batch_nothing(how):
    class Fragile(Oracle):
        async def judge(self, batch):
            answers = await super().judge(batch)
            if not batch[0].id.startswith(CANARY_ID):
                return answers
            if how == "raise":
                raise RuntimeError
            return {"miscount": [], "no_verdict": [Verdict.none("timeout")] * len(batch), "nonsense": [9] * len(batch)}[
                how
            ]

    judge = CanaryJudge(Fragile(), every=2, stop="mute")
    verdicts = run(judge, pairs(40))
    assert [v.preference for v in verdicts] == [0.5] * 40
    record = judge.stats()["kinds"]["all"]
    assert (record["passed"], record["failed"], sum(record["unanswered"].values())) == (0, 0, 20)
    assert record["failure_rate"] is None
    assert judge.alarmed == ()


def test_a_batch_that_breaks_the_judge_is_contained_and_the_canaries_still_count():
    class Fragile(Oracle):
        async def judge(self, batch):
            if not batch[0].id.startswith(CANARY_ID):
                raise RuntimeError
            return await super().judge(batch)

    judge = CanaryJudge(Fragile(), every=2)
    assert {v.reason for v in run(judge, pairs(10))} == {"raised_RuntimeError"}
    assert judge.stats()["kinds"]["all"]["passed"] == 5


def test_cancellation_goes_through_to_both_calls():
    async def main():
        started, cancelled = [], []

        class Hanging:
            async def judge(self, batch):
                started.append(len(batch))
                if len(started) == 2:
                    both.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.append(len(batch))

        both = asyncio.Event()
        task = asyncio.create_task(CanaryJudge(Hanging(), every=5).judge(pairs(10)))
        await both.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return cancelled

    assert sorted(asyncio.run(main())) == [2, 10]


# -- composition and arguments -----------------------------------------------------------------------------------------


def test_around_tiers_a_canary_meets_the_tier_of_its_source():
    cheap, strong = Oracle(), Oracle()
    tiers = TieredJudge([Tier(cheap, "cheap", (1, 2)), Tier(strong, "strong", (2, float("inf")))])
    judge = MonitoredJudge(CanaryJudge(tiers, every=1))
    run(judge, [pair(1, uncertainty=1.5, preference=1.0), pair(2, uncertainty=3.0, preference=1.0)])
    assert [p.uncertainty for p in cheap.canaries] == [1.5]
    assert [p.uncertainty for p in strong.canaries] == [3.0]
    assert judge.stats()["pairs"] == 2, "the alarm outside never sees a canary"
    assert tiers.stats()["cheap"]["asked"] == 2


def test_inside_a_tier_it_watches_that_judge_alone():
    canary = CanaryJudge(Oracle(), every=1)
    tiers = TieredJudge([Tier(canary, "cheap", accept=Accept(min_preference=0.9)), Tier(Oracle(), "strong")])
    assert {v.judge for v in run(tiers, pairs(10))} == {"strong"}
    assert canary.stats()["kinds"]["all"]["passed"] == 10


@pytest.mark.parametrize(
    "arguments",
    [
        {"every": 0},
        {"every": 2.0},
        {"window": 0},
        {"recovery": True},
        {"kinds": []},
        {"kinds": ["empty", "empty"]},
        {"kinds": ["poison"]},
        {"kinds": "empty"},
        {"threshold": 0},
        {"threshold": 1.0},
        {"threshold": {"empty": 2}},
        {"threshold": {"poison": 0.1}},
        {"stop": "always"},
        {"on_alarm": 3},
    ],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(InputError, match="expected"):
        CanaryJudge(Oracle(), **arguments)
    with pytest.raises(InputError, match="expected"):
        CanaryJudge("judge")


def test_thresholds_by_kind_leave_the_others_at_the_default():
    judge = CanaryJudge(Oracle(), threshold={"truncated": 0.4})
    assert judge.thresholds["truncated"] == 0.4
    assert judge.thresholds["empty"] == 0.2


def test_closing_closes_the_inner_judge():
    class Closable(Oracle):
        closed = False

        async def aclose(self):
            self.closed = True

    inner = Closable()
    asyncio.run(CanaryJudge(inner).aclose())
    assert inner.closed
