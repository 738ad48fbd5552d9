"""What a pair costs: the most to expect of one, which a budget reserves, and the average, by which it plans."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from rmcore.judge.base import JudgeUsage

__all__ = ["FIRST_ESTIMATE", "PairCost"]

FIRST_ESTIMATE = {"pairs": 1, "calls": 2, "tokens": 2 * 4096}
"""Before anything is known: two orders with one call each, and for tokens a long prompt and answer in each of them."""

_RECENT = 64  # settlements whose highest cost a pair is the estimate
_HEADROOM = 1.25  # over that highest cost
_TRUSTED = 16  # pairs that must be settled before the estimate may fall below the first one
_MEMORY = 256  # pairs: half-life of the mean cost a pair


class PairCost:
    """Learns what pairs cost from what they did cost, in a budget's whole grains. Not thread-safe: its budget locks.

    Args:
        bound: the most that one pair can ever cost, if that is known.
        first: without a bound, the estimate until enough pairs have been settled.
        recent: of a state, the highest cost a pair of each of the latest settlements.
        mean: of a state, the average cost of a pair.
    """

    def __init__(self, bound: int | None, first: int, recent: Iterable[int] = (), mean: float | None = None) -> None:
        self.bound = bound
        self.first = first
        self.recent: deque[int] = deque(recent, maxlen=_RECENT)
        self.mean = mean

    def highest(self, settled: int) -> int:
        """What to reserve for a pair when ``settled`` pairs have been settled so far, ≥ 1."""
        highest = max(self.recent, default=0)
        if self.bound is not None:
            return max(self.bound, highest)  # a bound that was seen broken is none
        estimate = math.ceil(highest * _HEADROOM)
        return max(estimate if settled >= _TRUSTED and self.recent else max(self.first, estimate), 1)

    def average(self, settled: int) -> float:
        """What a pair costs on average, > 0."""
        # Half a grain at least: a judge that is free so far must not make every plan infinite.
        return float(self.highest(settled)) if self.mean is None else max(self.mean, 0.5)

    def learn(self, pairs: int, charge: int, usage: JudgeUsage) -> None:
        """``pairs`` pairs, one or more, cost ``charge`` together."""
        each, fresh = charge / pairs, 1 - 0.5 ** (pairs / _MEMORY)
        self.mean = each if self.mean is None else self.mean + fresh * (each - self.mean)
        if usage.calls:
            # As if nothing had come from a store: a run of cached pairs must not make the next fresh one look free.
            self.recent.append(math.ceil(each * (usage.calls + max(usage.cache_hits, 0)) / usage.calls))
