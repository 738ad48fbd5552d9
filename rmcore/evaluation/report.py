"""What goes into an evaluation and what comes out of it: data, checks and rendering. ``statistics`` computes it.

Conventions shared by every array here: one entry per pair; a *score* routes **highest first**; *correct* is 1 where
the answer agrees with the label, 0 where it does not and 0.5 where it states no preference (a coin would decide).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject

__all__ = [
    "AccuracyCostCurve",
    "Array",
    "Estimate",
    "EvaluationReport",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "ScoreReport",
    "ScoredPairs",
    "Uplift",
    "as_vector",
]

Array: TypeAlias = npt.NDArray[np.float64]
"""A one-dimensional float64 array."""

BUILT_IN_SCORES = ("u", "margin", "novelty", "rank_sum", "random")
"""Scores every evaluation computes itself; a control may not take one of these names."""


def as_vector(
    name: str,
    value: npt.ArrayLike,
    *,
    length: int | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    missing: bool = False,
) -> Array:
    """``value`` as a float64 vector in [low, high], or :class:`InputError` naming ``name``; NaN only if ``missing``."""
    try:
        vector = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor on a GPU, or one that wants grad
        reject(name, f"{type(value).__name__} ({error})", "a one-dimensional array of numbers")
    if vector.ndim != 1:
        reject(name, f"shape {vector.shape}", "a one-dimensional array, one entry per pair")
    if vector.size == 0:
        reject(name, "no entries", "at least one pair")
    if length is not None and vector.size != length:
        reject(name, f"{vector.size} entries", f"{length}, one per pair like the other arguments")
    # The negated form catches NaN too: every comparison with it is false.
    usable = np.isfinite(vector) & (vector >= low) & (vector <= high)
    if missing:
        usable |= np.isnan(vector)
    if not usable.all():
        row = int(np.flatnonzero(~usable)[0])
        bounds = "finite numbers" if low == -math.inf else f"numbers in [{low:g}, {high:g}]"
        reject(f"{name}[{row}]", f"{vector[row]}", bounds + (" or NaN for none" if missing else ""))
    return vector


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredPairs:
    """What a head said about labelled pairs, and what else is known of them. Arrays are copied and made read-only.

    Anything ``numpy.asarray`` takes will do; the attributes are float64 vectors, and ``cluster`` is renumbered 0..C-1.

    Attributes:
        logit: g, the head's raw logit; positive means "first preferred".
        label: 1 the first is better, 0 the second, 0.5 a tie. Ties are counted and left out of every statistic.
        uncertainty: u > 0, the posterior's inflation of the logit scale (design 2.5).
        cluster: one id per pair, of the prompt it comes from; intervals resample prompts, not pairs, because pairs
            of one prompt share its difficulty. Numbers or strings.
        probability: the served P(first is better), strictly inside (0, 1); by default σ(g/u), the mean-field form.
        judge: the judge's preference in [-1, 1] from the first response's side (1 first, -1 second, 0 tie), NaN
            where there is no verdict. None stands for an oracle that always agrees with the label.
        controls: further scores to hold u against, name → array, highest routed first (nearest-training distance,
            ‖e₁ − e₂‖, |length difference|, ...).
        novelty: distance from the training data (:mod:`rmcore.head.rows`), where the head knows it.
        served_logit: log p/(1-p), computed here: g/u itself where no probability is given, so it never saturates.
    """

    logit: npt.NDArray[Any]
    label: npt.NDArray[Any]
    uncertainty: npt.NDArray[Any]
    cluster: npt.NDArray[Any]
    probability: npt.NDArray[Any] | None = None
    judge: npt.NDArray[Any] | None = None
    controls: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    novelty: npt.NDArray[Any] | None = None
    served_logit: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        logit = as_vector("logit", self.logit)
        n = logit.size
        label = as_vector("label", self.label, length=n)
        if not np.isin(label, (0.0, 0.5, 1.0)).all():
            row = int(np.flatnonzero(~np.isin(label, (0.0, 0.5, 1.0)))[0])
            reject(f"label[{row}]", f"{label[row]}", "1 (first is better), 0 (second is) or 0.5 (tie)")
        uncertainty = as_vector("uncertainty", self.uncertainty, length=n)
        if (uncertainty <= 0).any():
            row = int(np.flatnonzero(uncertainty <= 0)[0])
            reject(f"uncertainty[{row}]", f"{uncertainty[row]}", "a positive number (u ≥ 1 by its formula)")
        self._keep("logit", logit)
        self._keep("label", label)
        self._keep("uncertainty", uncertainty)
        self._keep("cluster", _cluster_index(self.cluster, n))
        served = logit / uncertainty
        if self.probability is not None:
            probability = _open_interval("probability", self.probability, n)
            served = np.log(probability) - np.log1p(-probability)
        else:
            probability = _sigmoid(served)
        self._keep("probability", probability)
        self._keep("served_logit", served)
        if self.judge is not None:
            self._keep("judge", as_vector("judge", self.judge, length=n, low=-1, high=1, missing=True))
        if self.novelty is not None:
            self._keep("novelty", as_vector("novelty", self.novelty, length=n, low=0))
        controls = {}
        for name, score in self.controls.items():
            if name in BUILT_IN_SCORES:
                reject("controls", f"the name {name!r}", f"a name other than {', '.join(BUILT_IN_SCORES)}")
            controls[name] = _frozen(as_vector(f"controls[{name!r}]", score, length=n))
        object.__setattr__(self, "controls", MappingProxyType(controls))

    def _keep(self, name: str, value: npt.NDArray[Any]) -> None:
        object.__setattr__(self, name, _frozen(value))

    def __len__(self) -> int:
        return int(self.logit.size)

    def decided(self) -> npt.NDArray[np.bool_]:
        """Which pairs have a label other than a tie."""
        mask: npt.NDArray[np.bool_] = self.label != 0.5
        return mask


def _frozen(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    copy = value.copy()  # of a caller's array we must neither follow later changes nor forbid them
    copy.setflags(write=False)
    return copy


def _cluster_index(cluster: npt.ArrayLike, length: int) -> npt.NDArray[np.intp]:
    """Any hashable-looking ids as 0..C-1, so that a resample is one ``bincount``."""
    ids = np.asarray(cluster)
    if ids.shape != (length,):
        reject("cluster", f"shape {ids.shape}", f"({length},), one prompt id per pair")
    if ids.dtype.kind not in "iubUS" and not (ids.dtype.kind == "f" and np.isfinite(ids).all()):
        reject("cluster", f"dtype {ids.dtype}", "integers or strings without missing values")
    inverse: npt.NDArray[np.intp] = np.unique(ids, return_inverse=True)[1]
    return inverse


def _sigmoid(logit: Array) -> Array:
    small = np.exp(-np.abs(logit))  # of a non-positive number only: no overflow at any logit
    return np.where(logit >= 0, 1.0, small) / (1.0 + small)


def _open_interval(name: str, value: npt.ArrayLike, length: int) -> Array:
    probability = as_vector(name, value, length=length, low=0, high=1)
    certain = np.flatnonzero((probability == 0) | (probability == 1))
    if certain.size:
        reject(
            f"{name}[{certain[0]}]",
            f"{probability[certain[0]]:g}",
            "a number strictly between 0 and 1",
            "Certainty has infinite log-loss when wrong; leave it out to have σ(g/u) computed in float64",
        )
    return probability


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its interval; NaN bounds mean that no interval can be had (one prompt, no replicates)."""

    point: float
    low: float
    high: float


