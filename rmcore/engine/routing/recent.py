"""What a stream was like lately, in bounded memory: quantiles that forget, quantiles of a step, a sliding sum.

:class:`ForgettingSample` answers which score the highest tenth lies above *now*. The last ``4 · half_life`` values are
kept, each weighing ``2^(−age / half_life)``, age counted in values that came after it. A weighted sample, not a
histogram: no bin edges to fall out of when the stream drifts, and ties stay ties. What is dropped at the far end weighs
1/16 of a new value or less.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rmcore._base.errors import reject
from rmcore._base.quantile import quantiles
from rmcore.engine.routing.state import plain

__all__ = ["ForgettingSample", "SampleQuantiles", "SlidingSum", "Tail"]

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tail:
    """The upper tail of a weighted sample that holds a given share of its weight.

    Everything above ``threshold`` belongs to it, and ``tied`` (0 to 1) of what equals it.
    """

    threshold: float
    tied: float


class ForgettingSample:
    """An exponentially forgetting sample. Not thread-safe.

    Args:
        half_life: after so many further values a value weighs half. Memory and time of a query grow with it.
    """

    def __init__(self, half_life: float) -> None:
        if isinstance(half_life, bool) or not isinstance(half_life, (int, float)) or not 16 <= half_life <= 65536:
            reject("half_life", repr(half_life), "a number of values from 16 to 65536")
        self.half_life = float(half_life)
        self.capacity = math.ceil(4 * half_life)
        self.seen = 0
        self._values = np.empty(0)
        self._mass = np.empty(0)
        self._stamp = np.empty(0, dtype=np.int64)  # ``seen`` when the value's batch had come

    def add(self, values: Floats) -> None:
        """Add a batch. Its values came together: they all have the same age."""
        self.seen += len(values)
        kept, mass = values, 1.0
        if len(values) > self.capacity:
            kept, mass = _thinned(values, self.capacity), len(values) / self.capacity
        room = self.capacity - len(kept)
        old = slice(max(len(self._values) - room, 0), None)
        self._values = np.concatenate([self._values[old], kept])
        self._mass = np.concatenate([self._mass[old], np.full(len(kept), mass)])
        self._stamp = np.concatenate([self._stamp[old], np.full(len(kept), self.seen)])

    def tail(self, share: float, batch: Floats) -> Tail:
        """The upper tail with ``share`` of the weight of the sample and ``batch`` together, ``batch`` being new.

        With the values to be judged in it, a batch that is unlike all before is still ranked within itself.
        """
        if share <= 0:
            return Tail(math.inf, 0.0)
        if share >= 1:
            return Tail(-math.inf, 1.0)
        now = self.seen + len(batch)
        values = np.concatenate([self._values, batch])
        weights = np.concatenate([self._mass * np.exp2((self._stamp - now) / self.half_life), np.ones(len(batch))])
        if not len(values):
            return Tail(math.inf, 0.0)
        order = np.argsort(-values, kind="stable")
        values, weights = values[order], weights[order]
        above = np.cumsum(weights)
        wanted = share * above[-1]
        threshold = values[min(int(np.searchsorted(above, wanted)), len(values) - 1)]
        higher, equal = float(weights[values > threshold].sum()), float(weights[values == threshold].sum())
        return Tail(float(threshold), min(max((wanted - higher) / equal, 0.0), 1.0))

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "half_life": self.half_life,
            "seen": self.seen,
            "values": [plain(v) for v in self._values.tolist()],
            "mass": self._mass.tolist(),
            "stamp": self._stamp.tolist(),
        }

    @classmethod
    def from_state(cls, state: object, where: str, half_life: float) -> ForgettingSample:
        """The sample that a state describes. Raises CheckpointError if it is damaged or forgets at another rate."""
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import SampleState

        found = checked(SampleState, state, where)
        sample = cls(half_life)
        if found.half_life != sample.half_life:
            refuse(f"{where}.half_life", found.half_life, f"{sample.half_life!r}, as this object was made with")
        if len(found.values) > sample.capacity:
            refuse(f"{where}.values", f"{len(found.values)} of them", f"at most {sample.capacity}")
        sample.seen = found.seen
        sample._values, sample._mass = np.array(found.values), np.array(found.mass)
        sample._stamp = np.array(found.stamp, dtype=np.int64)
        return sample


class SampleQuantiles:
    """Quantiles of all values since the last :meth:`clear`, in bounded memory. Exact up to ``capacity`` values.

    Beyond, neighbours in rank are merged; the rank of an answer is then off by at most 1/capacity per halving.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._values, self._weights = np.empty(0), np.empty(0)

    def add(self, values: Floats) -> None:
        """Add a batch."""
        self._values = np.concatenate([self._values, values])
        self._weights = np.concatenate([self._weights, np.ones(len(values))])
        if len(self._values) > 2 * self.capacity:
            values, cumulative = self._sorted()
            total = float(cumulative[-1])
            centres = (np.arange(self.capacity) + 0.5) / self.capacity * total
            self._values = values[np.searchsorted(cumulative, centres)]
            self._weights = np.full(self.capacity, total / self.capacity)

    def quantiles(self, levels: tuple[float, ...]) -> list[float] | None:
        """One value a level; None if there is none."""
        if not len(self._values):
            return None
        return quantiles(self._values, levels, counts=self._weights)

    def _sorted(self) -> tuple[Floats, Floats]:
        order = np.argsort(self._values, kind="stable")
        return self._values[order], np.cumsum(self._weights[order])

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"values": self._values.tolist(), "weights": self._weights.tolist()}

    @classmethod
    def from_state(cls, state: object, where: str, capacity: int = 4096) -> SampleQuantiles:
        """The sample that a state describes. Raises CheckpointError if it is damaged."""
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import QuantilesState

        found = checked(QuantilesState, state, where)
        if len(found.values) > 2 * capacity:
            refuse(f"{where}.values", f"{len(found.values)} of them", f"at most {2 * capacity}")
        sample = cls(capacity)
        sample._values, sample._weights = np.array(found.values), np.array(found.weights)
        return sample


