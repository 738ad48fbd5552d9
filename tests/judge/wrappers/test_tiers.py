"""Tiers: who is asked, whose verdict counts, what is said when nobody decides, and that pairs climb independently."""

from __future__ import annotations

import asyncio
import json
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.judge import Accept, Judge, JudgeUsage, Pair, ReplayServer, RetryPolicy, Tier, TieredJudge, Verdict
from rmcore.judge.wrappers import escalation

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

    n = 20_000
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


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_pair_whose_deadline_has_passed_is_not_asked(clock):
    fake = Fake(WIN)
    judge = TieredJudge([Tier(fake, "a"), Tier(fake, "b")], clock=clock)
    now = clock.now()
    late, early = ask(judge, Pair("late", "a", "b", deadline=now), Pair("p", "a", "b", deadline=now + 1))
    assert (late.reason, late.failed, early.preference) == ("deadline", True, 1)
    assert fake.asked == ["p"]
    assert judge.stats()["a"]["late"] == 1


@pytest.mark.parametrize("verdict", [Verdict.none("timeout"), FLIP])
def test_stronger_tiers_are_skipped_once_the_deadline_passes(clock, verdict):
    class Slow(Fake):
        async def judge(self, pairs):
            clock.time += 10
            return await super().judge(pairs)

    strong = Fake(WIN)
    judge = two(Slow(verdict), strong, rule=Accept(flips=False), clock=clock)
    (result,) = ask(judge, Pair("p", "a", "b", deadline=clock.now() + 5))
    assert strong.asked == []
    assert result.reason == ("cheap:timeout; deadline" if verdict.failed else "unaccepted:cheap:flipped; deadline")
    assert result.failed == verdict.failed
    assert judge.stats()["strong"]["late"] == 1


def test_the_batch_has_a_deadline_of_its_own_and_the_earlier_one_holds(clock):
    fake = Fake(WIN)
    now = clock.now()
    pairs = [Pair("p", "a", "b", deadline=d) for d in (None, now + 5, now + 500)]
    asyncio.run(TieredJudge([Tier(fake, "a")], deadline_s=60, clock=clock).judge(pairs))
    assert [pair.deadline for pair in fake.pairs] == [now + 60, now + 5, now + 60]
    unlimited = Fake(WIN)
    asyncio.run(TieredJudge([Tier(unlimited, "a")], deadline_s=None, clock=clock).judge(pairs[:1]))
    assert unlimited.pairs[0].deadline is None


def test_a_judge_that_ignores_the_deadline_is_cancelled(clock, monkeypatch):
    monkeypatch.setattr(escalation, "_OVERTIME_S", 0.0)

    class Hanging:
        async def judge(self, pairs):
            clock.time += 10
            await asyncio.Event().wait()

    (verdict,) = ask(two(Hanging(), Fake(WIN), clock=clock), Pair("p", "a", "b", deadline=clock.now() + 0.01))
    assert verdict.reason == "cheap:deadline; deadline"


# -- counters ----------------------------------------------------------------------------------------------------------


def test_stats_add_up_and_are_json():
    cheap = Fake({"win": WIN, "flip": FLIP, "fails": Verdict.none("timeout"), "both": FLIP}, 3)
    strong = Fake({"flip": LOSS, "fails": WIN, "both": Verdict.none("http_500")}, 100)
    judge = two(cheap, strong, rule=Accept(flips=False))
    for _ in range(2):
        ask(judge, *(Pair(name, "a", "b") for name in ("win", "flip", "fails", "both")))
    stats = json.loads(json.dumps(judge.stats()))
    low, high = stats["cheap"], stats["strong"]
    assert (low["asked"], low["accepted"], low["unaccepted"], low["failed"]) == (8, 2, {"flipped": 4}, {"timeout": 2})
    assert (high["asked"], high["accepted"], high["unaccepted"], high["failed"]) == (6, 4, {}, {"http_500": 2})
    assert (low["kept"], high["kept"], low["late"]) == (2, 0, 0)
    assert (low["usage"]["calls"], high["usage"]["prompt_tokens"]) == (8, 600)
    assert "latencies_s" not in low["usage"]


outcomes = st.sampled_from([WIN, LOSS, TIE, FLIP, Verdict(0.3), Verdict.none("timeout"), RuntimeError()])


