"""What a verdict store needs of a database, and nothing more: five verbs, used in one thread by one writer.

Two databases do it: a file of sqlite (:mod:`rmcore.judge.store.sqlite`), for the processes of one machine, and
PostgreSQL (:mod:`rmcore.judge.store.postgres`), for those of many. What they keep is the same:

- *calls*, a log that is only ever appended to, with texts and judges in tables of their own, once each;
- *claims*: who is asking what at this moment, so that nobody buys it too, and *owners*, who show that they live by a
  heartbeat. A claim ends with its record, when it is given up, or with its owner: at once where the owner's process is
  seen to be gone, and ``lease_s`` after its last heartbeat everywhere.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias

from rmcore._base.clock import Clock
from rmcore._base.errors import InputError
from rmcore.judge.store.records import Question, Reply

__all__ = [
    "BUSY",
    "Claim",
    "Database",
    "Find",
    "Job",
    "Location",
    "Reader",
    "Record",
    "Release",
    "Reuse",
    "StoreError",
    "UnreachableStoreError",
    "Write",
]

BUSY: Final = object()
"""Another owner holds the claim."""

Reuse: TypeAlias = Literal["replies", "verdicts"] | Collection[str]
"""What answers an equal question: whatever the judge replied; only replies that hold a verdict; or whatever it replied
but for replies without a verdict that have one of these reasons (``{"length", "unparsable"}``)."""


class StoreError(InputError):
    """A verdict store cannot be used: missing, damaged, another program's, or of a later version."""


class UnreachableStoreError(StoreError):
    """It cannot be used at this moment, for others keep it locked or the connection is lost: worth another try."""


@dataclass(slots=True)
class Find:
    """→ the stored reply, or ``None``."""

    key: str
    future: Future[Any] = field(default_factory=Future)


@dataclass(slots=True)
class Claim:
    """→ the stored reply; ``None`` if the claim is now ours; :data:`BUSY`."""

    key: str
    future: Future[Any] = field(default_factory=Future)


@dataclass(slots=True)
class Release:
    """Give up our claim, if there is one. → ``None``"""

    key: str
    future: Future[Any] = field(default_factory=Future)


@dataclass(slots=True)
class Record:
    """Log a call and give up the claim. → the reply that answers the question from now on."""

    question: Question
    reply: Reply
    future: Future[Any] = field(default_factory=Future)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of the call: by it a database knows a record that it was given before."""

    @property
    def key(self) -> str:
        """Of the question."""
        return self.question.key


Write: TypeAlias = Claim | Release | Record
Job: TypeAlias = Find | Write


class Database(Protocol):
    """A connection that one owner uses in one thread. It connects when it is first needed, and again when it must.

    Every method raises :class:`UnreachableStoreError` where trying again may help, :class:`StoreError` where it does
    not. It returns in bounded time whatever the database does, hang included.
    """

    def find(self, keys: Sequence[str], reuse: Reuse) -> Mapping[str, Reply | StoreError]:
        """What answers each key without a call, as :func:`standing_reply` says; a row that cannot be read is an error
        of its key alone. Keys that nothing answers are left out. Takes no lock.
        """
        ...

    def write(self, jobs: Sequence[Write], reuse: Reuse) -> list[object]:
        """Do the jobs in order in one transaction, with a heartbeat; what each came to, once it is committed.

        A record comes to the reply that answers the question from now on: the one just logged, unless a verdict was
        there before. Done twice, after a connection was lost in the middle, it is logged once.
        """
        ...

    def beat(self) -> None:
        """Show that the owner lives."""
        ...

    def close(self) -> None:
        """Give up all claims and close the connection. Raises nothing."""
        ...


class Reader(Protocol):
    """A store opened for reading, in one thread; others may write to it. Methods raise :class:`StoreError`."""

    version: int
    """Of the schema, as sqlite's migrations count it."""

    def rows(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """The rows of a query in the SQL that both databases speak, with ``?`` for values."""
        ...

    def size(self) -> int:
        """Bytes on disk."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Location(Protocol):
    """Where a store is; its ``str`` is what errors and logs call it, and holds no password."""

    def check(self, open_s: float) -> None:
        """Make the store if there is none, bring it to this release's version, and say what is wrong with it.

        Raises:
            StoreError: it cannot be used, or not within ``open_s``.
        """
        ...

    def connect(self, lease_s: float, clock: Clock) -> Database:
        """A connection of a new owner of this process."""
        ...

    def read(self) -> Reader:
        """Open it for reading; nothing is made or changed.

        Raises:
            StoreError: there is none, or it cannot be read.
        """
        ...
