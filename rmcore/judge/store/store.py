"""The verdict store: the cache of a judge, its audit log, and what a run that was killed goes on from.

It is one file of sqlite, which the processes of a machine share, or a database of PostgreSQL, which those of many do.

What is promised:

- A verdict is handed out after its row is committed, so nothing that was handed out is bought again: not after
  ``kill -9``, and, as rows are synced (``synchronous = FULL``), not after a power cut where disks keep their word.
  Replies that were on their way at that moment are lost, at most one a call in progress.
- Equal questions share one call: tasks, threads and event loops of this process, and all processes of the store. The
  one who asks holds a *claim* in it. If it dies, its claim ends at once where the system tells (Linux, the same
  machine), and after ``lease_s`` everywhere; if it is stopped, or cut off from the database, for longer than
  ``lease_s`` and goes on, a question may be bought twice, and the first verdict to be committed is the answer from then
  on. After a restart of PostgreSQL everybody has ``lease_s`` to come back.
- While the database cannot be reached nothing is bought. What was paid for by then is kept in memory and written when
  it is there again; a store that is closed before says how much it lost.
- Whoever asks may be cancelled; somebody who waits for the same answer then asks in its place.

The database is used in one thread, which commits whatever has come in meanwhile as one transaction; event loops never
wait for it. sqlite's write-ahead log needs a local file system.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.numbers import Within, check_number
from rmcore.judge.store.location import locate
from rmcore.judge.store.protocol import BUSY, Claim, Find, Location, Record, Release, Reuse, StoreError
from rmcore.judge.store.records import Question, Reply
from rmcore.judge.store.sqlite import SqliteFile
from rmcore.judge.store.writer import Writer

__all__ = ["StoreError", "VerdictStore"]

_logger = logging.getLogger(__name__)
_FIRST_POLL_S, _LAST_POLL_S = 0.02, 0.25
_MOMENT_S = 0.25


class VerdictStore:
    """Verdicts in a sqlite file or a PostgreSQL database. Give it to judges; use it from any thread, loop or process.

    Args:
        path: the file; made if it is not there, with mode 0600, since prompts may be confidential. Or
            ``postgresql://[user@]host[:port]/database``, in which a schema ``rmcore`` is made; the password comes from
            ``PGPASSWORD`` or a pgpass file, never from the URL (:mod:`rmcore.judge.store.postgres_url`).
        reuse: ``"replies"``: whatever a judge replied answers an equal question later, refusals and unreadable replies
            included, for they were paid for and will mostly come again; ``"verdicts"``: replies without a verdict are
            asked anew; a set of reasons, such as ``{"length", "unparsable"}``: of those only the ones with these.
            Failures on the way to the judge are logged and never reused.
        open_s: longest wait for others who keep the file locked while it is being opened, or for a server that starts.
        lease_s: seconds after which a claim of a process that gives no sign of life ends.
        clock: the wall clock, for timestamps, and for leases in a file; it must agree with that of other processes.
            PostgreSQL has leases by its own clock.

    Raises:
        StoreError: the store is damaged, of another program, of a later version, or cannot be used.
        InputError: another argument is unusable.
        MissingPackageError: a URL is given, and psycopg is not installed.
    """

    _writer: Writer | None
    _silent: bool

    def __init__(
        self,
        path: str | Path,
        *,
        reuse: Reuse = "replies",
        lease_s: float = 30.0,
        open_s: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        self.location: Location = locate(path)
        if not isinstance(reuse, str) and all(isinstance(reason, str) and reason for reason in reuse):
            reuse = frozenset(reuse)
        elif reuse not in ("replies", "verdicts"):
            reject("reuse", repr(reuse)[:80], "'replies', 'verdicts' or a set of reasons")
        check_number("lease_s", lease_s, Within(above=0), "seconds above 0")
        check_number("open_s", open_s, Within(above=0), "seconds above 0")
        self.reuse: Reuse = reuse
        self.lease_s = lease_s
        self.clock: Clock = clock or SystemClock()
        self.location.check(open_s)  # what is wrong with it is told here, not at the first call
        self._start_anew()

    def __repr__(self) -> str:
        return f"VerdictStore({str(self.location)!r}, reuse={self.reuse!r})"

    @property
    def path(self) -> Path | str:
        """Of the file, absolute; or the URL."""
        return self.location.path if isinstance(self.location, SqliteFile) else str(self.location)

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a copy in another process opens the store for itself."""
        return {name: self.__dict__[name] for name in ("location", "reuse", "lease_s", "clock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    # -- one question at a time --------------------------------------------------------------------------------------

    def get(self, question: Question) -> Reply | None:
        """The stored answer, without a call and without waiting for one under way; ``None`` if there is none.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._submit(Find(question.key)).result()

    def put(self, question: Question, reply: Reply) -> Reply:
        """Log one call; returns, once it is committed, the reply that answers the question from now on.

        That is ``reply``, unless an earlier one holds a verdict already; its usage stays that of ``reply``.

        Raises:
            StoreError: the store cannot be written.
        """
        return self._submit(Record(question, reply)).result()

    async def once(
        self, question: Question, ask: Callable[[], Awaitable[Reply]], *, timeout_s: float | None = None
    ) -> Reply | None:
        """The answer to ``question``: the stored one, that of an equal question under way, or else that of ``ask()``.

        ``ask`` is awaited at most once. What it returns is committed before it is returned, also if this call is
        cancelled in between; if the store cannot be written (a full disk), it is returned all the same, since it is
        paid for, and the error is logged. A reply under way that fails is shared like any other, unless it failed only
        for its own deadline.

        Args:
            question: what is asked.
            ask: puts it to the judge.
            timeout_s: longest wait for *other* askers and for the database; ``ask`` keeps its own time. ``None``: no
                limit. A reply that could not be committed by then is returned all the same and committed later.

        Returns:
            The reply, with a usage of one cache hit if it was not ``ask`` that brought it; ``None`` if ``timeout_s``
            passed while others were asking.

        Raises:
            StoreError: the store cannot be read, or the question not claimed, by ``timeout_s`` where others keep it
                locked or it is out of reach. Nothing was asked then.
            BaseException: what ``ask`` raises, cancellation included.
        """
        self._check_process()
        until = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while True:
            flight, leads = self._join(question.key)
            if leads:
                return await self._lead(question, ask, flight, until)
            try:
                async with asyncio.timeout_at(until):
                    shared = await asyncio.wrap_future(flight)
            except TimeoutError:
                return None
            if shared is not None:
                return shared.as_hit()

    def close(self) -> None:
        """Commit what is waiting and close the database. The store can be used again; it then opens it anew."""
        self._check_process()
        with self._lock:
            writer = self._writer
            self._writer = None
        if writer is not None:
            writer.stop()

    def __enter__(self) -> VerdictStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- single flight -----------------------------------------------------------------------------------------------

    def _join(self, key: str) -> tuple[Future[Reply | None], bool]:
        """The flight of ``key``, and whether the caller has just begun it and has to lead it."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return flight, False
            flight = self._flights[key] = Future()
            flight.set_running_or_notify_cancel()  # so that a follower that is cancelled cannot cancel it for all
            return flight, True

    async def _lead(
        self,
        question: Question,
        ask: Callable[[], Awaitable[Reply]],
        flight: Future[Reply | None],
        until: float | None,
    ) -> Reply | None:
        shared: Reply | None = None
        release = True
        try:
            found = await self._claim(question.key, until)
            if isinstance(found, Reply):
                shared, release = found, False
                return found.as_hit()
            if found is BUSY:
                return None
            own = await ask()
            if not own.verdict.usage.attempts:
                return own  # nothing was sent: no call to log
            try:
                # The job is in the writer's queue before anything is awaited: a paid reply is kept, come what may.
                job = self._submit(Record(question, own))
                release = False
                kept = await self._by(job, until)
            except TimeoutError:
                _logger.warning(
                    "%s: a verdict is handed out before its row is written: it is locked by others, or out of reach",
                    self.location,
                )
                kept = own
            except StoreError as error:
                _logger.error("%s; a reply that was paid for is used and not stored", error)
                kept = own
            shared = kept if kept.shareable else None
            return kept
        finally:
            try:
                if release:
                    self._submit(Release(question.key))  # before the next leader can claim it
            finally:
                with self._lock:
                    if self._flights.get(question.key) is flight:
                        del self._flights[question.key]
                flight.set_result(shared)

    async def _claim(self, key: str, until: float | None) -> Reply | object:
        """The stored answer; ``BUSY`` if another process was asking until time ran out; ``None``: it is ours to ask."""
        loop, delay = asyncio.get_running_loop(), _FIRST_POLL_S
        while True:
            try:
                found = await self._by(self._submit(Claim(key)), until)
            except TimeoutError:
                raise StoreError(f"{self.location}: locked by others, or out of reach, until the deadline") from None
            if found is not BUSY:
                return found
            left = delay if until is None else until - loop.time()
            if left <= 0:
                return BUSY
            await asyncio.sleep(min(delay, left))
            delay = min(2 * delay, _LAST_POLL_S)

    async def _by(self, job: Future[Any], until: float | None) -> Any:
        """What the writer answers. It has a moment even after ``until``: what is stored costs nothing. It has none
        where it let a moment pass before and has answered nobody since, or a batch would take a moment a question.

        Raises:
            TimeoutError: it did not answer in time. The job stays in its queue.
        """
        least = asyncio.get_running_loop().time() + (0.0 if self._silent else _MOMENT_S)
        try:
            async with asyncio.timeout_at(None if until is None else max(until, least)):
                answer = await asyncio.wrap_future(job)
        except TimeoutError:
            self._silent = True
            raise
        self._silent = False
        return answer

    # -- the writer --------------------------------------------------------------------------------------------------

    def _submit(self, job: Any) -> Future[Any]:
        self._check_process()
        with self._lock:
            if self._writer is None or self._writer.ended:
                connect = partial(self.location.connect, self.lease_s, self.clock)
                self._writer = Writer(str(self.location), connect, self.reuse, self.lease_s)
                # At exit too: what is in the queue then is paid for.
                weakref.finalize(self, self._writer.stop)
            return self._writer.submit(job)

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._flights: dict[str, Future[Reply | None]] = {}
        self._writer = None
        self._silent = False

    def _check_process(self) -> None:
        """After a fork the writer's thread is not there, and its connection must not be touched, not even closed."""
        if self._process != os.getpid():
            _abandoned.append(self._writer)
            self._start_anew()


_abandoned: list[Writer | None] = []
