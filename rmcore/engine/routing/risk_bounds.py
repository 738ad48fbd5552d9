"""How much may be left to a head (or a cheap judge) if the error rate among what is left must not exceed α?

Pairs are ranked by a score, highest first in line for the judge; those with score ≤ t are *kept*. From pairs whose
truth is known, :func:`risk_threshold` finds the largest t, so the least routing, that is safe:

- ``fixed-sequence``: with probability ≥ 1 − δ the error rate among kept pairs is ≤ α, both in the population that the
  calibration pairs were drawn from and among the next ``horizon`` pairs. Thresholds chosen by the scores alone are
  tested from the most confident up, each with an exact test, until one fails ("Trust or Escalate", arXiv 2407.18370,
  after Bauer 1991). Two sequences share δ, one from an eighth of the pairs and one from half of them, so that a few
  confident errors cannot end it all; where the first arrives at the second's start its share goes on there (the
  graphical procedure of Bretz et al. 2009).
- ``conformal``: the largest t with (errors + 1) / (kept + 1) ≤ α. The error rate among kept pairs, 0 where none is
  kept, is then ≤ α *in the mean* over calibrations, up to terms of order 1/N: about every second calibration exceeds
  it, and δ plays no part (the linear expectation form of selective conformal prediction, as in SCOPE, arXiv
  2602.13110).

The tests: binomial for the population, and hypergeometric for the pairs ahead, whose own error rate scatters round the
population's (with a short horizon that matters more than the calibration's size). For the population the whole is
proven; for the pairs ahead each single test is exact, and the sequence is checked by resampling (``rmcore evaluate
--alpha``).

Both methods hold for pairs drawn alike (exchangeable). Several pairs of one prompt are not: give ``cluster``, and one
pair of each, drawn with ``seed``, is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject

__all__ = [
    "RiskMethod",
    "RiskThreshold",
    "check_risk",
    "least_pairs",
    "one_per_cluster",
    "risk_threshold",
    "risk_tiers",
]

RiskMethod: TypeAlias = Literal["fixed-sequence", "conformal"]
Floats: TypeAlias = npt.NDArray[np.float64]

_STARTS = (0.125, 0.5)
"""Where the two sequences begin, as shares of the calibration pairs; fixed in advance, by no label."""
_STEPS = 24
"""Thresholds tested, at most: few, so that one unlucky step ends the sequence rarely."""


@dataclass(frozen=True, slots=True)
class RiskThreshold:
    """What a calibration found.

    Attributes:
        alpha, delta, method: what was asked.
        threshold: pairs with a score above it are routed; -inf routes every pair.
        pairs: calibration pairs used.
        kept: of them, those that the threshold leaves to the head.
        errors: of these, those that the head gets wrong.
        bound: upper confidence bound (Clopper-Pearson, one-sided, at 1 − δ) of the error rate among kept pairs, at this
            threshold alone; 1 where none is kept.
        reason: why every pair is routed; empty where some are kept.
    """

    alpha: float
    delta: float
    method: RiskMethod
    threshold: float
    pairs: int
    kept: int
    errors: int
    bound: float
    reason: str = ""

    @property
    def share_judged(self) -> float:
        """Of the calibration pairs."""
        return 1 - self.kept / self.pairs if self.pairs else 1.0

    @property
    def guarantee(self) -> str:
        """What may be claimed, in words."""
        if self.method == "conformal":
            return f"the error rate among kept pairs is at most {self.alpha:g} in expectation"
        return f"the error rate among kept pairs is at most {self.alpha:g} with probability {1 - self.delta:g}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        threshold = self.threshold if math.isfinite(self.threshold) else None
        return asdict(self) | {"threshold": threshold, "share_judged": self.share_judged, "guarantee": self.guarantee}


def check_risk(alpha: float, delta: float, method: str) -> None:
    """Raise InputError for a risk that cannot be asked for."""
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            reject(name, value, "a number strictly between 0 and 1")
    if method not in ("fixed-sequence", "conformal"):
        reject("method", repr(method), "'fixed-sequence' or 'conformal'")


def least_pairs(alpha: float, delta: float, method: RiskMethod = "fixed-sequence") -> int:
    """How many kept pairs it takes, all right, before anything can be kept: the least n with (1 − α)ⁿ ≤ δ / 2."""
    check_risk(alpha, delta, method)
    if method == "conformal":
        return math.ceil(1 / alpha - 1e-9) - 1
    return math.ceil(math.log(delta / len(_STARTS)) / math.log1p(-alpha) - 1e-9)


def risk_threshold(
    score: npt.ArrayLike,
    wrong: npt.ArrayLike,
    *,
    alpha: float,
    delta: float = 0.1,
    method: RiskMethod = "fixed-sequence",
    horizon: float | None = None,
    cluster: npt.ArrayLike | None = None,
    seed: int = 0,
) -> RiskThreshold:
    """The least routing under which the error rate among kept pairs is bounded; see the module's text.

    Args:
        score: (N,) what pairs are routed by, highest first; +inf is always routed. Equal scores are kept or routed
            together.
        wrong: (N,) bool, or 0 and 1: whether the head's answer is wrong. A pair without a truth has no place here.
        alpha: the error rate that is allowed among kept pairs.
        delta: how often a calibration may fail to hold it.
        method: which guarantee.
        horizon: how many pairs ahead the rate is to hold among, of all pairs, kept or not; ``math.inf`` for the
            population alone. Default: as many as there are calibration pairs. Without meaning for ``conformal``.
        cluster: (N,) the prompt of each pair.
        seed: of the draw of one pair a cluster.

    Returns:
        A threshold; -inf, with the reason, where too few pairs are known or too many wrong.

    Raises:
        InputError: an argument is not as described; N = 0 is none, it routes everything.
    """
    check_risk(alpha, delta, method)
    if horizon is not None and not horizon >= 1:
        reject("horizon", horizon, "a number of pairs from 1, math.inf, or None")
    values, errors = _checked(score, wrong)
    if cluster is not None:
        names = np.asarray(cluster)
        if names.shape != values.shape:
            reject("cluster", f"shape {names.shape}", f"{values.shape}, one prompt a pair")
        rows = one_per_cluster(names, np.random.default_rng(seed))
        values, errors = values[rows], errors[rows]
    order = np.argsort(values, kind="stable")
    values, errors = values[order], errors[order]
    # A threshold keeps all pairs of its score: the last of each run of equal ones, of those that may be kept at all.
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)]) + 1
    ends = ends[np.isfinite(values[ends - 1])] if len(values) else ends
    wrong_by = np.concatenate(([0], np.cumsum(errors)))
    from scipy import stats  # here, so that routing needs none: importing it takes a second

    if method == "conformal":
        kept = _conformal(ends, wrong_by, alpha)
    else:
        ahead = 1.0 if horizon is None else horizon / max(len(values), 1)
        kept = _fixed_sequence(ends, wrong_by, len(values), alpha, delta, ahead)
    mistakes = int(wrong_by[kept])
    return RiskThreshold(
        alpha,
        delta,
        method,
        float(values[kept - 1]) if kept else -math.inf,
        len(values),
        kept,
        mistakes,
        float(stats.beta.ppf(1 - delta, mistakes + 1, kept - mistakes)) if kept > mistakes else 1.0,
        "" if kept else _why_nothing(ends, wrong_by, alpha, delta, method),
    )


def risk_tiers(
    preference: Sequence[npt.ArrayLike],
    label: npt.ArrayLike,
    *,
    alpha: float,
    delta: float = 0.1,
    method: RiskMethod = "fixed-sequence",
) -> tuple[RiskThreshold, ...]:
    """One threshold a tier of judges, cheap to strong, each calibrated on the pairs that the tiers before it pass on.

    Each tier gets δ / T, so that with probability ≥ 1 − δ the error rate among what *every* tier keeps is ≤ α. A tier's
    score is −|preference|: hand ``-threshold`` on as ``Accept(min_preference=...)``, and a threshold of -inf means that
    the tier is not worth asking.

    Args:
        preference: for each tier (N,) in [-1, 1], its answer on each pair; NaN (no verdict) is passed on.
        label: (N,) 1 where the first response is better, 0 where the second.
        alpha: as in :func:`risk_threshold`, as are the next two.
        delta: over all tiers together.
        method: which guarantee.

    Raises:
        InputError: an argument is not as described.
    """
    check_risk(alpha, delta, method)
    truth = np.asarray(label, dtype=np.float64)
    if truth.ndim != 1 or not np.isin(truth, (0.0, 1.0)).all():
        reject("label", f"shape {truth.shape}, or other values", "(N,) of 0 and 1")
    if not len(preference):
        reject("preference", "no tier", "at least one")
    left = np.ones(len(truth), dtype=bool)
    found = []
    for k, tier in enumerate(preference):
        values = np.asarray(tier, dtype=np.float64)
        if values.shape != truth.shape or (np.abs(values) > 1).any():
            reject(f"preference[{k}]", f"shape {values.shape}, or values beyond 1", f"{truth.shape} in [-1, 1]")
        score = np.where(np.isnan(values), np.inf, -np.abs(values))
        wrong = np.sign(values) != 2 * truth - 1
        level = delta / len(preference)
        found.append(risk_threshold(score[left], wrong[left], alpha=alpha, delta=level, method=method))
        left &= score > found[-1].threshold
    return tuple(found)


def one_per_cluster(cluster: npt.NDArray[Any], random: np.random.Generator) -> npt.NDArray[np.intp]:
    """Numbers of one row a cluster, each row of it as likely as any other, in order."""
    order = random.permutation(len(cluster))
    _, first = np.unique(cluster[order], return_index=True)
    return np.sort(order[first])


def _checked(score: npt.ArrayLike, wrong: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.bool_]]:
    values, errors = np.asarray(score, dtype=np.float64), np.asarray(wrong)
    if values.ndim != 1 or np.isnan(values).any():
        reject("score", f"shape {values.shape}, or NaN", "(N,) numbers")
    if errors.shape != values.shape or not np.isin(errors, (0, 1)).all():
        reject("wrong", f"shape {errors.shape}, or other values", f"{values.shape} of booleans, or of 0 and 1")
    return values, errors.astype(bool)


def _fixed_sequence(
    ends: npt.NDArray[np.intp], wrong_by: npt.NDArray[np.int64], count: int, alpha: float, delta: float, ahead: float
) -> int:
    tested = _grid(ends, count, least_pairs(alpha, delta))
    if not len(tested):
        return 0
    level = delta / len(_STARTS)
    tested = tested[_p_values(np.zeros_like(tested), tested, alpha, ahead) <= level]  # the others could never pass
    p = _p_values(wrong_by[tested], tested, alpha, ahead)
    second = int(np.searchsorted(tested, _STARTS[1] * count))
    passed = _run(p[:second] <= level)
    if passed == second > 0:  # it arrives at the second start and brings its share of δ along
        passed += _run(p[second:] <= delta)
    elif (beyond := _run(p[second:] <= level)) > 0:
        passed = second + beyond
    return int(tested[passed - 1]) if passed else 0


def _p_values(
    errors: npt.NDArray[np.int64], kept: npt.NDArray[np.intp], alpha: float, ahead: float
) -> npt.NDArray[np.float64]:
    """Of "the error rate is above α", at each threshold: in the population, and among ``ahead`` times as many pairs."""
    from scipy import stats

    p = np.asarray(stats.binom.cdf(errors, kept, alpha))
    if math.isinf(ahead):
        return p
    # Kept pairs known and ahead are one exchangeable set. The fewest errors in all that break the bound ahead leave as
    # few as were seen among the known with this probability; more errors in all, with a smaller one.
    coming = np.maximum(np.round(kept * ahead), 1).astype(np.int64)
    total = errors + np.floor(alpha * coming + 1e-9).astype(np.int64) + 1
    found: npt.NDArray[np.float64] = np.maximum(p, stats.hypergeom.cdf(errors, kept + coming, total, kept))
    return found


def _run(passes: npt.NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(passes) if passes.all() else int(passes.argmin())


def _grid(ends: npt.NDArray[np.intp], count: int, least: int) -> npt.NDArray[np.intp]:
    """The thresholds that are tested, as numbers of kept pairs: chosen by the scores, never by an error."""
    low = max(least, math.ceil(_STARTS[0] * count))
    if not len(ends) or ends[-1] < least:
        return ends[:0]
    wanted = np.linspace(min(low, ends[-1]), ends[-1], _STEPS)
    at: npt.NDArray[np.intp] = np.unique(ends[np.minimum(np.searchsorted(ends, wanted), len(ends) - 1)])
    return at[at >= least]


def _conformal(ends: npt.NDArray[np.intp], wrong_by: npt.NDArray[np.int64], alpha: float) -> int:
    safe = ends[(wrong_by[ends] + 1) <= alpha * (ends + 1) * (1 + 1e-12)]
    return int(safe[-1]) if len(safe) else 0


def _why_nothing(
    ends: npt.NDArray[np.intp], wrong_by: npt.NDArray[np.int64], alpha: float, delta: float, method: RiskMethod
) -> str:
    known, least = int(ends[-1]) if len(ends) else 0, least_pairs(alpha, delta, method)
    if known < least:
        return f"{known} calibration pairs, and it takes at least {least}, all right, for this alpha and delta"
    tested = ends[ends >= least]
    rate = wrong_by[tested] / tested
    k = int(rate.argmin())
    if wrong_by[known] == 0:
        return f"{known} calibration pairs, all right, are too few to bound the error rate among as many pairs to come"
    return (
        f"no threshold is safe: the lowest error rate among {least} kept pairs or more is {rate[k]:.3f} "
        f"({int(wrong_by[tested[k]])} of {int(tested[k])})"
    )
