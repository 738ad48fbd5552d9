"""What others do, written from the formulas: the baselines every figure of ours stands beside.

All take the same frozen head in plain float64 form (:class:`Problem`) and return (g, v) of hidden rows, so each timed
variant is checked against the same truth.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.quantize import quantize_projection, quantize_rows
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["PEERS", "TOLERANCE", "Peer", "Problem", "make_problem", "ours", "peer_truth", "truth"]

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 4e-3, torch.int8: 4e-2}
"""Largest error of v over the largest v at which a timed variant counts as right: a sanity bound, looser than the
tests', since peers round where they like."""


@dataclass(frozen=True)
class Problem:
    """A random head: W̄ (h, h), Ω/2πℓ (D, h) and phase in turns, β, P (D, D) and its factor U, all float32 or better.

    ``feature_map`` is the folded map in the serving dtype, and P and U belong to *its* features, as after a real fit.
    """

    hidden_size: int
    num_features: int
    layer: Tensor
    omega: Tensor
    phase: Tensor
    beta: Tensor
    precision: Tensor
    factor: Tensor
    feature_map: FeatureMap

    @property
    def scale(self) -> float:
        """√(2/D)."""
        return math.sqrt(2.0 / self.num_features)

    @cached_property
    def inverse(self) -> Tensor:
        """P⁻¹ in float32."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.precision)).float()


@dataclass(frozen=True)
class Peer:
    """A way to score.

    Attributes:
        name: shown in tables.
        dtype: of its weights.
        weights: problem → the tensors it keeps, made once; the harness clones them to stay out of the cache.
        run: (hidden, *weights) → (g, v).
        nbytes: (B, h, D) → bytes it must move.
        flop: (B, h, D) → operations it must do.
        compiled: run it through torch.compile.
        max_rows: largest batch it is timed at.
    """

    name: str
    dtype: torch.dtype
    weights: Callable[[Problem], tuple[Tensor, ...]]
    run: Callable[..., tuple[Tensor, Tensor]]
    nbytes: Callable[[int, int, int], float]
    flop: Callable[[int, int, int], float]
    compiled: bool = False
    max_rows: int = 1 << 30


def make_problem(h: int, d: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Problem:
    """A problem with a plausible posterior: P from random features of random rows, without an O(N D²) fp64 fit."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.randn(h, h, generator=generator) / (2 * math.sqrt(h))
    omega = torch.randn(d, h, generator=generator) / (2 * math.pi * math.sqrt(h))
    phase = torch.rand(d, generator=generator)
    beta = torch.randn(d, generator=generator)
    layer, omega, phase, beta = (t.to(device) for t in (layer, omega, phase, beta))
    rows = torch.randn(2 * d, h, generator=generator).to(device)
    feature_map = _freeze(omega @ layer, phase, dtype, rows)
    scale = feature_map.feature_scale
    precision = torch.zeros(d, d, dtype=torch.float32, device=device)
    for chunk in rows.split(4096):
        phi = feature_map(chunk) * scale
        precision.addmm_(phi.mT, phi)
    precision = precision.double()
    precision.diagonal().add_(0.1)
    factor = torch.linalg.solve_triangular(
        torch.linalg.cholesky(precision), torch.eye(d, dtype=torch.float64, device=device), upper=False
    )
    return Problem(h, d, layer, omega, phase, beta, precision, factor, feature_map)


def _freeze(projection: Tensor, phase: Tensor, dtype: torch.dtype, rows: Tensor) -> FeatureMap:
    d, h = projection.shape
    quantized: dict[str, Any] = {}
    if dtype == torch.int8:
        quantized = quantize_projection(projection.double(), phase.double(), rows)
        projection, phase = quantized.pop("projection"), quantized.pop("phase")
    return FeatureMap(
        "rff", projection.to(dtype), phase, None, None, "none", False, h, d, dtype, feature_scale=math.sqrt(2.0 / d),
        **quantized,
    )  # fmt: skip


def ours(problem: Problem) -> HeadWeights:
    """The head as rmcore serves it."""
    return HeadWeights.build(problem.feature_map, problem.beta, 0.0, problem.factor, reference.mean_field_amplitude())


