"""Does a filter by uncertainty raise accuracy, and does it do so all the way? Intervals and tests over prompts.

A filter keeps the share c of the pairs whose uncertainty is lowest; a(c) is the accuracy of those it keeps. A curve of
points tells little: kept sets are nested, pairs of a prompt go together, and a step of a point is noise where a hundred
pairs are left. Two tests of order-restricted inference (Barlow et al. 1972; Robertson, Wright & Dykstra 1988) say what
can be said. With w(c) the inverse bootstrap variances and m the closest curve that never falls as c shrinks,

    rising   = Σ w (m − m̄)²     against a filter that does nothing: small p, accuracy rises
    falling  = Σ w (a − m)²      against one that never does harm:   small p, accuracy falls somewhere

both against the same statistic of resamples of *prompts* centred at a flat curve, which is the least favourable of
those that never fall. "Monotone within its interval" is: the second is not rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from rmcore._base.errors import reject
from rmcore._base.quantile import quantiles
from rmcore.evaluation.report import Array, as_vector
from rmcore.evaluation.statistics import check_interval

__all__ = ["SHARES", "FilterCurve", "filter_curve"]

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True, eq=False)
class FilterCurve:
    """Accuracy of what a filter keeps, in percent, from all pairs to the fewest.

    Attributes:
        share: (C,) of the pairs kept, above the share asked for where uncertainties tie.
        accuracy, low, high: (C,) with percentile bounds.
        gain, gain_low, gain_high: accuracy at the last share less that of all pairs, in points.
        p_rising: of the test against a filter that does nothing.
        p_falling: of the test against one that never does harm.
        level: of bounds and tests.
    """

    share: Array
    accuracy: Array
    low: Array
    high: Array
    gain: float
    gain_low: float
    gain_high: float
    p_rising: float
    p_falling: float
    level: float = 0.95

    @property
    def verdict(self) -> Literal["rises", "falls", "rises and falls", "not shown"]:
        """What the two tests say together; "not shown" is a curve that may be flat."""
        rises, falls = (p <= 1 - self.level for p in (self.p_rising, self.p_falling))
        if rises and falls:
            return "rises and falls"
        return "rises" if rises else "falls" if falls else "not shown"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        curve = {name: getattr(self, name).round(4).tolist() for name in ("share", "accuracy", "low", "high")}
        gain = [round(value, 4) for value in (self.gain, self.gain_low, self.gain_high)]
        tests = {"p_rising": round(self.p_rising, 4), "p_falling": round(self.p_falling, 4), "verdict": self.verdict}
        return curve | {"gain": gain} | tests


def filter_curve(
    score: Sequence[npt.ArrayLike],
    correct: Sequence[npt.ArrayLike],
    cluster: Sequence[npt.ArrayLike],
    *,
    shares: Sequence[float] = SHARES,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> FilterCurve:
    """The curve of a filter by ``score``, as the mean over runs (seeds of a head, say) of the same prompts.

    Args:
        score: of each run (N,), what the filter goes by: a threshold keeps what is at most its quantile.
        correct: likewise, in [0, 1]: whether the pair is right.
        cluster: likewise, the pair's prompt. One name is one prompt in all runs, and is drawn or not in all.
        shares: falling, from 1; kept of the pairs of each run.
        replicates: resamples of prompts, at least 100.
        level: of bounds and tests.
        seed: of the resamples.

    Raises InputError for arguments that do not fit.
    """
    asked = as_vector("shares", shares, low=0, high=1)
    if asked.size < 2 or asked[0] != 1 or not (np.diff(asked) < 0).all() or asked[-1] == 0:
        reject("shares", list(shares), "at least two, falling from 1 to above 0")
    if not len(score) == len(correct) == len(cluster) or not len(score):
        reject("score", f"{len(score)} runs", f"as many of correct ({len(correct)}) and cluster ({len(cluster)})")
    check_interval(replicates, level)
    if replicates < 100:
        reject("replicates", replicates, "at least 100: the tests are of resamples")
    right, kept, pairs = _by_prompt(score, correct, cluster, asked)
    prompts = right.shape[0]
    if prompts < 2:
        reject("cluster", f"{prompts} prompt", "at least 2")
    times = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=replicates)
    point = _mean_of_runs(right.sum(0, keepdims=True), kept.sum(0, keepdims=True))[0]
    drawn = _mean_of_runs(
        np.tensordot(times.astype(np.float64), right, 1), np.tensordot(times.astype(np.float64), kept, 1)
    )
    drawn = drawn[np.isfinite(drawn).all(1)]  # a resample may hold no pair of those kept
    if len(drawn) < 0.95 * replicates:
        reject("shares", asked[-1], "a share that keeps pairs of more prompts")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    gains = np.quantile(drawn[:, -1] - drawn[:, 0], [(1 - level) / 2, (1 + level) / 2])
    rising, falling = _order_tests(point, drawn)
    return FilterCurve(
        share=kept.sum(0).mean(0) / pairs,
        accuracy=100 * point,
        low=100 * low,
        high=100 * high,
        gain=100 * float(point[-1] - point[0]),
        gain_low=100 * float(gains[0]),
        gain_high=100 * float(gains[1]),
        p_rising=rising,
        p_falling=falling,
        level=level,
    )


def _by_prompt(
    score: Sequence[npt.ArrayLike], correct: Sequence[npt.ArrayLike], cluster: Sequence[npt.ArrayLike], shares: Array
) -> tuple[Array, Array, float]:
    """(prompts, runs, C) sums of right and of all kept pairs, and the mean number of pairs of a run."""
    names = np.concatenate([np.asarray(one) for one in cluster])
    prompts, number = np.unique(names, return_inverse=True)
    right, at = np.zeros((len(prompts), len(score), len(shares))), 0
    kept = np.zeros_like(right)
    for run, (u, good, who) in enumerate(zip(score, correct, cluster, strict=True)):
        u = as_vector(f"score[{run}]", u)
        good = as_vector(f"correct[{run}]", good, length=u.size, low=0, high=1)
        if np.asarray(who).shape != u.shape:
            reject(f"cluster[{run}]", f"shape {np.asarray(who).shape}", f"{u.shape}, one prompt a pair")
        own, at = number[at : at + u.size], at + u.size
        for k, threshold in enumerate(quantiles(u, shares.tolist())):
            stays = u <= threshold
            right[:, run, k] = np.bincount(own[stays], good[stays], len(prompts))
            kept[:, run, k] = np.bincount(own[stays], minlength=len(prompts))
    return right, kept, names.size / len(score)


def _mean_of_runs(right: Array, kept: Array) -> Array:
    """(R, runs, C) sums → (R, C) the mean over runs of each one's accuracy; NaN where a run keeps nothing."""
    with np.errstate(invalid="ignore"):
        return np.asarray((right / kept).mean(1))


def _order_tests(point: Array, drawn: Array) -> tuple[float, float]:
    """(p of rising, p of falling); a resample counts as extreme where it is as far as the data, one added for them."""
    variance = drawn.var(0)
    if not (variance > 0).all():
        return 1.0, 1.0  # every pair right, or every pair wrong: no order can be told
    weights = 1 / variance

    def statistics(curves: Array) -> tuple[Array, Array]:
        closest = np.stack([isotonic_regression(curve, weights=weights).x for curve in curves])
        middle = (closest @ weights / weights.sum())[..., None]
        return ((closest - middle) ** 2) @ weights, ((curves - closest) ** 2) @ weights

    flat = statistics(drawn - point)
    seen = [float(one[0]) for one in statistics(point[None])]
    rising, falling = ((1 + int((null >= own).sum())) / (1 + len(drawn)) for own, null in zip(seen, flat, strict=True))
    return rising, falling
