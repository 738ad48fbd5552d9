"""What every uncertainty offers: pairs of hidden rows → logit, variance, and what kind of variance it is.

An estimator is fitted from cached hidden rows (the inputs of a last layer, one a response), and then scores groups of
rows as a head in difference mode does. So all of them can be put side by side over one pass of the backbone.

The v of every estimator here is the variance of a *difference* of per-response scores that pairs of a group share:
:func:`rmcore.ops.reference.difference_variance` gives the variance of any combination of these from the v alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.posterior import check_finite
from rmcore.ops import reference
from rmcore.ops.pair_layout import PairLayout

__all__ = [
    "PairEstimate",
    "PairEstimator",
    "VarianceKind",
    "check_part",
    "check_training",
    "check_width",
    "gaussian_estimate",
    "of_kind",
    "refuse_update",
    "row_differences",
    "row_sums",
]

VarianceKind: TypeAlias = Literal["epistemic", "aleatoric", "total"]
"""``epistemic``: of what the fit does not know, and more data would tell; ``aleatoric``: of the labels themselves;
``total``: both."""


class PairEstimate(NamedTuple):
    """Every pair i < j of every group, flat, in the order of :class:`~rmcore.ops.pair_layout.PairLayout`; float64.

    Attributes:
        logit: (Q,) g, the mean of the logit; positive where the first is better.
        variance: (Q,) v ≥ 0, the variance of the logit, of the estimator's ``kind``.
        preference: (Q,) p̃, the log-odds of the mean probability: E[σ(logit)] exactly where there are samples of it,
            g / √(1 + a·v) where it is normal.
        information: (Q,) nats that the pair's label would tell of the weights (BALD, Houlsby et al. 2011); None where
            the estimator has no samples.
        epistemic: (Q,) the part of the variance that more data would take away; None where the estimator tells none.
        aleatoric: (Q,) the part that is the answers' own, expected over what the fit does not know; None likewise.
        measures: (R,) by name, what an estimator says of each row besides; None where it has nothing of its own. URME:
            ``gap`` and ``covariance``, by which its authors filter.
    """

    logit: Tensor
    variance: Tensor
    preference: Tensor
    information: Tensor | None = None
    epistemic: Tensor | None = None
    aleatoric: Tensor | None = None
    measures: dict[str, Tensor] | None = None


class PairEstimator(Protocol):
    """An uncertainty of pairs.

    Attributes:
        name: by which it is known, saved and refused.
        kind: what its variance is of.
    """

    name: ClassVar[str]
    kind: ClassVar[VarianceKind]

    def pairs(self, hidden: Tensor, group_sizes: Tensor) -> PairEstimate:
        """Score all pairs of groups of rows (R, h), ``group_sizes`` (G,) int64 summing to R.

        Raises:
            InputError: shapes do not fit.
            NonFiniteError: a row holds NaN or Inf.
        """

    def deviations(self, hidden: Tensor) -> Tensor:
        """(R, h) → (R, d) float64 y with ‖y_i − y_j‖² the epistemic variance of the pair: all pairs' covariance.

        Raises InputError, by name, where there is none.
        """

    def update(self, hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
        """Learn from verdicts; arguments as of ``fit``. Raises InputError, by name, where that has no meaning."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write its tensors into ``folder``; returns the JSON values that go with them."""

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any]) -> PairEstimator:
        """The inverse of :meth:`write`."""


def row_differences(rows: Tensor, group_sizes: Tensor) -> Tensor:
    """(R, ...) → (Q, ...): first less second of every pair of every group, in the rows' dtype."""
    first, second = _pair_rows(rows, group_sizes)
    return rows[first] - rows[second]


def row_sums(rows: Tensor, group_sizes: Tensor) -> Tensor:
    """(R, ...) → (Q, ...): first and second of every pair of every group, in the rows' dtype."""
    first, second = _pair_rows(rows, group_sizes)
    return rows[first] + rows[second]


