"""What the scored stream says of the head and its judge: u as a histogram and lately, and judge against head."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import torch

from rmcore._base.quantile import quantiles
from rmcore.engine.groups import GroupScores
from rmcore.engine.monitor import LEVELS, Agreement, agreement

__all__ = ["U_BOUNDS", "StreamStats"]

U_BOUNDS: Final = (1.001, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Upper bounds of the histogram's buckets; u begins at 1."""
_RECENT: Final = 4096


@dataclass
class StreamStats:
    """Sums over all scored pairs, and u of the latest 4,096."""

    agreement: Agreement = field(default_factory=Agreement)
    counts: list[int] = field(default_factory=lambda: [0] * (len(U_BOUNDS) + 1))
    total: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, scores: GroupScores) -> None:
        """Take in a call's pairs; those without a finite u are not counted."""
        self.agreement += agreement(scores)
        u = scores.table.uncertainty.cpu().double()
        u = u[u.isfinite()]
        buckets = torch.bucketize(u, torch.tensor(U_BOUNDS, dtype=torch.float64))
        found = torch.bincount(buckets, minlength=len(self.counts)).tolist()
        self.counts = [old + new for old, new in zip(self.counts, found, strict=True)]
        self.total += float(u.sum())
        self.recent.extend(u[-_RECENT:].tolist())

    def buckets(self) -> list[tuple[str, int]]:
        """Pairs at or below each bound, as Prometheus counts them."""
        bounds = [*map(str, U_BOUNDS), "+Inf"]
        sums = [sum(self.counts[: k + 1]) for k in range(len(self.counts))]
        return list(zip(bounds, sums, strict=True))

    def recent_quantiles(self) -> dict[str, float]:
        """By level; empty before the first pair."""
        if not self.recent:
            return {}
        return dict(zip(map(str, LEVELS), quantiles(list(self.recent), LEVELS), strict=True))
