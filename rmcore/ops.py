"""One function per kernel, and the choice of who runs it.

``score``, ``accumulate``, ``pair_variance`` and ``power_iteration`` take the tensors of :mod:`rmcore.weights` and hand
them to a backend of :mod:`rmcore.backends`. ``backend="auto"`` takes the first of a table's order that can run; a
backend named explicitly runs or raises :class:`~rmcore.errors.BackendError` saying why not. :func:`explain` tells
without running.

In eager code the backend is called directly: the custom-operator boundary costs more than a kernel. Under
``torch.compile`` the same functions call the operators registered in :mod:`rmcore.operators`.

Shapes, devices and dtypes are checked here. Finiteness is not: a non-finite hidden row gives non-finite results in
that row alone, and the callers that own an error policy look at the (B,) results instead of the (B, h) inputs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rmcore.errors import BackendError, reject
from rmcore.reference import Likelihood
from rmcore.weights import FeatureMap, HeadWeights

__all__ = [
    "Backend",
    "Explanation",
    "Scores",
    "accumulate",
    "explain",
    "pair_variance",
    "power_iteration",
    "score",
    "select",
]

Backend: TypeAlias = Literal["auto", "torch", "cpu", "triton", "cuda"]
OPS = ("score", "accumulate", "pair_variance", "power_iteration")

# Fastest first, by device type. On CPUs the order is measured (bench/results/cpu.json). On GPUs it is by design, not
# yet by measurement: one launch with grid barriers for small batches, GEMM-shaped kernels for the rest.
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
_ALL = ("cuda", "triton", "cpu", "torch")


class Scores(NamedTuple):
    """Four views of one (4, B) float32 tensor, one value a row."""

    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    preference: Tensor


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend would run (``none`` where a named one cannot), and why each other considered would not."""

    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.backend}: chosen", *(f"{name}: {why}" for name, why in self.reasons.items())])


def explain(
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
    backend: Backend = "auto",
    *,
    rows: int | None = None,
    weights: FeatureMap | HeadWeights | Tensor | None = None,
) -> Explanation:
    """Which backend ``op`` would run on, and why the others would not.

    Args:
        op: ``score``, ``accumulate``, ``pair_variance`` or ``power_iteration``.
        device: of the tensors.
        dtype: of the head, or of the matrix.
        backend: as the operation would be called.
        rows: rows of the batch, where the answer depends on it.
        weights: the head (or power iteration's matrix), likewise.

    Raises InputError for an unknown operation or backend.
    """
    if op not in OPS:
        reject("op", repr(op), f"one of {', '.join(OPS)}")
    if backend not in ("auto", *_ALL):
        reject("backend", repr(backend), f"one of auto, {', '.join(_ALL)}")
    device = torch.device(device)
    order = _ORDER.get(device.type, ("torch",)) if backend == "auto" else (backend,)
    reasons: dict[str, str] = {}
    for name in order:
        module = _module(name)
        why = "not part of this build" if module is None else module.unavailable(op, device, dtype)
        if why is None and rows is not None and hasattr(module, "declines"):
            why = module.declines(op, rows, weights)
        if why is None:
            return Explanation(name, reasons)
        reasons[name] = why
    return Explanation("none", reasons)


@functools.cache
def _module(name: str) -> Any:
    home = f"rmcore.backends.{name}"
    return importlib.import_module(home) if importlib.util.find_spec(home) else None


def select(
    op: str,
    tensor: Tensor,
    dtype: torch.dtype,
    backend: Backend,
    weights: FeatureMap | HeadWeights | Tensor | None = None,
) -> Any:
    """The backend module that runs ``op`` on ``tensor``; raises BackendError where the named one cannot."""
    if backend == "auto" and tensor.dtype == torch.float64:
        backend = "torch"  # the kernels compute in float32; who brings float64 wants it kept
    explanation = explain(op, tensor.device, dtype, backend, rows=tensor.shape[0], weights=weights)
    if explanation.backend == "none":
        raise BackendError(f"backend: got {backend!r}, which cannot run {op} here: {explanation.reasons[backend]}")
    return _module(explanation.backend)


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


def check_pairs(pairs: Tensor | None, rows: int) -> None:
    """Raise InputError for a pair index outside 0..rows−1."""
    if pairs is not None and pairs.numel():
        low, high = int(pairs.min()), int(pairs.max())
        if low < 0 or high >= rows:
            reject("pairs", f"indices {low}..{high}", f"row indices 0..{rows - 1}")


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


def check_group_sizes(group_sizes: Tensor, rows: int) -> None:
    """Raise InputError unless the sizes are non-negative and sum to ``rows``."""
    if bool((group_sizes < 0).any()) or int(group_sizes.sum()) != rows:
        shown = group_sizes.tolist() if len(group_sizes) <= 8 else f"{group_sizes[:8].tolist()}..."
        reject("group_sizes", f"{shown} (sum {int(group_sizes.sum())})", f"non-negative sizes that sum to {rows} rows")


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


# The registrations refer to this module; importing them last keeps one import enough for users of the operators.
from rmcore import operators as _operators  # noqa: E402, F401
