"""The evaluation says what its formulas say: hand-computed values, brute force beside every fast path, edge cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routed_pairs import NAN, routed

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
    spearman,
    uplift_over_random,
)


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