def truth(problem: Problem, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(g, v) in float64 for the frozen features."""
    phi = problem.feature_map(hidden.double()) * problem.scale
    return phi @ problem.beta.double(), reference.variance(phi, problem.factor)


def peer_truth(peer: Peer, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A peer's own formula with its own weights in float64: it is judged by its arithmetic, not by its features."""
    return peer.run(x.double(), *(t.double() for t in weights))


# Each peer's first function lists what it keeps, the second is its formula.


def _dense_weights(problem: Problem) -> tuple[Tensor, ...]:
    return problem.layer, problem.omega, problem.phase, problem.beta * problem.scale, problem.inverse * problem.scale**2


def _dense(
    x: Tensor, layer: Tensor, omega: Tensor, phase: Tensor, beta: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Three dense products: z = W̄x, Ωz, and cᵀP⁻¹c with the inverse kept."""
    c = torch.cos(2 * math.pi * (x.to(layer.dtype) @ layer.mT @ omega.mT + phase))
    return c @ beta, ((c @ inverse) * c).sum(-1)


def _folded_weights(dtype: torch.dtype) -> Callable[[Problem], tuple[Tensor, ...]]:
    def weights(problem: Problem) -> tuple[Tensor, ...]:
        assert problem.feature_map.projection is not None
        projection = problem.feature_map.projection.to(dtype)
        return projection, problem.phase, problem.beta * problem.scale, (problem.factor * problem.scale).to(dtype)

    return weights


def _folded(x: Tensor, projection: Tensor, phase: Tensor, beta: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Two dense products in the weights' dtype: the folded projection, and U kept dense."""
    c = torch.cos(2 * math.pi * (_wide(x.to(projection.dtype) @ projection.mT) + phase))
    return c @ beta, _wide(c.to(factor.dtype) @ factor.mT).square().sum(-1)


def _int8_weights(problem: Problem) -> tuple[Tensor, ...]:
    assert problem.feature_map.projection is not None
    projection, p_scale = quantize_rows(problem.feature_map.projection)
    factor = problem.factor * problem.scale
    whole, f_scale = quantize_rows(factor.tril(-1))
    diagonal = factor.diagonal().float()
    # torch's product is fastest with the one layout for a single row, with the other for more: it gets both.
    layouts = (projection, projection.mT.contiguous(), whole, whole.mT.contiguous())
    return *layouts, p_scale, problem.phase, problem.beta * problem.scale, f_scale, diagonal


def _folded_int8(
    x: Tensor,
    projection: Tensor,
    projection_t: Tensor,
    factor: Tensor,
    factor_t: Tensor,
    p_scale: Tensor,
    phase: Tensor,
    beta: Tensor,
    f_scale: Tensor,
    diagonal: Tensor,
) -> tuple[Tensor, Tensor]:
    """The folded form in 8 bits: rows and c to whole numbers with a factor a row, integer products."""
    alone = x.shape[0] == 1
    if x.dtype == torch.float64:
        c = torch.cos(2 * math.pi * (x @ projection.mT * p_scale + phase))
        return c @ beta, (c @ factor.mT * f_scale + c * diagonal).square().sum(-1)
    largest = x.float().abs().amax(1, keepdim=True) / 127
    whole = (x / largest).round().to(torch.int8)
    product = torch._int_mm(whole, projection.mT if alone else projection_t)
    c = torch.cos(2 * math.pi * (product * (p_scale * largest) + phase))
    product = torch._int_mm((127 * c).round().to(torch.int8), factor.mT if alone else factor_t)
    return c @ beta, (product * (f_scale / 127) + c * diagonal).square().sum(-1)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _solve_weights(problem: Problem) -> tuple[Tensor, ...]:
    precision = (problem.precision / problem.scale**2).float()
    return problem.layer, problem.omega, problem.phase, problem.beta * problem.scale, precision


def _solve(
    x: Tensor, layer: Tensor, omega: Tensor, phase: Tensor, beta: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """The published code's way: a linear solve with P on every call."""
    c = torch.cos(2 * math.pi * (x.to(layer.dtype) @ layer.mT @ omega.mT + phase))
    return c @ beta, (c * torch.linalg.solve(precision, c.mT).mT).sum(-1)


def _gpytorch(
    x: Tensor, layer: Tensor, omega: Tensor, phase: Tensor, beta: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """The inverse quadratic form through gpytorch's linear operators."""
    from linear_operator import to_linear_operator

    c = torch.cos(2 * math.pi * (x.to(layer.dtype) @ layer.mT @ omega.mT + phase))
    return c @ beta, to_linear_operator(precision).inv_quad(c.mT, reduce_inv_quad=False)


def _laplace_weights(problem: Problem) -> tuple[Tensor, ...]:
    scale = problem.factor.mT.float() * problem.scale
    return problem.layer, problem.omega, problem.phase, problem.beta * problem.scale, scale.contiguous()


def _laplace(
    x: Tensor, layer: Tensor, omega: Tensor, phase: Tensor, beta: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """laplace-torch's own last-layer variance. It keeps a square root of P⁻¹ and multiplies it out on every call."""
    from laplace.lllaplace import FullLLLaplace

    c = torch.cos(2 * math.pi * (x.to(layer.dtype) @ layer.mT @ omega.mT + phase))
    fitted = FullLLLaplace.__new__(FullLLLaplace)  # its constructor wants a model and a data loader to fit
    fitted._posterior_scale = scale
    return c @ beta, fitted.functional_variance(c[:, None, :])[:, 0, 0]


def _dense_bytes(b: int, h: int, d: int) -> float:
    return 4.0 * (h * h + h * d + d * d + b * (h + d))


def _dense_flop(b: int, h: int, d: int) -> float:
    return 2.0 * b * (h * h + h * d + d * d)


def _folded_bytes(width: int) -> Callable[[int, int, int], float]:
    return lambda b, h, d: float(width) * (h * d + d * d + b * (h + d))


def _folded_flop(b: int, h: int, d: int) -> float:
    return 2.0 * b * (h * d + d * d)


def _laplace_flop(b: int, h: int, d: int) -> float:
    return 2.0 * d**3 + _dense_flop(b, h, d)


def _solve_flop(b: int, h: int, d: int) -> float:
    return 2.0 * d**3 / 3 + 2.0 * b * (h * h + h * d + 2 * d * d)


_F32, _BF16, _I8 = torch.float32, torch.bfloat16, torch.int8
PEERS: tuple[Peer, ...] = (
    Peer("torch eager, dense fp32", _F32, _dense_weights, _dense, _dense_bytes, _dense_flop),
    Peer("torch.compile, dense fp32", _F32, _dense_weights, _dense, _dense_bytes, _dense_flop, True),
    Peer("torch eager, folded fp32", _F32, _folded_weights(_F32), _folded, _folded_bytes(4), _folded_flop),
    Peer("torch eager, folded bf16", _BF16, _folded_weights(_BF16), _folded, _folded_bytes(2), _folded_flop),
    Peer("torch.compile, folded bf16", _BF16, _folded_weights(_BF16), _folded, _folded_bytes(2), _folded_flop, True),
    Peer("torch eager, folded int8", _I8, _int8_weights, _folded_int8, _folded_bytes(1), _folded_flop),
    Peer("torch.compile, folded int8", _I8, _int8_weights, _folded_int8, _folded_bytes(1), _folded_flop, True),
    Peer("solve per call (published code)", _F32, _solve_weights, _solve, _dense_bytes, _solve_flop, max_rows=256),
)
if importlib.util.find_spec("linear_operator") is not None:
    # It iterates, as often as it takes: the least it can do is one product.
    PEERS += (Peer("gpytorch inv_quad", _F32, _solve_weights, _gpytorch, _dense_bytes, _dense_flop, max_rows=256),)
if importlib.util.find_spec("laplace") is not None:
    PEERS += (Peer("laplace-torch", _F32, _laplace_weights, _laplace, _dense_bytes, _laplace_flop, max_rows=256),)
