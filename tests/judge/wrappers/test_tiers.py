"""Tiers: who is asked, whose verdict counts, what is said when nobody decides, and that pairs climb independently."""

from __future__ import annotations

import asyncio
import logging
import math

import pytest
from support.tiers import FLIP, LOSS, TIE, WIN, Fake, ask, two

from rmcore.judge import Accept, Judge, Pair, Tier, TieredJudge, Verdict


def test_it_is_a_judge_and_composes():
    inner = two(Fake(Verdict.none("timeout")), Fake(WIN))
    judge = TieredJudge([Tier(inner, "inner"), Tier(Fake(LOSS), "last")])
    assert isinstance(judge, Judge)
    assert ask(judge)[0].preference == 1
    assert repr(judge) == "TieredJudge(inner < last)"
    assert asyncio.run(judge.judge([])) == []


def test_an_accepted_verdict_ends_the_climb():
    cheap, strong = Fake(WIN), Fake(LOSS)
    (verdict,) = ask(two(cheap, strong))
    assert (verdict.preference, verdict.judge, verdict.reason, verdict.usage.calls) == (1, "cheap", "", 1)
    assert strong.asked == []


def test_usage_adds_up_over_the_tiers_asked():
    (verdict,) = ask(two(Fake(TIE, 3), Fake(LOSS, 100), rule=Accept(ties=False)))
    assert (verdict.preference, verdict.judge) == (-1, "strong")
    assert (verdict.usage.calls, verdict.usage.prompt_tokens, verdict.usage.latencies_s) == (2, 103, (0.5, 0.5))


@pytest.mark.parametrize(
    ("rule", "verdict", "why"),
    [
        (Accept(), FLIP, ""),
        (Accept.always, TIE, ""),
        (Accept.always, Verdict.none("x"), "no_verdict"),
        (Accept(flips=False), FLIP, "flipped"),
        (Accept(flips=False), Verdict(0.1, flipped=True), "flipped"),
        (Accept(flips=False), TIE, ""),
        (Accept(ties=False), TIE, "tie"),
        (Accept(ties=False), FLIP, ""),
        (Accept(one_order=False), Verdict(1.0, "one_order:timeout"), "one_order"),
        (Accept(one_order=False), WIN, ""),
        (Accept(min_preference=0.6), Verdict(-0.59), "weak"),
        (Accept(min_preference=0.6), Verdict(-0.6), ""),
        (Accept(min_preference=0.6), TIE, "weak"),
    ],
)
def test_the_named_rules(rule, verdict, why):
    assert rule.why_not(verdict) == why
    assert rule(verdict) is (why == "")


def test_a_verdict_by_rule_is_certain_and_stays_one():
    class Ruled:
        async def judge(self, pairs):
            return [Verdict(0.0, "rule:identical", judge="rule")] * len(pairs)

    strong = Fake(WIN)
    (verdict,) = ask(two(Ruled(), strong, rule=Accept(ties=False, min_preference=0.5)))
    assert (verdict.preference, verdict.reason, verdict.judge) == (0, "rule:identical", "rule")
    assert strong.asked == []


def test_any_function_is_a_rule_and_one_that_raises_sends_the_pair_up():
    def broken(verdict):
        raise KeyError

    assert ask(two(Fake(WIN), Fake(LOSS), rule=lambda v: v.preference < 0))[0].preference == -1
    judge = two(Fake(WIN), Fake(LOSS), rule=broken)
    assert ask(judge)[0].judge == "strong"
    assert judge.stats()["cheap"]["unaccepted"] == {"rule_raised_KeyError": 1}


@pytest.mark.parametrize(
    ("u", "first_asked"),
    [(None, "cheap"), (math.nan, "cheap"), (1.0, "cheap"), (0.999999, "cheap"), (1.5, "strong"), (math.inf, "strong")],
)
def test_a_pair_starts_in_its_band(u, first_asked):
    fakes = {"cheap": Fake(WIN), "strong": Fake(WIN)}
    judge = TieredJudge([Tier(fakes["cheap"], "cheap", (1, 1.5)), Tier(fakes["strong"], "strong", (1.5, math.inf))])
    (verdict,) = ask(judge, Pair("p", "a", "b", uncertainty=u))
    assert verdict.judge == first_asked
    assert [name for name, fake in fakes.items() if fake.asked] == [first_asked]


