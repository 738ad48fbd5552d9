"""Design 2.2: random Fourier features, the length-scale, and the folded serving form."""

from __future__ import annotations

import math

import pytest
import torch

from rmcore.ops import reference


def rows(n=60, m=8, seed=1):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rbf(a, b, length_scale):
    return torch.exp(-torch.cdist(a, b).square() / (2 * length_scale**2))


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kernel_scale", [1.0, 3.0])
def test_inner_products_are_the_rbf_kernel(orthogonal, kernel_scale):
    # One entry is a mean of D terms of standard deviation below κ²: 5 standard deviations at D = 16384 are 0.039 κ².
    z = rows()
    omega, b = reference.draw_features(16384, 8, seed=0, orthogonal=orthogonal, dtype=torch.float64)
    phi = reference.random_fourier_features(z, omega, b, length_scale=3.0, kernel_scale=kernel_scale)
    torch.testing.assert_close(phi @ phi.mT, kernel_scale**2 * rbf(z, z, 3.0), atol=5e-2 * kernel_scale**2, rtol=0)


def test_orthogonal_features_have_less_error():
    z = rows(40, 32)
    truth = rbf(z, z, 10.0)

    def error(orthogonal):
        total = 0.0
        for seed in range(5):
            omega, b = reference.draw_features(1024, 32, seed=seed, orthogonal=orthogonal, dtype=torch.float64)
            # cos and sin of each frequency: leaves only the error of the frequencies, which is what the blocks help
            phi = [reference.random_fourier_features(z, omega, c, length_scale=10.0) for c in (b, b + math.pi / 2)]
            total += float(((phi[0] @ phi[0].mT + phi[1] @ phi[1].mT) / 2 - truth).square().mean())
        return total

    assert error(True) < 0.7 * error(False)


def test_orthogonal_rows_are_orthogonal_within_a_block_and_of_chi_length():
    omega, _ = reference.draw_features(64 * 40, 64, orthogonal=True, rounding=torch.float64, dtype=torch.float64)
    block = omega[:64]
    gram = block @ block.mT
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-10, rtol=0)
    # E‖ω‖² = m with variance 2m: the mean of 2560 has a standard deviation of 0.22.
    assert float(omega.square().sum(1).mean()) == pytest.approx(64, abs=1.2)


@pytest.mark.parametrize("rounding", [torch.float16, torch.bfloat16])
def test_features_are_rounded_when_they_are_drawn(rounding):
    omega, b = reference.draw_features(100, 7, rounding=rounding)
    assert torch.equal(omega, omega.to(rounding).to(omega.dtype))
    assert torch.equal(b, b.to(rounding).to(b.dtype))


def test_a_seed_is_a_draw():
    first, again, other = (reference.draw_features(10, 4, seed=s) for s in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_feature_norms_are_the_kernel_variance():
    omega, b = reference.draw_features(20000, 8, dtype=torch.float64)
    phi = reference.random_fourier_features(rows(), omega, b, kernel_scale=2.0)
    # ‖φ‖² averages D values of 2κ²cos², standard deviation κ²/√2: 5 of the mean's are 0.1.
    torch.testing.assert_close(phi.square().sum(-1), torch.full((60,), 4.0, dtype=torch.float64), atol=0.1, rtol=0)


def test_median_length_scale_is_the_median_distance():
    z = rows(101)
    distances = sorted(float((z[i] - z[j]).norm()) for i in range(101) for j in range(i))
    assert float(reference.median_length_scale(z)) == pytest.approx(distances[(len(distances) - 1) // 2], rel=1e-12)


def test_the_length_scale_follows_size_and_scale():
    # Distances of standard normal rows concentrate at √(2m): a constant would make the kernel a delta.
    for m in (16, 256, 1024):
        z = rows(200, m)
        assert float(reference.median_length_scale(z)) == pytest.approx(math.sqrt(2 * m), rel=0.1)
        assert float(reference.median_length_scale(100 * z)) == pytest.approx(
            100 * float(reference.median_length_scale(z)), rel=1e-12
        )


def test_the_length_scale_ignores_repeated_rows_and_needs_two_that_differ():
    repeated = torch.tensor([[0.0], [0.0], [0.0], [2.0]])  # distances 0, 0, 0, 2, 2, 2
    assert float(reference.median_length_scale(repeated)) == 2
    z = rows(30)
    with pytest.raises(ValueError, match="no two rows"):
        reference.median_length_scale(z[:1].expand(10, -1))
    with pytest.raises(ValueError, match="no two rows"):
        reference.median_length_scale(z[:1])


def test_the_length_scale_of_many_rows_takes_a_seeded_sample():
    z = rows(5000, 4)
    assert torch.equal(reference.median_length_scale(z, max_rows=300), reference.median_length_scale(z, max_rows=300))
    full = float(torch.nn.functional.pdist(z[:2000]).median())
    assert float(reference.median_length_scale(z)) == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize("with_layer", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_folded_projection_computes_the_unfolded_features(with_layer, with_bias):
    x = rows(20, 12, seed=5)
    m = 6 if with_layer else 12
    weight = rows(6, 12, seed=6) if with_layer else None
    bias = rows(1, m, seed=7)[0] if with_bias else None
    omega, b = reference.draw_features(50, m, dtype=torch.float64)
    z = x if weight is None else x @ weight.mT
    z = z if bias is None else z + bias
    phi = reference.random_fourier_features(z, omega, b, length_scale=2.5)
    projection, phase = reference.fold_projection(omega, b, 2.5, weight, bias)
    assert projection.shape == (50, 12)
    assert bool(((phase >= 0) & (phase < 1)).all())
    c = reference.phase_features(x, projection, phase)
    # both are sums of 12 products of order 1 in float64, then a cosine of slope at most 2π a turn
    torch.testing.assert_close(c * math.sqrt(2 / 50), phi, atol=1e-12, rtol=0)


def test_phase_reduction_keeps_large_phases_exact():
    """t − round(t) is exact in floating point, so whole turns change nothing."""
    turns = torch.tensor([[0.125], [1000.125], [-65536.875]], dtype=torch.float64)
    c = reference.phase_features(turns, torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(c, torch.full((3, 1), math.sqrt(0.5), dtype=torch.float64), atol=1e-15, rtol=0)


def test_linear_features_are_z():
    z = rows()
    assert reference.linear_features(z) is z
