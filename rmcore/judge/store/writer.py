"""The one thread of a verdict store that talks to sqlite: jobs in, futures out, one commit for all that came together.

A *claim* says that an owner is asking a question right now, so that other processes wait for its answer instead of
buying it too. An owner is one writer of one process. It shows that it lives by a heartbeat; on Linux its death is seen
at once, since host, process id and the process's start time together name a process for good.
"""

from __future__ import annotations

import logging
import os
import queue
import sqlite3
import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from rmcore._base.clock import Clock
from rmcore.judge.store.database import Reuse, StoreError, find_reply, insert_call, open_database
from rmcore.judge.store.records import Question, Reply

__all__ = ["BUSY", "Claim", "Find", "Job", "Record", "Release", "Writer"]

BUSY: Final = object()
"""Another process holds the claim."""

_logger = logging.getLogger(__name__)

_BATCH: Final = 512
_BUSY_S: Final = 0.25  # one wait for a lock, so that the end of the store is seen in between
_PATIENCE_S: Final = 30.0  # all waits of one batch
_CLOSE_S: Final = 5.0  # the same, once the store is being closed


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


Job: TypeAlias = Find | Claim | Release | Record


class Writer:
    """A thread with a connection. It starts with the first job and ends with :meth:`stop`."""

    def __init__(self, path: Path, reuse: Reuse, lease_s: float, clock: Clock) -> None:
        from rmcore._base.version import __version__

        self._path, self._reuse, self._lease_s, self._clock = path, reuse, lease_s, clock
        self._version = __version__
        self._owner = uuid.uuid4().hex
        self._held: set[str] = set()
        self._registered = False
        self._beaten = 0.0
        self._process = os.getpid()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Lock()
        self._stopped = False
        self._stop_by = float("inf")
        self._file: tuple[int, int] | None = None
        self._thread = threading.Thread(target=self._run, name="rmcore-store", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job; its future carries the result after the commit, or a StoreError."""
        job.future.set_running_or_notify_cancel()  # what is queued is done, whoever stops waiting for it
        with self._closed:
            if self._stopped:
                job.future.set_exception(StoreError(f"{self._path}: the store was closed"))
            else:
                self._jobs.put(job)
        return job.future

    def stop(self) -> None:
        """Do what is queued, close the connection, end the thread. Jobs that come later fail.

        It takes five seconds at most where somebody else keeps the file locked; what could not be written by then is
        lost, and the log says how much of it was paid for.
        """
        if self._process != os.getpid():
            return  # the thread stayed behind when this process was forked off
        with self._closed:
            if not self._stopped:
                self._stopped = True
                self._stop_by = time.monotonic() + _CLOSE_S
                self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S + 1.0)
            if self._thread.is_alive():
                _logger.error("%s: cannot be closed; its last verdicts may be missing", self._path)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        database: sqlite3.Connection | None = None
        going = True
        while going:
            batch, going = self._next()
            began = time.monotonic()
            while True:
                try:
                    database = self._opened(database)
                    if batch:
                        self._do(database, batch)
                    if going and self._held and time.monotonic() - self._beaten > self._lease_s / 4:
                        self._beat(database)
                except (StoreError, sqlite3.Error) as error:
                    batch = [job for job in batch if not job.future.done()]
                    if "locked" in str(error) and time.monotonic() < min(began + _PATIENCE_S, self._stop_by):
                        continue  # by another process, which may be done soon
                    # Disk full, file gone bad: everybody in this batch is told, and the next batch tries again.
                    self._fail(batch, error if isinstance(error, StoreError) else StoreError(f"{self._path}: {error}"))
                except BaseException as error:  # nobody may wait for ever, whatever happened
                    self._fail(batch, error)
                break
        if database is not None:
            self._close(database)

    def _opened(self, database: sqlite3.Connection | None) -> sqlite3.Connection:
        """The connection, opened if there is none, and a new one where the file it belongs to is gone."""
        if database is not None:
            if self._file == _identity(self._path):
                return database
            self._rescue(database)
        opened = open_database(self._path, busy_s=_BUSY_S)
        self._file, self._registered = _identity(self._path), False
        return opened

    def _rescue(self, database: sqlite3.Connection) -> None:
        """Write what ``database`` still holds to a file again: under its name, or beside a file that took its place.

        The old connection is kept: closing it would delete the log beside the path, which is another file's by now.
        """
        replaced = self._path.exists()
        target = self._path.with_name(f"{self._path.name}.kept-{self._owner[:8]}") if replaced else self._path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not replaced:
                for ending in ("-wal", "-shm"):  # of the lost file; a new one must not take them for its own
                    Path(f"{self._path}{ending}").unlink(missing_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            database.execute("VACUUM INTO ?", (str(target),))
            what = "another file lies in its place; its verdicts are kept in" if replaced else "it is written again to"
            _logger.error("%s: the store was removed while in use; %s %s", self._path, what, target)
        except (OSError, sqlite3.Error) as error:
            _logger.error("%s: the store was removed while in use, and its verdicts are lost (%s)", self._path, error)
        _lost.append(database)

    def _fail(self, batch: list[Job], error: BaseException) -> None:
        paid = sum(isinstance(job, Record) for job in batch)
        if paid:
            _logger.error("%s: %d replies that were paid for are not stored (%s)", self._path, paid, error)
        for job in batch:
            if not job.future.done():
                job.future.set_exception(error)

    def _next(self) -> tuple[list[Job], bool]:
        """All jobs there are, waiting for one (with claims held: until a heartbeat is due), and whether to go on."""
        try:
            job = self._jobs.get(timeout=self._lease_s / 4 if self._held else None)
        except queue.Empty:
            return [], True
        batch: list[Job] = []
        while job is not None:
            batch.append(job)
            if len(batch) == _BATCH:
                return batch, True
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _do(self, database: sqlite3.Connection, batch: list[Job]) -> None:
        """Look up first, since what is stored needs no lock; then write the rest in one transaction, in order."""
        rest = []
        for job in batch:
            found: Reply | None = None
            if isinstance(job, (Find, Claim)):
                try:
                    found = find_reply(database, job.key, self._reuse)
                except StoreError as error:  # one row that nobody can read concerns nobody else
                    job.future.set_exception(error)
                    continue
            if found is None and not isinstance(job, Find):
                rest.append(job)
            else:
                job.future.set_result(found)
        if not rest:
            return
        # Claims need not outlast a power cut, for their owner does not either. What was paid for must.
        records = any(isinstance(job, Record) for job in rest)
        database.execute(f"PRAGMA synchronous = {'FULL' if records else 'NORMAL'}")
        held = set(self._held)
        database.execute("BEGIN IMMEDIATE")
        try:
            self._register(database)
            results = [self._write(database, job) for job in rest]
            database.execute("COMMIT")
        except BaseException:
            self._held = held
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        self._registered = True
        for job, result in zip(rest, results, strict=True):
            job.future.set_result(result)

    def _write(self, database: sqlite3.Connection, job: Job) -> object:
        if isinstance(job, Claim):
            return self._claim(database, job.key)
        if isinstance(job, Release):
            self._release(database, job.key)
            return None
        if isinstance(job, Record):
            insert_call(database, job.question, job.reply, self._clock.wall(), self._version)
            self._release(database, job.question.key)
            return self._standing(database, job)
        raise AssertionError(f"unknown job {type(job).__name__}")

    def _standing(self, database: sqlite3.Connection, job: Record) -> Reply:
        """What answers the question now: the reply just logged, unless somebody else's verdict was there before."""
        if job.reply.verdict.failed and not job.reply.replied:
            return job.reply
        first = find_reply(database, job.question.key, self._reuse)
        if first is None or first.verdict.preference == job.reply.verdict.preference:
            return job.reply
        return replace(first, verdict=replace(first.verdict, usage=job.reply.verdict.usage))

    # -- claims ------------------------------------------------------------------------------------------------------

    def _claim(self, database: sqlite3.Connection, key: str) -> object:
        found = find_reply(database, key, self._reuse)  # again: it may have come since, or earlier in this batch
        if found is not None:
            return found
        holder = database.execute(
            "SELECT owner, host, pid, started, beat FROM claims LEFT JOIN owners ON owners.id = owner WHERE key = ?",
            (key,),
        ).fetchone()
        if holder is not None and holder[0] != self._owner:
            owner, host, pid, started, beat = holder
            # Either way: a beat from the future is of a clock that was set back, and would never end.
            alive = beat is not None and abs(self._clock.wall() - beat) < self._lease_s
            if alive and not _is_dead(host, pid, started):
                return BUSY
            database.execute("DELETE FROM claims WHERE owner = ?", (owner,))
            database.execute("DELETE FROM owners WHERE id = ?", (owner,))
        database.execute("INSERT OR REPLACE INTO claims (key, owner) VALUES (?, ?)", (key, self._owner))
        self._held.add(key)
        return None

    def _release(self, database: sqlite3.Connection, key: str) -> None:
        database.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self._owner))
        self._held.discard(key)

    def _register(self, database: sqlite3.Connection) -> None:
        """Write that we live: with every transaction, and by itself when nothing else is written for a while."""
        now, self._beaten = self._clock.wall(), time.monotonic()
        if not self._registered:
            pid = os.getpid()
            row = (self._owner, _host(), pid, _started(pid), now)
            database.execute("INSERT OR REPLACE INTO owners (id, host, pid, started, beat) VALUES (?, ?, ?, ?, ?)", row)
        elif not database.execute("UPDATE owners SET beat = ? WHERE id = ?", (now, self._owner)).rowcount:
            # We were taken for dead. Claims are gone with that; what is being asked now may be bought twice.
            self._registered = False
            self._register(database)

    def _beat(self, database: sqlite3.Connection) -> None:
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("BEGIN IMMEDIATE")
        try:
            self._register(database)
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _close(self, database: sqlite3.Connection) -> None:
        if self._file != _identity(self._path):
            self._rescue(database)
            return
        try:
            database.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))
            database.execute("DELETE FROM owners WHERE id = ?", (self._owner,))
        except sqlite3.Error:
            pass  # they end with their lease
        database.close()


_lost: list[sqlite3.Connection] = []  # to files that are gone


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies at ``path``; ``None`` if none does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _host() -> str:
    """A name for "this boot of this machine, and this space of process ids"; empty where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot; empty if that cannot be seen, ``dead`` for a zombie."""
    try:
        # The name before the last parenthesis may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "dead" if fields[0] in (b"Z", b"X") else fields[19].decode("ascii")
    except (OSError, IndexError, ValueError):
        return ""


def _is_dead(host: str, pid: int, started: str) -> bool:
    """Whether a process is known to be gone. Where that cannot be known, it is not."""
    if not host or host != _host():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    now = _started(pid)
    return bool(now) and now != started
