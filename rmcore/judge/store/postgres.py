"""A verdict store in PostgreSQL: :class:`~rmcore.judge.store.protocol.Database` for the processes of many machines.

A batch of jobs is a handful of statements over all its keys, whatever its size, so that round trips are few. Rows are
locked in the order of their keys, so batches do not wait for each other in a circle.

- A claim is a row that was inserted: of two who try at once the database lets one. Its owner's heartbeat is by the
  database's clock, so machines need not agree on the time, and after a restart of the server everybody is given a lease
  from its start before a claim is taken over.
- Records of one question are written one after the other (an advisory lock), so that ids are in the order of commits
  and the first verdict is the same one for everybody.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

import psycopg

from rmcore._base.clock import Clock
from rmcore._base.version import __version__
from rmcore.judge.store.owner import Owner, is_dead
from rmcore.judge.store.postgres_connection import Connection, connect, in_transaction, meaning
from rmcore.judge.store.postgres_schema import LAYOUT_VERSION, version_of
from rmcore.judge.store.protocol import BUSY, Claim, Record, Reuse, StoreError, Write
from rmcore.judge.store.records import Reply
from rmcore.judge.store.rows import REPLY_COLUMNS, call_row, digest, dump_text, judge_row, reply_of, standing

__all__ = ["PostgresDatabase", "PostgresReader"]

_FIND: Final = f"""
    SELECT DISTINCT ON (key) key, {REPLY_COLUMNS} FROM rmcore.calls
    WHERE key = ANY(%s) AND replied = 1 AND (preference IS NOT NULL OR (%s AND reason <> ALL(%s)))
    ORDER BY key, preference IS NULL, CASE WHEN preference IS NULL THEN -id ELSE id END"""  # noqa: S608
_BEAT: Final = """
    INSERT INTO rmcore.owners (id, host, pid, started, beat) VALUES (%s, %s, %s, %s, clock_timestamp())
    ON CONFLICT (id) DO UPDATE SET beat = clock_timestamp()"""
_CLAIM: Final = """
    INSERT INTO rmcore.claims (key, owner) SELECT key, %s FROM unnest(%s::text[]) AS key ORDER BY key COLLATE "C"
    ON CONFLICT (key) DO NOTHING"""
# A beat from the future is of a clock that was set back, and would never end.
_HOLDERS: Final = """
    SELECT key, owner, host, pid, started, beat IS NULL OR abs(extract(epoch FROM
        clock_timestamp() - greatest(beat, pg_postmaster_start_time()))) > %s
    FROM rmcore.claims LEFT JOIN rmcore.owners ON owners.id = owner WHERE key = ANY(%s)"""
_PLAIN: Final = ("reason", "currency", "answered", "fingerprint", "judge", "model", "template")


class PostgresDatabase:
    """The connection of one owner; see :class:`~rmcore.judge.store.protocol.Database`.

    Args:
        url: of the database.
        owner: who holds the claims.
        lease_s: after how long without a heartbeat an owner is taken for dead.
        clock: the wall clock, for timestamps of calls.
    """

    def __init__(self, url: str, owner: Owner, lease_s: float, clock: Clock) -> None:
        self._url, self._owner, self._lease_s, self._clock = url, owner, lease_s, clock
        self._connection: Connection | None = None

    def find(self, keys: Sequence[str], reuse: Reuse) -> Mapping[str, Reply | StoreError]:
        """What answers each key without a call."""
        with self._opened() as connection:
            return _find(connection, keys, reuse)

    def write(self, jobs: Sequence[Write], reuse: Reuse) -> list[object]:
        """Do the jobs in order: those of different keys together, in one transaction."""
        results: list[object] = []
        for wave in _waves(jobs):
            with self._opened() as connection, in_transaction(connection):
                results += self._write(connection, wave, reuse)
        return results

    def beat(self) -> None:
        """Show that the owner lives."""
        with self._opened() as connection:
            self._beat(connection)

    def close(self) -> None:
        """Give up all claims and close the connection."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(psycopg.Error):  # they end with their lease
            connection.execute("DELETE FROM rmcore.claims WHERE owner = %s", (self._owner.id,))
            connection.execute("DELETE FROM rmcore.owners WHERE id = %s", (self._owner.id,))
        connection.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Connection]:
        """The connection, made if there is none; after an error it is dropped, and with it what it had begun."""
        try:
            if self._connection is None:
                self._connection = connect(self._url)
            yield self._connection
        except BaseException as error:
            broken, self._connection = self._connection, None
            if broken is not None:
                broken.close()
            if isinstance(error, psycopg.Error):
                raise meaning(error, self._url) from None
            raise

    def _beat(self, connection: Connection) -> None:
        me = self._owner
        connection.execute(_BEAT, (me.id, me.host, me.pid, me.started))

    # -- one wave ----------------------------------------------------------------------------------------------------

    def _write(self, connection: Connection, jobs: Sequence[Write], reuse: Reuse) -> list[object]:
        """What each job came to. Their keys are all different, so they are done kind by kind."""
        self._beat(connection)
        claims = sorted(job.key for job in jobs if isinstance(job, Claim))
        records = sorted((job for job in jobs if isinstance(job, Record)), key=lambda job: job.key)
        results: dict[str, object] = self._claims(connection, claims, reuse) if claims else {}
        if records:
            self._log(connection, records)
        ended = [job.key for job in jobs if not isinstance(job, Claim)]
        if ended:
            self._release(connection, ended)
        if records:
            found = _find(connection, [job.key for job in records], reuse)
            results |= {job.key: _standing(job, found.get(job.key)) for job in records}
        return [results.get(job.key) for job in jobs]

    def _claims(self, connection: Connection, keys: list[str], reuse: Reuse) -> dict[str, object]:
        """Of each key: the reply that is there, ``BUSY``, or ``None``: it is ours."""
        connection.execute(_CLAIM, (self._owner.id, keys))
        others = self._others(connection, keys)
        dead = sorted({holder for holder, alive in others.values() if not alive})
        if dead:
            connection.execute("DELETE FROM rmcore.claims WHERE owner = ANY(%s)", (dead,))
            connection.execute("DELETE FROM rmcore.owners WHERE id = ANY(%s)", (dead,))
            connection.execute(_CLAIM, (self._owner.id, sorted(others)))
            others = self._others(connection, sorted(others))
        mine = [key for key in keys if key not in others]
        results: dict[str, object] = dict.fromkeys(others, BUSY)
        # Only now: it may have come just before the claim was ours.
        found = _find(connection, mine, reuse)
        if found:
            self._release(connection, list(found))
        for key in mine:
            answer = found.get(key)
            if isinstance(answer, StoreError):
                raise answer
            results[key] = answer
        return results

    def _others(self, connection: Connection, keys: Sequence[str]) -> dict[str, tuple[str, bool]]:
        """Keys that others hold: who, and whether they live."""
        rows = connection.execute(_HOLDERS, (self._lease_s, list(keys))).fetchall()
        return {
            key: (owner, not late and not is_dead(host, pid, started))
            for key, owner, host, pid, started, late in rows
            if owner != self._owner.id
        }

    def _release(self, connection: Connection, keys: list[str]) -> None:
        connection.execute("DELETE FROM rmcore.claims WHERE key = ANY(%s) AND owner = %s", (keys, self._owner.id))

    def _log(self, connection: Connection, records: Sequence[Record]) -> None:
        """Append the calls, each once, however often it is tried."""
        locks = sorted({int(job.key[:15], 16) for job in records})
        connection.execute("SELECT pg_advisory_xact_lock(n) FROM unnest(%s::bigint[]) AS n", (locks,))
        texts = {name: [dump_text(getattr(job.question, name)) for job in records] for name in _TEXTS}
        bodies = {digest(body): {"body": body} for column in texts.values() for body in column}
        text_ids = _ids(connection, "texts", bodies)
        asked = [judge_row(job.question) for job in records]
        hashes = [digest(dump_text(list(row.values()))) for row in asked]
        judge_ids = _ids(connection, "judges", dict(zip(hashes, asked, strict=True)))
        at = self._clock.wall()
        rows = []
        for k, job in enumerate(records):
            row = _plain(call_row(job.question, job.reply, at, __version__))
            row |= {name: text_ids[digest(texts[name][k])] for name in _TEXTS}
            rows.append(row | {"judge": judge_ids[hashes[k]], "record": job.id})
        with connection.cursor() as cursor:
            cursor.executemany(_insert("calls", list(rows[0]), "record"), [tuple(row.values()) for row in rows])


