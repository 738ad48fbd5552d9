"""Which uncertainty a model's pairs have: that of its head, or one fitted beside it (:mod:`rmcore.head.estimators`).

All of them in logits: the head's v is scaled by its amplitude, V = v · a / (π/8), so that u = √(1 + π/8·V) is the
head's own and V can be added to the spread that a model of attributes sees in the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.config import HeadConfig
from rmcore.head.estimators import (
    ESTIMATORS,
    SNGP,
    PairEstimate,
    PairEstimator,
    SNGPWithURM,
    VarianceKind,
    estimator_named,
    of_kind,
)
from rmcore.head.estimators.protocol import row_sums
from rmcore.head.frozen import FrozenHead
from rmcore.ops import reference

__all__ = [
    "HEAD",
    "UNCERTAINTIES",
    "check_uncertainty",
    "estimate_pairs",
    "find_estimator",
    "fit_estimators",
    "head_estimate",
    "known_uncertainty",
    "told_apart",
]

HEAD = "head"
UNCERTAINTIES = (HEAD, *ESTIMATORS)
"""Names that ``uncertainty`` takes; ``sngp`` is the head too, where that is one and none was fitted beside it."""


def check_uncertainty(name: str, what: str = "uncertainty") -> None:
    """Raise InputError for a name that there is not."""
    if name not in UNCERTAINTIES:
        reject(what, repr(name)[:60], f"one of {', '.join(UNCERTAINTIES)}")


def fit_estimators(
    names: Sequence[str], hidden: Tensor, labels: Tensor, pairs: Tensor, config: HeadConfig, **settings: Any
) -> dict[str, PairEstimator]:
    """Fit estimators beside a head, by name, on labelled pairs of rows (:class:`PairEstimator`).

    Args:
        names: of :data:`~rmcore.head.estimators.ESTIMATORS`.
        hidden: (R, h) rows on any device.
        labels: (N,) in [0, 1].
        pairs: (N, 2) int64.
        config: of the head beside which they are: an SNGP head among them has its features, unless those come after a
            trained layer, which is not fitted here.
        **settings: of each one's ``fit``.

    Raises InputError for a name that there is not, and as each one's ``fit``.
    """
    found: dict[str, PairEstimator] = {}
    like = {"config": config} if config.features == "rff" and config.layer_size is None else {}
    for name in names:
        kind = estimator_named(name)
        own = like | settings if issubclass(kind, (SNGP, SNGPWithURM)) else settings
        found[name] = kind.fit(hidden.cpu(), labels.cpu(), pairs.cpu(), **own)
    return found


def find_estimator(
    name: str | None, head: FrozenHead, estimators: Mapping[str, PairEstimator], default: str | None = None
) -> PairEstimator | None:
    """The estimator of a name, or of the ``default`` without one; None for the head itself.

    Raises InputError for a name that there is not, or that the model has not.
    """
    found = known_uncertainty(name, head.config.features, estimators, default)
    return None if found is None else estimators[found]


def known_uncertainty(name: str | None, features: str, has: Collection[str], default: str | None = None) -> str | None:
    """Which of the estimators that a model ``has`` is meant; None for its head, which has ``features``.

    Raises InputError for a name that there is not, or that the model has not.
    """
    name = name or default or HEAD
    check_uncertainty(name)
    if name in has:
        return name
    if name != HEAD and (name != "sngp" or features != "rff"):
        remedy = "add_estimator fits one, or train --uncertainty"
        reject("uncertainty", repr(name), f"one that the model has: {', '.join([HEAD, *has])}", remedy)
    return None


def head_estimate(
    head: FrozenHead, logit: Tensor, variance: Tensor, sizes: Tensor, noise: Tensor | None = None
) -> PairEstimate:
    """The head's g and v (Q,) as an estimate, with the variance ``noise`` (R,) that answers have by themselves."""
    v = variance.double() * (head.config.resolved_amplitude / reference.mean_field_amplitude())
    u = reference.uncertainty(v, reference.mean_field_amplitude())
    spread = None if noise is None else row_sums(noise.double().to(v.device), sizes)
    g = logit.double()
    return PairEstimate(g, v, reference.preference(g, u), epistemic=v, aleatoric=spread)


def estimate_pairs(
    head: FrozenHead,
    hidden: Tensor,
    sizes: Tensor,
    estimator: PairEstimator | None,
    own: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    variance: VarianceKind | None = None,
    noise: Tensor | None = None,
) -> PairEstimate:
    """All pairs i < j of groups of rows, difference mode.

    Args:
        head: of the model.
        hidden: (R, h).
        sizes: (G,) summing to R.
        estimator: of :func:`find_estimator`; None for the head.
        own: gives the head's g and v of rows and sizes.
        variance: which part of it; None for the estimator's own kind, epistemic for the head.
        noise: (R,) the variance that answers have by themselves, beside the head.
    """
    if estimator is not None:
        found = estimator.pairs(hidden.cpu(), sizes.cpu())
        return found if variance is None else of_kind(found, variance, estimator.kind, estimator.name)
    found = head_estimate(head, *own(hidden, sizes), sizes, noise)
    return found if variance is None else of_kind(found, variance, "epistemic", HEAD)


def told_apart(found: PairEstimate | None) -> dict[str, Tensor]:
    """The (Q,) parts of a variance by name, where an aleatoric one is told; epistemic alone is the variance itself."""
    if found is None or found.aleatoric is None:
        return {}
    parts = {"epistemic": found.epistemic, "aleatoric": found.aleatoric}
    return {name: part for name, part in parts.items() if part is not None}
