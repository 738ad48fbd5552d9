"""One function per kernel, and the choice of who runs it.

``score``, ``accumulate``, ``pair_variance``, ``power_iteration`` and ``score_attributes`` take the tensors of
:mod:`rmcore.ops.weights` and :mod:`rmcore.ops.attribute_weights` and hand them to a backend of
:mod:`rmcore.ops.backends`. ``backend="auto"`` takes the first of a table's order that can
run; a backend named explicitly runs or raises :class:`~rmcore._base.errors.BackendError` saying why not.
:func:`explain` tells without running.

In eager code the backend is called directly: the custom-operator boundary costs more than a kernel. Under
``torch.compile`` the same functions call the operators registered in :mod:`rmcore.ops.library`.

Calls of ``score`` on a GPU that are like an earlier one skip all of this (:mod:`rmcore.ops.plans`).

Shapes, devices and dtypes are checked here. Finiteness is not: a non-finite hidden row gives non-finite results in
that row alone, and the callers that own an error policy look at the (B,) results instead of the (B, h) inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rmcore.ops import plans
from rmcore.ops.attribute_weights import AttributeWeights
from rmcore.ops.dispatch import Backend, select
from rmcore.ops.library import OPERATIONS
from rmcore.ops.reference import Likelihood
from rmcore.ops.tasks import (
    AccumulateTask,
    PairVarianceTask,
    PowerIterationTask,
    ScoreAttributesTask,
    ScoreTask,
    check_hidden,
    check_out,
)
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = [
    "AttributeOutputs",
    "Scores",
    "accumulate",
    "pair_variance",
    "power_iteration",
    "score",
    "score_attributes",
]


class Scores(NamedTuple):
    """Four views of one (4, B) float32 tensor, one value a row."""

    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    preference: Tensor


_score, _accumulate = OPERATIONS["score"], OPERATIONS["accumulate"]
_pair_variance, _power_iteration = OPERATIONS["pair_variance"], OPERATIONS["power_iteration"]
_score_attributes = OPERATIONS["score_attributes"]


class AttributeOutputs(NamedTuple):
    """What M attribute heads say of N rows; the first five (N,) are views of one tensor.

    Attributes:
        mean: mean reward of the heads; of one head its reward Σ w μ.
        variance: mean of Σ w² σ², the reward's own (aleatoric) variance.
        epistemic: variance of the heads' rewards, over M − 1; 0 for one head.
        gap: largest difference of two rewards (URME, Eq. 7).
        norm: largest ‖Σ‖_F of a head (URME, Eq. 8); NaN for quantiles.
        outputs: (N, M, A · per) of the value heads.
        weights: (N, M, A).
    """

    mean: Tensor
    variance: Tensor
    epistemic: Tensor
    gap: Tensor
    norm: Tensor
    outputs: Tensor
    weights: Tensor


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
    key = None if torch.compiler.is_compiling() else plans.key_of(hidden, backend)
    launch = None if key is None else plans.find(weights, key)
    if launch is None:
        check_hidden(hidden, weights.map)  # before an output is made for it
    if out is None:
        out = torch.empty(4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    else:
        check_out(out, hidden)
    if launch is None or not launch(hidden, weights, out):
        _score.checked(ScoreTask(hidden, weights, out), backend)
        if launch is None and key is not None:
            plans.keep(weights, key, hidden, select("score", hidden, weights.dtype, backend, weights))
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
        InputError: a shape, dtype or device does not fit, or a pair index is out of range. On a GPU the indices are not
            looked at from the host: one out of range makes the result and the gradient NaN.
        BackendError: the named backend cannot run here.
    """
    task = AccumulateTask(
        hidden, labels, feature_map, beta, precision, gradient, pairs, sample_weight, beta0, likelihood
    )
    total: Tensor = _accumulate(task, backend)
    return total


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
    g, v = _pair_variance(PairVarianceTask(hidden, group_sizes, weights), backend)
    return g, v


def power_iteration(
    weight: Tensor, vector: Tensor, iterations: int = 1, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """σ(W) by power iteration on WᵀW (design 2.1). weight (m, h), vector (h,) → σ () and the new v (h,).

    Raises:
        InputError: a shape does not fit or ``iterations`` < 1.
        BackendError: the named backend cannot run here.
    """
    sigma, right = _power_iteration(PowerIterationTask(weight, vector, iterations), backend)
    return sigma, right


def score_attributes(
    hidden: Tensor, weights: AttributeWeights, *, gate_hidden: Tensor | None = None, backend: Backend = "auto"
) -> AttributeOutputs:
    """Score rows by one multi-attribute head or an ensemble of them: URM, URME, QRM, PURM, ArmoRM's gate (design 6).

    Args:
        hidden: (N, h), any float dtype, any strides; N may be 0. Read once, however many heads there are.
        weights: the heads (formulas in :mod:`rmcore.ops.attribute_weights`).
        gate_hidden: (N, h) states that the gates read where they are others, as a prompt's are; in hidden's dtype.
        backend: who computes.

    Returns:
        :class:`AttributeOutputs`, float32 (float64 for float64 rows on torch).

    Raises:
        InputError: a shape, dtype or device does not fit, or states for a gate that is not there.
        BackendError: the named backend cannot run here.
    """
    summary, outputs, gate = _score_attributes(ScoreAttributesTask(hidden, weights, gate_hidden), backend)
    mean, variance, epistemic, gap, norm = summary.unbind(0)
    return AttributeOutputs(mean, variance, epistemic, gap, norm, outputs, gate)
