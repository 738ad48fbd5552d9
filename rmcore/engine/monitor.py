"""What a stream of score calls says of itself, for curves and alarms: the share routed, u, and judge against head.

A judge that contradicts the head more often than the head's own probabilities allow is the first sign that a policy has
found what the head does not know (reward hacking), long before the reward turns. A calibrated head with preference p̃
errs with probability d = σ(−|p̃|), so of judged pairs it should be contradicted on mean(d) of them, plus what the judge
errs; both are weighted by the strength of the verdicts, as in :mod:`rmcore.judge.wrappers.disagreement`, which has the
test with a stated rate of false alarms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from rmcore._base.quantile import quantiles
from rmcore._base.tracing import Span
from rmcore.engine.group_score import GroupScore
from rmcore.engine.groups import GroupScores
from rmcore.engine.pair_table import PairState
from rmcore.judge.base import RULE

__all__ = ["LEVELS", "Agreement", "agreement", "group_figures", "monitored", "note_scores"]


LEVELS: Final = (0.5, 0.9, 0.99)
"""The quantiles of u that are reported."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Judge against head over some pairs, each counted with its verdict's strength |J|.

    Attributes:
        pairs: with a verdict that has a side, and a head that has one; by a judge, not by rule.
        judged: the sum of their strengths.
        disagreed: of those where the judge took the other side.
        expected: the sum that a calibrated head and a judge without errors would give.
    """

    pairs: int = 0
    judged: float = 0.0
    disagreed: float = 0.0
    expected: float = 0.0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.pairs + other.pairs,
            self.judged + other.judged,
            self.disagreed + other.disagreed,
            self.expected + other.expected,
        )


def agreement(scores: GroupScores) -> Agreement:
    """Judge against head over the judged pairs of a call; the head's side is g/u, also where the verdict stands."""
    table = scores.table
    found = [
        (row, verdict.preference)
        for row, verdict in table.verdicts.items()
        if verdict.preference and verdict.judge != RULE and int(table.state[row]) == PairState.JUDGE
    ]
    if not found:
        return Agreement()
    rows = torch.tensor([row for row, _ in found])
    head = (table.logit.cpu()[rows] / table.uncertainty.cpu()[rows]).double()
    return _agreement(head, [preference for _, preference in found])


def group_figures(group: GroupScore) -> dict[str, float]:
    """What a group says of itself, under the names of :func:`monitored` and of the rewards' logs, for a trainer that
    averages over samples: ``judge_rate`` of its pairs, mean u, ``unknown_rate``, and judge against head as sums.

    The mean is that of finite u. Where there is none it is 1, u's least value, since a trainer's logs take numbers:
    ``unknown_rate``, the share of pairs of which the head knows nothing, says that it is no certainty.
    """
    above = torch.ones_like(group.routed).triu(1)
    above &= True if group.compared is None else group.compared
    u = group.uncertainty[above]
    known = u.isfinite()
    unknown, u = (~known).double(), u[known]
    judged = [
        (one.i, one.j, one.verdict.preference)
        for one in group.decisions
        if one.by == "judge" and one.verdict is not None and one.verdict.preference and one.verdict.judge != RULE
    ]
    seen = Agreement()
    if judged:
        i, j, preferences = zip(*judged, strict=True)
        seen = _agreement((group.logit / group.uncertainty)[list(i), list(j)].double(), preferences)
    return {
        "judge_rate": float(group.routed[above].double().mean()) if bool(above.any()) else 0.0,
        "uncertainty": float(u.mean()) if len(u) else 1.0,
        "unknown_rate": float(unknown.mean()) if len(unknown) else 0.0,
        "judged": seen.judged,
        "judge_disagreement": seen.disagreed,
        "judge_disagreement_expected": seen.expected,
    }


def _agreement(head: Tensor, preferences: Sequence[float]) -> Agreement:
    """Of the head's p̃ and the verdicts on the same pairs, from the same side."""
    verdicts = torch.tensor(preferences, dtype=torch.float64)
    usable = head.isfinite() & (head != 0)
    head, verdicts = head[usable], verdicts[usable]
    weight = verdicts.abs()
    return Agreement(
        int(usable.sum()),
        float(weight.sum()),
        float(weight[(head > 0) != (verdicts > 0)].sum()),
        float((weight * torch.sigmoid(-head.abs())).sum()),
    )


def monitored(scores: GroupScores | None) -> dict[str, float]:
    """The figures of a step that are worth a curve: the same names whatever happened in it.

    Trainers average them over steps and ranks, so judge against head comes as sums, whose ratio is right after any
    averaging. Without a pair the quantiles of u are its least value, 1.
    """
    seen, levels = Agreement(), [1.0, 1.0, 1.0]
    if scores is not None:
        u = scores.table.uncertainty.cpu()
        u = u[u.isfinite()]
        seen, levels = agreement(scores), quantiles(u.numpy(), LEVELS) if len(u) else levels
    return {
        **{f"uncertainty_p{round(100 * level)}": value for level, value in zip(LEVELS, levels, strict=True)},
        "judged": seen.judged,
        "judge_disagreement": seen.disagreed,
        "judge_disagreement_expected": seen.expected,
    }


def note_scores(span: Span, scores: GroupScores) -> GroupScores:
    """Count ``scores`` on their span."""
    if span.recording:
        state = scores.table.state
        failed = int(((state == PairState.JUDGE_FAILED) | (state == PairState.UNAFFORDABLE)).sum())
        span.set(
            rmcore__groups=len(scores),
            rmcore__responses=scores.table.layout.responses,
            rmcore__pairs=len(scores.table),
            rmcore__routed=int((state == PairState.JUDGE).sum()) + failed,
            rmcore__judge_failed=failed,
        )
    return scores