def test_a_climbing_pair_is_asked_whatever_its_band():
    cheap, strong = Tier(Fake(FLIP), "cheap", (1, 2), Accept(flips=False)), Tier(Fake(WIN), "strong", (2, math.inf))
    judge = TieredJudge([cheap, strong])
    assert ask(judge, Pair("p", "a", "b", uncertainty=1.1))[0].judge == "strong"


def test_overlapping_bands_prefer_the_cheaper():
    judge = TieredJudge([Tier(Fake(WIN), "cheap", (1, 3)), Tier(Fake(WIN), "strong", (2, math.inf))])
    assert ask(judge, Pair("p", "a", "b", uncertainty=2.5))[0].judge == "cheap"


@pytest.mark.parametrize(
    ("cheap", "strong", "reason"),
    [
        (Verdict.none("timeout"), Verdict.none("http_500"), "cheap:timeout; strong:http_500"),
        (RuntimeError(), Verdict.none("refusal"), "cheap:raised_RuntimeError; strong:refusal"),
        (Verdict(7.0), Verdict.none("x"), "cheap:preference_7.0; strong:x"),
    ],
)
def test_failures_fall_through_every_tier_to_the_head(cheap, strong, reason):
    (verdict,) = ask(two(Fake(cheap), Fake(strong)))
    assert verdict.failed
    assert verdict.reason == reason


def test_pairs_that_nobody_decided_are_one_warning_a_batch(caplog):
    cheap = Fake({f"p{k}": Verdict.none("timeout" if k else "refusal") for k in range(9)} | {"q": WIN})
    judge = TieredJudge([Tier(cheap, "cheap")])
    asyncio.run(judge.judge([Pair(prompt, "a", "b") for prompt in cheap.answers]))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "tiers cheap: no verdict for 9 of 10 pairs (cheap:timeout 8, cheap:refusal 1)"


def test_a_tier_that_miscounts_or_raises_is_contained_there(caplog):
    class Miscounts:
        async def judge(self, pairs):
            return []

    pairs = [Pair(f"p{k}", "a", "b") for k in range(20)]
    judge = TieredJudge([Tier(Miscounts(), "a"), Tier(Fake(ValueError()), "b", batch_size=3), Tier(Fake(WIN), "c")])
    verdicts = asyncio.run(judge.judge(pairs))
    assert [v.judge for v in verdicts] == ["c"] * 20
    stats = judge.stats()
    assert stats["a"]["failed"] == {"wrong_number_of_verdicts": 20}
    assert stats["b"]["failed"] == {"raised_ValueError": 20}
    assert [r.levelno for r in caplog.records] == [logging.ERROR] * 2, "one line a broken tier, not one a call"


@pytest.mark.parametrize("keep", [True, False])
def test_a_weak_verdict_when_the_stronger_tier_fails(keep):
    cheap = Fake(Verdict(0.0, flipped=True, critique="unsure"))
    judge = two(cheap, Fake(Verdict.none("http_500")), rule=Accept(flips=False), keep_unaccepted=keep)
    (verdict,) = ask(judge)
    assert verdict.usage.calls == 2
    if keep:
        assert (verdict.preference, verdict.flipped, verdict.judge, verdict.critique) == (0, True, "cheap", "unsure")
        assert verdict.reason == "unaccepted:cheap:flipped; strong:http_500"
    else:
        assert verdict.failed
        assert verdict.reason == "cheap:flipped; strong:http_500"
    assert judge.stats()["cheap"]["kept"] == keep


def test_of_several_unaccepted_verdicts_the_strongest_tiers_is_kept():
    soft = Accept(min_preference=0.9)
    (verdict,) = ask(two(Fake(Verdict(0.8)), Fake(Verdict(-0.1)), rule=soft, strong_rule=soft))
    assert (verdict.preference, verdict.judge) == (-0.1, "strong")
    assert verdict.reason == "unaccepted:cheap:weak; strong:weak"


