"""What filters by uncertainty are worth (``uncertainties``): by variance, margin, and URME's two measures.

The paper's claim for URME is that a filter by threshold raises accuracy the more, the fewer pairs it keeps. Each curve
here has the tests of :mod:`rmcore.evaluation.filtering`, prompts resampled; a test at 5% is wrong one time in twenty,
so counts over all curves stand beside what chance alone would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmcore.evaluation.evaluate import PairStates
from rmcore.evaluation.filtering import SHARES, FilterCurve, filter_curve
from rmcore.head.estimators import URME, AnyEstimator, PairEstimate

__all__ = ["MEASURES", "filter_curves", "filter_lines", "filter_scores", "summary_lines"]

MEASURES = ("variance", "margin", "gap", "covariance")
"""v; −|g|; and of URME max |rᵢ − rⱼ| and max ‖Σ‖_F, the larger of the two answers', as in the paper."""
SHOWN = (1.0, 0.7, 0.5, 0.3)

Run = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
"""Scores by measure, whether each pair is right, its prompt."""


def filter_scores(
    estimator: AnyEstimator, states: PairStates, found: PairEstimate | None = None
) -> dict[str, np.ndarray]:
    """What a filter of these pairs can go by: measure → (N,); v and the margin only where they are ``found``."""
    scores = {} if found is None else {"variance": found.variance, "margin": -found.logit.abs()}
    if isinstance(estimator, URME):
        said = estimator.ensemble.scores(states.hidden.flatten(0, 1))
        for measure in ("gap", "covariance"):
            scores[measure] = said.uncertainty(measure).view(-1, 2).amax(1)
    return {measure: score.cpu().numpy() for measure, score in scores.items()}


def filter_curves(runs: Sequence[Run], *, replicates: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The curve of each measure over runs of the same prompts, as JSON values."""
    found = {}
    for measure in runs[0][0]:
        by, right, prompt = ([run[0][measure] for run in runs], [run[1] for run in runs], [run[2] for run in runs])
        curve: FilterCurve = filter_curve(by, right, prompt, replicates=max(replicates, 100), seed=seed)
        found[measure] = curve.to_dict()
    return found


def filter_lines(by_estimator: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A table of Markdown: estimator → measure → curve."""
    heads = ["filter", *(f"{100 * share:.0f}% kept" for share in SHOWN), "30% less all, points"]
    lines = [_row([*heads, "p, rising", "p, falling", "accuracy"]), "|---" * (len(heads) + 3) + "|"]
    for name, curves in by_estimator.items():
        for measure, curve in curves.items():
            accuracy = [f"{curve['accuracy'][SHARES.index(share)]:.1f}" for share in SHOWN]
            gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*curve["gain"])
            tests = [f"{curve['p_rising']:.3f}", f"{curve['p_falling']:.3f}", curve["verdict"]]
            lines.append(_row([f"{name}, {measure}", *accuracy, gain, *tests]))
    return lines


def summary_lines(parts: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """How many curves rise, fall or show neither: part of the data → estimator → measure → curve."""
    lines = [_row(["filter by", "curves", "rise", "fall", "rise and fall", "not shown"]), "|---" * 6 + "|"]
    for measure in MEASURES:
        curves = [own[measure] for part in parts.values() for own in part.values() if measure in own]
        said = [curve["verdict"] for curve in curves]
        counts = [str(said.count(verdict)) for verdict in ("rises", "falls", "rises and falls", "not shown")]
        lines.append(_row([measure, str(len(curves)), *counts]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
