"""Mini-batches of data of which each rank has a part: one order for all, gradients added in rank order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rmcore.head.ranks import Ranks

__all__ = ["Batch", "Batches"]


class Batch(NamedTuple):
    """What this rank has of a batch."""

    own: Tensor
    """Which of its data, (n,) int64."""
    size: int
    """Of the whole batch."""


class Batches:
    """The batches of one process with the data of all ranks, rank 0's first.

    Args:
        mine: how many data this rank has.
        ranks: None for one process.
    """

    def __init__(self, mine: int, ranks: Ranks | None) -> None:
        counts = [mine] if ranks is None else ranks.counts(mine)
        self.count = sum(counts)
        """Of all ranks' data."""
        self._ranks, self._mine = ranks, mine
        self._start = 0 if ranks is None else sum(counts[: ranks.rank])

    def epoch(self, size: int, generator: torch.Generator, device: torch.device) -> Iterator[Batch]:
        """All batches once, in an order of the generator's, which is to be in the same state on all ranks."""
        for batch in torch.split(torch.randperm(self.count, generator=generator), size):
            own = batch - self._start
            if self._ranks is not None:
                own = own[(own >= 0) & (own < self._mine)]
            yield Batch(own.to(device), len(batch))

    def summed(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Add up all ranks' gradients, in place, and their losses of a batch."""
        if self._ranks is None:
            return loss
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten().double() for g in gradients), loss.detach().double().view(1)])
        *parts, total = self._ranks.total(flat).split([*(g.numel() for g in gradients), 1])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)
        return total[0].to(loss)