@dataclass(frozen=True)
class Uplift(Estimate):
    """Percentage points of accuracy over random routing when ``fraction`` of the pairs are judged."""

    fraction: float


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Non-empty bins of confidence max(p, 1-p): their centre, mean confidence, accuracy with Wilson bounds, count."""

    center: Array
    confidence: Array
    accuracy: Array
    low: Array
    high: Array
    count: npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class AccuracyCostCurve:
    """Accuracy of the routed system after 0..N judged pairs.

    ``area`` is the mean accuracy over all budgets. ``normalised_area`` is the part above random routing as a share of
    what the best possible order would gain: 1 is that order, 0 is random, below 0 is harmful; NaN where every order
    is the same.
    """

    fraction: Array
    accuracy: Array
    area: float
    normalised_area: float

    def at(self, fractions: npt.ArrayLike) -> Array:
        """Accuracy at any fraction in [0, 1]; between two counts the next pair is judged with that probability."""
        return np.interp(as_vector("fractions", fractions, low=0, high=1), self.fraction, self.accuracy)


@dataclass(frozen=True, eq=False)
class RiskCoverageCurve:
    """Error rate among the ``coverage`` share of pairs with the lowest score, and its mean over coverages (AURC)."""

    coverage: Array
    risk: Array
    aurc: float


@dataclass(frozen=True, eq=False)
class ScoreReport:
    """One score's worth: ``uplift`` at the asked fractions, ``band`` the same on a regular grid, for plots.

    For ``random`` the bounds are those between which random orders of these same pairs fall, not a bootstrap.
    """

    name: str
    uplift: tuple[Uplift, ...]
    band: tuple[Uplift, ...]
    auroc: float
    rank_correlation_with_u: float
    curve: AccuracyCostCurve
    risk_coverage: RiskCoverageCurve

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; the curve at the band's fractions, None for what does not exist."""
        grid = [step.fraction for step in self.band]
        return {
            "name": self.name,
            "uplift": [_estimate(step) | {"fraction": step.fraction} for step in self.uplift],
            "auroc_errors": _number(self.auroc),
            "area": _number(self.curve.area),
            "normalised_area": _number(self.curve.normalised_area),
            "aurc": _number(self.risk_coverage.aurc),
            "rank_correlation_with_u": _number(self.rank_correlation_with_u),
            "curve": {
                "fraction": grid,
                "accuracy": [_number(value) for value in self.curve.at(grid)],
                "uplift": [_number(step.point) for step in self.band],
                "uplift_low": [_number(step.low) for step in self.band],
                "uplift_high": [_number(step.high) for step in self.band],
            },
        }


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What :func:`rmcore.evaluation.evaluate.evaluate_pairs` found, over the ``n_decided`` pairs that are no tie.

    ``log_loss`` scores the served probability, ``log_loss_logit`` the raw logit: their difference is what the
    uncertainty does for calibration. ``judge_accuracy`` is over the pairs with a verdict.
    """

    n_pairs: int
    n_decided: int
    n_prompts: int
    accuracy: Estimate
    log_loss: float
    log_loss_logit: float
    ece_equal_mass: float
    ece_equal_width: float
    reliability: ReliabilityCurve
    judge: str
    judge_accuracy: float
    n_no_verdict: int
    scores: tuple[ScoreReport, ...]
    level: float
    replicates: int
    seed: int

    @property
    def n_ties(self) -> int:
        """Pairs whose label is a tie, left out of every statistic."""
        return self.n_pairs - self.n_decided

    def score(self, name: str) -> ScoreReport:
        """The report of the score called ``name``."""
        by_name = {entry.name: entry for entry in self.scores}
        if name not in by_name:
            reject("name", repr(name), f"one of {', '.join(by_name)}")
        return by_name[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values. What does not exist (an AUROC with one class) is None, never NaN."""
        bins = self.reliability
        return {
            "pairs": {
                "total": self.n_pairs,
                "decided": self.n_decided,
                "ties": self.n_ties,
                "prompts": self.n_prompts,
            },
            "accuracy": _estimate(self.accuracy),
            "log_loss": _number(self.log_loss),
            "log_loss_logit": _number(self.log_loss_logit),
            "ece": {"equal_mass": _number(self.ece_equal_mass), "equal_width": _number(self.ece_equal_width)},
            "reliability": {
                name: [_number(value) for value in getattr(bins, name)]
                for name in ("center", "confidence", "accuracy", "low", "high")
            }
            | {"count": [int(count) for count in bins.count]},
            "judge": {
                "kind": self.judge,
                "accuracy": _number(self.judge_accuracy),
                "no_verdict": self.n_no_verdict,
            },
            "interval": {
                "level": self.level,
                "replicates": self.replicates,
                "seed": self.seed,
                "resampled": "prompts",
            },
            "scores": [entry.to_dict() for entry in self.scores],
        }

    def to_markdown(self) -> str:
        """Two tables: the head by itself, then every score as a router."""
        judge = f"{_percent(self.judge_accuracy)} ({self.judge}, {self.n_no_verdict} without a verdict)"
        base = _percent(self.accuracy.point)
        if math.isfinite(self.accuracy.low):
            base += f" [{100 * self.accuracy.low:.1f}, {100 * self.accuracy.high:.1f}]"
        head = [
            ("pairs (ties left out)", f"{self.n_decided} ({self.n_ties})"),
            ("prompts", f"{self.n_prompts}"),
            ("base accuracy", base),
            ("log-loss of p / of raw logit", f"{_fixed(self.log_loss)} / {_fixed(self.log_loss_logit)}"),
            ("ECE, equal mass / equal width", f"{_fixed(self.ece_equal_mass)} / {_fixed(self.ece_equal_width)}"),
            ("judge accuracy", judge),
        ]
        shares = [f"{100 * step.fraction:g}% judged" for step in self.scores[0].uplift] if self.scores else []
        columns = ["routed by", *shares, "AUROC of errors", "area", "rank corr. with u"]
        lines = ["| head | |", "|---|---|", *(f"| {name} | {value} |" for name, value in head), ""]
        lines += [_row(columns), "|---|" + "---:|" * (len(columns) - 1)]
        for entry in self.scores:
            tail = (entry.auroc, entry.curve.normalised_area, entry.rank_correlation_with_u)
            name = entry.name.replace("|", "\\|")  # a control may well be called |length difference|
            lines.append(_row([name, *map(_points, entry.uplift), *map(_fixed, tail)]))
        lines += [
            "",
            f"Middle columns: points of accuracy over random routing of as many pairs, with {100 * self.level:g}% "
            f"intervals ({self.replicates} resamples of prompts; for random: where random orders fall). "
            "Area: 0 is random routing, 1 the best possible order. –: not defined here.",
        ]
        return "\n".join(lines) + "\n"


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _estimate(value: Estimate) -> dict[str, float | None]:
    return {"point": _number(value.point), "low": _number(value.low), "high": _number(value.high)}


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _fixed(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if math.isfinite(value) else "–"


def _points(step: Uplift) -> str:
    interval = f" [{step.low:+.1f}, {step.high:+.1f}]" if math.isfinite(step.low) else ""
    return f"{step.point + 0.0:+.1f}{interval}"
