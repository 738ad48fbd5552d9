"""Last-layer Laplace of a linear Bradley-Terry reward: full, Kronecker or diagonal (Daxberger et al. 2021).

The features are the hidden rows themselves, so nothing is approximated before the Hessian: with Δ = x_first − x_second,

    H = s·I + Σ p(1−p) ΔΔᵀ        the exact Hessian of the logistic likelihood at the MAP w, and the prior's
    v = Δᵀ H⁻¹ Δ                  the variance of a pair's logit

``full`` keeps H; ``kron`` its Kronecker factors, which for a layer of one output are a scalar and a matrix,
b = mean p(1−p) and A = Σ ΔΔᵀ (Ritter et al. 2018): H ≈ s·I + b·A; ``diag`` its diagonal. All in float64. The prior
precision s is that of most evidence, log p(D | s) ≈ log p(D, w) + ½ D log s − ½ log |H| with the full H (MacKay 1992),
so that the three differ in the covariance only.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.ascent import ascend
from rmcore.head.estimators.protocol import (
    PairEstimate,
    VarianceKind,
    check_training,
    check_width,
    gaussian_estimate,
    refuse_update,
    row_differences,
)
from rmcore.head.estimators.tensors import read_tensors, write_tensors
from rmcore.head.posterior import Posterior
from rmcore.ops import reference

__all__ = ["Laplace", "LaplaceDiagonal", "LaplaceKronecker", "Structure", "log_evidence"]

log = logging.getLogger(__name__)

Structure: TypeAlias = Literal["full", "kron", "diag"]

_RANGE = 14.0  # of log s, either side of the scale at which prior and data weigh the same


class Laplace:
    """The full last-layer Laplace.

    Args:
        beta: (h,) w.
        factor: with v = ‖UΔ‖², (h, h); of the diagonal (h,), U's diagonal.
        ridge: s.
    """

    name: ClassVar[str] = "laplace"
    kind: ClassVar[VarianceKind] = "epistemic"
    structure: ClassVar[Structure] = "full"

    def __init__(self, beta: Tensor, factor: Tensor, ridge: float) -> None:
        wanted = (len(beta),) if self.structure == "diag" else (len(beta), len(beta))
        if beta.dim() != 1 or factor.shape != wanted:
            reject("factor", f"shape {tuple(factor.shape)}", f"{wanted} for {self.name}")
        self.beta, self.ridge = beta.double(), float(ridge)
        self.factor = factor.double().contiguous()  # as it is loaded: products of another layout differ in the last bit

    @classmethod
    def fit(cls, hidden: Tensor, labels: Tensor, pairs: Tensor, *, ridge: float | None = None) -> Laplace:
        """Fit w and its covariance.

        Args:
            hidden: (R, h) finite rows, the last layer's inputs.
            labels: (N,) in [0, 1], the probability that a pair's first is better.
            pairs: (N, 2) int64 rows of ``hidden``.
            ridge: s; None for that of most evidence.

        Raises:
            InputError: shapes or labels do not fit.
            NonFiniteError: a row holds NaN or Inf.
        """
        check_training(hidden, labels, pairs)
        delta, y = hidden.double()[pairs[:, 0]] - hidden.double()[pairs[:, 1]], labels.double()
        beta, posterior = _map(delta, y, _best_ridge(delta, y) if ridge is None else ridge)
        return cls(beta, _factor(delta, beta, posterior, cls.structure), posterior.ridge)

    @torch.no_grad()
    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.pairs`."""
        check_width(hidden, len(self.beta))
        delta = row_differences(hidden.double(), group_sizes)
        v = reference.variance(delta, self.factor) if self.factor.dim() == 2 else (delta * self.factor).square().sum(-1)
        return gaussian_estimate(delta @ self.beta, v)

    @torch.no_grad()
    def deviations(self, hidden: Tensor) -> Tensor:
        """As :meth:`rmcore.head.estimators.protocol.PairEstimator.deviations`: Ux."""
        check_width(hidden, len(self.beta))
        rows = hidden.double()
        return rows @ self.factor.mT if self.factor.dim() == 2 else rows * self.factor

    @torch.no_grad()
    def update(self, hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
        """Learn from labelled pairs one after the other, each an online Laplace step of O(h²); exact for one pair.

        The mode of N(w; m, H⁻¹)·p(y | w) lies at m + t·H⁻¹Δ with t = y − σ(g + v·t); and U becomes (I − α aaᵀ)U with
        a = UΔ and α = (1 − 1/√(1 + c‖a‖²))/‖a‖², c = p(1−p) there, which is a square root of (H + c·ΔΔᵀ)⁻¹: no inverse
        is kept or subtracted from.

        Raises:
            InputError: shapes or labels do not fit, or the structure cannot take single pairs (kron, diag).
        """
        if self.structure != "full":
            refuse_update(self.name)
        check_training(hidden, labels, pairs)
        check_width(hidden, len(self.beta))
        rows, beta, factor = hidden.double(), self.beta.clone(), self.factor.clone()
        for (first, second), y in zip(pairs.tolist(), labels.tolist(), strict=True):
            delta = rows[first] - rows[second]
            a = factor @ delta
            v = float(a @ a)
            if v == 0:
                continue  # equal rows: nothing to learn
            t, p = _one_pair(float(delta @ beta), v, y)
            beta += t * (factor.mT @ a)
            shrink = (1 - 1 / math.sqrt(1 + p * (1 - p) * v)) / v
            factor -= shrink * torch.outer(a, a @ factor)
        self.beta, self.factor = beta, factor

    def write(self, folder: Path) -> dict[str, Any]:
        """Write ``beta`` and ``factor`` in float64."""
        return {"ridge": self.ridge, **write_tensors(folder, {"beta": self.beta, "factor": self.factor})}

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> Laplace:
        """The inverse of :meth:`write`."""
        tensors = read_tensors(folder, values, ("beta", "factor"))
        return cls(tensors["beta"], tensors["factor"], float(values["ridge"]))


class LaplaceKronecker(Laplace):
    """The same with H's Kronecker factors."""

    name: ClassVar[str] = "laplace-kron"
    structure: ClassVar[Structure] = "kron"


class LaplaceDiagonal(Laplace):
    """The same with H's diagonal."""

    name: ClassVar[str] = "laplace-diag"
    structure: ClassVar[Structure] = "diag"


def log_evidence(delta: Tensor, labels: Tensor, ridge: float) -> float:
    """Laplace's log p(D | s) for differences (N, h) and labels (N,), float64."""
    beta, posterior = _map(delta, labels, ridge)
    joint = float(reference.log_likelihood(delta @ beta, labels).sum()) - 0.5 * ridge * float(beta @ beta)
    return joint + 0.5 * len(beta) * math.log(ridge) - 0.5 * posterior.log_determinant()


def _map(delta: Tensor, labels: Tensor, ridge: float) -> tuple[Tensor, Posterior]:
    """The MAP of w and H there."""

    def evaluate(at: Tensor) -> tuple[Posterior, Tensor, float]:
        gram, gradient, total = reference.accumulate(delta, labels, at)
        posterior = Posterior.from_gram(gram, len(labels), ridge=ridge, likelihood="logistic")
        return posterior, gradient - ridge * at, float(total) - 0.5 * ridge * float(at @ at)

    climb = ascend(evaluate, delta.new_zeros(delta.shape[1]), len(labels), tolerance=1e-12)
    if not climb.converged:
        log.warning("Newton did not converge in %d passes at prior precision %.3g", climb.passes, ridge)
    return climb.at, climb.curvature


def _best_ridge(delta: Tensor, labels: Tensor) -> float:
    from scipy.optimize import minimize_scalar

    middle = math.log(float(delta.square().sum()) / (4 * delta.shape[1]) or 1.0)
    bounds = (middle - _RANGE, middle + _RANGE)

    def lost(log_ridge: float) -> float:
        return -log_evidence(delta, labels, math.exp(log_ridge))

    found = float(minimize_scalar(lost, bounds=bounds, method="bounded", options={"xatol": 0.05}).x)
    if min(found - bounds[0], bounds[1] - found) < 0.1:
        log.warning("the evidence wants a prior precision beyond %.3g: the pairs tell little of w", math.exp(found))
    return math.exp(found)


def _factor(delta: Tensor, beta: Tensor, posterior: Posterior, structure: Structure) -> Tensor:
    if structure == "full":
        return posterior.factor()
    p = torch.sigmoid(delta @ beta)
    weight = p * (1 - p)
    if structure == "diag":
        return (posterior.ridge + weight @ delta.square()).rsqrt()
    gram = weight.mean() * (delta.mT @ delta)
    return Posterior.from_gram(gram, len(delta), ridge=posterior.ridge, likelihood="logistic").factor()


def _one_pair(g: float, v: float, y: float) -> tuple[float, float]:
    """The t with t = y − σ(g + v·t), and the probability there; t − y + σ(g + v·t) rises, from y − 1 to y through 0."""
    low, high = y - 1, y
    for _ in range(60):
        middle = (low + high) / 2
        if middle < y - _sigmoid(g + v * middle):
            low = middle
        else:
            high = middle
    return middle, _sigmoid(g + v * middle)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
