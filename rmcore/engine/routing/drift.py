"""What a router did, step by step, and how far the uncertainty it routes by has moved since it began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rmcore.engine.routing.recent import Floats, SampleQuantiles
from rmcore.engine.routing.state import plain

__all__ = ["Drift", "StepLog", "StepRecord"]

LEVELS = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of a router.

    Attributes:
        step: counted from 1.
        by: the score that ``threshold`` and ``fixed_fraction`` are about.
        pairs: candidates seen.
        routed: of them, those sent to the judge.
        denied: those that were wanted but that no budget would pay for.
        target: the share of pairs to route, averaged over the step.
        threshold: at the end of the step; ±inf where nothing or everything was to be routed.
        u_p10, u_p50, u_p90: quantiles of u in the step; None where it had no pair with a finite u.
        fixed_fraction: the share that the threshold at the end of the warm-up would have routed, had it stayed.
        spend: by budget, in its unit; what is still in flight is not in it yet.
    """

    step: int
    by: str
    pairs: int
    routed: int
    denied: int
    target: float | None
    threshold: float | None
    u_p10: float | None
    u_p50: float | None
    u_p90: float | None
    fixed_fraction: float | None
    spend: dict[str, float]

    @property
    def fraction(self) -> float | None:
        """The share of pairs that was routed."""
        return self.routed / self.pairs if self.pairs else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the fraction with them."""
        return {**asdict(self), "threshold": plain(self.threshold), "fraction": self.fraction}


@dataclass(frozen=True, slots=True)
class Drift:
    """The run so far, and its first step against its latest.

    Attributes:
        steps, pairs, routed, denied: of the whole run.
        first, last: (p10, p50, p90) of u in the first step and in the latest; None before there is one.
        shift: of the median, in units of the first step's p90 − p10; None where that is 0 or unknown.
        threshold: now.
        fixed_threshold: the one at the end of the warm-up.
        fixed_fraction: what that one would have routed in the latest step.
        fraction: what was routed in the latest step.
    """

    steps: int
    pairs: int
    routed: int
    denied: int
    first: tuple[float, ...] | None
    last: tuple[float, ...] | None
    shift: float | None
    threshold: float | None
    fixed_threshold: float | None
    fixed_fraction: float | None
    fraction: float | None


@dataclass
class _Step:
    step: int
    pairs: int = 0
    routed: int = 0
    denied: int = 0
    target_sum: float = 0.0
    threshold: float | None = None
    quantiles: list[float] | None = None
    compared: int = 0
    above: int = 0
    spend: dict[str, float] = field(default_factory=dict)

    def record(self, by: str) -> StepRecord:
        p10, p50, p90 = self.quantiles or (None, None, None)
        return StepRecord(
            step=self.step,
            by=by,
            pairs=self.pairs,
            routed=self.routed,
            denied=self.denied,
            target=self.target_sum / self.pairs if self.pairs else None,
            threshold=self.threshold,
            u_p10=p10,
            u_p50=p50,
            u_p90=p90,
            fixed_fraction=self.above / self.compared if self.compared else None,
            spend=dict(self.spend),
        )


class StepLog:
    """Keeps the records of the last ``length`` steps. Not thread-safe: its router's lock guards it.

    Args:
        by: the router's score.
        length: steps to keep.
        budgets: names of the budgets whose spend is recorded.
    """

    def __init__(self, by: str, length: int, budgets: Sequence[str]) -> None:
        self._by = by
        self._budgets = tuple(budgets)
        self._steps: deque[_Step] = deque(maxlen=length)
        self._sample = SampleQuantiles()
        self._fixed: float | None = None
        self._first: list[float] | None = None
        self._totals = {"pairs": 0, "routed": 0, "denied": 0}
        self._steps.append(self._empty(1))

    @property
    def pairs(self) -> int:
        """Pairs in the current step."""
        return self._steps[-1].pairs

    def begin_step(self) -> None:
        """Close the current step; one without pairs leaves no record."""
        step = self._steps[-1]
        if step.pairs:
            step.quantiles = self._sample.quantiles(LEVELS)
            self._first = self._first or step.quantiles
            self._sample.clear()
            self._steps.append(self._empty(step.step + 1))

    def add(
        self, u: Floats, score: Floats, pairs: int, routed: int, denied: int, target: float, threshold: float | None
    ) -> dict[str, float]:
        """Add a micro-batch to the current step.

        Returns:
            The step's spend by budget, for whoever settles later to add to: the step may be over by then.
        """
        step = self._steps[-1]
        step.pairs += pairs
        step.routed += routed
        step.denied += denied
        step.target_sum += target * pairs
        step.threshold = threshold
        self._sample.add(u)
        if self._fixed is not None:
            step.compared += len(score)
            step.above += int((score > self._fixed).sum())
        for name, value in (("pairs", pairs), ("routed", routed), ("denied", denied)):
            self._totals[name] += value
        return step.spend

    def fix(self, threshold: float) -> None:
        """The warm-up is over: remember the threshold that a router without drift in mind would keep."""
        if self._fixed is None and math.isfinite(threshold):
            self._fixed = threshold

    def records(self) -> tuple[StepRecord, ...]:
        """Oldest first, the current step last unless it is empty."""
        self._steps[-1].quantiles = self._sample.quantiles(LEVELS)
        return tuple(step.record(self._by) for step in self._steps if step.pairs)

    def drift(self, threshold: float | None) -> Drift:
        """The first step against the latest."""
        records = self.records()
        quantiles = [step.quantiles for step in self._steps if step.quantiles]
        first = self._first or (quantiles[0] if quantiles else None)
        last = quantiles[-1] if quantiles else None
        width = first[2] - first[0] if first else 0.0
        return Drift(
            steps=records[-1].step if records else 0,
            **self._totals,
            first=None if first is None else tuple(first),
            last=None if last is None else tuple(last),
            shift=(last[1] - first[1]) / width if first and last and width > 0 else None,
            threshold=threshold,
            fixed_threshold=self._fixed,
            fixed_fraction=records[-1].fixed_fraction if records else None,
            fraction=records[-1].fraction if records else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "steps": [{**asdict(s), "threshold": plain(s.threshold)} for s in self._steps],
            "sample": self._sample.state_dict(),
            "fixed": self._fixed,
            "first": self._first,
            "totals": dict(self._totals),
        }

    @classmethod
    def from_state(cls, state: object, where: str, by: str, length: int, budgets: Sequence[str]) -> StepLog:
        """The log that a state describes. Raises CheckpointError if it is damaged."""
        from rmcore._base.states import checked, refuse
        from rmcore.engine.routing.schema import LogState

        found = checked(LogState, state, where)
        log = cls(by, length, budgets)
        for k, step in enumerate(found.steps):
            if set(step.spend) != set(log._budgets):
                refuse(f"{where}.steps[{k}].spend", sorted(step.spend), f"the budgets {sorted(log._budgets)}")
        steps = [{**step.model_dump(), "spend": {name: step.spend[name] for name in budgets}} for step in found.steps]
        log._steps = deque((_Step(**step) for step in steps), maxlen=length)
        log._sample = SampleQuantiles.from_state(found.sample, f"{where}.sample")
        log._fixed, log._first = found.fixed, found.first
        log._totals = found.totals.model_dump()
        return log

    def _empty(self, step: int) -> _Step:
        return _Step(step, spend=dict.fromkeys(self._budgets, 0.0))
