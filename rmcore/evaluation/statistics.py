"""How good is a head, and which score should decide what the judge sees? numpy and scipy, float64, no model needed.

The question behind routing: with a judge for a fraction f of the pairs, which order of sending them gains most over
sending them at random? :func:`rmcore.evaluation.evaluate.evaluate_pairs` answers it for u and for every control beside
it, because a number for u alone proves nothing: a margin, a norm or a length difference may do as well.

Ties in a score are taken **in expectation** over their order, never by array position. So a constant score is exactly
random routing, and a coarse score gets no luck from how the file was sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from rmcore._base.errors import reject
from rmcore.evaluation.report import (
    AccuracyCostCurve,
    Array,
    Estimate,
    ReliabilityCurve,
    RiskCoverageCurve,
    Uplift,
    as_vector,
)

__all__ = [
    "Binning",
    "Interval",
    "accuracy",
    "accuracy_cost_curve",
    "auroc",
    "average_ranks",
    "bootstrap_bounds",
    "check_interval",
    "correctness",
    "expected_calibration_error",
    "judge_gains",
    "log_loss",
    "mean_with_interval",
    "normal_quantile",
    "rank_sum",
    "reliability_curve",
    "risk_coverage",
    "spearman",
    "uplift_over_random",
]

Binning: TypeAlias = Literal["mass", "width"]
"""``mass``: bins with equally many pairs; ``width``: bins of equal width on [0.5, 1]."""

FRACTIONS = (0.10, 0.25, 0.45)
CHUNK = 4_000_000  # entries of one block of bootstrap weights: 32 MB, whatever the number of pairs


# ---------------------------------------------------------------------------------------- the head by itself


def correctness(preference: npt.ArrayLike, label: npt.ArrayLike) -> Array:
    """1 where the sign of ``preference`` agrees with the label, 0 where not, 0.5 where it is 0; NaN where it is NaN.

    A preference of exactly 0 (identical responses, a judge's tie) leaves the choice to a coin, hence half a point.
    Labels must be 0 or 1, or InputError is raised: against a tie nothing is right or wrong.
    """
    preference = as_vector("preference", preference, missing=True)
    label = as_vector("label", label, length=preference.size)
    if not np.isin(label, (0.0, 1.0)).all():
        reject("label", "a tie or another value", "0 or 1 only", "Leave tied pairs out first")
    return 0.5 + 0.5 * np.sign(preference) * (2.0 * label - 1.0)


def accuracy(logit: npt.ArrayLike, label: npt.ArrayLike) -> float:
    """Share of pairs whose logit has the label's sign, over the pairs that are no tie; a logit of 0 counts half."""
    logit = as_vector("logit", logit)
    label = as_vector("label", label, length=logit.size, low=0, high=1)
    decided = _decided(label)
    return float(correctness(logit[decided], label[decided]).mean())


def log_loss(logit: npt.ArrayLike, label: npt.ArrayLike) -> float:
    """Mean of ``y·log(1+e^(-g)) + (1-y)·log(1+e^g)``, the negative log-likelihood in nats; a tie is y = 0.5.

    Taken from logits, so nothing is clipped: where σ(g) has rounded to 0 or 1 the loss is still right, |g| for a
    confident mistake. A probability of exactly 0 or 1 is an infinite logit and is refused as non-finite.
    """
    logit = as_vector("logit", logit)
    label = as_vector("label", label, length=logit.size, low=0, high=1)
    return float((label * np.logaddexp(0.0, -logit) + (1.0 - label) * np.logaddexp(0.0, logit)).mean())


def reliability_curve(
    probability: npt.ArrayLike,
    label: npt.ArrayLike,
    *,
    bins: int = 10,
    binning: Binning = "mass",
    level: float = 0.95,
) -> ReliabilityCurve:
    """Accuracy against confidence max(p, 1-p), in bins; empty bins and tied labels are left out.

    Confidence in the preferred response, not P(first), because which response comes first is arbitrary: the curve
    must not change when pairs are swapped. Bounds are Wilson's score interval (Wilson 1927), which stays inside
    [0, 1] and is honest in small bins; it treats pairs as independent. ``binning``: as many pairs in each (``mass``),
    or equal widths of confidence (``width``). Raises InputError for numbers outside [0, 1] and arrays of different
    lengths.
    """
    probability = as_vector("probability", probability, low=0, high=1)
    label = as_vector("label", label, length=probability.size, low=0, high=1)
    if bins < 1:
        reject("bins", bins, "at least 1")
    if binning not in ("mass", "width"):
        reject("binning", repr(binning), "'mass' or 'width'")
    decided = _decided(label)
    probability, label = probability[decided], label[decided]
    # 1 − (1 − p) is not p to the last bit: without rounding, right and wrong of one confidence would part at an edge.
    confidence = np.round(np.maximum(probability, 1.0 - probability), 12)
    correct = correctness(probability - 0.5, label)
    edges = np.linspace(0.5, 1.0, bins + 1)
    if binning == "mass":
        # By value, not by position: equal confidences share a bin, so the result cannot depend on their order.
        edges = np.quantile(confidence, np.linspace(0.0, 1.0, bins + 1))
    index = np.searchsorted(edges[1:-1], confidence, side="right")
    count = np.bincount(index, minlength=bins)
    used = count > 0
    mean_confidence = np.bincount(index, confidence, bins)[used] / count[used]
    mean_correct = np.bincount(index, correct, bins)[used] / count[used]
    low, high = _wilson(mean_correct, count[used], level)
    center = (edges[:-1] + edges[1:])[used] / 2.0
    return ReliabilityCurve(center, mean_confidence, mean_correct, low, high, count[used])


def expected_calibration_error(
    probability: npt.ArrayLike, label: npt.ArrayLike, *, bins: int = 10, binning: Binning = "mass"
) -> float:
    """``Σ_b n_b/N · |accuracy_b - confidence_b|`` over the bins of :func:`reliability_curve` (Naeini et al. 2015).

    Biased upwards by sampling noise, more so with more bins: compare only numbers with the same bins and N.
    """
    curve = reliability_curve(probability, label, bins=bins, binning=binning)
    return float(np.average(np.abs(curve.accuracy - curve.confidence), weights=curve.count))


# ---------------------------------------------------------------------------------------- ranks


def average_ranks(score: npt.ArrayLike) -> Array:
    """Ranks 1..N in ascending order; tied entries share the mean of the ranks they span."""
    ranks: Array = stats.rankdata(as_vector("score", score))
    return ranks


def rank_sum(*scores: npt.ArrayLike) -> Array:
    """Sum of the average ranks: a score that is high where several scores agree, free of their units.

    Raises InputError without a score, and for scores of different lengths.
    """
    if not scores:
        reject("scores", "none", "at least one score array")
    first = average_ranks(scores[0])
    for index, score in enumerate(scores[1:], start=1):
        first = first + average_ranks(as_vector(f"scores[{index}]", score, length=first.size))
    return first


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Pearson correlation of the average ranks (Spearman 1904, exact with ties); NaN if either is constant."""
    a = as_vector("a", a)
    b = as_vector("b", b, length=a.size)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def auroc(score: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """P(a positive scores above a negative) + ½·P(they tie): the Mann-Whitney statistic over n₊·n₋, exact.

    NaN with a single class. Raises InputError for values of ``positive`` other than 0 and 1, and other lengths.
    """
    score = as_vector("score", score)
    positive = as_vector("positive", positive, length=score.size)
    if not np.isin(positive, (0.0, 1.0)).all():
        reject("positive", "values other than 0 and 1", "booleans, or 0 and 1")
    above, below = score[positive == 1], score[positive == 0]
    if not above.size or not below.size:
        return float("nan")
    return float(stats.mannwhitneyu(above, below, method="asymptotic").statistic) / (above.size * below.size)


# ---------------------------------------------------------------------------------------- routing


def accuracy_cost_curve(
    score: npt.ArrayLike, correct_head: npt.ArrayLike, correct_judge: npt.ArrayLike
) -> AccuracyCostCurve:
    """Accuracy of head + judge when the k pairs with the highest ``score`` are judged, for every k = 0..N.

    ``accuracy(k) = (Σ head + Σ_{i among the first k} (judge_i - head_i)) / N``. NaN in ``correct_judge`` is no
    verdict: the call is counted, the head's answer stays.
    """
    score, head, gain = judge_gains(score, correct_head, correct_judge)
    n = score.size
    judged, gained = _cumulative(score, gain)
    counts = np.arange(n + 1.0)
    best = _area(*_above_random(*_cumulative(gain, gain))) / n**2
    above = _area(*_above_random(judged, gained)) / n**2
    return AccuracyCostCurve(
        fraction=counts / n,
        accuracy=(head.sum() + np.interp(counts, judged, gained)) / n,
        area=float(head.sum() / n + _area(judged, gained) / n**2),
        normalised_area=above / best if best > 0 else float("nan"),
    )


def uplift_over_random(
    score: npt.ArrayLike,
    correct_head: npt.ArrayLike,
    correct_judge: npt.ArrayLike,
    fractions: Sequence[float] = FRACTIONS,
    *,
    cluster: npt.ArrayLike | None = None,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> tuple[Uplift, ...]:
    """Percentage points of accuracy above the straight line of random routing, at each fraction judged.

    The line runs from the head's accuracy to the judge's, so the uplift is 0 at both ends, and a judge that is equally
    good on all pairs gives the same uplift however good it is. Between two counts the curve is linear.

    Bounds: percentile bootstrap (Efron 1979) over **prompts** drawn with replacement (``cluster`` gives each pair's
    prompt; by default each pair is its own). The same seed draws the same prompts for every score. With a single
    prompt, or ``replicates=0``, the bounds are NaN. Raises InputError for arrays of different lengths.
    """
    score, _, gain = judge_gains(score, correct_head, correct_judge)
    at = as_vector("fractions", fractions, low=0, high=1)
    check_interval(replicates, level)
    judged, above = _above_random(*_cumulative(score, gain))
    point = 100.0 * np.interp(at * judged[-1], judged, above) / judged[-1]
    groups = np.arange(score.size) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
    if groups.shape != score.shape:
        reject("cluster", f"shape {groups.shape}", f"{score.shape}, one prompt id per pair")
    low = high = np.full(at.size, np.nan)
    if replicates and groups.max() > 0:
        interval = Interval(groups, replicates, level, seed)
        low, high = (100.0 * bound for bound in bootstrap_bounds(_uplift_of_resamples(score, gain, at), interval))
    return tuple(
        Uplift(float(p), float(lo), float(hi), float(f)) for p, lo, hi, f in zip(point, low, high, at, strict=True)
    )


def risk_coverage(score: npt.ArrayLike, correct: npt.ArrayLike) -> RiskCoverageCurve:
    """Error rate among the k pairs of lowest score, k = 1..N, and its mean, the AURC (Geifman & El-Yaniv 2017)."""
    score = as_vector("score", score)
    correct = as_vector("correct", correct, length=score.size, low=0, high=1)
    counts = np.arange(1.0, score.size + 1.0)
    risk = np.interp(counts, *_cumulative(-score, 1.0 - correct)) / counts
    return RiskCoverageCurve(counts / score.size, risk, float(risk.mean()))


# ---------------------------------------------------------------------------------------- machinery


@dataclass(frozen=True)
class Interval:
    """How the intervals of one evaluation are drawn: over ``cluster``, each pair's prompt numbered from 0."""

    cluster: npt.NDArray[np.intp]
    replicates: int
    level: float
    seed: int | np.random.Generator

    def __post_init__(self) -> None:
        check_interval(self.replicates, self.level)


def _decided(label: Array) -> npt.NDArray[np.bool_]:
    decided: npt.NDArray[np.bool_] = label != 0.5
    if not decided.any():
        reject("label", "ties only", "at least one pair with label 0 or 1")
    return decided


def judge_gains(
    score: npt.ArrayLike, correct_head: npt.ArrayLike, correct_judge: npt.ArrayLike
) -> tuple[Array, Array, Array]:
    """Checked score and head, and what judging each pair adds: 0 where the judge gives no verdict."""
    score = as_vector("score", score)
    head = as_vector("correct_head", correct_head, length=score.size, low=0, high=1)
    judge = as_vector("correct_judge", correct_judge, length=score.size, low=0, high=1, missing=True)
    return score, head, np.where(np.isnan(judge), 0.0, judge - head)


def _cumulative(score: Array, value: Array) -> tuple[Array, Array]:
    """Running count and sum of ``value`` in descending score, at the end of each group of ties, from (0, 0).

    Joining these points by straight lines *is* the expectation over all orders of the ties: after m of a group of t,
    a random order has on average taken m/t of its sum.
    """
    group = np.unique(-score, return_inverse=True)[1]
    count = np.cumsum(np.bincount(group))
    total = np.cumsum(np.bincount(group, value))
    return np.concatenate(([0.0], count)), np.concatenate(([0.0], total))


def _above_random(judged: Array, gained: Array) -> tuple[Array, Array]:
    # Multiply before dividing: with gains in halves the last entry is then exactly 0, as it is by definition.
    return judged, gained - judged * gained[-1] / judged[-1]


def _area(x: Array, y: Array) -> float:
    return float(np.diff(x) @ (y[1:] + y[:-1])) / 2.0


def bootstrap_bounds(statistic: Callable[[Array], Array], interval: Interval) -> tuple[Array, Array]:
    """Percentile bounds of a statistic over resamples of prompts.

    scipy draws the prompts. A resample only reweights pairs, so ``statistic`` gets how often each pair occurs,
    (resamples, N), and gives (numbers, resamples).
    """
    cluster = interval.cluster
    n_clusters = int(cluster.max()) + 1

    def of_drawn(drawn: npt.NDArray[np.intp], axis: int) -> Array:
        rows = np.atleast_2d(drawn)
        in_row = rows + n_clusters * np.arange(len(rows))[:, None]
        times = np.bincount(in_row.ravel(), minlength=len(rows) * n_clusters).reshape(len(rows), n_clusters)
        found = statistic(times[:, cluster].astype(np.float64))
        return found if drawn.ndim > 1 else found[:, 0]

    bounds = stats.bootstrap(
        (np.arange(n_clusters),),
        of_drawn,
        n_resamples=interval.replicates,
        batch=max(1, CHUNK // cluster.size),  # keeps memory bounded
        vectorized=True,
        confidence_level=interval.level,
        method="percentile",
        rng=np.random.default_rng(interval.seed),
    ).confidence_interval
    return np.asarray(bounds.low), np.asarray(bounds.high)


def _uplift_of_resamples(score: Array, gain: Array, at: Array) -> Callable[[Array], Array]:
    """The uplift at each fraction, by how often each pair occurs: one sort of the scores serves all resamples."""
    group = np.unique(-score, return_inverse=True)[1]
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group)) - 1

    def uplift(times: Array) -> Array:
        weight = times[:, order]
        judged = np.pad(np.cumsum(weight, axis=1)[:, ends], ((0, 0), (1, 0)))
        gained = np.pad(np.cumsum(weight * gain[order], axis=1)[:, ends], ((0, 0), (1, 0)))
        above = gained - judged * gained[:, -1:] / judged[:, -1:]
        rows = [np.interp(at * x[-1], x, y) / x[-1] for x, y in zip(judged, above, strict=True)]
        return np.stack(rows, axis=1)

    return uplift


