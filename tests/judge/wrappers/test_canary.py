"""Canaries: the right pairs with the right known answers, seen by nobody outside, and an alarm that means something."""

from __future__ import annotations

import asyncio
import json
import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from rmcore.judge.wrappers.canary import _at_least, _interval
from rmcore.judge.wrappers.canary_pairs import SPOOF_MARGIN, Canary, CanaryMaker

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


# -- the alarm ---------------------------------------------------------------------------------------------------------


def test_a_judge_that_fails_one_kind_raises_that_alarm(caplog):
    alarms = []
    judge = CanaryJudge(Oracle({"master_key"}), every=1, on_alarm=alarms.append)
    for k in range(60):
        run(judge, [pair(k)])
    first = alarms[0]
    assert (first.name, first.details["kind"], first.details["failed"], first.details["canaries"]) == (
        "canary",
        "master_key",
        3,
        3,
    )
    assert first.details["interval"][0] > first.details["threshold"] == 0.2
    assert judge.alarmed == ("master_key",), "one failing kind of six is not yet too much for all together"
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1, "not again at every failure"
    assert "master_key" in caplog.text
    assert "Read the critiques" in caplog.text
    stats = json.loads(json.dumps(judge.stats()))
    assert stats["alarms"] == ["master_key"]
    assert stats["kinds"]["master_key"]["failure_rate"] == 1.0
    assert stats["kinds"]["empty"] | {"interval": 0} == {
        "asked": 10,
        "passed": 10,
        "failed": 0,
        "unanswered": {},
        "window": 10,
        "failure_rate": 0.0,
        "interval": 0,
        "threshold": 0.2,
        "alarm": False,
    }


def test_a_lasting_alarm_is_repeated_once_a_window():
    alarms = []
    judge = CanaryJudge(Oracle({"empty"}), every=1, kinds=["empty"], window=10, on_alarm=alarms.append)
    at = []
    for k in range(40):
        run(judge, [pair(k)])
        at += [k] * (sum(a.details["kind"] == "empty" for a in alarms) - len(at))
    assert at == [2, 12, 22, 32]


def test_the_alarm_ends_when_canaries_pass_again_and_can_be_raised_anew():
    oracle = Oracle({"empty"})
    judge = CanaryJudge(oracle, every=1, kinds=["empty"], recovery=4)
    states = []
    for k in range(30):
        oracle.fails = {"empty"} if k < 5 or k >= 15 else set()
        run(judge, [pair(k)])
        states.append("empty" in judge.alarmed)
    # Off after 4 passes, with a fresh window: 7 failures of 13 raise it again, and the 5 failures before do not count.
    assert [k for k, alarmed in enumerate(states) if alarmed] == [*range(2, 8), *range(21, 30)]


def test_muting_gives_the_pairs_to_the_head_until_the_judge_recovers():
    oracle = Oracle({"empty"})
    judge = CanaryJudge(oracle, every=1, kinds=["empty", "spoof"], recovery=3, stop="mute")
    seen = []
    for k in range(30):
        if k == 12:
            oracle.fails = set()
        real_before = sum(len(b) for b in oracle.batches) - len(oracle.canaries)
        (verdict,) = run(judge, [pair(k)])
        asked = sum(len(b) for b in oracle.batches) - len(oracle.canaries) - real_before
        seen.append((verdict.preference, verdict.reason, asked))
    muted = [k for k, (_, reason, _) in enumerate(seen) if reason == "canary_alarm"]
    assert muted == list(range(muted[0], muted[-1] + 1))
    assert 12 <= muted[-1] <= 16
    assert seen[muted[0]] == (None, "canary_alarm", 1), "the batch that raises the alarm is muted too"
    assert {seen[k] for k in muted[1:]} == {(None, "canary_alarm", 0)}, "a muted judge is not paid for real pairs"
    assert seen[-1] == (0.5, "", 1)
    while_muted = [p.id.split(":")[1] for p in oracle.canaries[muted[0] + 1 : muted[-1]]]
    assert set(while_muted) == {"empty"}, "only what failed has to be shown to work again"
    assert judge.stats()["muted_pairs"] == len(muted)


def test_muted_verdicts_keep_their_cost():
    judge = CanaryJudge(Oracle(CANARY_KINDS), every=1, stop="mute")
    verdicts = run(judge, pairs(30))
    assert {v.reason for v in verdicts} == {"canary_alarm"}
    assert sum(v.usage.calls for v in verdicts) == 60


def test_never_stop_returns_the_verdicts_in_spite_of_an_alarm():
    judge = CanaryJudge(Oracle(CANARY_KINDS), every=1)
    assert {v.preference for v in run(judge, pairs(30))} == {0.5}
    assert judge.alarmed
    assert not judge.muted


def test_a_callback_that_raises_costs_nothing(caplog):
    def broken(alarm):
        raise RuntimeError("no pager")

    judge = CanaryJudge(Oracle(CANARY_KINDS), every=1, on_alarm=broken)
    assert len(run(judge, pairs(30))) == 30
    assert "the callback of the canary alarm raised" in caplog.text


def test_the_callback_may_read_the_state():
    states = []
    judge = CanaryJudge(Oracle(CANARY_KINDS), every=1, on_alarm=lambda alarm: states.append(judge.stats()["alarms"]))
    run(judge, pairs(30))
    assert states
    assert all(states)


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


def test_a_judge_at_half_the_tolerated_rate_raises_no_alarm_in_thousands_of_canaries():
    assert [stream(0.1, seed, 500) for seed in range(8)].count(None) >= 7


def test_a_judge_that_turned_random_is_found_within_sixty_canaries():
    waits = sorted(stream(0.5, seed, 120) or 999 for seed in range(20))
    assert waits[18] <= 60
    assert waits[10] <= 30


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_binomial_tail_and_its_interval_against_exact_sums():
    from fractions import Fraction
    from math import comb

    for n, k, p in ((1, 1, 0.2), (50, 18, 0.2), (50, 17, 0.2), (7, 0, 0.3), (30, 30, 0.9), (400, 3, 0.001)):
        x = Fraction(p)
        exact = float(sum(comb(n, i) * x**i * (1 - x) ** (n - i) for i in range(k, n + 1)))
        assert _at_least(k, n, p) == pytest.approx(exact, rel=1e-9)
    assert _interval(0, 20) == pytest.approx((0, 1 - 0.01 ** (1 / 20)))
    assert _interval(3, 3) == pytest.approx((0.01 ** (1 / 3), 1))


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_rate_and_its_tails_are_one_percent(kn):
    k, n = kn
    low, high = _interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    if k:
        assert _at_least(k, n, low) == pytest.approx(0.01, rel=1e-6)


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
