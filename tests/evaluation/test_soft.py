"""Soft labels in an evaluation: cross-entropy, what of it is the labels' own, and the hard limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.evaluation.soft import soft_fit
from rmcore.evaluation.statistics import log_loss, reliability_curve

P = st.floats(0.01, 0.99)


@given(st.lists(st.tuples(P, P), min_size=1, max_size=20))
def test_cross_entropy_is_entropy_plus_divergence_and_least_at_the_labels(pairs):
    p, y = np.array(pairs).T
    found = soft_fit(np.log(p / (1 - p)), y)
    kl = (y * np.log(y / p) + (1 - y) * np.log((1 - y) / (1 - p))).mean()
    assert found.divergence == pytest.approx(kl, abs=1e-9)
    assert found.cross_entropy == pytest.approx(found.entropy + found.divergence, abs=1e-9)
    assert found.distance == pytest.approx(np.abs(p - y).mean())
    assert soft_fit(np.log(y / (1 - y)), y).divergence == pytest.approx(0, abs=1e-9)


def test_hard_labels_have_no_entropy_and_the_plain_log_loss():
    logit, label = [2.0, -1.0, 0.5], [1.0, 0.0, 0.0]
    found = soft_fit(logit, label)
    assert (found.soft, found.entropy) == (0, 0.0)
    assert found.cross_entropy == found.divergence == log_loss(logit, label)
    with pytest.raises(InputError, match=r"label\[1\]"):
        soft_fit([0.0, 1.0], [0.5, 1.5])


def test_equal_confidences_share_a_bin_on_either_side_of_a_half():
    """1 − (1 − p) is not p to the last bit; binning by mass must not put right and wrong answers apart for that."""
    p = np.array([11 / 14, 1 - 11 / 14] * 50)
    curve = reliability_curve(p, np.ones(100), bins=10)
    assert curve.count.tolist() == [100]
    assert curve.accuracy.tolist() == [0.5]
