"""Design 2.3-2.5: logit, Laplace posterior, variance and uncertainty, against exact Gaussian processes and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore.ops import reference

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def precision(phi, ridge, labels=None, beta=None, likelihood="gaussian"):
    labels = torch.zeros(len(phi), dtype=F64) if labels is None else labels
    beta = torch.zeros(phi.shape[1], dtype=F64) if beta is None else beta
    gram, _, _ = reference.accumulate(phi, labels, beta, likelihood=likelihood)
    return gram + ridge * torch.eye(phi.shape[1], dtype=F64)


def test_many_features_agree_with_an_exact_gaussian_process():
    """Mean and variance of GP regression with an RBF kernel, noise s, from features alone.

    With φφᵀ for the kernel the primal posterior is the dual one exactly (the next test), and there the feature count
    can be large: entries of φφᵀ over 2^19 features have a standard deviation near 1/√2^19 = 1.4e-3.
    """
    train, test, s, ell = randn(30, 3), randn(20, 3, seed=1), 1.0, 1.7
    y = torch.sin(2 * train[:, 0]) + train[:, 1]
    both = torch.cat([train, test])
    kernel = torch.zeros(50, 50, dtype=F64)
    for seed in range(16):
        omega, b = reference.draw_features(2**15, 3, seed=seed, orthogonal=False, rounding=F64, dtype=F64)
        phi = reference.random_fourier_features(both, omega, b, length_scale=ell)
        kernel += phi @ phi.mT / 16
    exact = torch.exp(-torch.cdist(both, both).square() / (2 * ell**2))

    def gp(k):
        inverse = torch.linalg.inv(k[:30, :30] + s * torch.eye(30, dtype=F64))
        cross = k[30:, :30]
        return cross @ inverse @ y, k[30:, 30:] - cross @ inverse @ cross.mT

    mean, covariance = gp(kernel)
    true_mean, true_covariance = gp(exact)
    assert float((covariance.diagonal() - true_covariance.diagonal()).abs().max()) < 5e-3
    assert float((mean - true_mean).abs().max()) < 5e-3
    assert float(true_covariance.diagonal().max()) > 0.3  # the numbers compared are not all near zero


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 30.0])
def test_primal_and_dual_form_are_the_same_posterior(ridge):
    """v = s φᵀ(sI + ΦᵀΦ)⁻¹φ = k(x,x) − k_xᵀ(K + sI)⁻¹k_x with k = φᵀφ (Woodbury)."""
    phi, new = randn(25, 60) / 8, randn(10, 60, seed=1) / 8
    factor = reference.triangular_factor(precision(phi, ridge), ridge=ridge, likelihood="gaussian")
    cross = new @ phi.mT
    dual = new @ new.mT - cross @ torch.linalg.solve(phi @ phi.mT + ridge * torch.eye(25, dtype=F64), cross.mT)
    # cond(P) is at most ‖ΦᵀΦ‖/s + 1, about 3e3 at s = 1e-3: float64 leaves far more than nine digits
    torch.testing.assert_close(reference.variance(new, factor), dual.diagonal(), rtol=1e-9, atol=1e-12)


def test_the_diagonal_is_the_diagonal_of_the_full_covariance():
    phi, new = randn(40, 30), randn(12, 30, seed=1)
    p = precision(phi, 0.5)
    full = new @ torch.linalg.inv(p) @ new.mT
    v = reference.variance(new, reference.triangular_factor(p))
    torch.testing.assert_close(v, full.diagonal(), rtol=1e-10, atol=0)


def test_the_gaussian_constant_is_folded_into_the_factor():
    p = precision(randn(40, 30), 4.0)
    logistic = reference.triangular_factor(p, ridge=4.0, likelihood="logistic")
    gaussian = reference.triangular_factor(p, ridge=4.0, likelihood="gaussian")
    torch.testing.assert_close(gaussian, 2 * logistic)
    torch.testing.assert_close(logistic.mT @ logistic, torch.linalg.inv(p), rtol=1e-9, atol=1e-12)
    assert torch.equal(logistic, logistic.tril())


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_precision_and_gradient_are_those_of_autograd(mode):
    """P is the Hessian, ΦᵀW(y−p) − sβ minus the gradient, of the negative log posterior."""
    rows = randn(50, 12)
    phi = rows[:25] - rows[25:] if mode == "difference" else rows
    labels = torch.rand(len(phi), generator=torch.Generator().manual_seed(2), dtype=F64)
    weight = torch.rand(len(phi), generator=torch.Generator().manual_seed(3), dtype=F64) * 2
    beta0 = 0.0 if mode == "difference" else 0.3
    beta, s = randn(12, seed=4), 0.7

    def negative_log_posterior(b):
        reward = rows @ b  # Bradley-Terry from the two rewards, not from the difference of the rows
        g = reward[:25] - reward[25:] if mode == "difference" else reward + beta0
        loss = torch.nn.functional.binary_cross_entropy_with_logits(g, labels, weight=weight, reduction="sum")
        return loss + s / 2 * b.square().sum()

    gram, gradient, total = reference.accumulate(phi, labels, beta, beta0=beta0, sample_weight=weight)
    hessian = torch.autograd.functional.hessian(negative_log_posterior, beta)
    slope = torch.autograd.functional.jacobian(negative_log_posterior, beta)
    torch.testing.assert_close(gram + s * torch.eye(12, dtype=F64), hessian, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(s * beta - gradient, slope, rtol=1e-10, atol=1e-12)
    assert float(s / 2 * beta.square().sum() - total) == pytest.approx(float(negative_log_posterior(beta)), rel=1e-12)


def test_log_likelihood_is_stable_far_out():
    g = torch.tensor([800.0, -800.0, 0.0], dtype=F64)
    y = torch.tensor([1.0, 1.0, 0.5], dtype=F64)
    torch.testing.assert_close(reference.log_likelihood(g, y), torch.tensor([0.0, -800.0, -math.log(2)], dtype=F64))


@settings(deadline=None, max_examples=40)
@given(
    d=st.integers(1, 12),
    n=st.integers(0, 30),
    more=st.integers(1, 10),
    ridge=st.floats(1e-4, 1e3),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
    likelihood=st.sampled_from(["logistic", "gaussian"]),
)
def test_variance_never_increases_with_data(d, n, more, ridge, scale, seed, likelihood):
    phi, new = randn(n + more, d, seed=seed) * scale, randn(20, d, seed=seed + 1)
    beta = randn(d, seed=seed + 2) / scale
    variances = []
    for data in (phi[:n], phi):
        p = precision(data, ridge, beta=beta, likelihood=likelihood)
        variances.append(reference.variance(new, reference.triangular_factor(p, ridge=ridge, likelihood=likelihood)))
    before, after = variances
    assert bool((after >= 0).all())
    # Cholesky's backward error is d·ε of ‖P‖, so v is known to cond(P)·d·ε: at most 3e11·12·1e-16 here, relative.
    condition = 1 + float(phi.square().sum()) / ridge
    assert bool((after <= before * (1 + condition * d * 1e-15)).all())


def test_variance_is_larger_out_of_distribution():
    x = randn(300, 6)
    near, far = randn(100, 6, seed=1), randn(100, 6, seed=2) + 8
    omega, b = reference.draw_features(512, 6, dtype=F64)
    ell = reference.median_length_scale(x)
    phi, phi_near, phi_far = (reference.random_fourier_features(z, omega, b, length_scale=ell) for z in (x, near, far))
    factor = reference.triangular_factor(precision(phi, 1.0), ridge=1.0, likelihood="gaussian")
    v_near, v_far = reference.variance(phi_near, factor), reference.variance(phi_far, factor)
    assert float(v_far.min()) > float(v_near.max())
    assert float(v_far.min()) > 0.5  # far from all data the kernel's own variance, 1, is what is left
    assert float(v_near.mean()) < 0.2


def test_without_data_the_variance_is_the_priors():
    phi = randn(10, 20)
    empty = precision(phi[:0], 4.0)
    norms = phi.square().sum(-1)
    torch.testing.assert_close(reference.variance(phi, reference.triangular_factor(empty)), norms / 4)
    factor = reference.triangular_factor(empty, ridge=4.0, likelihood="gaussian")
    torch.testing.assert_close(reference.variance(phi, factor), norms)


def test_uncertainty_is_at_least_one_and_one_without_variance():
    v = torch.tensor([0.0, 1e-30, 1.0, 8 / math.pi * 3])
    u = reference.uncertainty(v, reference.mean_field_amplitude())
    assert float(u[0]) == 1
    assert bool((u >= 1).all())
    assert float(u[3]) == pytest.approx(2)
    assert bool((reference.uncertainty(v, 0.0) == 1).all())


def test_the_mean_field_logit_is_the_expected_probability():
    """E[σ(g)], g ~ N(2, 3), by quadrature: the approximation is good to about 0.02."""
    x = torch.linspace(-10, 10, 4001, dtype=F64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    truth = torch.trapezoid(torch.sigmoid(2 + math.sqrt(3) * x) * density, x)
    u = reference.uncertainty(torch.tensor(3.0, dtype=F64), reference.mean_field_amplitude())
    approximation = torch.sigmoid(reference.preference(torch.tensor(2.0, dtype=F64), u))
    assert float(approximation) == pytest.approx(float(truth), abs=0.02)


def test_score_is_its_parts_and_broadcasts():
    phi, beta, p = randn(2, 3, 5, 8), randn(8, seed=1), precision(randn(30, 8, seed=2), 1.0)
    factor = reference.triangular_factor(p)
    g, v, u, preference = reference.score(phi, beta, factor, beta0=0.5)
    assert g.shape == v.shape == u.shape == preference.shape == (2, 3, 5)
    torch.testing.assert_close(g, (phi * beta).sum(-1) + 0.5)
    torch.testing.assert_close(v, torch.einsum("...d,de,...e->...", phi, torch.linalg.inv(p), phi))
    torch.testing.assert_close(u, torch.sqrt(1 + math.pi / 8 * v))
    torch.testing.assert_close(preference, g / u)
