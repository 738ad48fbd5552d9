"""A router's target share beside budgets: what is held back, spent, spread and counted."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from support.adaptive import FREE, drifting, of, route, stream
from support.clocks import SetClock

from rmcore import AdaptiveRouter, RewardEngine
from rmcore._base.errors import InputError
from rmcore.engine.routing import (
    Budget,
    Candidates,
    Reservation,
)
from rmcore.judge.base import JudgeUsage, Verdict

# ------------------------------------------------------------------------------------ budgets


def test_the_highest_go_first_when_the_budget_does_not_reach():
    router = AdaptiveRouter(1.0, [Budget(6, "calls"), Budget(5, "pairs", "step")])
    mask, reservation = router.reserve(of([1.2, 3.0, 1.1, 2.0, 2.5]))
    assert mask.tolist() == [False, True, False, True, True]
    assert reservation == Reservation(1, 3, (6.0, 3.0))
    assert router.history[-1].denied == 2
    assert router.budgets[1].stats().reserved == 3  # what the other budget denied is not held here


def test_unusable_rows_come_first_and_stay_out_of_the_fraction_but_in_the_budget():
    router = AdaptiveRouter(0.25, Budget(4, "pairs"), warmup=0)
    u = torch.tensor([1.0, math.inf, 3.0, 2.0, math.inf, 1.5], dtype=torch.float64)
    g = torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    mask, reservation = router.reserve(Candidates(g, u**2 - 1, u))
    assert mask.tolist() == [False, True, True, False, True, False]
    assert reservation.pairs == 3
    assert router.reserve(Candidates(g, u**2 - 1, u))[1].pairs == 1
    assert router.history[-1].u_p90 == 3.0
    json.dumps(router.state_dict(), allow_nan=False)


class Spending(RuleBasedStateMachine):
    """Any interleaving of score calls that share a router with three budgets, each against its own ledger."""

    open = Bundle("open")

    @initialize(
        calls=st.integers(0, 60),
        tokens=st.integers(0, 3_000),
        pairs=st.integers(0, 20),
        fraction=st.sampled_from([None, 0.1, 0.6, 1.0]),
    )
    def make(self, calls, tokens, pairs, fraction):
        self.clock = SetClock()
        self.limits = (calls, tokens, pairs)
        budgets = [
            Budget(calls, "calls", "run"),
            Budget(tokens, "tokens", "step", max_per_pair=100),
            Budget(pairs, "pairs", "minute", clock=self.clock),
        ]
        self.router = AdaptiveRouter(fraction, budgets, warmup=8, half_life=16)
        self.rng = np.random.default_rng(0)
        self.step = 0
        self.calls = 0
        self.tokens: dict[int, int] = {0: 0}
        self.pairs: list[list[float]] = []  # reserved at, settled at, pairs

    @rule(target=open, count=st.integers(0, 25), tied=st.booleans())
    def reserve(self, count, tied):
        u = np.ones(count) if tied else 1 + self.rng.random(count)
        mask, reservation = self.router.reserve(of(u))
        k = int(mask.sum())
        assert reservation.pairs == k
        assert reservation.amount == (2.0 * k, 100.0 * k, float(k))
        chosen = mask.numpy()
        if 0 < k < count:
            assert u[chosen].min() >= u[~chosen].max()
        self.calls += 2 * k
        self.tokens[self.step] += 100 * k
        entry = [self.clock.time, math.inf, k]
        self.pairs.append(entry)
        return reservation, self.step, entry

    @rule(flight=consumes(open), share=st.floats(0, 1), lost=st.booleans())
    def settle(self, flight, share, lost):
        reservation, step, entry = flight
        k = reservation.pairs
        calls, tokens = (2 * k, 100 * k) if lost else (int(share * 2 * k), int(share * 100 * k))
        if not calls:
            tokens = 0 if not lost else tokens
        usage = None if lost else JudgeUsage(calls=max(calls, bool(tokens)), prompt_tokens=tokens)
        if usage is not None and calls and not tokens:
            tokens = 100 * k  # calls without figures
        self.router.settle(reservation, usage)
        self.calls += calls - 2 * k
        self.tokens[step] += tokens - 100 * k
        entry[1] = self.clock.time
        if k:
            with pytest.raises(InputError, match="settled before"):
                self.router.settle(reservation, usage)

    @rule()
    def begin_step(self):
        self.router.begin_step()
        self.step += 1
        self.tokens[self.step] = 0

    @rule(seconds=st.sampled_from([0.5, 20.0, 61.0]))
    def wait(self, seconds):
        self.clock.time += seconds

    @invariant()
    def never_exceeded(self):
        calls, tokens, pairs = self.limits
        assert self.calls <= calls
        assert all(spent <= tokens for spent in self.tokens.values())
        for end in {e[0] for e in self.pairs} | {e[1] for e in self.pairs if e[1] < math.inf}:
            assert sum(e[2] for e in self.pairs if e[0] <= end and e[1] > end - 60.0) <= pairs
        stats = [budget.stats() for budget in self.router.budgets]
        assert stats[0].spent + stats[0].reserved == self.calls
        assert stats[1].spent + stats[1].reserved == self.tokens[self.step]
        assert not any(s.overshoot for s in stats)


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_threads_share_one_router_and_its_budget():
    limit = 900
    router = AdaptiveRouter(0.5, Budget(limit, "pairs"), half_life=64)
    counted, highest, errors = [0], [0], []
    guard, start = threading.Lock(), threading.Barrier(6)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            start.wait()
            for _ in range(60):
                mask, reservation = router.reserve(of(1 + rng.random(8)))
                with guard:
                    counted[0] += int(mask.sum())
                    highest[0] = max(highest[0], counted[0])
                router.settle(reservation, FREE)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert highest[0] == limit
    drift = router.drift()
    assert (drift.pairs, drift.routed) == (6 * 60 * 8, limit)
    assert drift.routed + drift.denied == pytest.approx(0.5 * drift.pairs, abs=64 + 16)


def test_a_step_budget_alone_is_spread_over_the_step_once_its_length_is_known():
    rng = np.random.default_rng(6)
    budget = Budget(300, "calls", "step")
    router = AdaptiveRouter(budget=budget, first_fraction=0.05)
    shares, worst = [], []
    for _ in range(12):
        router.begin_step()
        u = np.maximum(1, rng.normal(1.5, 0.2, 1_500))
        routed = stream(router, u, 30)
        shares.append(budget.stats().spent / 300)
        worst.append(routed[-500:].mean() / max(routed[:500].mean(), 1e-9))
    assert shares[0] == pytest.approx(2 * 0.05 * 1_500 / 300, abs=0.05)  # nothing known yet
    assert min(shares[1:]) > 0.97
    assert max(shares) <= 1
    assert min(worst[2:]) > 0.5  # the end of a step gets as much as its beginning
    assert max(worst[2:]) < 2.0
    assert router.history[-1].target == pytest.approx(0.1, abs=0.02)
    assert sum(record.denied for record in router.history) <= 12 * 5


def test_calls_a_minute_alone_follow_the_arrivals():
    clock = SetClock()
    router = AdaptiveRouter(budget=Budget(120, "calls", "minute", clock=clock), half_life=256)
    rng = np.random.default_rng(7)
    made, denied = [], 0
    for second in range(900):
        # 10 pairs a second, twice as many in the middle third: 60 pairs a minute of 600, then of 1,200.
        mask = route(router, 1 + rng.random(20 if 300 <= second < 600 else 10))
        made.append(2 * int(mask.sum()))
        clock.time += 1.0
    made = np.array(made)
    assert max(made[k : k + 60].sum() for k in range(840)) <= 120
    for start in (120, 420):
        assert made[start : start + 180].sum() > 0.8 * 3 * 120
    denied = sum(record.denied for record in router.history)
    assert denied < 0.25 * router.drift().routed


def test_a_burst_does_not_spend_its_minute_on_the_first_pairs():
    """RL arrives in bursts: 400 pairs within a second, then two minutes of training."""
    clock = SetClock()
    router = AdaptiveRouter(budget=Budget(80, "calls", "minute", clock=clock), half_life=256)
    rng = np.random.default_rng(8)
    first = last = 0
    for burst in range(12):
        routed = stream(router, 1 + rng.random(400), 20)
        if burst >= 2:
            first += int(routed[:200].sum())
            last += int(routed[200:].sum())
        clock.time += 120.0
    assert first + last > 0.85 * 10 * 40
    assert 0.6 < last / first < 1.6


def test_a_run_budget_alone_needs_to_know_the_run_and_is_then_spread_over_it():
    with pytest.raises(InputError, match="run_pairs with a budget per run"):
        AdaptiveRouter(budget=Budget(100))
    router = AdaptiveRouter(budget=Budget(2_000, "calls"), run_pairs=20_000)
    routed = stream(router, drifting(20_000), 40)
    assert 980 <= routed.sum() <= 1_000
    quarters = routed.reshape(4, -1).sum(axis=1)
    assert quarters.min() > 200


def test_a_budget_below_the_target_slows_it_down_before_it_stops_it():
    router = AdaptiveRouter(0.5, Budget(200, "calls", "step"))
    rng = np.random.default_rng(9)
    for _ in range(4):
        router.begin_step()
        routed = stream(router, 1 + rng.random(1_000), 20)
    assert routed[-250:].sum() >= 15  # of 100: not all was gone by then
    assert 0.09 < router.history[-1].target < 0.11


def test_a_step_whose_verdicts_come_at_its_end_is_spread_over_what_can_be_reserved():
    """The engine settles a score call's pairs when it is over: all hold four times what they turn out to cost."""
    budget = Budget(40_000, "tokens", "step", max_per_pair=400)
    router = AdaptiveRouter(budget=budget)
    rng = np.random.default_rng(19)
    for _ in range(6):
        router.begin_step()
        flying, routed = [], []
        for _ in range(40):
            mask, reservation = router.reserve(of(1 + rng.random(25)))
            flying.append(reservation)
            routed.append(int(mask.sum()))
        for reservation in flying:
            k = reservation.pairs
            router.settle(reservation, JudgeUsage(calls=2 * k, prompt_tokens=100 * k))
    assert 95 <= sum(routed) <= 100
    assert 15 < sum(routed[-10:]) < 35
    assert budget.stats().spent == 100 * sum(routed)
    assert router.history[-1].denied <= 5


