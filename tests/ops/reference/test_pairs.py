"""Design 2.6: the two pair modes."""

from __future__ import annotations

import torch

from rmcore.ops import reference

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_pair_variance_is_antisymmetric_symmetric_and_zero_on_the_diagonal():
    phi, beta = randn(3, 6, 20), randn(20, seed=1)
    factor = reference.triangular_factor(torch.eye(20, dtype=F64) + randn(20, 30, seed=2) @ randn(20, 30, seed=2).mT)
    g, v = reference.pair_variance(phi, beta, factor)
    assert g.shape == v.shape == (3, 6, 6)
    assert torch.equal(g, -g.mT)
    assert torch.equal(v, v.mT)
    assert bool((v.diagonal(dim1=-2, dim2=-1) == 0).all())
    assert bool((g.diagonal(dim1=-2, dim2=-1) == 0).all())
    torch.testing.assert_close(v[1, 2, 4], reference.variance(phi[1, 2] - phi[1, 4], factor))
    torch.testing.assert_close(g[1, 2, 4], (phi[1, 2] - phi[1, 4]) @ beta)


def test_identical_responses_have_exactly_no_variance():
    phi = randn(4, 20)
    phi[3] = phi[1]
    g, v = reference.pair_variance(phi, randn(20, seed=1), torch.eye(20, dtype=F64).tril())
    assert float(v[1, 3]) == 0
    assert float(g[1, 3]) == 0


def test_close_responses_keep_their_digits():
    """‖Uφ_i − Uφ_j‖² from the difference: the expanded form would lose everything here in float32."""
    phi = torch.ones(2, 64) * 100
    phi[1, 0] += 2**-10
    _, v = reference.pair_variance(phi, torch.zeros(64), torch.eye(64))
    assert float(v[0, 1]) == 2**-20


def test_standard_deviation_obeys_the_triangle_inequality():
    factor = reference.triangular_factor(torch.eye(10, dtype=F64) + randn(10, 30) @ randn(10, 30).mT)
    _, v = reference.pair_variance(randn(7, 10, seed=3), randn(10), factor)
    s = v.sqrt()
    assert bool((s[:, None, :] <= s[:, :, None] + s[None, :, :] + 1e-12).all())


def test_concat_preference_is_the_antisymmetric_part():
    p, u = randn(5, 5), 1 + randn(5, 5, seed=1).square()
    both, mean = reference.concat_preference(p, u)
    assert torch.equal(both, -both.mT)
    assert torch.equal(mean, mean.mT)
    torch.testing.assert_close(both[1, 2], (p[1, 2] - p[2, 1]) / 2)
    torch.testing.assert_close(mean[1, 2], (u[1, 2] + u[2, 1]) / 2)


def test_concat_preference_removes_an_order_bias():
    truth = randn(4, 4)
    truth = truth - truth.mT
    both, _ = reference.concat_preference(truth + 0.7, torch.ones(4, 4, dtype=F64))
    torch.testing.assert_close(both, truth)


def test_the_mean_of_probabilities_over_two_orders():
    forward = torch.tensor([-800.0, -3.0, 0.0, 0.4, 2.0, 50.0, 900.0], dtype=F64)
    backward = forward.flip(0) / 2
    found = reference.mean_of_orders(forward, backward, "probabilities")
    mean = (forward.sigmoid() + (-backward).sigmoid()) / 2
    torch.testing.assert_close(found.sigmoid(), mean)
    assert torch.equal(found, -reference.mean_of_orders(backward, forward, "probabilities"))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(reference.mean_of_orders(forward, -forward, "probabilities"), forward)
    assert torch.equal(reference.mean_of_orders(forward, backward), (forward - backward) / 2)
