"""The adaptive router: holds its fraction on any stream, never breaks a budget, survives a restart bit for bit."""

from __future__ import annotations

import doctest
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adaptive import FREE, busy, drifting, drive, of, route, stream
from support.clocks import SetClock

import rmcore.engine.routing.adaptive
from rmcore import AdaptiveRouter
from rmcore._base.errors import InputError
from rmcore.engine.routing import (
    AlwaysRoute,
    Budget,
    BudgetedRouter,
    BudgetRouter,
    Candidates,
    NeverRoute,
    RandomRouter,
    ThresholdRouter,
)
from rmcore.judge.base import JudgeUsage


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


# ------------------------------------------------------------------------------------ the picture, misuse


def test_the_plot_shows_the_history(tmp_path):
    pytest.importorskip("matplotlib")
    from rmcore.evaluation.plots import plot_routing

    clock = SetClock()
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