def test_denied_pairs_are_not_caught_up():
    clock = SetClock()
    router = AdaptiveRouter(0.5, Budget(10, "pairs", "minute", clock=clock), half_life=16)
    rng = np.random.default_rng(10)
    stream(router, 1 + rng.random(400), 20)
    router.target_fraction = 0.1
    clock.time += 600.0
    assert route(router, 1 + rng.random(40)).sum() <= 8


def test_select_alone_counts_everything_reserved():
    budget = Budget(100_000, "tokens", max_per_pair=1_000)
    router = AdaptiveRouter(0.5, budget)
    assert int(router.select(of(np.linspace(1, 2, 10))).sum()) == 5
    assert (budget.stats().spent, budget.stats().reserved) == (5_000, 0)


def test_a_late_settlement_is_booked_on_its_own_step():
    router = AdaptiveRouter(0.5, Budget(100, "calls"))
    router.begin_step()
    _, late = router.reserve(of(np.linspace(1, 2, 10)))
    router.begin_step()
    route(router, np.linspace(1, 2, 4))
    router.settle(late, JudgeUsage(calls=7))
    assert [record.spend for record in router.history] == [{"calls per run": 7.0}, {"calls per run": 4.0}]


def test_the_engine_reserves_asks_and_settles(hand_head, scripted_judge):
    asked = []

    def answer(pair):
        asked.append(pair)
        return Verdict(1.0, usage=JudgeUsage(calls=2, prompt_tokens=60, completion_tokens=20))

    tokens = Budget(1_000, "tokens", "run", max_per_pair=100)
    router = AdaptiveRouter(0.5, tokens, warmup=0)
    engine = RewardEngine(hand_head([1.0, 0.0]), scripted_judge(answer), router)
    rng = torch.Generator().manual_seed(0)
    for step in range(10):
        hidden = torch.randn(4, 2, generator=rng)
        scores = engine.score_hidden(hidden, [4], prompts=["p"], responses=[[f"{step}{k}" for k in "abcd"]])
        assert sum(d.by == "judge" for d in scores[0].decisions) == router.history[-1].routed
    stats = tokens.stats()
    assert stats.reserved == 0
    assert stats.spent == 80 * len(asked) == sum(record.spend["tokens per run"] for record in router.history)
    assert len(asked) == 12  # 12 · 80 = 960: no room for what a 13th pair may cost
    assert len(router.history) == 10
    assert router.drift().denied > 0
