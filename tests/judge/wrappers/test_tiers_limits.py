"""Deadlines of tiers, their counters, and what they refuse."""

from __future__ import annotations

import asyncio
import json
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiers import FLIP, LOSS, TIE, WIN, Fake, ask, two

from rmcore._base.errors import InputError
from rmcore.judge import Accept, Pair, ReplayServer, RetryPolicy, Tier, TieredJudge, Verdict
from rmcore.judge.wrappers import escalation

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
