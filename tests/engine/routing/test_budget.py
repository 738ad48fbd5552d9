"""Budgets: no interleaving of reserving and settling exceeds them, and what is unknown never counts as nothing."""

from __future__ import annotations

import doctest
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budgets import usage
from support.clocks import SetClock

import rmcore.engine.routing.budget
from rmcore.engine.routing import Budget
from rmcore.engine.routing.recent import SlidingSum
from rmcore.judge.base import JudgeUsage


def test_the_example_of_the_docstring():
    assert doctest.testmod(rmcore.engine.routing.budget).attempted > 0
    assert doctest.testmod(rmcore.engine.routing.budget).failed == 0


# ------------------------------------------------------------------------------------ estimates and what breaks them


@given(
    costs=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=6), min_size=1, max_size=30),
    limit=st.integers(0, 2_000),
)
@settings(max_examples=150, deadline=None)
def test_without_a_bound_the_overshoot_is_at_most_the_excess_in_flight(costs, limit):
    budget = Budget(limit, "tokens", "run", first_estimate=50)
    spent = 0
    for batch in costs:  # each batch is in flight together
        reservations = [budget.reserve(1) for _ in batch]
        assert budget.stats().spent + budget.stats().reserved <= max(limit, spent)
        excess = 0
        for reservation, cost in zip(reservations, batch, strict=True):
            cost *= reservation.pairs
            excess += max(0, cost - reservation.amount[0])
            spent += cost
            budget.settle(reservation, JudgeUsage(calls=reservation.pairs if cost else 0, prompt_tokens=cost))
        assert spent == budget.stats().spent
        if any(reservation.pairs for reservation in reservations):
            assert spent - limit <= excess
    assert budget.stats().overshoot >= max(0, spent - limit)
    assert budget.stats().left == max(0, limit - spent)


def test_an_overshoot_is_recorded_logged_and_taken_off(caplog):
    budget = Budget(100, "tokens", "run", first_estimate=10)
    first, second = budget.reserve(5), budget.reserve(5)
    with caplog.at_level(logging.WARNING):
        assert budget.settle(first, usage("tokens", 90)) == 90
        assert not caplog.records  # dear, but within the limit
        assert budget.settle(second, usage("tokens", 60)) == 60
    assert "tokens per run: 5 pairs cost 60 where 50 was reserved; 50 over the limit" in caplog.text
    stats = budget.stats()
    assert (stats.spent, stats.left, stats.overshoot, stats.excess) == (150, 0, 50, 40 + 10)
    assert budget.reserve(1).pairs == 0


def test_a_bound_that_was_seen_broken_is_raised():
    budget = Budget(1_000, "tokens", "run", max_per_pair=10)
    budget.settle(budget.reserve(2), usage("tokens", 60))
    assert budget.stats().per_pair == 30
    assert budget.reserve(100).pairs == (1_000 - 60) // 30


def test_the_estimate_starts_high_and_follows_the_dearest_of_late():
    budget = Budget(10**9, "tokens")
    assert budget.stats().per_pair == 8192
    for _ in range(15):
        budget.settle(budget.reserve(1), usage("tokens", 100))
    assert budget.stats().per_pair == 8192  # not yet to be trusted
    budget.settle(budget.reserve(1), usage("tokens", 200))
    assert budget.stats().per_pair == 250  # the dearest, and a quarter
    for _ in range(64):
        budget.settle(budget.reserve(1), usage("tokens", 100))
    assert budget.stats().per_pair == 125
    assert 100 < budget.stats().mean_per_pair < 130
    budget.settle(budget.reserve(1), usage("tokens", 40_000))
    assert budget.stats().per_pair == 50_000  # at once, upwards


def test_verdicts_from_a_store_do_not_make_fresh_ones_look_free():
    budget = Budget(10**9, "tokens", first_estimate=500)
    for _ in range(100):
        budget.settle(budget.reserve(1), JudgeUsage(cache_hits=2))
    assert budget.stats().per_pair == 500
    assert budget.stats().spent == 0
    # Eight pairs, both orders, four of the sixteen questions asked afresh at 100 tokens each: 200 a fresh pair.
    for _ in range(2):
        budget.settle(budget.reserve(8), JudgeUsage(calls=4, cache_hits=12, prompt_tokens=400))
    assert budget.stats().per_pair == 250
    assert budget.stats().spent == 800


def test_a_server_that_never_reports_tokens_does_not_inflate_the_estimate():
    budget = Budget(10**9, "tokens", first_estimate=500)
    for _ in range(100):
        assert budget.settle(budget.reserve(3), JudgeUsage(calls=6)) == 1_500
    assert budget.stats().per_pair == 500


def test_the_expected_number_of_pairs_goes_by_the_mean_not_the_bound():
    budget = Budget(1_000, "tokens", max_per_pair=100)
    assert budget.expected_pairs() == 10
    budget.settle(budget.reserve(4), usage("tokens", 100))
    assert budget.expected_pairs() == (1_000 - 100) / 25
    assert budget.expected_pairs(whole_period=True) == 40
    budget.reserve(2)
    assert budget.expected_pairs() == (1_000 - 100 - 2 * 25) / 25


# ------------------------------------------------------------------------------------ what counts, and as what