_TEXTS: Final = ("prompt", "first", "second")


class PostgresReader:
    """One snapshot of a store, as of when it was opened; see :class:`~rmcore.judge.store.protocol.Reader`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.version = LAYOUT_VERSION
        self._cursors = itertools.count()
        try:
            self._connection = connect(url)
            try:
                if not version_of(self._connection, url):
                    raise StoreError(f"{url}: got nothing, expected a verdict store")
                self._connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                self._connection.execute("SET LOCAL search_path = rmcore")
            except BaseException:
                self._connection.close()
                raise
        except psycopg.Error as error:
            raise meaning(error, url) from None

    def rows(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, a few at a time."""
        try:
            with self._connection.cursor(f"rmcore_{next(self._cursors)}") as cursor:
                cursor.execute(query.replace("?", "%s"), values)
                yield from cursor
        except psycopg.Error as error:
            raise StoreError(f"{meaning(error, self._url)} (reading)") from None

    def size(self) -> int:
        """Bytes of its tables and their indices."""
        query = """SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c
            WHERE c.relnamespace = 'rmcore'::regnamespace AND c.relkind = 'r'"""
        return int(next(self.rows(query))[0])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _waves(jobs: Sequence[Write]) -> Iterator[list[Write]]:
    """The jobs in order, cut wherever a key comes again."""
    wave: dict[str, Write] = {}
    for job in jobs:
        if job.key in wave:
            yield list(wave.values())
            wave = {}
        wave[job.key] = job
    if wave:
        yield list(wave.values())


