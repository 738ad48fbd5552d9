"""What the saved state of a router holds, as pydantic models: a state is checked whole before anything is made of it.

What depends on the object that loads the state (its half-life, its budgets) is that object's to check. Imported where a
state is loaded, so that routing needs no pydantic.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rmcore._base.states import FirstVersion, State

__all__ = [
    "BudgetState",
    "LearnedRouterState",
    "LearnedScoreState",
    "LogState",
    "PaceState",
    "QuantilesState",
    "RandomRouterState",
    "RiskRouterState",
    "RouterState",
    "SampleState",
    "Window",
]

_INFINITIES = {"inf": math.inf, "-inf": -math.inf}  # as state.plain writes them: JSON has none


def _infinity(value: object) -> object:
    return _INFINITIES.get(value, value) if isinstance(value, str) else value


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("a number or an infinity")
    return value


def _in_order(entry: tuple[float, float, int]) -> tuple[float, float, int]:
    if entry[0] < entry[1]:
        raise ValueError("[age of the first, age of the last, amount]")
    return entry


Count: TypeAlias = Annotated[int, Field(ge=0)]
Id: TypeAlias = Annotated[int, Field(ge=1)]
Stamp: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
Amount: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Mass: TypeAlias = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Extended: TypeAlias = Annotated[float, BeforeValidator(_infinity), AfterValidator(_no_nan)]
Levels: TypeAlias = Annotated[list[Number], Field(min_length=3, max_length=3)]
# Not strict as to the sequence: JSON has lists only.
Window: TypeAlias = list[Annotated[tuple[Amount, Amount, Count], Field(strict=False), AfterValidator(_in_order)]]


class SampleState(State):
    """A :class:`~rmcore.engine.routing.recent.ForgettingSample`: three columns, oldest first."""

    half_life: Number
    seen: Stamp
    values: list[Extended]
    mass: list[Mass]
    stamp: list[Stamp]

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if not len(self.values) == len(self.mass) == len(self.stamp):
            raise ValueError("as many values as there are masses and stamps")
        if any(a > b for a, b in pairwise([*self.stamp, self.seen])):
            raise ValueError("stamps in order, none above `seen`")
        return self


class QuantilesState(State):
    """A :class:`~rmcore.engine.routing.recent.SampleQuantiles`."""

    values: list[Number]
    weights: list[Mass]

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if len(self.values) != len(self.weights):
            raise ValueError("as many values as there are weights")
        return self


class StepState(State):
    """One step of a :class:`LogState`."""

    step: Id
    pairs: Count
    routed: Count
    denied: Count
    target_sum: Amount
    threshold: Extended | None
    quantiles: Levels | None
    compared: Count
    above: Count
    spend: dict[str, Amount]


class TotalsState(State):
    """Pairs of all steps."""

    pairs: Count
    routed: Count
    denied: Count


class LogState(State):
    """A :class:`~rmcore.engine.routing.drift.StepLog`."""

    steps: Annotated[list[StepState], Field(min_length=1)]
    sample: QuantilesState
    fixed: Number | None
    first: Levels | None
    totals: TotalsState

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if any(a.step >= b.step for a, b in pairwise(self.steps)):
            raise ValueError("steps in order")
        return self


class PaceState(State):
    """A :class:`~rmcore.engine.routing.pacing.Pace`; times are ages."""

    step_pairs: Number | None
    arrivals: Window
    peak: Amount
    since_first: Amount | None
    since_last: Amount | None

    @model_validator(mode="after")
    def _ages(self) -> Self:
        if self.since_first is None or self.since_last is None:
            if self.arrivals or self.since_first is not None or self.since_last is not None:
                raise ValueError("both times and their arrivals, or none of them")
        elif self.since_first < self.since_last:
            raise ValueError("since_first not below since_last")
        return self


class BudgetState(State):
    """A :class:`~rmcore.engine.routing.budget.Budget`, in whole grains of its unit."""

    unit: str
    per: str
    spent: Count
    window: Window
    total: Count
    settled_pairs: Count
    denied_pairs: Count
    excess: Count
    overshoot: Count
    recent: list[Count]
    mean: Amount | None
    next_id: Id


class WordsState(State):
    """The two 128-bit words of a PCG64."""

    state: Count
    inc: Count


class RandomState(State):
    """numpy's PCG64, as its ``state`` gives it."""

    bit_generator: Literal["PCG64"]
    state: WordsState
    has_uint32: Count
    uinteger: Count


class RandomRouterState(State):
    """A :class:`~rmcore.engine.routing.routers.RandomRouter`."""

    format: Literal["rmcore-random-router"]
    version: FirstVersion
    generator: str


class LearnedScoreState(State):
    """A :class:`~rmcore.engine.routing.learned_score.LearnedScore`; precisions as packed lower triangles."""

    format: Literal["rmcore-learned-score"]
    version: FirstVersion
    columns: list[str]
    beliefs: list[Annotated[tuple[str, Number], Field(strict=False)]]
    begin: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    mean: list[list[Number]]
    precision: list[list[Number]]
    log_weight: list[Number]
    moments: list[list[Number]]
    verdicts: Count
    overturned: Count
    weight: Amount


class LearnedRouterState(State):
    """A :class:`~rmcore.engine.routing.learned.LearnedRouter`."""

    format: Literal["rmcore-learned-router"]
    version: FirstVersion
    owed: Annotated[float, Field(ge=0, lt=1)]
    score: LearnedScoreState


class RouterState(State):
    """An :class:`~rmcore.engine.routing.adaptive.AdaptiveRouter`."""

    format: Literal["rmcore-adaptive-router"]
    version: FirstVersion
    by: str
    score: LearnedScoreState | None = None
    next_id: Id
    pairs: Count
    owed: Number
    threshold: Extended | None
    random: RandomState
    sample: SampleState
    paces: list[PaceState]
    budgets: list[BudgetState]
    log: LogState


Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Verdict: TypeAlias = Annotated[tuple[Number, Annotated[float, Field(ge=0, le=1)]], Field(strict=False)]


class RiskSettings(State):
    """What a risk-controlled router was made with."""

    alpha: Share
    delta: Share
    by: str
    method: str
    audit: Share
    alarm: Share


class RiskThresholdState(State):
    """A :class:`~rmcore.engine.routing.risk_bounds.RiskThreshold`, without what its router says."""

    delta: Share
    threshold: Extended
    pairs: Count
    kept: Count
    errors: Count
    bound: Share
    reason: str


class ShiftState(State):
    """A :class:`~rmcore.engine.routing.shift.ScoreShift`."""

    calibration: Annotated[list[Number], Field(min_length=1)]
    waiting: list[Number]
    blocks: Count
    least_p: Share


class ExcessState(State):
    """A :class:`~rmcore.engine.routing.shift.ErrorExcess`."""

    wealth: Annotated[list[Amount], Field(min_length=5, max_length=5)]
    pairs: Count
    errors: Count


class RiskRouterState(State):
    """A :class:`~rmcore.engine.routing.risk.RiskControlledRouter`."""

    format: Literal["rmcore-risk-router"]
    version: FirstVersion
    settings: RiskSettings
    epoch: Count
    alarms: list[str]
    seen: Count
    routed: Count
    random: RandomState
    found: RiskThresholdState | None
    sample: list[Verdict]
    unanswered: Count
    attempts: Count
    shift: ShiftState | None
    excess: ExcessState
