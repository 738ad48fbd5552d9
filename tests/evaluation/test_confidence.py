import math

import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.confidence import brier_score, confident_score


def test_brier_is_the_mean_square():
    assert brier_score([1.0, 0.5, 0.2], [1, 0, 0.5]) == pytest.approx((0 + 0.25 + 0.09) / 3)


def test_confident_pairs_count_for_and_against():
    logit, label = [3.0, 1.0, -3.0, -1.0, 0.5], [1, 1, 1, 0, 0]  # right: 1st, 2nd, 4th; wrong: 3rd, 5th
    variance = [1.0, 1.0, 1.0, 0.01, 1.0]  # confident: 1st, 3rd, 4th
    t, f, ct, cf = 0.6, 0.4, 0.4, 0.2
    for beta in (0.0, 0.01, 0.2, 1.0):
        expected = ct / ((1 - beta) * t + beta) - cf / ((1 - beta) * f + beta)
        assert confident_score(logit, variance, label, beta) == pytest.approx(expected)
    assert confident_score(logit, [1e6] * 5, label, 0.2) == 0
    assert math.isnan(confident_score([1.0], [0.0], [1], 0.0))
    assert confident_score([1.0], [0.0], [1], 1.0) == 1
    with pytest.raises(InputError, match="beta"):
        confident_score(logit, variance, label, 1.5)
    with pytest.raises(InputError, match="variance"):
        confident_score(logit, [-1.0] * 5, label, 0.5)
