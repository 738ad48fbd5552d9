"""When canaries fail: the alarm, muting, and the figures."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.canaries import Oracle, pair, pairs, run, stream

from rmcore.judge import (
    CANARY_KINDS,
    CanaryJudge,
)
from rmcore.judge.wrappers.canary import _at_least, _interval

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
