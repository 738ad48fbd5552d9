"""A verdict store in a file of sqlite: :class:`~rmcore.judge.store.protocol.Database` for the processes of one machine.

A write-ahead log needs a local file system: no sharing between machines.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rmcore._base.clock import Clock
from rmcore._base.version import __version__
from rmcore.judge.store.database import find_reply, insert_call, open_database, remedy
from rmcore.judge.store.owner import Owner, is_dead
from rmcore.judge.store.protocol import BUSY, Claim, Record, Release, Reuse, StoreError, UnreachableStoreError, Write
from rmcore.judge.store.records import Reply
from rmcore.judge.store.rows import standing

__all__ = ["SqliteDatabase", "SqliteFile"]

_logger = logging.getLogger(__name__)

_BUSY_S: Final = 0.25  # one wait for a lock, so that the end of the store is seen in between


@dataclass(frozen=True, slots=True)
class SqliteFile:
    """The place of a store that is a file; see :class:`~rmcore.judge.store.protocol.Location`."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def check(self, open_s: float) -> None:
        """Make the file, or bring it to this release's version."""
        open_database(self.path, busy_s=open_s).close()

    def connect(self, lease_s: float, clock: Clock) -> SqliteDatabase:
        """A connection of a new owner."""
        return SqliteDatabase(self.path, Owner.new(), lease_s, clock)

    def read(self) -> SqliteReader:
        """Open it for reading."""
        return SqliteReader(self.path)


