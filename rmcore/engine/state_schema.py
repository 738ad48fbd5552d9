"""What the saved state of an engine holds, as pydantic models. Imported where a state is loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from rmcore._base.states import FirstVersion, State

__all__ = ["EngineState", "LearnerPart", "RouterPart"]


Digest: TypeAlias = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class RouterPart(State):
    """Which router it is, and its state; None for one whose choices depend on its arguments alone."""

    kind: str
    state: dict[str, Any] | None


class LearnerPart(State):
    """The version a learner was at."""

    version: Annotated[int, Field(ge=0)]
    state: Digest


class EngineState(State):
    """A :class:`~rmcore.engine.engine.RewardEngine`."""

    format: Literal["rmcore-engine"]
    version: FirstVersion
    head: dict[str, Any]
    beta: Digest
    learner: LearnerPart | None
    router: RouterPart