def _pair_rows(rows: Tensor, group_sizes: Tensor) -> tuple[Tensor, Tensor]:
    layout = PairLayout(group_sizes)
    if layout.responses != len(rows):
        reject("group_sizes", f"sum {layout.responses}", f"{len(rows)}, the number of rows")
    return layout.first.to(rows.device), layout.second.to(rows.device)


def gaussian_estimate(logit: Tensor, variance: Tensor) -> PairEstimate:
    """Of a normal logit whose variance is epistemic: p̃ by the mean field with a = π/8."""
    u = reference.uncertainty(variance, reference.mean_field_amplitude())
    return PairEstimate(logit, variance, reference.preference(logit, u), epistemic=variance)


def of_kind(found: PairEstimate, kind: VarianceKind, own: VarianceKind, name: str) -> PairEstimate:
    """The estimate with the variance of ``kind`` in the place of its ``own``, and p̃ = g / √(1 + π/8·v) of that.

    Raises InputError, by the estimator's ``name``, for a part that it does not tell.
    """
    if kind not in get_args(VarianceKind):
        reject("variance", repr(kind), "'epistemic', 'aleatoric' or 'total'")
    if kind == own:
        return found
    parts = {"epistemic": found.epistemic, "aleatoric": found.aleatoric}
    missing = [part for part, v in parts.items() if v is None and kind in (part, "total")]
    if missing:
        told = ", ".join(part for part, v in parts.items() if v is not None) or "none of the two"
        reject("variance", f"{kind!r} of {name!r}", f"what it tells: {told}")
    (v, *more) = [part for which, part in parts.items() if part is not None and kind in (which, "total")]
    variance = v + more[0] if more else v
    u = reference.uncertainty(variance, reference.mean_field_amplitude())
    return found._replace(variance=variance, preference=reference.preference(found.logit, u))


def check_part(kind: VarianceKind, estimator: type[PairEstimator]) -> None:
    """Raise InputError for a part of the variance that an estimator of this class never tells."""
    if estimator.kind not in (kind, "total"):
        reject("variance", f"{kind!r} of {estimator.name!r}", f"what it tells: {estimator.kind}")


def check_width(hidden: Tensor, width: int) -> None:
    """Raise InputError unless rows are (R, ``width``), NonFiniteError unless they are finite."""
    if hidden.dim() != 2 or hidden.shape[1] != width:
        reject("hidden", f"shape {tuple(hidden.shape)}", f"(rows, {width})")
    check_finite(hidden)


def check_training(hidden: Tensor, labels: Tensor, pairs: Tensor) -> None:
    """Raise InputError, or NonFiniteError for rows, unless these are labelled pairs.

    ``hidden`` (R, h) finite, ``labels`` (N,) in [0, 1], ``pairs`` (N, 2) int64 rows of ``hidden``, N ≥ 1.
    """
    if hidden.dim() != 2:
        reject("hidden", f"shape {tuple(hidden.shape)}", "(rows, h)")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        reject("pairs", f"{tuple(pairs.shape)} {pairs.dtype}", "(N, 2) int64")
    if labels.shape != pairs.shape[:1] or not len(labels):
        reject("labels", f"shape {tuple(labels.shape)}", f"({len(pairs)},), one a pair, at least one")
    if int(pairs.min()) < 0 or int(pairs.max()) >= len(hidden):
        reject("pairs", f"indices {int(pairs.min())}..{int(pairs.max())}", f"row indices 0..{len(hidden) - 1}")
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        reject("labels", "values outside [0, 1] or NaN", "probabilities that the first is better")
    check_finite(hidden)


def refuse_update(name: str) -> NoReturn:
    """Raise InputError: this estimator does not learn from verdicts."""
    reject("update", f"estimator {name!r}", "one whose posterior takes single pairs: sngp or laplace", "Fit it again")