def mean_with_interval(value: Array, interval: Interval) -> Estimate:
    """The mean and its percentile bounds; NaN for these with a single prompt or without replicates."""
    point = float(value.mean())
    if interval.replicates == 0 or interval.cluster.max() == 0:
        return Estimate(point, float("nan"), float("nan"))
    low, high = bootstrap_bounds(lambda times: ((times @ value) / times.sum(axis=1))[None], interval)
    return Estimate(point, float(low[0]), float(high[0]))


def check_interval(replicates: int, level: float) -> None:
    """Raise InputError for intervals that cannot be drawn."""
    if replicates < 0:
        reject("replicates", replicates, "0 or more")
    if not 0 < level < 1:
        reject("level", level, "a number strictly between 0 and 1")


def normal_quantile(level: float) -> float:
    """z with P(|Z| ≤ z) = ``level`` for a standard normal Z."""
    check_interval(0, level)
    return float(special.ndtri((1 + level) / 2))


def _wilson(share: Array, count: npt.NDArray[np.intp], level: float) -> tuple[Array, Array]:
    z = normal_quantile(level)
    shrink = 1.0 + z**2 / count
    middle = (share + z**2 / (2.0 * count)) / shrink
    half = z / shrink * np.sqrt(share * (1.0 - share) / count + z**2 / (4.0 * count**2))
    # The exact bound at a share of 0 or 1 is 0 or 1; clip the rounding that would put it beyond its own point.
    return np.clip(middle - half, 0.0, share), np.clip(middle + half, share, 1.0)
