"""What groups are put together from: members, their results, and why one is refused (by ``serve.assembly``)."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field

from rmcore._base.errors import InputError
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_json, canonical_prompt, canonical_response
from rmcore.engine.group_score import GroupScore
from rmcore.integrations.server.once import Once

__all__ = [
    "RESENT",
    "AssemblyStats",
    "BusyError",
    "ConflictError",
    "LateError",
    "MemberResult",
    "OpenGroup",
    "Outcome",
    "Slot",
    "group_digest",
    "prompt_digest",
    "text_digest",
]


class ConflictError(InputError):
    """A member contradicts what it or its siblings said before."""


class LateError(InputError):
    """The group was scored without this member, because it came after the time limit."""


RESENT: ContextVar[bool] = ContextVar("resent", default=False)
"""Set around a call that is made again since the process that had the group has died: that one may have answered some
of its members. Such a group is scored whole or not at all (:mod:`rmcore.integrations.server.doubts`)."""


class BusyError(RuntimeError):
    """Too much is waiting already; come back after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class MemberResult:
    """One member's part of its scored group.

    Attributes:
        group: the scored group, its rows in the order of ``slots``.
        index: this member's row.
        slots: which slots were present, in order; shorter than ``size`` if the time limit passed.
        size: how many there should have been.
        notes: what each row's member came with.
        worked_out: of the group, for all its members.
    """

    group: GroupScore
    index: int
    slots: tuple[int, ...]
    size: int
    _slot: Slot | None = field(default=None, repr=False, compare=False)
    notes: tuple[object, ...] = ()
    worked_out: Once = field(default_factory=Once, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether nobody was missing."""
        return len(self.slots) == self.size

    def lost(self) -> None:
        """Tell that this result did not reach its caller, so that an equal call by content is a repetition."""
        if self._slot is not None:
            self._slot.delivered = False

    def reached(self) -> None:
        """Tell that this result is known to have reached its caller, where that is found out."""
        if self._slot is not None:
            self._slot.reached = self._slot.delivered


@dataclass
class AssemblyStats:
    """What happened so far."""

    members: int = 0
    retries: int = 0
    recovered: int = 0
    abandoned: int = 0
    groups: int = 0
    partial_groups: int = 0
    failed_groups: int = 0
    late_members: int = 0
    refused: int = 0


@dataclass(eq=False)
class Slot:
    """A member. ``left_at`` is when its last waiter went away; ``delivered`` means that its result went out, and
    ``reached`` that it is known to have arrived.
    """

    digest: bytes
    text: Canonical | None  # until the group is scored
    note: object = None
    waiters: int = 0
    delivered: bool = False
    reached: bool = False
    left_at: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A scored group: the slots present, and the row of each member; their notes, a row each; what is worked out of
    them.
    """

    score: GroupScore
    slots: tuple[int, ...]
    rows: dict[int, int]
    notes: tuple[object, ...] = ()
    worked_out: Once = field(default_factory=Once, repr=False, compare=False)


@dataclass(eq=False)
class OpenGroup:
    """A group from its first member until it is forgotten."""

    key: Hashable
    prompt: Prompt | None  # until it is scored
    digest: str  # of the prompt, and what else its members have in common
    size: int
    deadline: float
    principle: str = ""
    by_content: bool = False
    resent: bool = False
    slots: dict[int, Slot] = field(default_factory=dict)
    whole: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False
    task: asyncio.Future[Outcome] | None = None
    outcome: Outcome | None = None


def text_digest(response: Response) -> bytes:
    """sha256 of any response; raises InputError for what is none."""
    canonical = canonical_response(response)
    if isinstance(canonical, str):
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(b"\xff" + canonical_json(canonical).encode("ascii")).digest()  # no text begins with that byte


def group_digest(prompt: Prompt, *kin: object) -> str:
    """sha256 of a prompt and of JSON values that the members of a group have in common besides; of none: the prompt's.

    Raises InputError for what is no prompt.
    """
    digest = prompt_digest(prompt)
    if all(one in (None, "") for one in kin):
        return digest
    return hashlib.sha256(json.dumps([digest, *kin], separators=(",", ":")).encode("ascii")).hexdigest()


def prompt_digest(prompt: Prompt) -> str:
    """sha256 of what a judge would be shown; raises InputError for what is no prompt."""
    return hashlib.sha256(canonical_json(canonical_prompt(prompt)).encode("ascii")).hexdigest()
