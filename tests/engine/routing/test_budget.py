"""Budgets: no interleaving of reserving and settling exceeds them, and what is unknown never counts as nothing."""

from __future__ import annotations

import doctest
import json
import logging
import math
import random
import sys
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import rmcore.engine.routing.budget
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.routing import Budget
from rmcore.engine.routing.recent import SlidingSum
from rmcore.judge.base import JudgeUsage

LENGTH = {"minute": 60.0, "hour": 3600.0, "day": 86400.0}


class FakeClock:
    """Time that passes only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


def usage(unit: str, amount: float, calls: int = 1) -> JudgeUsage:
    if unit == "tokens":
        return JudgeUsage(calls=calls, prompt_tokens=int(amount) - int(amount) // 3, completion_tokens=int(amount) // 3)
    return JudgeUsage(calls=int(amount)) if unit == "calls" else JudgeUsage(calls=calls, cost=amount)


def test_the_example_of_the_docstring():
    assert doctest.testmod(rmcore.engine.routing.budget).attempted > 0
    assert doctest.testmod(rmcore.engine.routing.budget).failed == 0


# ------------------------------------------------------------------------------------ the property


@dataclass
class Spent:
    """One reservation as the outside world sees it: the money goes somewhere between reserving and settling."""

    step: int
    reserved_at: float
    settled_at: float
    amount: int


class Interleavings(RuleBasedStateMachine):
    """Any order of reserving, shrinking, settling, losing, stepping and waiting, against an independent ledger.

    Whole tokens, so that the ledger's own sums are exact.
    """

    reservations = Bundle("reservations")

    @initialize(
        limit=st.integers(0, 400), bound=st.integers(1, 40), per=st.sampled_from(["run", "step", "minute", "hour"])
    )
    def make(self, limit, bound, per):
        self.clock = FakeClock()
        self.limit, self.bound, self.per = limit, bound, per
        self.budget = Budget(limit, "tokens", per, max_per_pair=bound, clock=self.clock)
        self.step = 0
        self.flying: dict[int, Spent] = {}
        self.done: list[Spent] = []
        self.denied = 0

    @rule(target=reservations, pairs=st.integers(0, 12))
    def reserve(self, pairs):
        free = self.limit - self.counted()
        reservation = self.budget.reserve(pairs)
        assert reservation.pairs == min(pairs, free // self.bound)  # all that fits, and no more
        assert reservation.amount == (reservation.pairs * self.bound,)
        self.denied += pairs - reservation.pairs
        self.flying[reservation.id] = Spent(self.step, self.clock.time, math.inf, reservation.pairs * self.bound)
        return reservation

    @rule(target=reservations, reservation=consumes(reservations), share=st.floats(0, 1))
    def shrink(self, reservation, share):
        old = self.flying.pop(reservation.id)
        smaller = self.budget.shrink(reservation, int(share * reservation.pairs))
        assert smaller.amount == (int(share * reservation.pairs) * self.bound,)
        self.flying[smaller.id] = Spent(old.step, old.reserved_at, math.inf, int(smaller.amount[0]))
        return smaller

    @rule(reservation=consumes(reservations), share=st.floats(0, 1))
    def settle(self, reservation, share):
        spent = self.flying.pop(reservation.id)
        spent.settled_at, spent.amount = self.clock.time, int(share * spent.amount)
        calls = 2 if spent.amount else 0
        assert self.budget.settle(reservation, usage("tokens", spent.amount, calls)) == spent.amount
        self.done.append(spent)

    @rule(reservation=consumes(reservations))
    def lose(self, reservation):
        spent = self.flying.pop(reservation.id)
        spent.settled_at = self.clock.time
        assert self.budget.settle(reservation, None) == spent.amount
        self.done.append(spent)

    @rule()
    def begin_step(self):
        self.step += 1
        self.budget.begin_step()

    @rule(seconds=st.sampled_from([0.0, 0.25, 1.0, 29.5, 60.0, 61.0, 3000.0]))
    def wait(self, seconds):
        self.clock.time += seconds

    def counted(self) -> int:
        """What the budget itself counts in the current period."""
        return int(self.budget.stats().spent + self.budget.stats().reserved)

    @invariant()
    def never_exceeded(self):
        everything = [*self.flying.values(), *self.done]
        if self.per == "run":
            assert sum(s.amount for s in everything) <= self.limit
        elif self.per == "step":
            for step in range(self.step + 1):
                assert sum(s.amount for s in everything if s.step == step) <= self.limit
        else:
            # Whenever in [reserved, settled] each amount was really spent: no window (t - length, t] is over the limit.
            for end in {s.reserved_at for s in everything} | {s.settled_at for s in self.done}:
                start = end - LENGTH[self.per]
                assert sum(s.amount for s in everything if s.reserved_at <= end and s.settled_at > start) <= self.limit

    @invariant()
    def totals_add_up(self):
        stats = self.budget.stats()
        assert stats.total == sum(s.amount for s in self.done)
        assert stats.denied_pairs == self.denied
        assert stats.overshoot == stats.excess == 0
        assert 0 <= stats.left == self.limit - stats.spent - stats.reserved
        if self.per == "run":
            assert stats.spent == stats.total
        if self.per != "step":
            assert stats.reserved == sum(s.amount for s in self.flying.values())


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


class Restarts(RuleBasedStateMachine):
    """A budget that is saved, killed and restored at any moment spends no more than one that never was."""

    reservations = Bundle("reservations")

    @initialize(limit=st.integers(1, 200), per=st.sampled_from(["run", "step", "minute"]))
    def make(self, limit, per):
        self.clock = FakeClock()
        self.make_one = lambda: Budget(limit, "calls", per, max_per_pair=4, clock=self.clock)
        self.budget, self.limit, self.life = self.make_one(), limit, 0
        self.amounts: list[int] = []
        self.flying: dict[tuple[int, int], int] = {}

    @rule(target=reservations, pairs=st.integers(1, 6))
    def reserve(self, pairs):
        reservation = self.budget.reserve(pairs)
        self.flying[self.life, reservation.id] = int(reservation.amount[0])
        return self.life, reservation

    @rule(named=consumes(reservations), calls=st.integers(0, 24))
    def settle(self, named, calls):
        life, reservation = named
        if life == self.life:
            self.amounts.append(min(calls, self.flying.pop((life, reservation.id))))
            self.budget.settle(reservation, JudgeUsage(calls=self.amounts[-1]))
        else:  # asked by the process that was killed
            with pytest.raises(InputError):
                self.budget.settle(reservation, JudgeUsage(calls=calls))

    @rule()
    def restart(self):
        state = json.loads(json.dumps(self.budget.state_dict(), allow_nan=False))
        self.amounts += self.flying.values()  # nobody knows what these cost
        self.flying = {}
        before = self.budget.stats()
        self.budget, self.life = self.make_one(), self.life + 1
        self.budget.load_state_dict(state)
        after = self.budget.stats()
        assert after.spent == before.spent + before.reserved
        assert (after.reserved, after.left, after.denied_pairs) == (0, before.left, before.denied_pairs)

    @invariant()
    def never_exceeded(self):
        stats = self.budget.stats()
        assert stats.spent + stats.reserved <= self.limit
        assert stats.total == sum(self.amounts)
        if self.budget.per != "step":
            assert sum(self.amounts) + sum(self.flying.values()) <= self.limit


TestRestarts = Restarts.TestCase
TestRestarts.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("per", ["run", "minute"])
def test_threads_never_exceed_it_together(per):
    limit, bound = 1_500, 7
    budget = Budget(limit, "tokens", per, max_per_pair=bound, clock=FakeClock())
    ledger, highest, errors = {"counted": 0}, [0], []
    guard, start = threading.Lock(), threading.Barrier(8)

    def count(change: float) -> None:
        # Called after the budget has set aside and before it frees: the ledger is never above what the budget holds.
        with guard:
            ledger["counted"] += int(change)
            highest[0] = max(highest[0], ledger["counted"])

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            start.wait()
            for _ in range(150):
                reservation = budget.reserve(draw.randint(0, 9))
                count(reservation.amount[0])
                if draw.random() < 0.2:
                    smaller = reservation.pairs // 2
                    count(smaller * bound - reservation.amount[0])
                    reservation = budget.shrink(reservation, smaller)
                real = draw.randint(0, int(reservation.amount[0])) // 4
                count(real - reservation.amount[0])
                budget.settle(reservation, JudgeUsage(calls=bool(real), prompt_tokens=real))
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert 0.9 * limit < highest[0] <= limit  # the test did get near the edge
    stats = budget.stats()
    assert (stats.spent, stats.reserved, stats.overshoot) == (ledger["counted"], 0, 0)
    assert stats.denied_pairs > 0


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
    clock = FakeClock(1_000.0)
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
    clock = FakeClock(100.0)
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


# ------------------------------------------------------------------------------------ state and misuse


def full_budget(clock: FakeClock, per: str = "minute") -> Budget:
    budget = Budget(500, "tokens", per, first_estimate=20, clock=clock)
    for cost in (10, 30, 25):
        budget.settle(budget.reserve(2), usage("tokens", cost))
        clock.time += 10.0
    budget.reserve(40)
    return budget


@pytest.mark.parametrize("per", ["run", "step", "minute"])
def test_a_restored_budget_continues_as_if_nothing_had_happened(per):
    clock = FakeClock()
    budget, other = full_budget(clock, per), None
    budget.settle(budget.reserve(1), usage("tokens", 7))
    state = json.loads(json.dumps(budget.state_dict(), allow_nan=False))
    elsewhere = FakeClock(77_777.0)  # monotonic time means nothing on another machine
    other = Budget(500, "tokens", per, first_estimate=20, clock=elsewhere)
    other.load_state_dict(state)
    assert other.stats().left == budget.stats().left
    assert other.stats().spent == budget.stats().spent + budget.stats().reserved
    assert other.stats().per_pair == budget.stats().per_pair
    assert other.stats().mean_per_pair == budget.stats().mean_per_pair
    clock.time += 35.0
    elsewhere.time += 35.0
    assert other.stats().left == budget.stats().left
    other.settle(other.reserve(1), None)
    assert other.state_dict()["next_id"] == budget.state_dict()["next_id"] + 1


def test_the_limit_may_be_another_after_a_restart():
    budget = Budget(10, "calls")
    budget.settle(budget.reserve(5), None)
    more, less = Budget(14, "calls"), Budget(3, "calls")
    for new in (more, less):
        new.load_state_dict(budget.state_dict())
    assert more.reserve(9).pairs == 2
    assert less.reserve(1).pairs == 0
    assert less.stats().left == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"unit": "calls"},
        {"per": "run"},
        {"spent": -1},
        {"spent": 1.5},
        {"spent": True},
        {"spent": None},
        {"total": "12"},
        {"window": {}},
        {"window": [[1.0, 2.0, 3]]},
        {"window": [[2.0, 1.0, -3]]},
        {"window": [[2.0, 1.0]]},
        {"window": [[math.nan, 1.0, 3]]},
        {"window": [[2.0, 1.0, 3.5]]},
        {"recent": [-1]},
        {"recent": [1.5]},
        {"mean": -1.0},
        {"mean": "inf"},
        {"next_id": 0},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage):
    budget = Budget(500, "tokens", "minute", first_estimate=20, clock=FakeClock())
    good = full_budget(FakeClock()).state_dict()
    before = budget.stats()
    with pytest.raises(CheckpointError, match="budget"):
        budget.load_state_dict({**good, **damage})
    assert budget.stats() == before


def test_a_state_must_be_whole():
    budget = Budget(500, "tokens", "minute", first_estimate=20, clock=FakeClock())
    good = full_budget(FakeClock()).state_dict()
    for name in good:
        with pytest.raises(CheckpointError, match=f"fields missing .'{name}'"):
            budget.load_state_dict({k: v for k, v in good.items() if k != name})
    for foreign in (None, [], "{}", 3):
        with pytest.raises(CheckpointError, match="expected an object"):
            budget.load_state_dict(foreign)


def test_a_state_is_not_loaded_over_what_is_in_flight():
    budget = Budget(10)
    state = budget.state_dict()
    reservation = budget.reserve(1)
    with pytest.raises(InputError, match="1 reservations in flight"):
        budget.load_state_dict(state)
    budget.settle(reservation, None)
    budget.load_state_dict(state)
    assert budget.stats().left == 10


def test_reservations_are_settled_once_and_where_they_belong():
    budget, other = Budget(100), Budget(100)
    reservation, foreign = budget.reserve(3), other.reserve(4)
    for wrong in (foreign, None, 1):
        with pytest.raises(InputError, match="reservation"):
            budget.settle(wrong, None)
    with pytest.raises(InputError, match="usage: got dict"):
        budget.settle(reservation, {"calls": 1})
    with pytest.raises(InputError, match="pairs: got 4, expected an integer from 0 to the reservation's 3"):
        budget.shrink(reservation, 4)
    assert budget.stats().reserved == 6  # none of it did anything
    smaller = budget.shrink(reservation, 2)
    with pytest.raises(InputError, match="settled before"):
        budget.settle(reservation, None)
    budget.settle(smaller, None)
    with pytest.raises(InputError, match="settled before"):
        budget.settle(smaller, None)
    assert budget.stats().total == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"limit": -1}, "limit"),
        ({"limit": 1.5}, "limit"),
        ({"limit": math.inf}, "limit"),
        ({"limit": math.nan, "unit": "cost", "max_per_pair": 1}, "limit"),
        ({"limit": True}, "limit"),
        ({"limit": "10"}, "limit"),
        ({"limit": 1, "unit": "dollars"}, "unit"),
        ({"limit": 1, "per": "week"}, "per"),
        ({"limit": 1, "max_per_pair": 0}, "max_per_pair"),
        ({"limit": 1, "unit": "tokens", "first_estimate": 0}, "first_estimate"),
        ({"limit": 1, "unit": "cost", "max_per_pair": 1e-12}, "max_per_pair"),
        ({"limit": 1, "unit": "cost"}, "nothing is known about prices"),
        ({"limit": 1, "unit": "tokens", "first_estimate": 5, "max_per_pair": 5}, "at most one"),
        ({"limit": 1, "unit": "pairs", "max_per_pair": 2}, "a pair is one pair"),
    ],
)
def test_bad_settings(arguments, named):
    with pytest.raises(InputError, match=named):
        Budget(**arguments)


@pytest.mark.parametrize("pairs", [-1, 1.0, True, None])
def test_bad_numbers_of_pairs(pairs):
    with pytest.raises(InputError, match="pairs"):
        Budget(10).reserve(pairs)


def test_a_limit_of_zero_allows_nothing():
    assert Budget(0).reserve(3).pairs == 0
