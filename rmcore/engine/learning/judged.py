"""Judged pairs as data for a head: from a scored batch and its verdicts to hidden rows, labels and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.engine.groups import GroupScores
from rmcore.judge.base import RULE, Verdict
from rmcore.model.signal import PairSignal

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
    next time), ``flip`` (the orders disagree and ``flip_weight`` is 0), ``no_signal`` (the responses' inputs are equal,
    or one was left unread: nothing to learn it by), ``nonfinite`` (a hidden row holds NaN or Inf)
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
    table, layout = scores.table, scores.table.layout
    needed = int(layout.row_counts(mode, one_order=table.one_order).sum())
    if hidden.dim() != 2 or len(hidden) != needed:
        reject("scores.hidden", f"shape {tuple(hidden.shape)}", f"({needed}, h), as the groups need")
    routed = table.routed.nonzero()[:, 0]
    hidden_rows = layout.pair_rows(mode, one_order=table.one_order)[routed].tolist()
    skipped: Counter[str] = Counter()
    rows: dict[int, int] = {}
    labels: list[float] = []
    weights: list[float] = []
    index: list[tuple[int, int]] = []
    seen: set[tuple[int, frozenset[bytes]]] = set()
    for pair, group, own in zip(routed.tolist(), layout.group[routed].tolist(), hidden_rows, strict=True):
        verdict = table.verdicts.get(pair)
        reason = _why_not(verdict, flip_weight)
        if not reason and int(table.signal[pair]) != PairSignal.PRESENT:
            reason = "no_signal"
        if not reason and not bool(hidden[own].isfinite().all()):
            reason = "nonfinite"
        content = (group, frozenset(hidden[row].contiguous().view(torch.uint8).numpy().tobytes() for row in own))
        if not reason and content in seen:
            reason = "repeated"
        if reason:
            skipped[reason] += 1
            continue
        seen.add(content)
        assert verdict is not None
        assert verdict.preference is not None
        label = 0.5 + verdict.preference * (0.5 - epsilon)
        weight = judge_weight * (flip_weight if verdict.flipped else 1.0)
        numbers = [rows.setdefault(row, len(rows)) for row in own]
        if mode == "difference":
            index.append((numbers[0], numbers[1]))
            labels.append(label)
            weights.append(weight)
        else:
            labels += [label, 1 - label][: len(own)]
            weights += [weight] * len(own)
    return JudgedPairs(
        hidden[list(rows)],
        torch.tensor(labels, dtype=torch.float32),
        torch.tensor(weights, dtype=torch.float32),
        torch.tensor(index, dtype=torch.int64).view(-1, 2) if mode == "difference" else None,
        dict(skipped),
    )


def _why_not(verdict: Verdict | None, flip_weight: float) -> str:
    if verdict is None or verdict.preference is None:
        return "failed"
    if verdict.judge == RULE:
        return "rule"
    return "flip" if verdict.flipped and flip_weight == 0 else ""