@given(
    st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(outcomes, min_size=n, max_size=n), min_size=1, max_size=3)),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_every_pair_gets_what_a_plain_loop_over_the_tiers_gives(table, keep, batch, concurrency):
    rule = Accept(flips=False, ties=False, min_preference=0.5)
    table = [[v if batch == 1 or isinstance(v, Verdict) else Verdict.none("err") for v in row] for row in table]
    n = len(table[0])
    pairs = [Pair(str(k), "a", "b") for k in range(n)]
    tiers = [
        Tier(Fake({str(k): v for k, v in enumerate(row)}), f"t{level}", (1, math.inf), rule, batch, concurrency)
        for level, row in enumerate(table)
    ]
    judge = TieredJudge(tiers, keep_unaccepted=keep)
    logging.disable(logging.CRITICAL)
    try:
        got = asyncio.run(judge.judge(pairs))
    finally:
        logging.disable(logging.NOTSET)
    expected = []
    for k in range(n):
        best = None
        for row in table:
            verdict = row[k]
            if isinstance(verdict, Exception) or verdict.failed:
                continue
            if rule(verdict):
                best = verdict.preference
                break
            best = verdict.preference if keep else None
        expected.append(best)
    assert [v.preference for v in got] == expected
    stats = judge.stats()
    for record in stats.values():
        answered = record["accepted"] + sum(record["unaccepted"].values())
        assert record["asked"] == answered + sum(record["failed"].values())
    assert stats["t0"]["asked"] == n
    assert sum(v.usage.calls for v in got) == sum(record["usage"]["calls"] for record in stats.values())


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bands", "gap"),
    [
        ([(1, 2), (3, math.inf)], "2 to 3"),
        ([(1, 2)], "2 to inf"),
        ([(1.4, math.inf)], "1 to 1.4"),
        ([(1, 2), (1, 3)], "3 to inf"),
    ],
)
def test_bands_with_a_gap_are_named(bands, gap):
    with pytest.raises(InputError, match=f"u from {gap}"):
        TieredJudge([Tier(Fake(WIN), f"t{k}", band) for k, band in enumerate(bands)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: TieredJudge([]),
        lambda: TieredJudge([Fake(WIN)]),
        lambda: TieredJudge([Tier(Fake(WIN), "a"), Tier(Fake(WIN), "a")]),
        lambda: TieredJudge([Tier(Fake(WIN), "a")], deadline_s=0),
        lambda: Tier("judge", "a"),
        lambda: Tier(Fake(WIN), ""),
        lambda: Tier(Fake(WIN), "a;b"),
        lambda: Tier(Fake(WIN), "a", (2, 2)),
        lambda: Tier(Fake(WIN), "a", (math.nan, 2)),
        lambda: Tier(Fake(WIN), "a", accept=0.5),
        lambda: Tier(Fake(WIN), "a", batch_size=0),
        lambda: Tier(Fake(WIN), "a", concurrency=True),
        lambda: Accept(min_preference=1.1),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(InputError, match="expected"):
        make()


def test_closing_closes_every_tier():
    class Closable(Fake):
        closed = False

        async def aclose(self):
            self.closed = True

    fakes = [Closable(WIN), Closable(WIN)]
    asyncio.run(two(*fakes).aclose())
    assert all(fake.closed for fake in fakes)


def test_over_http_a_dead_endpoint_falls_to_the_live_one(recorded, pairs, make_judge):
    """Two chat judges on real sockets: nobody listens at the first, and the second answers as if asked directly."""
    with ReplayServer(recorded) as server:
        dead, live = make_judge(retry=RetryPolicy(max_attempts=1)), make_judge(server.base_url)
        judge = two(dead, live)

        async def judge_and_close():
            verdicts = await judge.judge(pairs)
            await judge.aclose()
            return verdicts

        verdicts = asyncio.run(judge_and_close())
    expected = asyncio.run(recorded.judge(pairs))
    assert [v.preference for v in verdicts] == [v.preference for v in expected]
    assert {v.judge for v in verdicts if not v.failed} == {"strong"}
    reasons = judge.stats()["cheap"]["failed"]  # the connection's, and of the breaker that it opened
    assert sum(reasons.values()) == len(pairs)
    assert {v.reason.split("; strong:")[0].removeprefix("cheap:") for v in verdicts if v.failed} <= set(reasons)
