"""Losses of pairs, one number a pair: what a trainer sums, and the seam where others plug in.

A loss is a callable ``loss(batch) -> (B,)`` of a :class:`PairBatch`. The trainer weighs the numbers by the pairs'
weights and divides by the pairs of the optimiser step, over all micro-batches and ranks, so that neither changes what
is trained. A loss that is an ``nn.Module`` has its parameters trained with the head's, in float32, equal on all ranks
(attribute heads, gates); further columns of the data (attribute labels, critiques' token losses) reach it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rmcore.head.config import PairMode

__all__ = ["PairBatch", "PairLoss", "bradley_terry", "centred"]


@dataclass(frozen=True)
class PairBatch:
    """What a loss sees of B pairs; gradients flow into ``states`` and ``scores``.

    Attributes:
        states: (B, 2, h) float32 pooled states: of the two responses, or in concat mode of the two orders.
        scores: (B, 2) float32, the head's logit of each state.
        labels: (B,) in [0, 1], the probability that the first response is better.
        margins: (B,) by how much g of the first is to exceed that of the second; exchanging a pair's responses turns
            its sign.
        mode: the head's.
        columns: further columns of the data, (B, ...) each.
    """

    states: Tensor
    scores: Tensor
    labels: Tensor
    margins: Tensor
    mode: PairMode
    columns: Mapping[str, Tensor]

    @property
    def logits(self) -> Tensor:
        """(B,) g of a pair: s_first − s_second, or in concat mode half of what the two orders say."""
        difference = self.scores[:, 0] - self.scores[:, 1]
        return difference if self.mode == "difference" else difference / 2


class PairLoss(Protocol):
    """A loss a pair."""

    def __call__(self, batch: PairBatch) -> Tensor:
        """(B,) losses."""
        ...


def bradley_terry(batch: PairBatch) -> Tensor:
    """−[y log σ(g − m) + (1−y) log σ(−g + m)] of each pair (Bradley & Terry 1952), y a label and m a margin.

    In concat mode the mean over both orders, the second with 1 − y and −m: exchanging a pair's responses changes
    nothing.
    """
    y, m = batch.labels, batch.margins
    if batch.mode == "difference":
        return binary_cross_entropy_with_logits(batch.logits - m, y, reduction="none")
    first = binary_cross_entropy_with_logits(batch.scores[:, 0] - m, y, reduction="none")
    second = binary_cross_entropy_with_logits(batch.scores[:, 1] + m, 1 - y, reduction="none")
    return (first + second) / 2


def centred(batch: PairBatch) -> Tensor:
    """(s_first + s_second)² of each pair (Eisenstein et al. 2023, arXiv:2312.09244)."""
    return batch.scores.sum(1).square()
