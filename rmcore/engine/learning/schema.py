"""The lines of a journal, as pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from rmcore._base.states import State

__all__ = ["LINES", "OpenLine", "RevertLine", "UpdateLine"]


def _beside(name: str) -> str:
    if name != Path(name).name:
        raise ValueError("the name of a file, none outside the folder")
    return name


Count: TypeAlias = Annotated[int, Field(ge=0)]
FileName: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(_beside)]
Digest: TypeAlias = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class OpenLine(State):
    """The first line: what the head is, and version 0."""

    event: Literal["open"]
    format: str
    format_version: int
    rmcore_version: str
    head: dict[str, Any]
    state: Digest
    count: Count
    snapshot: FileName
    snapshot_sha256: Digest


class UpdateLine(State):
    """A version that was learned; with a snapshot every now and then."""

    event: Literal["update"]
    version: Count
    parent: Count
    state: Digest
    count: Count
    file: FileName
    sha256: Digest
    report: dict[str, Any]
    snapshot: FileName | None = None
    snapshot_sha256: Digest | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.snapshot is None) != (self.snapshot_sha256 is None):
            raise ValueError("a snapshot with its sha256, or neither")
        return self


class RevertLine(State):
    """An older version became current."""

    event: Literal["revert"]
    version: Count


LINES: dict[object, type[OpenLine | UpdateLine | RevertLine]] = {
    "open": OpenLine,
    "update": UpdateLine,
    "revert": RevertLine,
}
"""By their event."""