def test_reasons_are_one_bounded_printable_line():
    hostile = Verdict.none("x\n\x1b[31m" + "y" * 100_000)
    judge = TieredJudge([Tier(Fake(hostile), f"t{k}") for k in range(20)])
    (verdict,) = ask(judge)
    assert len(verdict.reason) <= 400
    assert verdict.reason.isprintable()
    assert verdict.reason.startswith("t0:x")


def test_counted_reasons_are_bounded_too():
    judge = TieredJudge([Tier(Fake({f"p{k}": Verdict.none(f"r{k}") for k in range(200)}), "a")])
    asyncio.run(judge.judge([Pair(f"p{k}", "a", "b") for k in range(200)]))
    failed = judge.stats()["a"]["failed"]
    assert len(failed) == 65
    assert sum(failed.values()) == 200
    assert failed["other"] == 136


def test_a_pair_climbs_while_its_siblings_still_wait_below():
    """The strong tier gets the first pair before the cheap tier has answered the second."""

    async def main():
        reached = asyncio.Event()

        class Cheap:
            async def judge(self, pairs):
                if pairs[0].prompt == "slow":
                    await reached.wait()  # for ever, unless the strong tier is asked meanwhile
                    return [WIN]
                return [FLIP]

        class Strong:
            async def judge(self, pairs):
                reached.set()
                return [LOSS] * len(pairs)

        judge = two(Cheap(), Strong(), rule=Accept(flips=False))
        async with asyncio.timeout(20):
            return await judge.judge([Pair("slow", "a", "b"), Pair("quick", "a", "b")])

    assert [v.judge for v in asyncio.run(main())] == ["cheap", "strong"]


def test_many_pairs_are_bounded_per_tier_and_every_one_is_answered_in_order():
    class Busy:
        def __init__(self, verdict_of):
            self.now = self.most = 0
            self.verdict_of = verdict_of

        async def judge(self, pairs):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            self.now -= 1
            return [self.verdict_of(int(pair.prompt)) for pair in pairs]

    n = 5_000
    cheap, strong = Busy(lambda k: FLIP if k % 3 == 0 else WIN), Busy(lambda k: LOSS)
    judge = TieredJudge(
        [Tier(cheap, "cheap", accept=Accept(flips=False), concurrency=100), Tier(strong, "strong", concurrency=7)]
    )
    tasks = 0

    async def main():
        nonlocal tasks

        async def watch():
            nonlocal tasks
            while True:
                tasks = max(tasks, len(asyncio.all_tasks()))
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        verdicts = await judge.judge([Pair(str(k), "a", "b") for k in range(n)])
        watcher.cancel()
        return verdicts

    verdicts = asyncio.run(main())
    assert [v.preference for v in verdicts] == [-1.0 if k % 3 == 0 else 1.0 for k in range(n)]
    assert (cheap.most, strong.most) == (100, 7)
    assert tasks <= 2 * (100 + 7) + 2


def test_batches_are_as_large_as_asked_and_only_what_waits():
    fake = Fake(WIN)
    judge = TieredJudge([Tier(fake, "a", batch_size=8)])
    asyncio.run(judge.judge([Pair(f"p{k}", "a", "b") for k in range(20)]))
    assert fake.batches == [8, 8, 4]


def test_cancellation_reaches_every_tier():
    async def main():
        started, cancelled = asyncio.Event(), []

        class Hanging:
            def __init__(self, name):
                self.name = name

            async def judge(self, pairs):
                if self.name == "strong":
                    started.set()
                elif pairs[0].prompt == "climbs":
                    return [FLIP]
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.append(self.name)

        judge = two(Hanging("cheap"), Hanging("strong"), rule=Accept(flips=False))
        task = asyncio.create_task(judge.judge([Pair("hangs", "a", "b"), Pair("climbs", "a", "b")]))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return cancelled

    assert sorted(asyncio.run(main())) == ["cheap", "strong"]
