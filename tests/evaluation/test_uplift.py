"""Routing curves, their uplift over chance, and intervals of both."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routed_pairs import NAN, routed

from rmcore.evaluation.statistics import (
    accuracy_cost_curve,
    risk_coverage,
    uplift_over_random,
)

# -------------------------------------------------------------------------------- routing


def test_curve_by_hand():
    curve = accuracy_cost_curve([3, 2, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1])
    np.testing.assert_allclose(curve.fraction, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.accuracy, [0.5, 0.75, 0.75, 1, 1])
    assert curve.area == pytest.approx((0.25 + 0.75 + 0.75 + 1 + 0.5) / 4)
    # Above the line (0, .125, 0, .125, 0): .0625. The best order, both errors first: (0, .125, .25, .125, 0): .125.
    assert curve.normalised_area == pytest.approx(0.5)
    assert curve.at([0.125])[0] == pytest.approx(0.625)


def test_best_and_worst_orders_bound_the_normalised_area():
    head = np.array([0.0, 1, 0, 1, 1, 0, 1])
    ones = np.ones(7)
    assert accuracy_cost_curve(1 - head, head, ones).normalised_area == pytest.approx(1)
    assert accuracy_cost_curve(head, head, ones).normalised_area == pytest.approx(-1)


def test_curve_equals_a_naive_sort_where_nothing_ties():
    rng = np.random.default_rng(2)
    score, head, judge = rng.permutation(40), rng.integers(0, 2, 40), rng.integers(0, 2, 40).astype(float)
    judge[::7] = NAN
    order = sorted(range(40), key=lambda i: -score[i])
    want = []
    for k in range(41):
        judged = set(order[:k])
        answers = [judge[i] if i in judged and not math.isnan(judge[i]) else head[i] for i in range(40)]
        want.append(np.mean(answers))
    np.testing.assert_allclose(accuracy_cost_curve(score, head, judge).accuracy, want, atol=1e-14)


def test_ties_are_the_average_over_every_order_of_the_tied_pairs():
    score = np.array([1.0, 2, 1, 1, 2, 0])
    head, judge = np.array([0.0, 1, 1, 0, 0, 1]), np.array([1.0, 0, 1, 1, 1, NAN])
    jitter = [score + 1e-3 * np.array(order) for order in itertools.permutations(range(6))]
    want = np.mean([accuracy_cost_curve(s, head, judge).accuracy for s in jitter], axis=0)
    np.testing.assert_allclose(accuracy_cost_curve(score, head, judge).accuracy, want, atol=1e-13)
    want = np.mean([risk_coverage(s, head).risk for s in jitter], axis=0)
    np.testing.assert_allclose(risk_coverage(score, head).risk, want, atol=1e-13)


@given(routed())
@settings(max_examples=100, deadline=None)
def test_curve_runs_from_the_head_to_the_judge_whatever_the_order(data):
    score, head, judge = data
    curve = accuracy_cost_curve(score, head, judge)
    assert curve.fraction.size == head.size + 1
    assert curve.accuracy[0] == head.mean()
    assert curve.accuracy[-1] == pytest.approx(np.where(np.isnan(judge), head, judge).mean(), abs=1e-15)
    order = np.random.default_rng(0).permutation(head.size)
    shuffled = accuracy_cost_curve(score[order], head[order], judge[order])
    np.testing.assert_array_equal(shuffled.accuracy, curve.accuracy)


@given(routed(), st.lists(st.floats(0, 1), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_constant_score_is_exactly_random_routing(data, fractions):
    _, head, judge = data
    for step in uplift_over_random(np.full(head.size, 3.25), head, judge, fractions, replicates=20):
        assert step.point == 0
        assert head.size == 1 or (step.low, step.high) == (0, 0)


@given(routed())
@settings(max_examples=50, deadline=None)
def test_uplift_is_the_curve_less_the_line(data):
    score, head, judge = data
    curve, at = accuracy_cost_curve(score, head, judge), np.array([0.0, 0.1, 0.45, 1.0])
    line = curve.accuracy[0] + at * (curve.accuracy[-1] - curve.accuracy[0])
    got = [step.point for step in uplift_over_random(score, head, judge, at, replicates=0)]
    np.testing.assert_allclose(got, 100 * (curve.at(at) - line), atol=1e-10)


def test_uplift_does_not_depend_on_how_good_an_even_judge_is():
    rng = np.random.default_rng(3)
    score, head = rng.random(500), rng.integers(0, 2, 500).astype(float)
    perfect = np.array([s.point for s in uplift_over_random(score, head, np.ones(500), replicates=0)])
    weaker = np.array([s.point for s in uplift_over_random(score, head, np.full(500, 0.8), replicates=0)])
    np.testing.assert_allclose(weaker, perfect, atol=1e-10)  # a constant adds the same to every order


def test_bootstrap_equals_recomputing_on_repeated_prompts():
    rng = np.random.default_rng(4)
    n, replicates = 60, 40
    score, head = rng.integers(0, 6, n).astype(float), rng.integers(0, 2, n).astype(float)
    judge, cluster = (rng.random(n) < 0.85).astype(float), rng.integers(0, 15, n)
    _, cluster = np.unique(cluster, return_inverse=True)
    drawn = np.random.default_rng(9).integers(cluster.max() + 1, size=(replicates, cluster.max() + 1))
    want = []
    for row in drawn:
        rows = np.concatenate([np.flatnonzero(cluster == c) for c in row])
        steps = uplift_over_random(score[rows], head[rows], judge[rows], replicates=0)
        want.append([step.point for step in steps])
    low, high = np.quantile(want, (0.025, 0.975), axis=0)
    got = uplift_over_random(score, head, judge, cluster=cluster, replicates=replicates, seed=9)
    np.testing.assert_allclose([step.low for step in got], low, atol=1e-10)
    np.testing.assert_allclose([step.high for step in got], high, atol=1e-10)


def test_bootstrap_does_not_depend_on_how_it_is_split_into_blocks(monkeypatch):
    rng = np.random.default_rng(5)
    args = rng.random(50), rng.integers(0, 2, 50), np.ones(50)
    whole = uplift_over_random(*args, replicates=30)
    monkeypatch.setattr("rmcore.evaluation.statistics.CHUNK", 50 * 30 * 4)
    assert uplift_over_random(*args, replicates=30) == whole
    monkeypatch.setattr("rmcore.evaluation.statistics.CHUNK", 1)
    assert all(math.isfinite(step.low) for step in uplift_over_random(*args, replicates=30))


def test_intervals_widen_when_prompts_and_not_pairs_are_what_was_sampled():
    rng = np.random.default_rng(6)
    cluster = np.repeat(np.arange(40), 10)  # ten pairs a prompt, all alike
    score, head = rng.random(40)[cluster], rng.integers(0, 2, 40)[cluster]
    by_pair = uplift_over_random(score, head, np.ones(400))[1]
    by_prompt = uplift_over_random(score, head, np.ones(400), cluster=cluster)[1]
    assert by_prompt.high - by_prompt.low > 2 * (by_pair.high - by_pair.low)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    def sample(rng, prompts):
        difficulty = np.repeat(rng.random(prompts), 3)
        score = difficulty + rng.normal(0, 0.3, difficulty.size)
        head = (rng.random(difficulty.size) > 0.7 * difficulty).astype(float)
        return score, head, np.ones(head.size), np.repeat(np.arange(prompts), 3)

    rng = np.random.default_rng(7)
    score, head, judge, _ = sample(rng, 100_000)
    truth = uplift_over_random(score, head, judge, [0.25], replicates=0)[0].point
    hits = 0
    for _ in range(200):
        score, head, judge, cluster = sample(rng, 60)
        step = uplift_over_random(score, head, judge, [0.25], cluster=cluster, replicates=200, seed=rng)[0]
        hits += step.low <= truth <= step.high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_thousand_replicates_of_a_thousand_pairs_are_quick():
    rng = np.random.default_rng(8)
    start = time.perf_counter()
    uplift_over_random(rng.random(1000), rng.integers(0, 2, 1000), np.ones(1000), cluster=rng.integers(0, 300, 1000))
    assert time.perf_counter() - start < 5


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    rng = np.random.default_rng(10)
    args = rng.random(80), rng.integers(0, 2, 80), np.ones(80)
    assert uplift_over_random(*args, seed=1) == uplift_over_random(*args, seed=1)
    assert uplift_over_random(*args, seed=1) != uplift_over_random(*args, seed=2)


def test_risk_coverage_by_hand():
    curve = risk_coverage([0.1, 0.4, 0.2, 0.3], [1, 0, 1, 0])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 0, 1 / 3, 0.5])
    assert curve.aurc == pytest.approx((1 / 3 + 0.5) / 4)
