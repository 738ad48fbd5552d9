"""Scores of what a model says it knows: Brier's, and RewardUQ's of confidently right and wrong pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject
from rmcore.evaluation.report import as_vector
from rmcore.evaluation.statistics import correctness

__all__ = ["BETAS", "brier_score", "confident_score"]

BETAS = (0.0, 0.01, 0.2, 1.0)


def brier_score(probability: npt.ArrayLike, label: npt.ArrayLike) -> float:
    """Mean of (p − y)² (Brier 1950); a tie is y = 0.5."""
    probability = as_vector("probability", probability, low=0, high=1)
    label = as_vector("label", label, length=probability.size, low=0, high=1)
    return float(np.square(probability - label).mean())


def confident_score(
    logit: npt.ArrayLike, variance: npt.ArrayLike, label: npt.ArrayLike, beta: float, *, z: float = 1.96
) -> float:
    """CT/((1−β)T + β) − CF/((1−β)F + β) of RewardUQ (arXiv:2602.24040), in [−1, 1]: higher is better.

    T and F are the shares of pairs that are right and wrong, CT and CF those that are so confidently: g ± z√v leaves 0
    out. RewardUQ holds two responses' own intervals against each other; this is the interval of their *difference*,
    narrower where the two move together. At β = 0 it is the share of right pairs that are confident less that of wrong
    ones, at β = 1 what confident pairs are worth among all; NaN at β = 0 where none is right, or none wrong.

    Args:
        logit: (N,) g.
        variance: (N,) v ≥ 0 of it.
        label: (N,) 0 or 1.
        beta: β in [0, 1].
        z: half-width of the interval, in standard deviations.
    """
    g = as_vector("logit", logit)
    v = as_vector("variance", variance, length=g.size, low=0)
    right = correctness(g, label)
    if not 0 <= beta <= 1:
        reject("beta", beta, "a number in [0, 1]")
    if not z >= 0:
        reject("z", z, "a number from 0")
    confident = np.abs(g) > z * np.sqrt(v)
    parts = []
    for share in (right, 1 - right):
        floor = (1 - beta) * share.mean() + beta
        parts.append(float((share * confident).mean() / floor) if floor else float("nan"))
    return parts[0] - parts[1]
