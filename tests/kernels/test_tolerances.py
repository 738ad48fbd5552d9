"""The bounds of the GPU's tests, against arithmetic emulated here: wide enough for it, too narrow for a fault."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

import cuda_checks as cuda
import triton_checks as triton

from rmcore.ops import reference
from rmcore.ops.weights import HeadWeights

KINDS = ({"h": 72, "d": 200}, {"h": 67, "d": 130}, {"h": 64, "d": 100, "m": 48, "layernorm": True})


def emulated(hidden: torch.Tensor, weights: HeadWeights) -> torch.Tensor:
    """What csrc/cuda/score.cuh computes: float32 sums, z and c rounded to the serving dtype, g from the unrounded c."""
    m, serving = weights.map, weights.dtype
    x = (hidden.float() * m.input_scale).to(serving).float()
    if m.layer_weight is not None:
        x = torch.tanh(x @ m.layer_weight.float().mT + m.layer_bias)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5) if m.layernorm else x
        x = x.to(serving).float()
    c = torch.cos(2 * math.pi * (x @ m.projection.float().mT + m.phase))
    g = c @ weights.beta + weights.beta0
    factor = reference.unpack_lower(weights.factor, weights.num_features).float()
    v = (c.to(serving).float() @ factor.mT).square().sum(-1) * weights.factor_scale
    u = torch.sqrt(1 + weights.amplitude * v)
    return torch.stack([g, v, u, g / u])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_rounding_is_what_the_cuda_kernels_bound_expects(kind):
    errors, expected = [], []
    for seed in range(12):
        weights = cuda.head(**kind, seed=seed, device="cpu")
        for b in (1, 16):
            hidden = cuda.rows_of(b, weights.hidden_size, seed=seed, device="cpu")
            out = emulated(hidden, weights)
            cuda.check(out, hidden, weights)
        errors.append((out.double() - cuda.chain(hidden, weights)).abs())
        expected.append(cuda.rounding(hidden, weights))
    seen, deviation = torch.cat(errors, 1), torch.cat(expected, 1)
    for k in (1, 2):  # of v and u, which are all rounding, the spread is the one derived
        ratio = float((seen[k] / deviation[k]).square().mean().sqrt())
        assert 0.7 < ratio < 1.3, ratio


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("row", [0, 1])
def test_the_cuda_kernels_bound_sees_one_wrong_value(kind, row):
    """One weight of the projection read as zero, as beyond an edge, moves v by far more than rounding does."""
    weights = cuda.head(**kind, device="cpu")
    hidden = cuda.rows_of(2, weights.hidden_size, device="cpu")
    right, faulty = emulated(hidden, weights), weights.clone()
    faulty.map.projection[row, int(weights.map.projection[row].abs().argmax())] = 0
    wrong = right.clone()
    wrong[:, row] = emulated(hidden, faulty)[:, row]
    with pytest.raises(AssertionError):
        cuda.check(wrong, hidden, weights)


def tensor_core_sum(rows: NDArray[np.float64], guard: int = 2) -> NDArray[np.float64]:
    """Σ over n of rows² as an H100's tensor core adds them: 16 at a time, cut off below 2^-guard of the last bit."""
    total = np.zeros(rows.shape[1])
    for start in range(0, len(rows), triton.TENSOR_CORE_DEPTH):
        terms = np.concatenate([total[None], rows[start : start + triton.TENSOR_CORE_DEPTH] ** 2])
        last = np.exp2(np.floor(np.log2(np.maximum(terms.max(0), 2.0**-40))) - 23)
        total = (np.trunc(terms / (last * 2.0**-guard)) * (last * 2.0**-guard)).sum(0)
        last = np.exp2(np.floor(np.log2(np.maximum(total, 2.0**-40))) - 23)
        total = np.trunc(total / last) * last
    return total


def test_tensor_cores_lose_what_the_triton_kernels_bound_allows():
    """The diagonal of P from 20,000 rows, in the two chunks of the kernel: seen on an H100, 8.8e-5 of it too small."""
    rng = np.random.default_rng(0)
    phi = np.cos(2 * np.pi * rng.random((20_000, 24))) * np.sqrt(rng.uniform(0.05, 0.25, (20_000, 1)))
    phi = phi.astype(np.float16).astype(np.float64)
    exact = (phi**2).sum(0)
    lost = 1 - (tensor_core_sum(phi[:16384]) + tensor_core_sum(phi[16384:])) / exact
    assert lost.min() > 7e-5
    assert lost.max() < 9.5e-5
    assert lost.max() < triton.tensor_core_loss(16384) < 2 * lost.max()
    one = 1 - tensor_core_sum(phi[:2048]) / (phi[:2048] ** 2).sum(0)
    assert one.max() < triton.tensor_core_loss(2048) < 3 * one.max()  # it grows with the count, not with its root
