"""Whatever comes in whatever order, no budget is exceeded: in one thread, over restarts, in several."""

from __future__ import annotations

import json
import math
import random
import sys
import threading
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from support.budgets import usage
from support.clocks import SetClock

from rmcore._base.errors import InputError
from rmcore.engine.routing import Budget
from rmcore.judge.base import JudgeUsage

LENGTH = {"minute": 60.0, "hour": 3600.0, "day": 86400.0}


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
        self.clock = SetClock()
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
        self.clock = SetClock()
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
    budget = Budget(limit, "tokens", per, max_per_pair=bound, clock=SetClock())
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
