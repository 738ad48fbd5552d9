"""The climb of Newton's method, and small beliefs that learn together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.ascent import ascend, learn
from rmcore.head.fit import Belief, newton
from rmcore.head.posterior import Posterior


def a_problem(seed, beliefs=3, width=4, count=30):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(count, width)).astype(np.float32).astype(np.float64)
    roots = random.normal(size=(beliefs, width, width))
    precision = roots @ roots.transpose(0, 2, 1) + np.eye(width)
    labels = (random.random(count) < 1 / (1 + np.exp(-2 * inputs[:, 0]))).astype(np.float64)
    return random.normal(size=(beliefs, width)), precision, inputs, labels, random.random(count).round(1)


def slope_at(at, mean, precision, inputs, labels, weight):
    probability = 1 / (1 + np.exp(-(inputs @ at)))
    return inputs.T @ (weight * (labels - probability)) - precision @ (at - mean)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 70), beliefs=st.integers(1, 8))
def test_each_belief_ends_at_its_own_maximum_with_its_own_curvature(seed, count, beliefs):
    mean, precision, inputs, labels, weight = a_problem(seed, beliefs=beliefs, count=count)
    found, after = learn(mean, precision, inputs, labels, weight, tolerance=1e-24)
    for m in range(beliefs):
        # A step is taken while the value, a sum over all beliefs, does not fall: its rounding hides gains of gᵀP⁻¹g/2.
        prior = [(found[k] - mean[k]) @ precision[k] @ (found[k] - mean[k]) for k in range(beliefs)]
        hidden = 4 * 2.0**-53 * (beliefs * count + sum(prior))
        bound = np.sqrt(2 * hidden * np.linalg.eigvalsh(after[m]).max())
        assert np.linalg.norm(slope_at(found[m], mean[m], precision[m], inputs, labels, weight)) < bound + 1e-12
        p = 1 / (1 + np.exp(-(inputs @ found[m])))
        expected = precision[m] + inputs.T @ ((weight * p * (1 - p))[:, None] * inputs)
        assert np.abs(after[m] - expected).max() < 1e-9


def test_it_is_the_step_that_a_head_takes():
    mean, precision, inputs, labels, weight = a_problem(1)
    found, after = learn(mean, precision, inputs, labels, weight, tolerance=1e-20)
    config = HeadConfig(4, mode="concat", features="linear")
    feature_map = SNGPHead(config).freeze_features(torch.float32)
    tensors = [torch.from_numpy(a) for a in (labels, weight)]
    for m in range(3):
        gram = torch.from_numpy(precision[m]) - 1e-9 * torch.eye(4, dtype=torch.float64)
        known = Belief(torch.from_numpy(mean[m]), Posterior.from_gram(gram, 1, ridge=1e-9, likelihood="logistic"))
        beta, posterior, _ = newton(
            feature_map,
            torch.from_numpy(inputs).float(),
            tensors[0],
            config,
            sample_weight=tensors[1],
            prior=known,
            tolerance=1e-9,
            backend="torch",
        )
        assert found[m] == pytest.approx(beta.numpy(), abs=5e-5)  # that one works in float32
        assert after[m] == pytest.approx(posterior.precision.numpy(), abs=5e-4)


def test_batches_one_after_the_other_and_data_that_would_overflow():
    mean, precision, inputs, labels, weight = a_problem(2)
    before = (mean.copy(), precision.copy())
    found, after = learn(mean, precision, 1e3 * inputs, labels, weight)
    assert np.isfinite(found).all()
    assert np.isfinite(after).all()
    assert (mean == before[0]).all()
    assert (precision == before[1]).all()
    nothing = learn(mean, precision, inputs, labels, np.zeros(len(labels)))
    assert nothing[0] == pytest.approx(mean)
    assert nothing[1] == pytest.approx(precision)


def test_a_step_that_overshoots_is_halved():
    class Flat:
        def solve(self, vector):
            return 7 * vector

    def hill(at):
        return Flat(), -at, -0.5 * float(at @ at)

    climb = ascend(hill, np.array([1.0, -2.0]), 1, tolerance=1e-12, max_passes=200)
    assert climb.converged
    assert list(climb.values) == sorted(climb.values)
    assert climb.at == pytest.approx([0, 0], abs=1e-5)
    assert not ascend(hill, np.array([1.0, -2.0]), 1, tolerance=1e-12, max_passes=3).converged
