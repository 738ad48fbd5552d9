"""How large a share of the coming pairs a budget can carry: what is left of it, over the pairs it must last for."""

from __future__ import annotations

import math
from typing import Any

from rmcore.engine.routing.budget import WINDOWS, Budget
from rmcore.engine.routing.recent import SlidingSum

__all__ = ["Pace"]

_STEP_MEMORY = 0.3  # weight of the newest step in the expected number of pairs a step
_PEAK_HALF_LIFE = 10.0  # windows after which a burst of arrivals counts half


class Pace:
    """The plan for one budget. Not thread-safe: its router's lock guards it.

    - Per run: pairs left in the budget over pairs left in the run, if the run's length is known.
    - Per step: pairs left in the step's budget over pairs still to come in the step, expected from earlier steps.
    - Per window of time: pairs a whole window pays for over the pairs that arrive in one. RL training arrives in
      bursts, so that is the fullest window of late, not the average: otherwise the first pairs of a burst would take
      everything.
    """

    def __init__(self, budget: Budget, run_pairs: int | None) -> None:
        self._budget = budget
        self._run_pairs = run_pairs
        self._step_pairs: float | None = None
        window = WINDOWS.get(budget.per)
        self._arrivals = None if window is None else SlidingSum(window)
        self._peak = 0.0
        self._first: float | None = None
        self._last = -math.inf

    @property
    def plans(self) -> bool:
        """False for a budget per run whose length nobody knows: it is a limit and nothing else."""
        return self._budget.per != "run" or self._run_pairs is not None

    def fraction(self, pairs: int, run_seen: int, step_seen: int) -> float | None:
        """The share of the next ``pairs`` that the budget can carry, [0, 1]; None while there is nothing to go by.

        Args:
            pairs: how many come now.
            run_seen: pairs before them in the run.
            step_seen: pairs before them in the step.
        """
        if self._arrivals is not None:
            return self._window_fraction(self._arrivals, pairs)
        expected, seen = (self._run_pairs, run_seen) if self._budget.per == "run" else (self._step_pairs, step_seen)
        if expected is None:
            return None
        return min(self._budget.expected_pairs() / max(expected - seen, pairs, 1), 1.0)

    def end_step(self, pairs: int) -> None:
        """A step with ``pairs`` pairs is over."""
        before = self._step_pairs
        self._step_pairs = float(pairs) if before is None else before + _STEP_MEMORY * (pairs - before)

    def _window_fraction(self, arrivals: SlidingSum, pairs: int) -> float | None:
        now = max(self._budget.clock.now(), self._last)
        arrivals.add(now, pairs)
        if self._first is None:
            self._first = now
        else:
            self._peak *= 0.5 ** ((now - self._last) / (_PEAK_HALF_LIFE * arrivals.window))
        self._last = now
        self._peak = max(self._peak, arrivals.total(now))
        if now - self._first < arrivals.window:
            return None
        return min(self._budget.expected_pairs(whole_period=True) / max(self._peak, 1.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """JSON values; times as ages."""
        now = max(self._budget.clock.now(), self._last)
        return {
            "step_pairs": self._step_pairs,
            "arrivals": [] if self._arrivals is None else self._arrivals.state_dict(now),
            "peak": self._peak,
            "since_first": None if self._first is None else now - self._first,
            "since_last": None if self._first is None else now - self._last,
        }

    @classmethod
    def from_state(cls, state: object, where: str, budget: Budget, run_pairs: int | None) -> Pace:
        """The plan that a state describes. Raises CheckpointError if it is damaged."""
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import PaceState

        found = checked(PaceState, state, where)
        pace = cls(budget, run_pairs)
        pace._step_pairs, pace._peak = found.step_pairs, found.peak
        if found.since_first is not None and found.since_last is not None:
            if pace._arrivals is None:
                refuse(f"{where}.since_first", found.since_first, "nothing: this budget plans without arrivals")
            now = budget.clock.now()
            pace._first, pace._last = now - found.since_first, now - found.since_last
            pace._arrivals.load_state(found.arrivals, now)
        return pace
