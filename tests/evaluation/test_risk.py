"""A bound on the error rate, tried on halves of labelled pairs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.report import ScoredPairs
from rmcore.evaluation.risk import evaluate_risk


def stream(count: int, prompts: int, error: float, seed: int = 0) -> ScoredPairs:
    random = np.random.default_rng(seed)
    q = random.random(count)
    label = random.integers(0, 2, count).astype(float)
    wrong = random.random(count) < error * 2 * q
    side = np.where(wrong, 1 - 2 * label, 2 * label - 1)
    return ScoredPairs(logit=side * (1.5 - q), label=label, uncertainty=1 + q, cluster=np.arange(count) % prompts)


def test_the_bound_holds_on_halves_and_costs_what_it_must():
    report = evaluate_risk(stream(1500, 1500, 0.2), alpha=0.15, delta=0.1, times=100)
    assert report.error == pytest.approx(0.2, abs=0.03)
    for name in ("u", "margin"):
        found, tried = report.thresholds[name], report.resamplings[name]
        assert 0.1 < found.share_judged < 0.9
        assert tried.exceeded <= 0.1
        assert 0 < tried.error < 0.15
        assert tried.judged > found.share_judged - 0.1  # half the pairs know less
    assert json.dumps(report.to_dict(), allow_nan=False)
    assert "at most 0.15 with probability 0.9" in report.to_markdown()


def test_few_prompts_are_few_pairs_however_many_pairs_they_have():
    report = evaluate_risk(stream(1500, 20, 0.0), alpha=0.1, times=5)
    assert report.thresholds["u"].pairs == 20
    assert report.resamplings["u"].judged == 1.0
    assert math.isnan(report.resamplings["u"].error)
    assert "20 calibration pairs" in report.to_markdown()


def test_ties_are_left_out_and_no_preference_is_wrong():
    pairs = ScoredPairs(
        logit=np.zeros(200), label=np.repeat([0.5, 1.0], 100), uncertainty=np.ones(200), cluster=np.arange(200)
    )
    report = evaluate_risk(pairs, alpha=0.3, times=3)
    assert (report.error, report.thresholds["u"].pairs, report.thresholds["u"].kept) == (1.0, 100, 0)
    with pytest.raises(InputError, match="times: got 0"):
        evaluate_risk(pairs, alpha=0.3, times=0)
    ties = ScoredPairs(logit=[1.0], label=[0.5], uncertainty=[1.0], cluster=[0])
    with pytest.raises(InputError, match="label: got 1 ties"):
        evaluate_risk(ties, alpha=0.3)
