"""The adaptive router: holds its fraction on any stream, never breaks a budget, survives a restart bit for bit."""

from __future__ import annotations

import doctest
import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import rmcore.engine.routing.adaptive
from rmcore import AdaptiveRouter, RewardEngine
from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine.routing import (
    AlwaysRoute,
    Budget,
    BudgetedRouter,
    BudgetRouter,
    Candidates,
    NeverRoute,
    RandomRouter,
    Reservation,
    ThresholdRouter,
)
from rmcore.engine.routing.recent import ForgettingSample, SampleQuantiles
from rmcore.judge.base import JudgeUsage, Verdict

FREE = JudgeUsage()


class FakeClock:
    def __init__(self, now: float = 0.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


def of(u) -> Candidates:
    u = torch.as_tensor(np.asarray(u), dtype=torch.float64)
    return Candidates(torch.ones_like(u), u**2 - 1, u)


def route(router, u, calls_a_pair: int = 2) -> np.ndarray:
    mask, reservation = router.reserve(of(u))
    assert mask.dtype == torch.bool
    assert mask.shape == (len(u),)
    assert reservation.pairs == int(mask.sum())
    router.settle(reservation, JudgeUsage(calls=calls_a_pair * reservation.pairs))
    return mask.numpy()


def stream(router, u, size: int) -> np.ndarray:
    return np.concatenate([route(router, u[k : k + size]) for k in range(0, len(u), size)])


def drifting(pairs: int = 40_000, seed: int = 0) -> np.ndarray:
    """u over a run: its mean moves by ten of its own first standard deviations, its spread doubles, then it falls."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 1, pairs)
    mean = np.interp(at, [0, 0.1, 0.6, 0.7, 1], [1.4, 1.4, 2.4, 2.4, 1.6])
    return np.maximum(1.0, rng.normal(mean, 0.1 * (1 + at)))


def test_the_example_of_the_docstring():
    result = doctest.testmod(rmcore.engine.routing.adaptive)
    assert result.attempted > 0
    assert result.failed == 0


def test_routers_say_what_they_need_to_see():
    assert isinstance(AdaptiveRouter(0.1), BudgetedRouter)
    assert not isinstance(BudgetRouter(0.1), BudgetedRouter)
    assert BudgetRouter(0.1).whole_batch
    assert RandomRouter(0.1).whole_batch
    assert not any(r.whole_batch for r in (ThresholdRouter(1.0), AlwaysRoute(), NeverRoute(), AdaptiveRouter(0.1)))


# ------------------------------------------------------------------------------------ the fraction


@pytest.mark.parametrize(("size", "pairs"), [(1, 6_000), (28, 40_000), (512, 40_000)])
def test_a_drifting_stream_keeps_its_fraction(size, pairs):
    """Stated band: every 2,000 pairs in a row 10 ± 2.5%, all of them 10 ± 0.25%, while u moves by ten of its σ."""
    u = drifting(40_000)[:pairs]
    routed = stream(AdaptiveRouter(0.1), u, size)
    assert abs(routed.mean() - 0.1) < 0.0025 * (40_000 / pairs) ** 0.5
    windows = routed[: len(routed) // 2_000 * 2_000].reshape(-1, 2_000).mean(axis=1)
    assert windows.min() > 0.075
    assert windows.max() < 0.125
    # The threshold that was right in the beginning is not: this is what the router is for.
    fixed = (u > np.quantile(u[:4_000], 0.9)).reshape(-1, 2_000).mean(axis=1)
    assert fixed.max() > (0.99 if pairs == 40_000 else 0.2)


def test_it_routes_the_most_uncertain_pairs_of_their_time():
    u = drifting()
    routed = stream(AdaptiveRouter(0.1), u, 28)
    for start in range(4_000, 40_000, 4_000):
        here, chosen = u[start : start + 500], routed[start : start + 500]
        best = np.sort(here)[-int(chosen.sum()) :].mean()
        assert here[chosen].mean() > here.mean() + 0.9 * (best - here.mean())


def test_a_sudden_jump_is_followed_within_a_few_half_lives():
    rng = np.random.default_rng(1)
    u = np.concatenate([rng.normal(1.5, 0.1, 8_000), rng.normal(4.0, 0.1, 8_000), rng.normal(1.5, 0.1, 8_000)])
    routed = stream(AdaptiveRouter(0.1, half_life=256), u, 16)
    assert abs(routed.mean() - 0.1) < 0.005
    for start in (8_000, 16_000):
        assert abs(routed[start + 2_048 : start + 8_000].mean() - 0.1) < 0.015


@pytest.mark.parametrize("size", [1, 7, 300])
def test_ties_are_routed_in_proportion_not_all_or_none(size):
    router = AdaptiveRouter(0.2, warmup=0)
    routed = stream(router, np.full(6_000, 1.0), size)
    assert abs(routed.mean() - 0.2) < 0.02
    windows = routed.reshape(-1, 1_000).mean(axis=1)
    assert windows.min() > 0.14
    assert windows.max() < 0.26


def test_ties_at_two_values_take_all_of_the_higher_and_some_of_the_lower():
    rng = np.random.default_rng(2)
    u = np.where(rng.random(20_000) < 0.1, 2.0, 1.0)
    routed = stream(AdaptiveRouter(0.3), u, 50)
    assert routed[u == 2.0].mean() > 0.999
    assert abs(routed[u == 1.0].mean() - 2 / 9) < 0.01


def test_which_of_equal_pairs_is_routed_does_not_depend_on_its_place():
    router = AdaptiveRouter(0.5)
    places = sum(route(router, np.ones(10)) for _ in range(1_000))
    assert places.sum() == pytest.approx(5_000, abs=300)
    assert places.min() > 400
    assert places.max() < 600


@given(
    target=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.97, 1.0]),
    warmup=st.sampled_from([0, 50]),
    batches=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from(["up", "down", "same", "noise", "spike", "far"])),
        max_size=60,
    ),
)
@settings(max_examples=150, deadline=None)
def test_the_bound_holds_for_every_stream(target, warmup, batches):
    """target · pairs − routed stays within [−(target · N + n), (1 − target) · N + n], whatever the scores."""
    router = AdaptiveRouter(target, warmup=warmup, half_life=16)
    rng = np.random.default_rng(3)
    pairs = routed = largest = 0
    level = 1.5
    for size, kind in batches:
        level = {"up": level * 1.3, "down": level / 1.3, "far": 1e12}.get(kind, level)
        u = np.full(size, level) if kind == "same" else level + rng.random(size) * (100 if kind == "spike" else 1)
        routed += int(route(router, u).sum())
        pairs += size
        largest = max(largest, size)
        span = max(16, largest)
        assert -(target * span + largest) <= target * pairs - routed + 1e-6
        assert target * pairs - routed - 1e-6 <= (1 - target) * span + largest
    assert router.drift().routed == routed


def test_batches_far_larger_than_the_memory_do_not_make_it_swing():
    router = AdaptiveRouter(0.1, half_life=16)
    shares = [route(router, drifting(605, seed=seed)).mean() for seed in range(40)]
    assert min(shares) > 0.08
    assert max(shares) < 0.12


@pytest.mark.parametrize(("target", "expected"), [(0.0, 0), (1.0, 5_000)])
def test_nothing_and_everything(target, expected):
    assert stream(AdaptiveRouter(target), drifting(5_000), 13).sum() == expected


def test_until_warm_it_takes_the_top_by_rank():
    router = AdaptiveRouter(0.25, warmup=100)
    batch = np.array([1.1, 5.0, 1.2, 1.3, 4.0, 1.4, 1.5, 1.6])
    for _ in range(3):
        assert np.flatnonzero(route(router, batch)).tolist() == [1, 4]
    # What rounding down leaves is carried on: micro-batches of one get their quarter as well.
    single = AdaptiveRouter(0.25, warmup=100)
    assert [bool(route(single, [1.0 + k])[0]) for k in range(8)] == [False, False, False, True] * 2


@pytest.mark.parametrize("by", ["margin", "error_probability"])
def test_other_scores_drift_and_are_followed_too(by):
    rng = np.random.default_rng(4)
    routed, order = [], []
    router = AdaptiveRouter(0.1, by=by)
    for step in range(100):
        g = torch.as_tensor(rng.normal(0, 0.5 + 0.05 * step, 200))
        v = torch.as_tensor(rng.random(200) * 2)
        v[:20] = 0.0  # certain of the sign: −inf by error_probability
        pairs = Candidates(g, v, torch.sqrt(1 + v))
        mask, reservation = router.reserve(pairs)
        router.settle(reservation, FREE)
        routed.append(float(mask.double().mean()))
        if step > 20:
            order.append(float(g[mask].abs().mean() / g.abs().mean()))
    assert abs(np.mean(routed) - 0.1) < 0.01
    assert max(order) < 0.6  # close calls are what it takes
    assert router.history[0].by == by


def test_the_same_seed_gives_the_same_choices():
    u = np.round(drifting(4_000), 1)
    one, two, other = (AdaptiveRouter(0.1, seed=seed) for seed in (5, 5, 6))
    first = stream(one, u, 40)
    assert (first == stream(two, u, 40)).all()
    assert (first != stream(other, u, 40)).any()


def test_a_micro_batch_without_pairs_changes_nothing():
    router = AdaptiveRouter(0.1, Budget(10))
    mask, reservation = router.reserve(of([]))
    assert (len(mask), reservation.pairs, reservation.amount) == (0, 0, (0.0,))
    router.settle(reservation, None)
    router.settle(reservation, None)  # nothing to settle, so nothing to settle twice
    assert router.history == ()


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
        self.clock = FakeClock()
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
    clock = FakeClock()
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
    clock = FakeClock()
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
    clock = FakeClock()
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


# ------------------------------------------------------------------------------------ drift


def test_history_and_drift_show_what_moved():
    router = AdaptiveRouter(0.1, Budget(50_000, "calls"), history=20)
    u = drifting(28_000)
    for k in range(28):
        router.begin_step()
        stream(router, u[1_000 * k : 1_000 * (k + 1)], 50)
    records = router.history
    assert [record.step for record in records] == list(range(9, 29))  # the last 20
    for record in records:
        here = u[1_000 * (record.step - 1) : 1_000 * record.step]
        assert record.u_p50 == pytest.approx(np.quantile(here, 0.5), abs=0.01)
        assert record.u_p10 == pytest.approx(np.quantile(here, 0.1), abs=0.02)
        assert record.u_p90 == pytest.approx(np.quantile(here, 0.9), abs=0.02)
        assert record.spend == {"calls per run": 2.0 * record.routed}
        assert record.pairs == 1_000
        assert record.target == pytest.approx(0.1)
    drift = router.drift()
    assert (drift.steps, drift.pairs) == (28, 28_000)
    assert drift.first[1] == pytest.approx(1.4, abs=0.02)
    assert drift.last[1] == pytest.approx(1.62, abs=0.05)
    assert drift.shift == pytest.approx((drift.last[1] - 1.4) / (2 * 1.2816 * 0.1), rel=0.15)
    assert drift.fixed_threshold == pytest.approx(1.53, abs=0.05)
    assert drift.fixed_fraction > 0.5
    assert drift.fraction < 0.13
    assert drift.threshold == router.threshold == records[-1].threshold
    assert records[9].fixed_fraction > 0.99
    json.dumps([record.to_dict() for record in records], allow_nan=False)


def test_before_anything_there_is_nothing_to_show():
    router = AdaptiveRouter(0.1)
    router.begin_step()
    router.begin_step()
    drift = router.drift()
    assert (router.history, router.threshold) == ((), None)
    assert (drift.steps, drift.first, drift.last, drift.shift, drift.fraction) == (0, None, None, None, None)


def test_memory_does_not_grow():
    router = AdaptiveRouter(0.1, Budget(10**9, "calls", "minute"), half_life=64, history=5)
    rng = np.random.default_rng(11)
    sizes = []
    for k in range(300):
        if k % 10 == 0:
            router.begin_step()
        route(router, 1 + rng.random(2_000))
        if k in (149, 299):
            sizes.append(len(json.dumps(router.state_dict())))
    assert sizes[1] < 1.3 * sizes[0]


# ------------------------------------------------------------------------------------ state


def busy(clock: FakeClock, **changes) -> AdaptiveRouter:
    budgets = [
        Budget(4_000, "tokens", "step", first_estimate=200, clock=clock),
        Budget(500, "calls", "minute", clock=clock),
        Budget(3.5, "cost", "run", max_per_pair=0.004, clock=clock),
    ]
    return AdaptiveRouter(0.2, budgets, **{"half_life": 128, "warmup": 64, "history": 4, **changes})


def drive(router, clock, u, rng, steps) -> list:
    seen = []
    for step in steps:
        router.begin_step()
        for start in range(0, 200, 25):
            mask, reservation = router.reserve(of(u[200 * step + start : 200 * step + start + 25]))
            k = reservation.pairs
            tokens = int(rng.integers(50, 90)) * k
            usage = JudgeUsage(calls=2 * k, prompt_tokens=tokens, cost=0.0031 * k)
            router.settle(reservation, usage if rng.random() < 0.9 else None)
            clock.time += 0.5
            seen.append((mask.tolist(), reservation, router.threshold))
    return seen


@pytest.mark.parametrize("by", ["u", "error_probability"])
def test_a_restored_router_continues_bit_for_bit(by, tmp_path):
    clock, u, rng = FakeClock(), np.round(drifting(4_000), 3), np.random.default_rng(12)
    router = busy(clock, by=by)
    drive(router, clock, u, rng, range(7))
    path = tmp_path / "deep" / "router.json"
    router.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["router.json"]
    later = FakeClock(clock.time)
    other = busy(later, by=by, seed=99)
    other.load(path)
    assert other.state_dict() == router.state_dict()
    assert other.history == router.history
    assert other.drift() == router.drift()
    rest = np.random.default_rng(13), np.random.default_rng(13)
    assert drive(router, clock, u, rest[0], range(7, 20)) == drive(other, later, u, rest[1], range(7, 20))
    assert other.state_dict() == router.state_dict()
    assert other.history == router.history


def test_a_router_that_died_with_pairs_in_flight_counts_them_as_spent():
    router = AdaptiveRouter(0.5, Budget(100, "calls"))
    _, flying = router.reserve(of(np.linspace(1, 2, 20)))
    state = router.state_dict()
    other = AdaptiveRouter(0.5, Budget(100, "calls"))
    other.load_state_dict(state)
    assert other.budgets[0].stats().spent == 20
    with pytest.raises(InputError, match="reservation"):
        other.settle(flying, FREE)
    with pytest.raises(InputError, match="in flight"):
        router.load_state_dict(state)


def test_target_and_limits_may_be_new_after_a_restart():
    router = AdaptiveRouter(0.5, Budget(10, "calls"))
    route(router, np.linspace(1, 2, 20))
    other = AdaptiveRouter(0.9, Budget(14, "calls"))
    other.load_state_dict(router.state_dict())
    assert route(other, np.linspace(1, 2, 20)).sum() == 2


DAMAGES = [
    ("format", "other"),
    ("version", 2),
    ("version", True),
    ("by", "margin"),
    ("pairs", -1),
    ("owed", math.nan),
    ("owed", None),
    ("threshold", "high"),
    ("next_id", 0),
    ("random", {}),
    ("random", None),
    ("random", {"bit_generator": "MT19937", "state": {}}),
    ("sample", {}),
    ("paces", []),
    ("budgets", []),
    ("budgets", [{}, {}, {}]),
    ("log", None),
]


@pytest.mark.parametrize(("name", "value"), DAMAGES, ids=lambda v: str(v)[:30])
def test_a_damaged_state_is_refused_and_changes_nothing(name, value):
    clock = FakeClock()
    good = busy(clock)
    drive(good, clock, drifting(4_000), np.random.default_rng(14), range(3))
    router = busy(FakeClock())
    before = router.state_dict()
    with pytest.raises(CheckpointError):
        router.load_state_dict({**good.state_dict(), name: value})
    assert router.state_dict() == before


def _leaves(value, path=()):
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for key, item in enumerate(value) for leaf in _leaves(item, (*path, key))]
    return [path]


def test_every_field_of_a_state_is_checked():
    clock = FakeClock()
    good = busy(clock)
    drive(good, clock, drifting(4_000), np.random.default_rng(15), range(2))
    text = json.dumps(good.state_dict())
    router = busy(FakeClock())
    before = router.state_dict()
    for path in _leaves(json.loads(text)):
        for wrong in ({"no": 1}, "seven", [None], [[1]]):
            state = json.loads(text)
            place = state
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            with pytest.raises(CheckpointError):
                router.load_state_dict(state)
    assert router.state_dict() == before
    router.load_state_dict(json.loads(text))


SAVED = Path(__file__).parent / "data" / "adaptive_router_v1.json"


def saved_like(clock) -> AdaptiveRouter:
    return busy(clock, half_life=16, warmup=8, history=2)


def test_a_file_saved_before_states_had_models_still_loads():
    router = saved_like(FakeClock())
    router.load(SAVED)
    assert router.state_dict() == json.loads(SAVED.read_text())
    assert len(router.history) == 2


@pytest.mark.parametrize(
    ("path", "wrong", "says"),
    [
        (("version",), 2, r"router\.version: got '2', expected 1$"),
        (("format",), "other", r"router\.format: got 'other', expected 'rmcore-adaptive-router'$"),
        (("pairs",), True, r"router\.pairs: got 'True', expected a valid integer$"),
        (("pairs",), 400.0, r"router\.pairs: got '400\.0', expected a valid integer$"),
        (("owed",), "0.5", r"router\.owed: got '0\.5', expected a valid number$"),
        (
            ("budgets", 1, "mean"),
            -1.0,
            r"router\.budgets\[1\]\.mean: got '-1\.0', expected greater than or equal to 0$",
        ),
        (("paces", 1, "since_last"), None, r"router\.paces\[1\]: got .*, expected both times and their arrivals"),
        (("sample", "stamp"), [1], r"router\.sample: got .*, expected as many values as there are masses and stamps$"),
        (("log", "steps", 0, "spend"), {}, r"router\.log\.steps\[0\]\.spend: got '\[\]', expected the budgets"),
        (("random", "state"), {"state": 1}, r"router\.random\.state: fields missing \['inc'\], fields unknown \[\]$"),
        (("sample",), [], r"router\.sample: got list, expected an object$"),
        (("surprise",), 1, r"router: fields missing \[\], fields unknown \['surprise'\]$"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_an_error_names_the_file_the_field_and_what_was_expected(path, wrong, says, tmp_path):
    state = json.loads(SAVED.read_text())
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    file = tmp_path / "router.json"
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=says) as caught:
        saved_like(FakeClock()).load(file)
    assert str(caught.value).startswith(f"{file}: router")


def test_a_file_that_is_no_state_is_refused(tmp_path):
    router = AdaptiveRouter(0.1)
    for name, content in (("empty", b""), ("half", b'{"format": "rmco'), ("bytes", b"\xff\xfe\x00"), ("list", b"[]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            router.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="missing"):
        router.load(tmp_path / "missing")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    router = AdaptiveRouter(0.1)
    path = tmp_path / "router.json"
    router.save(path)
    old = path.read_bytes()
    route(router, [1.0, 2.0])

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("rmcore.engine.routing.state.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        router.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------ streaming quantiles


@given(st.lists(st.lists(st.floats(-100, 100), max_size=40), max_size=12), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_the_tail_holds_its_share_of_the_weight(batches, share):
    sample, weights, values, seen = ForgettingSample(16), [], [], 0
    for batch in batches:
        sample.add(np.array(batch, dtype=float))
        seen += len(batch)
        values += batch
        weights += [seen] * len(batch)
    new = np.array([1.0, 2.0, 3.0])
    tail = sample.tail(share, new)
    kept = len(values[-64:])
    every = np.concatenate([values[-64:], new])
    mass = np.concatenate([0.5 ** ((seen + 3 - np.array(weights[len(values) - kept :])) / 16), np.ones(3)])
    above, equal = mass[every > tail.threshold].sum(), mass[every == tail.threshold].sum()
    assert equal > 0
    assert 0 <= tail.tied <= 1
    assert above + tail.tied * equal == pytest.approx(share * mass.sum())


def test_a_batch_larger_than_the_sample_keeps_its_distribution():
    sample = ForgettingSample(16)
    sample.add(np.random.default_rng(16).permutation(np.linspace(0, 1, 100_000)))
    assert sample.seen == 100_000
    assert len(sample.state_dict()["values"]) == 64
    assert sample.tail(0.25, np.empty(0)).threshold == pytest.approx(0.75, abs=0.02)


def test_quantiles_of_a_long_step_stay_close():
    sample = SampleQuantiles(capacity=256)
    values = np.random.default_rng(17).normal(size=100_000)
    for k in range(0, len(values), 100):
        sample.add(values[k : k + 100])
    for level, got in zip((0.1, 0.5, 0.9), sample.quantiles((0.1, 0.5, 0.9)), strict=True):
        assert np.mean(values < got) == pytest.approx(level, abs=0.02)
    assert len(sample.state_dict()["values"]) <= 512
    sample.clear()
    assert sample.quantiles((0.5,)) is None


# ------------------------------------------------------------------------------------ the picture, misuse


def test_the_plot_shows_the_history(tmp_path):
    pytest.importorskip("matplotlib")
    from rmcore.evaluation.plots import plot_routing

    clock = FakeClock()
    router = busy(clock, history=100)
    drive(router, clock, drifting(4_000), np.random.default_rng(18), range(20))
    path = tmp_path / "routing.png"
    axes = plot_routing(router.history, path).axes
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = {line.get_label(): line.get_ydata() for ax in axes for line in ax.get_lines()}
    np.testing.assert_allclose(lines["median u"], [record.u_p50 for record in router.history])
    np.testing.assert_allclose(lines["threshold"], [record.threshold for record in router.history])
    np.testing.assert_allclose(lines["routed"], [100 * record.fraction for record in router.history])
    assert "a fixed threshold" in lines
    spent = sum(record.spend["tokens per step"] for record in router.history)
    assert f"{spent:,.0f} spent" in axes[2].get_title(loc="left")
    # One step, another score, nothing but unusable pairs: still a picture.
    plain = AdaptiveRouter(0.5, by="margin")
    route(plain, [1.0, 2.0])
    plot_routing(plain.history, path)
    unusable = AdaptiveRouter(0.5)
    unusable.settle(unusable.reserve(of([math.inf, math.inf]))[1], FREE)
    plot_routing(unusable.history, path)
    with pytest.raises(InputError, match="history: got no steps"):
        plot_routing([])


def test_reservations_are_settled_once_and_where_they_belong():
    router, other = AdaptiveRouter(1.0, Budget(100)), AdaptiveRouter(1.0, Budget(100))
    _, mine = router.reserve(of([1.0, 2.0]))
    for wrong in (replace(mine, pairs=1), replace(mine, id=7), None, "1"):
        with pytest.raises(InputError, match="reservation"):
            router.settle(wrong, None)
    with pytest.raises(InputError, match="reservation"):
        other.settle(mine, None)
    with pytest.raises(InputError, match="usage: got int"):
        router.settle(mine, 3)
    assert router.budgets[0].stats().reserved == 4
    router.settle(mine, JudgeUsage(calls=3))
    with pytest.raises(InputError, match="settled before"):
        router.settle(mine, JudgeUsage(calls=3))
    assert router.budgets[0].stats().spent == 3
    without = AdaptiveRouter(1.0)
    _, mine = without.reserve(of([1.0, 2.0]))
    without.settle(mine, None)
    with pytest.raises(InputError, match="settled before"):
        without.settle(mine, None)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "nothing that says how much"),
        ({"target_fraction": -0.1}, "target_fraction"),
        ({"target_fraction": 1.1}, "target_fraction"),
        ({"target_fraction": math.nan}, "target_fraction"),
        ({"target_fraction": True}, "target_fraction"),
        ({"target_fraction": 0.1, "first_fraction": 2}, "first_fraction"),
        ({"target_fraction": 0.1, "by": "rank_sum"}, "by: got 'rank_sum'"),
        ({"target_fraction": 0.1, "by": "entropy"}, "by"),
        ({"target_fraction": 0.1, "warmup": -1}, "warmup"),
        ({"target_fraction": 0.1, "warmup": 1.5}, "warmup"),
        ({"target_fraction": 0.1, "history": 0}, "history"),
        ({"target_fraction": 0.1, "seed": -1}, "seed"),
        ({"target_fraction": 0.1, "half_life": 1}, "half_life"),
        ({"target_fraction": 0.1, "half_life": math.nan}, "half_life"),
        ({"target_fraction": 0.1, "half_life": 1e9}, "half_life"),
        ({"target_fraction": 0.1, "run_pairs": 0}, "run_pairs"),
        ({"target_fraction": 0.1, "budget": 100}, "budget"),
        ({"target_fraction": 0.1, "budget": [100]}, "budget"),
        ({"target_fraction": 0.1, "budget": [Budget(1), Budget(2)]}, "at most one of a kind"),
        ({"budget": [Budget(1, "calls", "run")]}, "run_pairs"),
    ],
)
def test_bad_settings(arguments, named):
    with pytest.raises(InputError, match=named):
        AdaptiveRouter(**arguments)


def test_importing_it_is_cheap(torch_python):
    code = (
        "import sys, rmcore; rmcore.AdaptiveRouter, rmcore.BudgetRouter;"
        "assert not {'transformers', 'httpx', 'sqlite3', 'triton', 'matplotlib'} & set(sys.modules)"
    )
    done = torch_python.start(code)
    _, errors = done.communicate()
    assert done.returncode == 0, errors


@pytest.mark.parametrize("per", ["run", "step", "minute"])
def test_a_reservation_without_pairs_leaves_nothing_in_flight(per):
    budget = Budget(3, "calls", per, max_per_pair=1)
    router = AdaptiveRouter(1.0, budget, warmup=0)
    candidates = Candidates(torch.zeros(3), torch.ones(3), torch.linspace(1, 2, 3))
    _, reservation = router.reserve(candidates)
    router.settle(reservation, JudgeUsage(calls=3))
    for _ in range(3):
        mask, nothing = router.reserve(candidates)
        assert not mask.any()
        assert nothing.pairs == 0
    assert budget.stats().reserved == 0
    assert (budget.stats().spent, budget.stats().denied_pairs) == (3, 9)
    router.load_state_dict(router.state_dict())  # refused while anything is in flight
