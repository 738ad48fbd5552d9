"""Scored pairs on their way through router and judge, and what a router was offered of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rmcore.engine.judging import Submission
from rmcore.engine.pair_table import PairTable
from rmcore.engine.routing import Candidates, Reservation
from rmcore.judge.base import JudgeUsage, Verdict

__all__ = ["Offer", "ScoredPart"]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a router was offered, where that is in the table, and what it chose."""

    candidates: Candidates
    rows: Tensor
    routed: Tensor

    def preference(self, verdicts: Mapping[int, Verdict]) -> Tensor:
        """(Q,) float64: the verdict on each pair, by row of the table; NaN where there is none."""
        found = torch.full((len(self.rows),), math.nan, dtype=torch.float64)
        for k in self.routed.nonzero()[:, 0].tolist():
            verdict = verdicts.get(int(self.rows[k]))
            if verdict is not None and verdict.preference is not None:
                found[k] = verdict.preference
        return found


@dataclass
class ScoredPart:
    """Scored pairs on their way through router and judge: those of a micro-batch, or of the whole call.

    Attributes:
        groups: for each group of the table, which of the call's it is.
        table: the pairs.
        distance: (Q,) how far each pair's rows are from the training rows, where the router asked for that.
        first: number of its first group among all that were scored; names of questions count from it.
        reservation: what a budgeted router set aside.
        offer: what the router chose from.
        rows: of the table, handed to the judge,
        submission: as these questions.
    """

    groups: list[int]
    table: PairTable
    distance: Tensor | None = None
    first: int = 0
    reservation: Reservation | None = None
    offer: Offer | None = None
    rows: list[int] = field(default_factory=list)
    submission: Submission | None = None

    @classmethod
    def joined(cls, parts: Sequence[ScoredPart]) -> ScoredPart:
        """Parts that have not been routed yet as one."""
        distances = [part.distance for part in parts if part.distance is not None]
        return cls(
            [k for part in parts for k in part.groups],
            PairTable.joined([part.table for part in parts]),
            torch.cat(distances) if distances else None,
        )

    @property
    def usage(self) -> JudgeUsage | None:
        """What the questions cost; None if nobody knows, or if it never came to asking."""
        return None if self.submission is None else self.submission.usage
