"""The one thread of a verdict store that talks to its database: jobs in, futures out, one commit for all that came
together.

A *claim* says that an owner is asking a question right now, so that other processes wait for its answer instead of
buying it too. An owner is one writer of one process.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final

from rmcore.judge.store.protocol import (
    BUSY,
    Claim,
    Database,
    Find,
    Job,
    Record,
    Release,
    Reuse,
    StoreError,
    UnreachableStoreError,
    Write,
)

__all__ = ["BUSY", "Claim", "Find", "Job", "Record", "Release", "Writer"]

_logger = logging.getLogger(__name__)

_BATCH: Final = 512
_PATIENCE_S: Final = 30.0  # all tries of one batch
_CLOSE_S: Final = 5.0  # the same, once the store is being closed
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 0.5  # between two tries


class Writer:
    """A thread with a connection. It starts with the first job and ends with :meth:`stop`.

    Args:
        place: the store's name, for messages.
        connect: makes the connection, of an owner of its own. It is called in the thread and opens nothing yet.
        reuse: as in :class:`~rmcore.judge.store.store.VerdictStore`.
        lease_s: the database's; a heartbeat is due after a quarter of it.
    """

    def __init__(self, place: str, connect: Callable[[], Database], reuse: Reuse, lease_s: float) -> None:
        self._place, self._connect, self._reuse, self._lease_s = place, connect, reuse, lease_s
        self._held: set[str] = set()
        self._beaten = 0.0
        self._owed: list[Job] = []  # records and releases that could not be written yet; nobody waits for them
        self._process = os.getpid()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = threading.Lock()
        self._stopped = False
        self._stop_by = float("inf")
        self._thread = threading.Thread(target=self._run, name="rmcore-store", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job; its future carries the result after the commit, or a StoreError."""
        job.future.set_running_or_notify_cancel()  # what is queued is done, whoever stops waiting for it
        with self._closed:
            if self._stopped:
                job.future.set_exception(StoreError(f"{self._place}: the store was closed"))
            else:
                self._jobs.put(job)
        return job.future

    def stop(self) -> None:
        """Do what is queued, close the connection, end the thread. Jobs that come later fail.

        It takes five seconds at most where somebody else keeps the database locked or it cannot be reached; what could
        not be written by then is lost, and the log says how much of it was paid for. Where nothing was, it does not
        wait: claims end with their owner.
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
                _logger.error("%s: cannot be closed; its last verdicts may be missing", self._place)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            database = self._connect()
            going = True
            while going:
                batch, going = self._next()
                owed, self._owed = self._owed, []
                self._try_until_done(database, owed + batch, going)
            database.close()
        except BaseException as error:  # nobody may wait for ever, whatever happened
            _logger.exception("%s: the store's thread ended", self._place)
            with self._closed:
                self._stopped = True
            left = []
            while not self._jobs.empty():
                left.append(self._jobs.get_nowait())
            self._fail([job for job in left if job is not None], StoreError(f"{self._place}: {type(error).__name__}"))

    @property
    def ended(self) -> bool:
        """Whether it takes nothing more."""
        return self._stopped

    def _try_until_done(self, database: Database, batch: list[Job], going: bool) -> None:
        began, pause = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                if batch:
                    self._work_off(database, batch)
                if going and self._held and time.monotonic() - self._beaten > self._lease_s / 4:
                    database.beat()
                    self._beaten = time.monotonic()
            except UnreachableStoreError as error:
                batch = [job for job in batch if not job.future.done()]
                owed = any(isinstance(job, Record) for job in batch)
                if time.monotonic() < min(began + _PATIENCE_S, self._stop_by) and (owed or not self._stopped):
                    time.sleep(pause)
                    pause = min(2 * pause, _LAST_PAUSE_S)
                    continue
                self._give_up(batch, error)
            except StoreError as error:  # disk full, file gone bad: everybody is told, the next batch tries again
                self._fail(batch, error)
            except BaseException as error:  # nobody may wait for ever, whatever happened
                self._fail(batch, error)
            return

    def _give_up(self, batch: list[Job], error: StoreError) -> None:
        """Nobody waits longer. What was paid for is written when the database is there again, unless that is now."""
        if self._stopped:
            self._fail(batch, error)
            return
        for job in batch:
            if isinstance(job, (Record, Release)):
                later = replace(job, future=Future())
                later.future.set_running_or_notify_cancel()
                self._owed.append(later)
        paid = sum(isinstance(job, Record) for job in self._owed)
        if paid:
            _logger.error("%s: %d replies that were paid for are not stored yet (%s)", self._place, paid, error)
        for job in batch:
            if not job.future.done():
                job.future.set_exception(error)

    def _fail(self, batch: list[Job], error: BaseException) -> None:
        batch = [job for job in batch if not job.future.done()]
        paid = sum(isinstance(job, Record) for job in batch)
        if paid:
            _logger.error("%s: %d replies that were paid for are not stored (%s)", self._place, paid, error)
        for job in batch:
            job.future.set_exception(error)

    def _next(self) -> tuple[list[Job], bool]:
        """All jobs there are, waiting for one (with claims held: until a heartbeat is due), and whether to go on."""
        wait = self._lease_s / 4 if self._held else None
        if self._owed:
            wait = _LAST_PAUSE_S
        try:
            job = self._jobs.get(timeout=wait)
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

    def _work_off(self, database: Database, batch: list[Job]) -> None:
        """Look up first, since what is stored needs no lock; then write the rest in one transaction, in order."""
        keys = dict.fromkeys(job.key for job in batch if isinstance(job, (Find, Claim)))
        found = database.find(list(keys), self._reuse) if keys else {}
        rest: list[Write] = []
        for job in batch:
            if isinstance(job, (Find, Claim)):
                answer = found.get(job.key)
                if isinstance(answer, StoreError):
                    job.future.set_exception(answer)
                    continue
                if isinstance(job, Find) or answer is not None:
                    job.future.set_result(answer)
                    continue
            rest.append(job)
        if not rest:
            return
        results = database.write(rest, self._reuse)
        self._beaten = time.monotonic()
        for job, result in zip(rest, results, strict=True):
            if not isinstance(job, Claim):
                self._held.discard(job.key)
            elif result is None:
                self._held.add(job.key)
            job.future.set_result(result)
