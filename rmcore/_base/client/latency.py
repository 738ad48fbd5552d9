"""How long a call is likely to take: the median of the latest ones."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque

__all__ = ["LatencyEstimate"]


class LatencyEstimate:
    """A running median, forgetful on purpose.

    Attempts that were cut short count with the time they had, if that was more than the median: they would have taken
    at least so long. Samples older than ``horizon_s`` are dropped; with fewer than ``needed`` left the estimate is 0,
    which stands for "not known". So a slow spell, in which nothing is begun because nothing would end in time,
    cannot keep the estimate up for ever: after the horizon calls are tried again.
    """

    def __init__(self, *, size: int = 64, needed: int = 8, horizon_s: float = 60.0) -> None:
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, float]] = deque()  # (when, seconds)
        self._sorted: list[float] = []
        self._size, self._needed, self._horizon = size, needed, horizon_s

    def add(self, seconds: float, now: float, *, complete: bool = True) -> None:
        """One attempt's time; ``complete=False`` if it was cut short after ``seconds``."""
        with self._lock:
            median = self._median(now)
            if not complete and not 0 < median <= seconds:
                return
            self._samples.append((now, seconds))
            insort(self._sorted, seconds)
            if len(self._samples) > self._size:
                self._drop()

    def expected_s(self, now: float) -> float:
        """The median in seconds, 0 if too little is known."""
        with self._lock:
            return self._median(now)

    def _median(self, now: float) -> float:
        while self._samples and self._samples[0][0] + self._horizon < now:
            self._drop()
        return self._sorted[len(self._sorted) // 2] if len(self._sorted) >= self._needed else 0.0

    def _drop(self) -> None:
        _, seconds = self._samples.popleft()
        del self._sorted[bisect_left(self._sorted, seconds)]