class SqliteReader:
    """A file opened read-only; see :class:`~rmcore.judge.store.protocol.Reader`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = open_database(path, read_only=True)
        self._database.text_factory = _text
        (self.version,) = next(self.rows("PRAGMA user_version"))

    def rows(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """The rows of a query."""
        try:
            yield from self._database.execute(query, values)
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: cannot be read ({error}){remedy(error)}") from None

    def size(self) -> int:
        """Bytes of the file."""
        return self._path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class SqliteDatabase:
    """The connection of one owner to a file; see :class:`~rmcore.judge.store.protocol.Database`.

    Args:
        path: of the file.
        owner: who holds the claims.
        lease_s: after how long without a heartbeat an owner is taken for dead.
        clock: the wall clock; it must agree with that of other processes.
    """

    def __init__(self, path: Path, owner: Owner, lease_s: float, clock: Clock) -> None:
        self._path, self._owner, self._lease_s, self._clock = path, owner, lease_s, clock
        self._registered = False
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None

    def find(self, keys: Sequence[str], reuse: Reuse) -> Mapping[str, Reply | StoreError]:
        """What answers each key without a call."""
        found: dict[str, Reply | StoreError] = {}
        with self._opened() as database:
            for key in keys:
                try:
                    reply = find_reply(database, key, reuse)
                except StoreError as error:  # one row that nobody can read concerns nobody else
                    found[key] = error
                else:
                    if reply is not None:
                        found[key] = reply
        return found

    def write(self, jobs: Sequence[Write], reuse: Reuse) -> list[object]:
        """Do the jobs in order in one transaction."""
        # Claims need not outlast a power cut, for their owner does not either. What was paid for must.
        durable = any(isinstance(job, Record) for job in jobs)
        with self._opened() as database:
            with _transaction(database, durable):
                self._register(database)
                results = [self._write(database, job, reuse) for job in jobs]
            self._registered = True
        return results

    def beat(self) -> None:
        """Show that the owner lives."""
        with self._opened() as database, _transaction(database, durable=False):
            self._register(database)

    def close(self) -> None:
        """Give up all claims and close the file."""
        database, self._connection = self._connection, None
        if database is None:
            return
        if self._file != _identity(self._path):
            self._rescue(database)
            return
        with contextlib.suppress(sqlite3.Error):  # they end with their lease
            database.execute("DELETE FROM claims WHERE owner = ?", (self._owner.id,))
            database.execute("DELETE FROM owners WHERE id = ?", (self._owner.id,))
        with contextlib.suppress(sqlite3.Error):
            database.close()

    # -- the file ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The connection, opened if there is none, and a new one where the file it belongs to is gone."""
        try:
            if self._connection is not None and self._file != _identity(self._path):
                lost, self._connection = self._connection, None
                self._rescue(lost)
            if self._connection is None:
                self._connection = open_database(self._path, busy_s=_BUSY_S)
                self._file, self._registered = _identity(self._path), False
            yield self._connection
        except UnreachableStoreError:
            raise
        except (StoreError, sqlite3.Error) as error:
            kind = UnreachableStoreError if _passes(error) else StoreError
            text = str(error) if isinstance(error, StoreError) else f"{self._path}: {error}{remedy(error)}"
            raise kind(text) from None

    def _rescue(self, database: sqlite3.Connection) -> None:
        """Write what ``database`` still holds to a file again: under its name, or else beside what took its place, or
        else in the nearest folder that is still there.

        The old connection is kept: closing it would delete the log beside the path, which is another file's by now.
        """
        kept, trouble = f"{self._path.name}.kept-{self._owner.id[:8]}", ""
        there = next(folder for folder in self._path.parents if folder.is_dir())
        for target in dict.fromkeys((self._path, self._path.with_name(kept), there / kept)):
            if os.path.lexists(target):
                trouble = trouble or "another file lies in its place"
                continue
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if target == self._path:
                    for ending in ("-wal", "-shm"):  # of the lost file; a new one must not take them for its own
                        Path(f"{target}{ending}").unlink(missing_ok=True)
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                database.execute("VACUUM INTO ?", (str(target),))
            except (OSError, sqlite3.Error) as error:
                trouble = trouble or f"its place cannot be written to ({error})"
                continue
            what = f"{trouble}; its verdicts are kept in" if trouble else "it is written again to"
            _logger.error("%s: the store was removed while in use; %s %s", self._path, what, target)
            break
        else:
            _logger.error("%s: the store was removed while in use, and its verdicts are lost (%s)", self._path, trouble)
        _lost.append(database)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def _write(self, database: sqlite3.Connection, job: Write, reuse: Reuse) -> object:
        if isinstance(job, Claim):
            return self._claim(database, job.key, reuse)
        if isinstance(job, Record):
            insert_call(database, job.question, job.reply, self._clock.wall(), __version__)
        self._release(database, job.key)
        if isinstance(job, Release):
            return None
        return standing(job.reply, find_reply(database, job.key, reuse))

    def _claim(self, database: sqlite3.Connection, key: str, reuse: Reuse) -> object:
        found = find_reply(database, key, reuse)  # again: it may have come since, or earlier in this batch
        if found is not None:
            return found
        holder = database.execute(
            "SELECT owner, host, pid, started, beat FROM claims LEFT JOIN owners ON owners.id = owner WHERE key = ?",
            (key,),
        ).fetchone()
        if holder is not None and holder[0] != self._owner.id:
            owner, host, pid, started, beat = holder
            # Either way: a beat from the future is of a clock that was set back, and would never end.
            alive = beat is not None and abs(self._clock.wall() - beat) < self._lease_s
            if alive and not is_dead(host, pid, started):
                return BUSY
            database.execute("DELETE FROM claims WHERE owner = ?", (owner,))
            database.execute("DELETE FROM owners WHERE id = ?", (owner,))
        database.execute("INSERT OR REPLACE INTO claims (key, owner) VALUES (?, ?)", (key, self._owner.id))
        return None

    def _release(self, database: sqlite3.Connection, key: str) -> None:
        database.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self._owner.id))

    def _register(self, database: sqlite3.Connection) -> None:
        """Write that we live: with every transaction, and by itself when nothing else is written for a while."""
        now, me = self._clock.wall(), self._owner
        if not self._registered:
            row = (me.id, me.host, me.pid, me.started, now)
            database.execute("INSERT OR REPLACE INTO owners (id, host, pid, started, beat) VALUES (?, ?, ?, ?, ?)", row)
        elif not database.execute("UPDATE owners SET beat = ? WHERE id = ?", (now, me.id)).rowcount:
            # We were taken for dead. Claims are gone with that; what is being asked now may be bought twice.
            self._registered = False
            self._register(database)


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection, durable: bool) -> Iterator[None]:
    database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


_lost: list[sqlite3.Connection] = []  # to files that are gone


def _passes(error: Exception) -> bool:
    """Whether trying again may help: another process has the file locked, or this one has no file left to open.

    A full disk, or a file gone bad, does not pass so soon.
    """
    said = str(error)
    if "unable to open" in said:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as trouble:
            return trouble.errno in (errno.EMFILE, errno.ENFILE)
    return "locked" in said or os.strerror(errno.EMFILE) in said or os.strerror(errno.ENFILE) in said


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies at ``path``; ``None`` if none does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _text(stored: bytes) -> str | bytes:
    """A text, or its bytes where they are none: then its row is refused, not the whole query."""
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return stored