class SlidingSum:
    """A sum over the last ``window`` seconds, in bounded memory.

    Amounts added within 1/256 of a window of each other share an entry that ages with the youngest of them: the sum is
    never too low, and at most that much too slow to forget.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self._entries: deque[list[float]] = deque()  # first time, last time
        self._amounts: deque[int] = deque()
        self._sum = 0

    def add(self, now: float, amount: int) -> None:
        """Add ``amount`` at ``now``, which never goes back."""
        if not amount:
            return
        if self._entries and now - self._entries[-1][0] < self.window / 256:
            self._entries[-1][1] = now
            self._amounts[-1] += amount
        else:
            self._entries.append([now, now])
            self._amounts.append(amount)
        self._sum += amount

    def total(self, now: float) -> int:
        """The sum of what was added after ``now - window``."""
        while self._entries and self._entries[0][1] + self.window <= now:
            self._entries.popleft()
            self._sum -= self._amounts.popleft()
        return self._sum

    def state_dict(self, now: float) -> list[list[float]]:
        """Ages instead of times: a clock that counts from the start of the machine means nothing elsewhere."""
        self.total(now)
        return [[now - a, now - b, n] for (a, b), n in zip(self._entries, self._amounts, strict=True)]

    def load_state(self, state: Sequence[tuple[float, float, int]], now: float) -> None:
        """As if no time had passed since the state was taken, which is the cautious reading."""
        self._entries = deque([now - first, now - last] for first, last, _ in state)
        self._amounts = deque(amount for _, _, amount in state)
        self._sum = sum(self._amounts)


def _thinned(values: Floats, count: int) -> Floats:
    """``count`` values with the distribution of ``values``: the middles of as many slices of equal weight."""
    ranks = ((np.arange(count) + 0.5) / count * len(values)).astype(np.int64)
    return np.sort(values)[ranks]
