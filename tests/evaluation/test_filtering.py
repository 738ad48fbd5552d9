"""What a filter by uncertainty is worth: the curve, and the two tests of its order."""

from __future__ import annotations

import numpy as np
import pytest

from rmcore._base.errors import InputError
from rmcore.evaluation.filtering import SHARES, filter_curve


def _pairs(chance, prompts: int = 200, of: int = 4, seed: int = 0):
    """``of`` pairs of each prompt, uncertainties uniform in [0, 1], right with the chance at that uncertainty."""
    rng = np.random.default_rng(seed)
    u = rng.random(prompts * of)
    return u, (rng.random(u.size) < chance(u)).astype(float), np.arange(u.size) // of


def test_the_curve_is_the_accuracy_of_those_kept_and_runs_are_averaged():
    u, right, prompt = np.arange(10.0), np.array([1, 1, 1, 0, 1, 0, 1, 0, 0, 0.0]), np.arange(10) // 2
    found = filter_curve([u, u[::-1]], [right, right], [prompt, prompt], shares=(1.0, 0.5), replicates=100)
    assert found.share.tolist() == [1.0, 0.5]
    np.testing.assert_allclose(found.accuracy, [50.0, (80 + 20) / 2])
    one = filter_curve([u], [right], [prompt], shares=(1.0, 0.5), replicates=100)
    np.testing.assert_allclose(one.accuracy, [50.0, 80.0])
    assert one.gain == pytest.approx(30)
    assert one.low[0] <= 50 <= one.high[0]


@pytest.mark.parametrize(
    ("chance", "verdict"),
    [
        (lambda u: 0.85 - 0.4 * u, "rises"),
        (lambda u: 0.45 + 0.4 * u, "falls"),
        (lambda u: 0.65 + 0.4 * ((u > 0.3) & (u < 0.55)) - 0.4 * (u > 0.55), "rises and falls"),
    ],
)
def test_what_the_curve_does_is_told(chance, verdict):
    u, right, prompt = _pairs(chance)
    found = filter_curve([u], [right], [prompt], replicates=300)
    assert found.verdict == verdict
    assert found.to_dict()["verdict"] == verdict
    assert len(found.to_dict()["accuracy"]) == len(SHARES)


def test_under_a_filter_that_does_nothing_both_tests_reject_as_often_as_they_say():
    """The null of either test, pairs of a prompt all right or all wrong: rejections at 10% over 80 draws."""
    rejected = np.zeros(2)
    for seed in range(80):
        rng = np.random.default_rng([7, seed])
        prompt = np.arange(200) // 4
        right, u = (rng.random(50) < 0.6).astype(float)[prompt], rng.random(50)[prompt] + 0.01 * rng.random(200)
        found = filter_curve([u], [right], [prompt], shares=(1.0, 0.8, 0.6, 0.4), replicates=100, seed=seed)
        rejected += [found.p_rising <= 0.1, found.p_falling <= 0.1]
    assert (rejected / 80 < 0.2).all()  # 0.1 and three standard errors
    assert (rejected > 0).all()  # a test that never rejects holds its level too


def test_pairs_of_a_prompt_go_together():
    """Copies of each pair under the same prompt are no further evidence; as prompts of their own they would be."""
    u, right, prompt = _pairs(lambda u: 0.65 - 0.15 * u, prompts=80, of=1)
    once = filter_curve([u], [right], [prompt], replicates=200)
    copied = [np.repeat(one, 8) for one in (u, right, prompt)]
    together = filter_curve([copied[0]], [copied[1]], [copied[2]], replicates=200)
    apart = filter_curve([copied[0]], [copied[1]], [np.arange(640)], replicates=200)
    width = [float(one.high[0] - one.low[0]) for one in (once, together, apart)]
    assert width[1] == pytest.approx(width[0], rel=0.05)
    assert width[2] < 0.5 * width[0]


def test_ties_stay_together_and_a_curve_without_errors_has_no_order():
    u, right, prompt = np.r_[np.zeros(6), np.ones(4)], np.ones(10), np.arange(10)
    found = filter_curve([u], [right], [prompt], shares=(1.0, 0.5), replicates=100)
    assert found.share.tolist() == [1.0, 0.6]
    assert (found.p_rising, found.p_falling, found.verdict) == (1.0, 1.0, "not shown")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"shares": (0.9, 0.5)}, "shares"),
        ({"shares": (1.0, 0.5, 0.6)}, "shares"),
        ({"shares": (1.0, 0.001)}, "shares"),
        ({"replicates": 10}, "replicates"),
        ({"correct": []}, "score"),
        ({"cluster": [np.zeros(40)]}, "cluster"),
        ({"cluster": [np.arange(39)]}, "cluster"),
    ],
)
def test_what_does_not_fit_is_named(change, name):
    u, right, prompt = _pairs(lambda u: 0.7 + 0 * u, prompts=40, of=1)
    arguments = {"score": [u], "correct": [right], "cluster": [prompt], "replicates": 100} | change
    with pytest.raises(InputError, match=rf"^{name}"):
        filter_curve(**arguments)
