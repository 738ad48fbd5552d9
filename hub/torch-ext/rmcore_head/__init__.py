"""Scores of an uncertainty-aware reward head, and power iteration, as Triton kernels.

c = cos 2π(x projectionᵀ + phase)     g = βᵀc + β₀     v = factor_scale · ‖U c‖²     u = √(1 + a v)     p = g / u
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import layers
from ._ops import add_op_namespace_prefix
from .features import features
from .heuristics import device
from .power_iteration import power_iteration as _iterate
from .variance import TILE_EDGE, squares
from .variance import score as _finish

__all__ = ["layers", "pack_factor", "power_iteration", "score"]

_ROWS = 16384
"""Rows taken at a time: bounds the features held to 128 MiB at D = 4096 in 16 bits."""


@dataclass(frozen=True)
class _Map:
    projection: Tensor
    phase: Tensor
    dtype: torch.dtype
    features: str = "rff"
    layer_weight: Tensor | None = None
    layer_bias: Tensor | None = None
    activation: str = "none"
    layernorm: bool = False
    input_scale: float = 1.0
    cache: dict[str, object] = field(default_factory=dict)


def pack_factor(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """U (D, D) lower triangular → tiles (n(n+1)/2, 128, 128) in ``dtype`` and the factor_scale of ``score``.

    U is multiplied by a power of two first, so that its largest value is near 2^10: away from fp16's subnormals.
    """
    largest = float(factor.abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"factor: got a largest magnitude of {largest}, expected finite values")
    exponent = 10 - math.frexp(largest)[1] if largest > 0 else 0
    size = factor.shape[0]
    n = -(-size // TILE_EDGE)
    padded = factor.new_zeros(n * TILE_EDGE, n * TILE_EDGE, dtype=torch.float64)
    padded[:size, :size] = factor.tril().double() * 2.0**exponent
    tiles = padded.reshape(n, TILE_EDGE, n, TILE_EDGE).transpose(1, 2)
    rows, columns = torch.tril_indices(n, n, device=factor.device)
    return tiles[rows, columns].to(dtype).contiguous(), 2.0 ** (-2 * exponent)


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(add_op_namespace_prefix(name), mutates_args=())


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@_operator("score")
def _score(
    hidden: Tensor,
    projection: Tensor,
    phase: Tensor,
    beta: Tensor,
    tiles: Tensor,
    beta0: float,
    factor_scale: float,
    amplitude: float,
) -> Tensor:
    out = torch.empty(4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    head, on = _Map(projection.contiguous(), phase.float(), projection.dtype), device(hidden.device)
    with _on(hidden):
        for start in range(0, hidden.shape[0], _ROWS):
            c, logits = features(hidden[start : start + _ROWS], head, on, beta=beta.float().contiguous())
            parts = squares(c, tiles, projection.shape[0], on)
            _finish(
                logits,
                parts,
                out[:, start : start + _ROWS],
                beta0=beta0,
                factor_scale=factor_scale,
                amplitude=amplitude,
            )
    return out


@_score.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(4, hidden.shape[0], dtype=torch.float32)


@_operator("power_iteration")
def _power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    with _on(weight):
        sigma, right = _iterate(weight.contiguous(), vector, iterations, device(weight.device))
    return sigma, right.clone()  # one of two rows of a tensor: an operator's outputs are tensors of their own


@_power_iteration.register_fake
def _(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    return weight.new_empty((), dtype=torch.float32), vector.new_empty(vector.shape, dtype=torch.float32)


def score(
    hidden: Tensor,
    projection: Tensor,
    phase: Tensor,
    beta: Tensor,
    tiles: Tensor,
    *,
    beta0: float = 0.0,
    factor_scale: float = 1.0,
    amplitude: float = math.pi / 8,
) -> Tensor:
    """hidden (B, h), projection (D, h), phase (D,), beta (D,), tiles of :func:`pack_factor` → (4, B): g, v, u, p."""
    if hidden.dim() != 2 or hidden.shape[1] != projection.shape[1]:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected (rows, {projection.shape[1]})")
    out: Tensor = _score(hidden, projection, phase, beta, tiles, beta0, factor_scale, amplitude)
    return out


def power_iteration(weight: Tensor, vector: Tensor, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """σ(W) by steps of power iteration on WᵀW: weight (m, h), h ≤ 16384, vector (h,) → σ (), the new vector (h,)."""
    if weight.dim() != 2 or vector.shape != (weight.shape[1],):
        raise ValueError(f"vector: got shape {tuple(vector.shape)}, expected ({weight.shape[-1]},)")
    sigma, right = _power_iteration(weight, vector, iterations)
    return sigma, right
