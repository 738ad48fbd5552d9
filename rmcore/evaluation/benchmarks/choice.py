"""Which pairs of a benchmark a budget or a threshold puts to a judge, by any score that routers rank by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from rmcore._base.errors import reject
from rmcore._base.numbers import Within, check_number
from rmcore.engine.routing import LearnedRouter, LearnedScore, rank_score
from rmcore.evaluation.benchmarks.item import Matrix
from rmcore.evaluation.benchmarks.scoring import Answers
from rmcore.evaluation.benchmarks.verdicts import Verdicts
from rmcore.model.error_prior import ErrorPrior

__all__ = ["BUDGETS", "Choice", "RouteBy", "check_cuts", "choose", "pair_scores"]

RouteBy: TypeAlias = Literal["learned", "u", "margin", "error_probability", "novelty", "rank_sum"]
"""``learned`` learns from the verdicts it buys, pair by pair in a seeded random order; the others are fixed."""
BUDGETS = (0.02, 0.10, 0.25, 0.45)
STEP = 64  # pairs that a router which learns sees together

Rows: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Choice:
    """The pairs of one budget or threshold.

    Attributes:
        name: as it was asked for.
        rows: their numbers, the first worth a call most.
        threshold: the lowest score among them; Inf where there is none, NaN where the scores moved.
    """

    name: str
    rows: Rows
    threshold: float


def check_cuts(
    budgets: Sequence[float], thresholds: Sequence[float], names: tuple[str, str] = ("budgets", "thresholds")
) -> None:
    """Raise InputError for a budget that is no share, or a threshold that is no number; ``names`` of these two."""
    for budget in budgets:
        check_number(names[0], budget, Within(least=0, most=1), "shares of the pairs, in [0, 1]")
    for threshold in thresholds:
        check_number(names[1], threshold, Within(), "finite numbers")


def pair_scores(answers: Answers, by: RouteBy, prior: ErrorPrior | None = None) -> Matrix:
    """(P,) what makes a pair worth a call; ``learned`` is what it begins with, before any verdict.

    Raises InputError where the model does not know the score.
    """
    if by not in get_args(RouteBy):
        reject("by", repr(by), f"one of {', '.join(get_args(RouteBy))}")
    candidates = answers.candidates()
    return rank_score(candidates, LearnedScore(prior) if by == "learned" else by).numpy()


def choose(
    answers: Answers,
    verdicts: Verdicts,
    by: RouteBy,
    *,
    budgets: Sequence[float] = (),
    thresholds: Sequence[float] = (),
    prior: ErrorPrior | None = None,
    seed: int = 0,
) -> list[Choice]:
    """The pairs of each budget (a share of all pairs) and each threshold (pairs with a higher score).

    Args:
        answers: the model's.
        verdicts: what ``learned`` learns from: it asks as it goes. The others ask nothing here.
        by: the score. Equal ones are taken in a seeded random order.
        budgets: shares of the pairs, in [0, 1].
        thresholds: on the score; for ``learned`` on the probability that the model is wrong.
        prior: the model's, where ``learned`` begins.
        seed: of the random order.

    Raises:
        InputError: a budget or threshold that is none, or a score that the model does not know.
    """
    check_cuts(budgets, thresholds)
    count = len(answers.pairs)
    shuffled = np.random.default_rng(seed).permutation(count)
    if by == "learned":
        walks = [(f"{100 * budget:.3g}%", LearnedRouter(budget, prior=prior)) for budget in budgets]
        walks += [(f"{by} > {cut:g}", LearnedRouter(threshold=cut, prior=prior)) for cut in thresholds]
        return [Choice(name, _walk(answers, verdicts, router, shuffled), float("nan")) for name, router in walks]
    score = pair_scores(answers, by)
    order = np.lexsort((shuffled, -score))
    cuts = [(f"{100 * budget:.3g}%", round(budget * count)) for budget in budgets]
    cuts += [(f"{by} > {cut:g}", int((score > cut).sum())) for cut in thresholds]
    return [
        Choice(name, order[:calls], float(score[order[calls - 1]]) if calls else float("inf")) for name, calls in cuts
    ]


def _walk(answers: Answers, verdicts: Verdicts, router: LearnedRouter, order: Rows) -> Rows:
    """What a router that learns routes of the pairs, step by step."""
    candidates = answers.candidates()
    routed = []
    for start in range(0, len(order), STEP):
        rows = order[start : start + STEP]
        seen = candidates[torch.from_numpy(rows)]
        chosen = router.select(seen)
        own = rows[chosen.numpy()]
        verdicts.ask(own)
        said = np.full(len(rows), np.nan)
        said[chosen.numpy()] = verdicts.preference[own]
        router.observe(seen, chosen, torch.from_numpy(said))
        routed.append(own)
    return np.concatenate(routed)