def _find(connection: Connection, keys: Sequence[str], reuse: Reuse) -> dict[str, Reply | StoreError]:
    if not keys:
        return {}
    not_again = [] if isinstance(reuse, str) else list(reuse)
    found: dict[str, Reply | StoreError] = {}
    for key, *row in connection.execute(_FIND, (list(keys), reuse != "verdicts", not_again)):
        try:
            found[key] = reply_of(row)
        except StoreError as error:  # one row that nobody can read concerns nobody else
            found[key] = error
    return found


def _standing(job: Record, found: Reply | StoreError | None) -> Reply:
    return job.reply if isinstance(found, StoreError) else standing(job.reply, found)


def _ids(connection: Connection, table: str, rows: Mapping[bytes, Mapping[str, str]]) -> dict[bytes, int]:
    """The ids of rows of ``table`` that are found by their hash, and made where they are not there."""
    query = f"SELECT hash, id FROM rmcore.{table} WHERE hash = ANY(%s)"  # noqa: S608
    found: dict[bytes, int] = dict(connection.execute(query, (list(rows),)).fetchall())
    missing = sorted(rows.keys() - found.keys())
    if missing:
        names = ["hash", *rows[missing[0]]]
        with connection.cursor() as cursor:
            values = [(key, *_plain(rows[key]).values()) for key in missing]
            cursor.executemany(_insert(table, names, "hash"), values)
        found |= dict(connection.execute(query, (missing,)).fetchall())
    return found


def _insert(table: str, names: Sequence[str], unique: str) -> Any:
    columns, values = ", ".join(names), ", ".join(["%s"] * len(names))
    return f"INSERT INTO rmcore.{table} ({columns}) VALUES ({values}) ON CONFLICT ({unique}) DO NOTHING"  # noqa: S608


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """``row`` with escapes for what PostgreSQL's text cannot hold: NUL, and halves of surrogate pairs."""
    return {name: _escaped(value) if name in _PLAIN else value for name, value in row.items()}


def _escaped(value: object) -> object:
    text = cast("str", value)
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
