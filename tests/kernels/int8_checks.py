"""int8 heads to test with, what they must come to, and how near: shared by the CPU's tests and the GPU kernels'.

The rule of test_cpu_score: at most twice the error that torch makes with operands rounded to the same whole numbers
(:mod:`rmcore.ops.whole_numbers`), plus a bound from the number of additions. Between kernels that multiply the same
whole numbers only float32 roundings differ (:func:`check_same_numbers`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmcore.head import SNGPHead
from rmcore.ops import reference, whole_numbers
from rmcore.ops.weights import FeatureMap, HeadWeights


def draw(rows, h, dtype=torch.float32, seed=0):
    return torch.randn(rows, h, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_head(h, d, *, calibrated=True):
    """A head frozen to int8, with columns of very different size where it has calibration rows."""
    generator = torch.Generator().manual_seed(h * 1000 + d)
    head = SNGPHead(h, num_features=d, length_scale=2 * math.sqrt(h), kernel_scale=3.0, mode="concat")
    feature_map = head.freeze_features(torch.int8, calibration=spread(draw(200, h, seed=9)) if calibrated else None)
    factor = torch.randn(d, d, generator=generator).tril(-1) / d + torch.eye(d)
    return HeadWeights.build(feature_map, torch.randn(d, generator=generator), 0.3, factor.double(), math.pi / 8)


def spread(hidden):
    """Every eleventh column twelve times as large and off centre."""
    hidden = hidden.clone()
    hidden[:, ::11] = 12 * hidden[:, ::11] + 5
    return hidden


def truth(hidden, weights):
    c = weights.map(hidden.double())
    return torch.stack(
        reference.score(
            c, weights.beta.double(), whole_numbers.factor(weights), beta0=weights.beta0, amplitude=weights.amplitude
        )
    )


def bounds(hidden, weights):
    """The truth, and how far from it each quantity may be."""
    expected = truth(hidden, weights)
    allowed = 2 * (whole_numbers.score(hidden, weights) - expected).abs().amax(1)
    additions = weights.hidden_size + weights.num_features
    sizes = torch.stack([weights.beta.norm().double(), *expected[1:].abs().amax(1)]) + expected.abs().amax(1)
    return expected, allowed + 4 * math.sqrt(additions) * 2.0**-24 * sizes


def check(got, hidden, weights, known=None, what=""):
    expected, allowed = known or bounds(hidden, weights)
    error = (got.double() - expected).abs().amax(1)
    assert bool((error <= allowed).all()), f"{what}: error {error.tolist()}, allowed {allowed.tolist()}"


def check_same_numbers(got: Tensor, other: Tensor, weights: HeadWeights) -> None:
    """Two (4, B) from the same whole numbers.

    c on the edge between two whole numbers may fall either way: one step of 1/127 in a few of D features. One alone
    moves v = ‖U c‖² by 2 (UᵀU c)_j / 127, which in a small head is more than a few are on average in a large one.
    """
    d, factor = weights.num_features, whole_numbers.factor(weights)
    one = 2 / 127 * float((factor.mT @ factor).abs().sum(1).amax())
    torch.testing.assert_close(got[0], other[0], rtol=0, atol=1e-5 * float(weights.beta.norm()))
    torch.testing.assert_close(got[1], other[1], rtol=2e-3 / math.sqrt(d) + 1e-5, atol=one)


def random_whole(shape, extreme, seed):
    """int8 of all values, −128 too; or −128, −127 and 127 alone, which make the largest sums there are."""
    generator = torch.Generator().manual_seed(seed)
    if extreme:
        return torch.tensor([-128, -127, 127])[torch.randint(0, 3, shape, generator=generator)].to(torch.int8)
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


def whole_head(projection, scale, row, *, feature=0):
    """β reads one feature. U is one row of whole numbers, its last, with nothing on its diagonal: v has one term."""
    d, h = projection.shape
    whole = torch.zeros(d, d, dtype=torch.int8)
    whole[d - 1, : d - 1] = row[: d - 1]
    beta = torch.zeros(d)
    beta[feature] = 1.0
    scales = torch.full((d,), scale)
    feature_map = FeatureMap(
        "rff", projection, torch.zeros(d), None, None, "none", False, h, d, torch.int8, projection_scale=scales,
        feature_scale=1.0,
    )  # fmt: skip
    factor = reference.pack_lower(whole, 128)
    return HeadWeights(feature_map, beta, 0.0, factor, 1.0, 0.4, torch.full((d,), 2.0**-9), torch.zeros(d))
