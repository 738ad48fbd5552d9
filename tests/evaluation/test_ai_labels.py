"""What is counted of a judge's labels: position bias, agreement, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.ai_labels import label_report, plot_labels
from rmcore.judge import Verdict
from rmcore.judge.labelling import soft_label
from rmcore.judge.orders import Asked


def judged(p, lean=0.0):
    """A judge who holds the first response better with probability p and adds ``lean`` to what is shown first."""
    return soft_label(Asked(Verdict(2 * (p + lean) - 1), Verdict(2 * (p - lean) - 1)))


def test_position_bias_is_what_was_put_in_and_both_orders_cancel_it():
    p = np.random.default_rng(0).uniform(0.2, 0.8, 400)
    labels = [judged(x, 0.15) for x in p]
    report = label_report(labels, [f"p{k}" for k in range(400)], (p > 0.5).astype(float).tolist(), replicates=200)
    assert report.position.first_shown.point == pytest.approx(0.15)
    assert report.position.spread == pytest.approx(0.3)
    assert report.position.conflicts.point == pytest.approx((np.abs(p - 0.5) < 0.15).mean())
    assert report.agreement.accuracy.point == 1.0
    assert report.agreement.one_order.point == pytest.approx(1 - ((p < 0.5) & (p > 0.35)).mean())
    assert report.agreement.pairs == 400


def test_refused_pairs_are_counted_by_reason_and_left_out_of_agreement():
    labels = [judged(0.9), judged(0.1), judged(0.5), soft_label(Asked(Verdict.none("refusal"), Verdict.none("x")))]
    report = label_report(labels, ["a", "a", "b", "c"], [1.0, 1.0, 0.5, 1.0], replicates=50)
    assert (report.pairs, report.labelled, report.even, report.refused) == (4, 3, 1, {"refusal": 1})
    assert report.agreement.pairs == 2  # people's tie and the refused pair are left out
    assert report.agreement.accuracy.point == 0.5
    content = report.to_dict()
    json.dumps(content, allow_nan=False)
    for word in ("3 of 4 pairs", "1 refusal", "50.0"):
        assert word in report.to_markdown()


def test_hard_labels_that_are_wrong_have_an_infinite_loss_which_is_said_and_not_clipped():
    report = label_report([judged(1.0), judged(1.0)], ["a", "b"], [1.0, 0.0], replicates=10)
    assert math.isinf(report.agreement.log_loss)
    assert "∞" in report.to_markdown()
    assert report.to_dict()["agreement"]["log_loss"] is None
    assert report.mean_entropy == 0


def test_the_plot_needs_peoples_labels(tmp_path):
    p = np.random.default_rng(1).uniform(0.05, 0.95, 200)
    y = (np.random.default_rng(2).uniform(size=200) < p).astype(float)
    labels, prompts = [judged(x) for x in p], [str(k) for k in range(200)]
    figure = plot_labels(label_report(labels, prompts, y.tolist(), replicates=20), tmp_path / "labels.png")
    assert (tmp_path / "labels.png").stat().st_size > 5000
    assert "200 labels" in figure.axes[0].get_title(loc="left") + figure.axes[0].get_title()
    with pytest.raises(InputError, match="no labels of people"):
        plot_labels(label_report(labels, prompts, replicates=0))
    with pytest.raises(InputError, match="one a pair each"):
        label_report(labels, prompts[:-1])
