"""Judged pairs as data for a head: from a scored batch and its verdicts to hidden rows, labels and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.engine.groups import GroupScore, GroupScores
from rmcore.judge.base import RULE, Verdict

__all__ = ["JudgedPairs", "judged_pairs"]


@dataclass(frozen=True)
class JudgedPairs:
    """What a head learns from, laid out as :func:`rmcore.head.fit.fit` takes it.

    Attributes:
        hidden: (R, h) rows; in difference mode one a response, in concat mode one an ordered pair.
        labels: (N,) float32 in [0, 1], the probability that the first response is better.
        weights: (N,) float32, what each counts, where 1 is a pair of the training data.
        pairs: (N, 2) int64 rows of ``hidden`` in difference mode, None in concat mode.
        skipped: verdicts that were not taken, by reason.
    """

    hidden: Tensor
    labels: Tensor
    weights: Tensor
    pairs: Tensor | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> JudgedPairs:
        """The same on another device."""
        pairs = None if self.pairs is None else self.pairs.to(device)
        return JudgedPairs(self.hidden.to(device), self.labels.to(device), self.weights.to(device), pairs, self.skipped)

    def bounded(self, weight: float) -> tuple[JudgedPairs, float]:
        """The same with all weights scaled down alike so that they sum to at most ``weight``, and the factor."""
        total = float(self.weights.sum())
        factor = min(1.0, weight / total) if total > 0 else 1.0
        return (self if factor == 1.0 else replace(self, weights=self.weights * factor)), factor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> JudgedPairs:
        """From :meth:`tensors`."""
        return cls(tensors["hidden"], tensors["labels"], tensors["weights"], tensors.get("pairs"))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        parts = {"hidden": self.hidden, "labels": self.labels, "weights": self.weights}
        return parts if self.pairs is None else {**parts, "pairs": self.pairs}


def judged_pairs(
    scores: GroupScores,
    mode: Literal["difference", "concat"],
    *,
    judge_weight: float = 1.0,
    flip_weight: float = 0.0,
    epsilon: float = 0.0,
) -> JudgedPairs:
    """The judged pairs of a scored batch.

    A verdict of preference q becomes the label ½ + q(½ − ε): a win 1 − ε, a tie ½, a weak or soft preference what it
    says. In concat mode both orders of a pair are taken, as in fitting, or the one that was scored.

    Not taken, and counted in ``skipped``: ``failed`` (no verdict), ``rule`` (decided without a judge, as it will be
    next time), ``flip`` (the orders disagree and ``flip_weight`` is 0), ``nonfinite`` (a hidden row holds NaN or Inf)
    and ``repeated`` (equal rows in one group: one question, one answer, which must not count twice).

    Args:
        scores: with its hidden rows, as an engine with a learner returns it.
        mode: of the head.
        judge_weight: of a verdict.
        flip_weight: factor on it where the orders disagree.
        epsilon: ε.

    Raises InputError where ``scores`` has no hidden rows, or not as many as its groups need.
    """
    hidden = scores.hidden
    if hidden is None:
        reject("scores.hidden", "None", "the hidden rows of the batch", "Score with an engine that has a learner")
    needed = sum(_rows_of(group, mode) for group in scores)
    if hidden.dim() != 2 or len(hidden) != needed:
        reject("scores.hidden", f"shape {tuple(hidden.shape)}", f"({needed}, h), as the groups need")
    skipped: Counter[str] = Counter()
    rows: dict[int, int] = {}
    labels: list[float] = []
    weights: list[float] = []
    index: list[tuple[int, int]] = []
    first = 0
    for group in scores:
        seen: set[frozenset[bytes]] = set()
        for decision in group.decisions:
            reason = _why_not(decision.by, decision.verdict, flip_weight)
            if reason == "identical":
                continue
            places = _places(group, mode, decision.i, decision.j, first)
            if not reason and not bool(hidden[places].isfinite().all()):
                reason = "nonfinite"
            content = frozenset(hidden[place].contiguous().view(torch.uint8).numpy().tobytes() for place in places)
            if not reason and content in seen:
                reason = "repeated"
            if reason:
                skipped[reason] += 1
                continue
            seen.add(content)
            assert decision.verdict is not None
            assert decision.verdict.preference is not None
            label = 0.5 + decision.verdict.preference * (0.5 - epsilon)
            weight = judge_weight * (flip_weight if decision.verdict.flipped else 1.0)
            numbers = [rows.setdefault(place, len(rows)) for place in places]
            if mode == "difference":
                index.append((numbers[0], numbers[1]))
                labels.append(label)
                weights.append(weight)
            else:
                labels += [label, 1 - label][: len(places)]
                weights += [weight] * len(places)
        first += _rows_of(group, mode)
    return JudgedPairs(
        hidden[list(rows)],
        torch.tensor(labels, dtype=torch.float32),
        torch.tensor(weights, dtype=torch.float32),
        torch.tensor(index, dtype=torch.int64).view(-1, 2) if mode == "difference" else None,
        dict(skipped),
    )


def _why_not(by: str, verdict: Verdict | None, flip_weight: float) -> str:
    if by == "identical":
        return "identical"
    if verdict is None or verdict.preference is None:
        return "failed"
    if verdict.judge == RULE:
        return "rule"
    return "flip" if verdict.flipped and flip_weight == 0 else ""


def _rows_of(group: GroupScore, mode: str) -> int:
    k = group.size
    return k if mode == "difference" else k * (k - 1) // (2 if group.one_order else 1)


def _places(group: GroupScore, mode: str, i: int, j: int, first: int) -> list[int]:
    """The rows of pair i < j, in the layout of ``RewardEngine.score_hidden``."""
    k = group.size
    if mode == "difference":
        return [first + i, first + j]
    if group.one_order:
        return [first + i * k - i * (i + 1) // 2 + j - i - 1]
    return [first + i * (k - 1) + j - 1, first + j * (k - 1) + i]
