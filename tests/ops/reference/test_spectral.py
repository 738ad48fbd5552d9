"""Design 2.1: the spectral norm and the soft bound."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.ops import power_iteration, reference


def matrix(m=24, h=40, seed=0):
    return torch.randn(m, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_spectral_norm_is_the_operator_norm():
    w = matrix()
    assert float(reference.spectral_norm(w)) == pytest.approx(float(torch.linalg.matrix_norm(w, 2)), rel=1e-12)
    assert reference.spectral_norm(torch.stack([w, 3 * w])).shape == (2,)


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 20), h=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_power_iteration_converges_from_below(m, h, seed):
    w, v = matrix(m, h, seed), torch.ones(h, dtype=torch.float64)
    truth = float(reference.spectral_norm(w))
    sigmas = [float(reference.power_iteration(w, v, k)[0]) for k in (1, 2, 5, 20, 100)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(sigmas))  # monotone
    assert max(sigmas) <= truth * (1 + 1e-12)


def test_power_iteration_reaches_the_svd():
    w = matrix()
    sigma, v = reference.power_iteration(w, torch.ones(40, dtype=torch.float64), 3000)
    assert float(sigma) == pytest.approx(float(reference.spectral_norm(w)), rel=1e-10)
    assert float(v.norm()) == pytest.approx(1, abs=1e-12)
    assert float((w @ v).norm()) == pytest.approx(float(sigma), rel=1e-10)


def test_steps_one_at_a_time_are_the_same_steps():
    w, v = matrix(), torch.ones(40, dtype=torch.float64)
    for _ in range(7):
        sigma, v = reference.power_iteration(w, v, 1)
    together, u = reference.power_iteration(w, torch.ones(40, dtype=torch.float64), 7)
    torch.testing.assert_close((sigma, v), (together, u), rtol=1e-13, atol=1e-13)


def test_a_zero_matrix_has_norm_zero_and_keeps_the_vector():
    v = torch.tensor([0.6, 0.8], dtype=torch.float64)
    sigma, u = reference.power_iteration(torch.zeros(3, 2, dtype=torch.float64), v, 3)
    assert float(sigma) == 0
    torch.testing.assert_close(u, v)
    assert not reference.spectral_normalize(torch.zeros(3, 2), 0.9).any()


def test_the_bound_is_soft():
    w = matrix()
    w = w / reference.spectral_norm(w)
    under = 0.5 * w
    assert torch.equal(reference.spectral_normalize(under, 0.95), under)  # bit for bit: left alone
    over = reference.spectral_normalize(2 * w, 0.95)
    assert float(reference.spectral_norm(over)) == pytest.approx(0.95, rel=1e-12)
    torch.testing.assert_close(over, 0.95 * w)


def test_torchs_spectral_norm_is_another_layer():
    """torch's parametrisation divides by σ always, so it scales a small matrix up; ours leaves it."""
    layer = torch.nn.Linear(40, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(0.1 * matrix() / reference.spectral_norm(matrix()))
    ours = reference.spectral_normalize(layer.weight.detach().clone(), 0.95)
    theirs = torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=500).weight.detach()
    assert float(reference.spectral_norm(theirs)) == pytest.approx(1, rel=1e-3)
    assert float(reference.spectral_norm(ours)) == pytest.approx(0.1, rel=1e-12)


def test_normalized_layer_is_lipschitz_through_tanh():
    w = reference.spectral_normalize(matrix(), 0.95)
    a, b = matrix(50, 40, 1), matrix(50, 40, 2)
    za, zb = (reference.normalized_layer(x, w, torch.ones(24, dtype=torch.float64), activation="tanh") for x in (a, b))
    assert bool(((za - zb).norm(dim=1) <= 0.95 * (a - b).norm(dim=1) * (1 + 1e-12)).all())


def test_layernorm_has_no_affine_part():
    z = reference.normalized_layer(matrix(5, 40), matrix(), layernorm=True)
    torch.testing.assert_close(z.mean(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.square().mean(-1), torch.ones(5, dtype=torch.float64), atol=1e-5, rtol=0)  # eps


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.ones(3), torch.ones(3)), "weight"),
        ((torch.ones(2, 3), torch.ones(2)), "vector"),
        ((torch.ones(2, 3), torch.ones(3), 0), "iterations"),
    ],
)
def test_the_operation_names_what_does_not_fit(arguments, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        power_iteration(*arguments, backend="torch")
