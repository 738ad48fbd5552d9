"""The evaluation says what its formulas say: hand-computed values, brute force beside every fast path, edge cases."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.evaluation.evaluate import evaluate_pairs
from rmcore.evaluation.report import ScoredPairs
from rmcore.evaluation.statistics import (
    accuracy,
    accuracy_cost_curve,
    auroc,
    average_ranks,
    correctness,
    expected_calibration_error,
    log_loss,
    rank_sum,
    reliability_curve,
    risk_coverage,
    spearman,
    uplift_over_random,
)

NAN = float("nan")


def make_pairs(n=300, seed=0, **changes):
    """Half the pairs off distribution, where the head is worse and u is larger."""
    rng = np.random.default_rng(seed)
    far = rng.random(n) < 0.5
    truth = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    logit = truth * np.where(far, rng.normal(-0.2, 1.5, n), rng.normal(1.0, 1.5, n))
    fields = {
        "logit": logit,
        "label": (truth > 0).astype(float),
        "uncertainty": np.sqrt(1 + rng.gamma(2, np.where(far, 1.0, 0.3))),
        "cluster": rng.integers(0, max(1, n // 3), n),
        "controls": {"|length difference|": np.abs(rng.normal(size=n))},
    }
    return ScoredPairs(**(fields | changes))


@st.composite
def routed(draw):
    """A score with many ties, and what head and judge get right; some pairs without a verdict."""
    n = draw(st.integers(1, 30))
    column = lambda values: np.array(draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)))  # noqa: E731
    return column([-2.0, 0.0, 0.5, 1e9]), column([0.0, 0.5, 1.0]), column([0.0, 0.5, 1.0, NAN])


# -------------------------------------------------------------------------------- the head by itself


def test_correctness_follows_the_sign_and_halves_indifference():
    got = correctness([2.0, -0.1, 3.0, 0.0, NAN], [1, 1, 0, 1, 0])
    np.testing.assert_array_equal(got, [1.0, 0.0, 0.0, 0.5, NAN])


def test_accuracy_leaves_ties_out():
    assert accuracy([1.0, -1.0, 0.0, 5.0], [1, 1, 0, 0.5]) == 0.5  # (1 + 0 + ½) / 3


def test_accuracy_needs_a_decided_pair():
    with pytest.raises(InputError, match="label: got ties only"):
        accuracy([1.0], [0.5])


def test_log_loss_by_hand():
    assert log_loss([0.0], [1]) == pytest.approx(math.log(2))
    assert log_loss([math.log(3), math.log(3)], [1, 0]) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert log_loss([1.0], [0.5]) == pytest.approx(math.log1p(math.exp(-1)) + 0.5)


def test_log_loss_is_exact_where_the_probability_has_saturated():
    assert log_loss([800.0, -800.0], [0, 1]) == 800.0
    assert log_loss([800.0], [1]) == 0.0
    assert log_loss([40.0], [1]) == pytest.approx(math.exp(-40), rel=1e-12)


def test_ece_by_hand_and_both_binnings():
    probability = [0.6, 0.4, 0.9, 0.9]  # confidences 0.6 0.6 0.9 0.9
    label = [1, 1, 1, 0]  # right, wrong, right, wrong
    assert expected_calibration_error(probability, label, bins=2, binning="width") == pytest.approx(0.25)
    assert expected_calibration_error(probability, label, bins=2, binning="mass") == pytest.approx(0.25)
    assert expected_calibration_error(probability, label, bins=1) == pytest.approx(0.25)


def test_equal_width_bins_have_their_centres_and_skip_empty_bins():
    curve = reliability_curve([0.55, 0.95, 0.05], [1, 1, 0], bins=5, binning="width")
    np.testing.assert_allclose(curve.center, [0.55, 0.95])
    np.testing.assert_allclose(curve.confidence, [0.55, 0.95])
    np.testing.assert_array_equal(curve.count, [1, 2])


def test_a_confidence_on_a_bin_edge_belongs_to_the_upper_bin():
    curve = reliability_curve([0.75, 0.25, 0.5, 1.0], [1, 0, 1, 1], bins=2, binning="width")
    np.testing.assert_array_equal(curve.count, [1, 3])


def test_equal_mass_bins_are_equal():
    rng = np.random.default_rng(0)
    curve = reliability_curve(rng.random(1003), rng.integers(0, 2, 1003), bins=10)
    assert set(curve.count) <= {100, 101}


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263 gives 0.2553 to 0.3662; 0/20 gives 0 to 0.1611.
    for right, n, low, high in [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)]:
        curve = reliability_curve(np.full(n, 0.7), np.arange(n) < right, bins=1)
        assert curve.low[0] == pytest.approx(low, abs=5e-5)
        assert curve.high[0] == pytest.approx(high, abs=5e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["mass", "width"]), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_calibration_depends_neither_on_pair_order_nor_on_which_response_is_first(seed, binning, bins):
    rng = np.random.default_rng(seed)
    probability, label = np.round(rng.random(60), 1), rng.integers(0, 2, 60)
    swap, order = rng.random(60) < 0.5, rng.permutation(60)
    swapped = np.where(swap, 1 - probability, probability)[order]
    want = expected_calibration_error(probability, label, bins=bins, binning=binning)
    # Rounded again: 1 - 0.3 and 0.7 differ in the last bit, and a bin edge may lie between them.
    got = expected_calibration_error(
        np.round(swapped, 1), np.where(swap, 1 - label, label)[order], bins=bins, binning=binning
    )
    assert got == pytest.approx(want, abs=1e-12)


# -------------------------------------------------------------------------------- ranks


def test_average_ranks_and_their_sum():
    np.testing.assert_array_equal(average_ranks([10, 20, 10, 5]), [2.5, 4, 2.5, 1])
    np.testing.assert_array_equal(rank_sum([1, 2, 3], [30, 20, 20]), [4, 3.5, 4.5])


def test_rank_sum_ignores_units():
    a, b = np.random.default_rng(1).normal(size=(2, 50))
    np.testing.assert_array_equal(rank_sum(a, b), rank_sum(np.exp(a), 1000 * b - 7))


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)  # 1 - 6·4/(4·15)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [1, 2, 2]) == pytest.approx(0.5)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


@given(routed())
@settings(max_examples=60, deadline=None)
def test_auroc_counts_every_pair_of_a_positive_and_a_negative(data):
    score, head, _ = data
    positive = head > 0
    wins = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    got = auroc(score, positive)
    assert math.isnan(got) if not wins else got == pytest.approx(np.mean(wins), abs=1e-14)


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


# -------------------------------------------------------------------------------- all of it


def test_report_holds_every_score_and_agrees_with_the_parts():
    pairs = make_pairs()
    report = evaluate_pairs(pairs, replicates=50)
    assert [s.name for s in report.scores] == ["u", "margin", "rank_sum", "|length difference|", "random"]
    head = correctness(pairs.logit, pairs.label)
    assert report.accuracy.point == accuracy(pairs.logit, pairs.label) == head.mean()
    assert report.accuracy.low < report.accuracy.point < report.accuracy.high
    assert report.log_loss == pytest.approx(log_loss(pairs.logit / pairs.uncertainty, pairs.label))
    assert report.score("margin").auroc == auroc(-np.abs(pairs.logit), head == 0)
    want = uplift_over_random(pairs.uncertainty, head, np.ones(300), cluster=pairs.cluster, replicates=50)
    assert report.score("u").uplift == want
    assert report.score("u").rank_correlation_with_u == pytest.approx(1)


def test_random_has_no_uplift_and_bounds_that_random_orders_fall_into():
    pairs = make_pairs()
    random = evaluate_pairs(pairs, replicates=10).score("random")
    head, rng = correctness(pairs.logit, pairs.label), np.random.default_rng(0)
    draws = [uplift_over_random(rng.random(300), head, np.ones(300), [0.25], replicates=0)[0].point for _ in range(800)]
    assert random.uplift[1].point == 0
    assert random.auroc == 0.5
    assert random.curve.normalised_area == 0
    assert random.uplift[1].high == pytest.approx(1.96 * np.std(draws), rel=0.1)


def test_report_is_json_without_nan_and_a_markdown_table():
    report = evaluate_pairs(make_pairs(), replicates=20)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["pairs"] == {"total": 300, "decided": 300, "ties": 0, "prompts": report.n_prompts}
    assert len(data["scores"][0]["curve"]["accuracy"]) == 21
    table = report.to_markdown().splitlines()
    assert "| routed by | 10% judged | 25% judged | 45% judged | AUROC of errors | area | rank corr. with u |" in table
    assert any(line.startswith("| \\|length difference\\| | ") for line in table)


def test_ties_are_counted_and_change_nothing_else():
    pairs = make_pairs(50)
    extra = ScoredPairs(
        logit=np.append(pairs.logit, [9.0, -9.0]),
        label=np.append(pairs.label, [0.5, 0.5]),
        uncertainty=np.append(pairs.uncertainty, [50.0, 50.0]),
        cluster=np.append(pairs.cluster, [98, 99]),
        controls={"|length difference|": np.append(pairs.controls["|length difference|"], [7.0, 7.0])},
    )
    with_ties, without = evaluate_pairs(extra, replicates=20), evaluate_pairs(pairs, replicates=20)
    assert (with_ties.n_ties, without.n_ties) == (2, 0)
    assert with_ties.to_dict() | {"pairs": None} == without.to_dict() | {"pairs": None}


def test_a_given_judge_counts_its_missing_verdicts_and_keeps_the_head_there():
    pairs = ScoredPairs(
        logit=[1.0, -1.0, 2.0, -2.0],
        label=[1, 1, 0, 0],
        uncertainty=[1.0, 2.0, 3.0, 4.0],
        cluster=["a", "a", "b", "b"],
        judge=[1, NAN, 0, 1],
    )
    report = evaluate_pairs(pairs, replicates=10)
    assert report.n_no_verdict == 1
    assert report.judge_accuracy == pytest.approx(0.5)  # right, (none), a tie, wrong
    np.testing.assert_allclose(report.score("u").curve.accuracy, [0.5, 0.25, 0.375, 0.375, 0.375])


def test_the_oracle_is_right_everywhere():
    report = evaluate_pairs(make_pairs(40), replicates=0)
    assert report.judge == "oracle"
    assert report.judge_accuracy == 1
    assert all(entry.curve.accuracy[-1] == 1 for entry in report.scores)


def test_one_pair_has_values_and_no_intervals():
    report = evaluate_pairs(ScoredPairs(logit=[1.0], label=[1], uncertainty=[1.5], cluster=["only"]))
    data = report.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["accuracy"] == {"point": 1.0, "low": None, "high": None}
    assert data["scores"][0]["auroc_errors"] is None
    assert data["scores"][0]["normalised_area"] is None
    assert data["scores"][0]["uplift"][0] == {"point": 0.0, "low": None, "high": None, "fraction": 0.1}
    assert "| u | +0.0 | +0.0 | +0.0 | – | – | – |" in report.to_markdown()


def test_a_head_without_errors_leaves_nothing_to_gain():
    label = np.array([1.0, 0, 1, 0])
    report = evaluate_pairs(make_pairs(4, logit=2 * label - 1, label=label), replicates=20)
    entry = report.score("u")
    assert {step.point for step in entry.uplift} == {0.0}
    assert math.isnan(entry.auroc)
    assert entry.risk_coverage.aurc == 0


def test_scores_that_all_tie_are_random_routing():
    entry = evaluate_pairs(make_pairs(90, uncertainty=np.ones(90)), replicates=20).score("u")
    assert {step.point for step in entry.uplift} == {0.0}
    assert entry.auroc == 0.5
    assert math.isnan(entry.rank_correlation_with_u)


def test_a_judge_without_any_verdict_changes_nothing():
    report = evaluate_pairs(make_pairs(30, judge=np.full(30, NAN)), replicates=5)
    assert report.to_dict()["judge"] == {"kind": "given verdicts", "accuracy": None, "no_verdict": 30}
    np.testing.assert_array_equal(report.score("u").curve.accuracy, np.full(31, report.accuracy.point))


# -------------------------------------------------------------------------------- what comes in


def test_inputs_are_copied_and_read_only():
    logit = np.array([1.0, 2.0])
    pairs = ScoredPairs(logit=logit, label=[1, 0], uncertainty=[1, 1], cluster=[7, 7])
    logit[0] = -5.0
    assert pairs.logit[0] == 1.0
    assert len(pairs) == 2
    with pytest.raises(ValueError, match="read-only"):
        pairs.logit[0] = 3.0


def test_probability_defaults_to_the_mean_field_form_without_overflow():
    pairs = ScoredPairs(logit=[2.0, -4000.0], label=[1, 1], uncertainty=[2.0, 2.0], cluster=[0, 1])
    assert pairs.probability[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert pairs.probability[1] == 0.0
    assert evaluate_pairs(pairs, replicates=0).log_loss == pytest.approx((math.log1p(math.exp(-1)) + 2000) / 2)


def test_a_given_probability_is_what_calibration_is_scored_on():
    pairs = make_pairs(40, probability=np.full(40, 0.8))
    report = evaluate_pairs(pairs, replicates=0)
    want = -np.where(pairs.label == 1, math.log(0.8), math.log(0.2)).mean()
    assert report.log_loss == pytest.approx(want)
    assert report.log_loss_logit == pytest.approx(log_loss(pairs.logit, pairs.label))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit": [1.0, NAN, 0.0]}, r"logit\[1\]: got nan, expected finite"),
        ({"logit": []}, "logit: got no entries"),
        ({"logit": [[1.0, 2.0, 3.0]]}, r"logit: got shape \(1, 3\)"),
        ({"logit": ["a", "b", "c"]}, "logit: got list"),
        ({"label": [1, 0]}, "label: got 2 entries, expected 3"),
        ({"label": [1, 0, 2]}, r"label\[2\]: got 2.0, expected 1 \(first is better\)"),
        ({"label": [1, 0, NAN]}, r"label\[2\]: got nan"),
        ({"uncertainty": [1, 0, 1]}, r"uncertainty\[1\]: got 0.0, expected a positive"),
        ({"probability": [0.5, 0.5, 1.0]}, r"probability\[2\]: got 1, expected a number strictly between 0 and 1"),
        ({"judge": [1, -1, 2]}, r"judge\[2\]: got 2.0, expected numbers in \[-1, 1\] or NaN"),
        ({"cluster": [1, 2]}, r"cluster: got shape \(2,\)"),
        ({"cluster": [None, "a", "b"]}, "cluster: got dtype object"),
        ({"controls": {"u": [1, 2, 3]}}, "controls: got the name 'u'"),
        ({"controls": {"d": [1, math.inf, 3]}}, r"controls\['d'\]\[1\]: got inf"),
    ],
)
def test_bad_pairs_are_refused_by_name(changes, message):
    fields = {"logit": [1.0, 2.0, -1.0], "label": [1, 0, 1], "uncertainty": [1, 2, 3], "cluster": [0, 0, 1]}
    with pytest.raises(InputError, match=message):
        ScoredPairs(**(fields | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate_pairs(make_pairs(4, label=np.full(4, 0.5))), "label: got 4 ties and nothing else"),
        (lambda: evaluate_pairs(make_pairs(4), fractions=[]), "fractions: got no entries"),
        (
            lambda: evaluate_pairs(make_pairs(4), fractions=[10]),
            r"fractions\[0\]: got 10.0, expected numbers in \[0, 1\]",
        ),
        (lambda: evaluate_pairs(make_pairs(4), level=95), "level: got 95"),
        (lambda: evaluate_pairs(make_pairs(4), replicates=-1), "replicates: got -1"),
        (lambda: evaluate_pairs(make_pairs(4), bins=0), "bins: got 0"),
        (
            lambda: evaluate_pairs(make_pairs(4), replicates=0).score("entropy"),
            "name: got 'entropy', expected one of u,",
        ),
        (lambda: reliability_curve([0.5], [1], binning="log"), "binning: got 'log'"),
        (lambda: accuracy_cost_curve([1, 2], [1, 2], [1, 1]), r"correct_head\[1\]: got 2.0"),
        (lambda: accuracy_cost_curve([1, NAN], [1, 1], [1, 1]), r"score\[1\]: got nan"),
        (lambda: uplift_over_random([1], [1], [1], cluster=[1, 2]), r"cluster: got shape \(2,\)"),
        (lambda: correctness([1.0], [0.5]), "label: got a tie"),
        (lambda: auroc([1, 2], [0.5, 1]), "positive: got values other than 0 and 1"),
        (lambda: rank_sum(), "scores: got none"),
        (lambda: rank_sum([1, 2], [1]), r"scores\[1\]: got 1 entries, expected 2"),
        (lambda: log_loss([math.inf], [1]), r"logit\[0\]: got inf"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(InputError, match=message):
        call()