@pytest.mark.parametrize(
    ("unit", "spent", "expected"),
    [
        ("pairs", None, 4),
        ("pairs", JudgeUsage(cache_hits=8), 4),
        ("calls", None, 8),
        ("calls", JudgeUsage(calls=6, attempts=20, cache_hits=2), 6),
        ("tokens", JudgeUsage(calls=6, prompt_tokens=100, completion_tokens=30, reasoning_tokens=20), 130),
        ("tokens", JudgeUsage(cache_hits=8), 0),
        ("tokens", JudgeUsage(calls=6), 4_000),  # no figures: as reserved
        ("cost", JudgeUsage(calls=6, cost=0.25), 0.25),
        ("cost", JudgeUsage(calls=6, cost=0.0), 0.0),  # a free model with a price
        ("cost", JudgeUsage(calls=6, cost=0.25, unpriced_calls=2), 4.0),
        ("cost", JudgeUsage(calls=6, cost=5.5, unpriced_calls=2), 5.5),  # the priced ones alone were dearer
        ("cost", JudgeUsage(calls=6, cost=math.nan), 4.0),
        ("cost", JudgeUsage(calls=6, cost=-1.0), 4.0),
        ("cost", JudgeUsage(calls=6, cost=math.inf), 4.0),
        ("tokens", JudgeUsage(calls=6, prompt_tokens=-5, completion_tokens=7), 4_000),
    ],
)
def test_what_is_booked(unit, spent, expected):
    bound = {"tokens": {"max_per_pair": 1_000}, "cost": {"max_per_pair": 1}}.get(unit, {})
    budget = Budget(10_000, unit, **bound)
    reservation = budget.reserve(4)
    assert budget.settle(reservation, spent) == expected
    assert (budget.stats().spent, budget.stats().reserved) == (expected, 0)


def test_currency_does_not_round_away():
    budget = Budget(0.3, "cost", max_per_pair=0.1)
    for _ in range(3):
        reservation = budget.reserve(1)
        assert reservation.pairs == 1
        budget.settle(reservation, JudgeUsage(calls=2, cost=0.1))
    assert budget.reserve(1).pairs == 0
    assert budget.stats().left == 0
    many = Budget(1_000_000, "cost", max_per_pair=1e-6)
    for _ in range(10_000):
        many.settle(many.reserve(1), JudgeUsage(calls=1, cost=1e-6))
    assert many.stats().total == 0.01


def test_a_step_budget_is_full_again_and_late_settlements_stay_on_their_own_step():
    budget = Budget(10, "calls", "step")
    late = budget.reserve(5)
    assert budget.reserve(1).pairs == 0
    budget.begin_step()
    assert budget.stats().left == 10
    now = budget.reserve(3)
    budget.settle(late, JudgeUsage(calls=10))
    assert (budget.stats().spent, budget.stats().reserved, budget.stats().total) == (0, 6, 10)
    budget.settle(now, JudgeUsage(calls=6))
    assert budget.stats().spent == 6


def test_a_run_budget_ignores_steps():
    budget = Budget(10, "calls", "run")
    budget.settle(budget.reserve(5), None)
    budget.begin_step()
    assert budget.reserve(1).pairs == 0


def test_the_window_slides_by_settlement_and_holds_what_is_in_flight():
    clock = SetClock(1_000.0)
    budget = Budget(10, "calls", "minute", clock=clock)
    slow, quick = budget.reserve(2), budget.reserve(3)
    budget.settle(quick, JudgeUsage(calls=6))
    clock.time += 59.9
    assert budget.reserve(1).pairs == 0
    clock.time += 0.1
    assert budget.stats().spent == 0
    assert budget.stats().reserved == 4  # 60 s old, but nobody knows when its calls were made
    budget.settle(slow, JudgeUsage(calls=4))
    clock.time += 59.0
    assert budget.stats().left == 6
    clock.time += 1.0
    assert budget.stats().left == 10


def test_a_clock_that_steps_back_frees_nothing():
    clock = SetClock(100.0)
    budget = Budget(4, "calls", "minute", clock=clock)
    budget.settle(budget.reserve(2), None)
    clock.time = 0.0
    assert budget.stats().left == 0
    clock.time = 159.0
    assert budget.stats().left == 0
    clock.time = 160.0
    reservation = budget.reserve(2)
    clock.time = 0.0
    budget.settle(reservation, None)
    clock.time = 219.0
    assert budget.stats().left == 0


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.3, 5.0, 59.9, 60.0, 200.0]), st.integers(0, 5)), max_size=80))
def test_a_sliding_sum_is_never_low_and_hardly_late(items):
    window, now, added = SlidingSum(60.0), 0.0, []
    for wait, amount in items:
        now += wait
        window.add(now, amount)
        added.append((now, amount))
        exact = sum(a for t, a in added if t + 60.0 > now)
        slack = sum(a for t, a in added if t + 60.0 + 60.0 / 256 > now)
        assert exact <= window.total(now) <= slack


def test_a_sliding_sum_stays_small():
    window = SlidingSum(60.0)
    for k in range(20_000):
        window.add(k * 0.001, 1)
        window.total(k * 0.001)
    assert len(window.state_dict(20.0)) <= 257
    assert window.total(20.0) == 20_000
