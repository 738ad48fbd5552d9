"""Cached states of preference pairs, as attribute heads are trained on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.posterior import check_finite

__all__ = ["PairStates"]


@dataclass(frozen=True)
class PairStates:
    """Cached states of P preference pairs.

    Attributes:
        chosen: (P, h).
        rejected: (P, h).
        gate: (P, h) states that a gate reads, as ArmoRM's reads the prompt's; None where it reads each response's own.
        weight: (P,) how much each counts; None for all alike.
        group: (P,) int64, of the prompt: pairs of one group are held out of training together, since what is learned of
            one tells of the others. None: each by itself.
    """

    chosen: Tensor
    rejected: Tensor
    gate: Tensor | None = None
    weight: Tensor | None = None
    group: Tensor | None = None

    @classmethod
    def of_labels(cls, hidden: Tensor, labels: Tensor, pairs: Tensor, group: Tensor | None = None) -> PairStates:
        """Pairs (N, 2) int64 of rows (R, h) whose first is better with probability ``labels`` (N,).

        A label strictly between 0 and 1 becomes both orders, weighted by it and its rest: its cross-entropy. Without
        ``group`` (N,), pairs that share rows, directly or by others, are one.
        """
        group = _connected(pairs, len(hidden)) if group is None else group
        first, second = hidden[pairs[:, 0]], hidden[pairs[:, 1]]
        if bool(((labels == 0) | (labels == 1)).all()):
            won = (labels == 1)[:, None]
            return cls(torch.where(won, first, second), torch.where(won, second, first), group=group)
        keep, chosen, rejected = torch.cat([labels, 1 - labels]), torch.cat([first, second]), torch.cat([second, first])
        counted = keep > 0
        return cls(chosen[counted], rejected[counted], weight=keep[counted], group=torch.cat([group, group])[counted])

    def __post_init__(self) -> None:
        if self.weight is not None and not (
            self.weight.shape == self.chosen.shape[:1] and bool((self.weight.isfinite() & (self.weight > 0)).all())
        ):
            reject("weight", f"shape {tuple(self.weight.shape)}", f"({len(self.chosen)},) positive finite numbers")
        if self.group is not None and (self.group.shape != self.chosen.shape[:1] or self.group.dtype != torch.int64):
            reject("group", f"{tuple(self.group.shape)} {self.group.dtype}", f"({len(self.chosen)},) int64")
        parts = {"chosen": self.chosen, "rejected": self.rejected, "gate": self.gate}
        for name, part in parts.items():
            if part is None:
                continue
            if part.dim() != 2 or part.shape != self.chosen.shape or not len(part):
                reject(name, f"shape {tuple(part.shape)}", f"(P, h), that of chosen {tuple(self.chosen.shape)}, P > 0")
            check_finite(part, name)


def _connected(pairs: Tensor, rows: int) -> Tensor:
    """(N,) int64 of pairs (N, 2): the connected part of the graph of rows that a pair is in."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = pairs.cpu().numpy().T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(rows, rows))
    return torch.from_numpy(connected_components(graph, directed=False)[1])[pairs[:, 0].cpu()].long()
