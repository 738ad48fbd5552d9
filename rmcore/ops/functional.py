"""One function per kernel, and the choice of who runs it.

``score``, ``accumulate``, ``pair_variance`` and ``power_iteration`` take the tensors of :mod:`rmcore.ops.weights` and
hand them to a backend of :mod:`rmcore.ops.backends`. ``backend="auto"`` takes the first of a table's order that can
run; a backend named explicitly runs or raises :class:`~rmcore._base.errors.BackendError` saying why not.
:func:`explain` tells without running.

In eager code the backend is called directly: the custom-operator boundary costs more than a kernel. Under
``torch.compile`` the same functions call the operators registered in :mod:`rmcore.ops.library`.

Shapes, devices and dtypes are checked here. Finiteness is not: a non-finite hidden row gives non-finite results in
that row alone, and the callers that own an error policy look at the (B,) results instead of the (B, h) inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.ops.dispatch import Backend, check_group_sizes, check_pairs, select
from rmcore.ops.reference import Likelihood
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["Scores", "accumulate", "pair_variance", "power_iteration", "score"]


class Scores(NamedTuple):
    """Four views of one (4, B) float32 tensor, one value a row."""

    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    preference: Tensor


def _check_hidden(hidden: Tensor, feature_map: FeatureMap, name: str = "hidden") -> None:
    if not isinstance(hidden, Tensor):
        reject(name, type(hidden).__name__, "a torch.Tensor")
    if hidden.dim() != 2 or hidden.shape[1] != feature_map.hidden_size:
        reject(name, f"shape {tuple(hidden.shape)}", f"(rows, {feature_map.hidden_size})")
    if not hidden.dtype.is_floating_point:
        reject(name, hidden.dtype, "a floating-point dtype")
    if feature_map.tensors() and hidden.device != feature_map.device:
        reject(name, f"device {hidden.device}", f"the head's device {feature_map.device}")


def _check_vector(name: str, tensor: Tensor, length: int) -> None:
    if tensor.shape != (length,):
        reject(name, f"shape {tuple(tensor.shape)}", f"({length},)")


def score(hidden: Tensor, weights: HeadWeights, *, backend: Backend = "auto", out: Tensor | None = None) -> Scores:
    """Score rows: logit g, variance v = ‖Uφ‖², uncertainty u = √(1 + a v), preference p = g/u (design 2.1-2.5).

    Args:
        hidden: (B, h), any float dtype, any strides; B may be 0.
        weights: the frozen head.
        backend: who computes.
        out: optional (4, B) float32 contiguous tensor that receives the result.

    Returns:
        :class:`Scores`, each (B,) float32.

    Raises:
        InputError: a shape, dtype or device does not fit.
        BackendError: the named backend cannot run here.
    """
    _check_hidden(hidden, weights.map)
    rows = hidden.shape[0]
    if out is not None and (out.shape != (4, rows) or out.dtype != torch.float32 or not out.is_contiguous()):
        reject("out", f"{tuple(out.shape)} {out.dtype}", f"contiguous (4, {rows}) float32")
    if out is not None and out.device != hidden.device:
        reject("out", f"device {out.device}", f"the device of hidden, {hidden.device}")
    if out is None:
        out = torch.empty(4, rows, dtype=torch.float32, device=hidden.device)
    if torch.compiler.is_compiling():
        torch.ops.rmcore.score_out(hidden, weights.handle, backend, out)
    else:
        select("score", hidden, weights.dtype, backend, weights).score(hidden, weights, out)
    return Scores(*out.unbind(0))


def accumulate(
    hidden: Tensor,
    labels: Tensor,
    feature_map: FeatureMap,
    beta: Tensor,
    *,
    precision: Tensor,
    gradient: Tensor,
    pairs: Tensor | None = None,
    sample_weight: Tensor | None = None,
    beta0: float = 0.0,
    likelihood: Likelihood = "logistic",
    backend: Backend = "auto",
) -> Tensor:
    """One pass over the data: ``precision += ΦᵀWΦ`` and ``gradient += Φᵀ(y − p)``; returns Σ log-likelihood (2.4).

    Args:
        hidden: (R, h) rows.
        labels: (N,) in [0, 1]; N = R without ``pairs``.
        feature_map: the frozen features; φ = feature_scale · c.
        beta: (D,) for φ.
        precision: (D, D) float32 or float64, contiguous. **Only its lower triangle is updated and meaningful.**
        gradient: (D,) float32 or float64.
        pairs: (N, 2) int64 row indices; then φ_n = φ[first] − φ[second], formed in float32 before any rounding.
        sample_weight: (N,) non-negative factors on each datum.
        beta0: logit offset.
        likelihood: ``logistic``: w = p(1−p); ``gaussian``: w = 1. The gradient is the logistic one in both.
        backend: who computes.

    Returns:
        () float64, the sum of log-likelihoods at β.

    Raises:
        InputError: a shape, dtype or device does not fit, or a pair index is out of range.
        BackendError: the named backend cannot run here.
    """
    _check_hidden(hidden, feature_map)
    d, n = feature_map.num_features, hidden.shape[0] if pairs is None else pairs.shape[0]
    _check_vector("labels", labels, n)
    _check_vector("beta", beta, d)
    _check_vector("gradient", gradient, d)
    if sample_weight is not None:
        _check_vector("sample_weight", sample_weight, n)
    if precision.shape != (d, d) or precision.dtype not in (torch.float32, torch.float64):
        reject("precision", f"{tuple(precision.shape)} {precision.dtype}", f"({d}, {d}) float32 or float64")
    if not precision.is_contiguous():
        reject("precision", f"strides {precision.stride()}", "a contiguous tensor")
    if pairs is not None and (pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64):
        reject("pairs", f"{tuple(pairs.shape)} {pairs.dtype}", "(N, 2) int64")
    if torch.compiler.is_compiling():
        return torch.ops.rmcore.accumulate(
            hidden,
            labels,
            feature_map.handle,
            beta,
            precision,
            gradient,
            pairs,
            sample_weight,
            beta0,
            likelihood,
            backend,
        )
    check_pairs(pairs, hidden.shape[0])
    feature_map = feature_map.dequantized()
    module = select("accumulate", hidden, feature_map.dtype, backend, feature_map)
    return module.accumulate(
        hidden, labels, feature_map, beta, precision, gradient, pairs, sample_weight, beta0, likelihood
    )


def pair_variance(
    hidden: Tensor, group_sizes: Tensor, weights: HeadWeights, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Difference mode: logits and variances of all pairs i < j of every group (design 2.6).

    Args:
        hidden: (ΣK, h), the rows of group 0, then of group 1, ...
        group_sizes: (G,) int64 on the CPU, each ≥ 0, summing to the number of rows.
        weights: the frozen head; β₀ cancels.
        backend: who computes.

    Returns:
        g (Q,), v (Q,) float32, Q = Σ K(K−1)/2, pairs in the order (0,1), (0,2), ..., (1,2), ... within each group.
        Equal rows give exactly g = 0 and v = 0.

    Raises:
        InputError: a shape, dtype or device does not fit.
        BackendError: the named backend cannot run here.
    """
    _check_hidden(hidden, weights.map)
    if group_sizes.dim() != 1 or group_sizes.dtype != torch.int64 or group_sizes.device.type != "cpu":
        reject("group_sizes", f"{tuple(group_sizes.shape)} {group_sizes.dtype}", "(G,) int64 on the CPU")
    if torch.compiler.is_compiling():
        return torch.ops.rmcore.pair_variance(hidden, group_sizes, weights.handle, backend)
    check_group_sizes(group_sizes, hidden.shape[0])
    module = select("pair_variance", hidden, weights.dtype, backend, weights)
    return module.pair_variance(hidden, group_sizes, weights)


def power_iteration(
    weight: Tensor, vector: Tensor, iterations: int = 1, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """σ(W) by power iteration on WᵀW (design 2.1). weight (m, h), vector (h,) → σ () and the new v (h,).

    Raises:
        InputError: a shape does not fit or ``iterations`` < 1.
        BackendError: the named backend cannot run here.
    """
    if weight.dim() != 2:
        reject("weight", f"shape {tuple(weight.shape)}", "(m, h)")
    _check_vector("vector", vector, weight.shape[1])
    if iterations < 1:
        reject("iterations", iterations, "at least 1")
    if torch.compiler.is_compiling():
        return torch.ops.rmcore.power_iteration(weight, vector, iterations, backend)
    module = select("power_iteration", weight, weight.dtype, backend, weight)
    return module.power_iteration(weight, vector, iterations)
