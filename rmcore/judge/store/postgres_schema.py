"""The verdict store's tables in PostgreSQL: one schema, ``rmcore``, made on first use.

The columns are those of the file (:mod:`rmcore.judge.store.database`), so one reader reads both. ``record`` is
new: by it a call that is written again, after a connection was lost in the middle of its commit, is known. ``limits``
and ``admissions`` belong to :mod:`rmcore.judge.store.admissions`.
"""

from __future__ import annotations

import re
import time
from typing import Any, Final

import psycopg

from rmcore.judge.store.postgres_connection import Connection, connect, in_transaction, meaning
from rmcore.judge.store.protocol import StoreError

__all__ = ["LAYOUT_VERSION", "SCHEMA_VERSION", "prepare", "version_of"]

_MIGRATION_LOCK: Final = 0x726D7673
_STARTING = re.compile(r"starting up|shutting down|recovery|too many|remaining connection slots")

_MIGRATIONS: Final = (
    # Step n takes a schema from version n to n + 1; released steps are never edited. The collation "C" makes the
    # beginning of a key a range of its index.
    """
    CREATE SCHEMA IF NOT EXISTS rmcore;
    CREATE TABLE rmcore.store (version INTEGER NOT NULL);
    CREATE TABLE rmcore.texts (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, hash BYTEA NOT NULL UNIQUE, body TEXT NOT NULL);
    CREATE TABLE rmcore.judges (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, hash BYTEA NOT NULL UNIQUE,
        judge TEXT NOT NULL, model TEXT NOT NULL, parameters TEXT NOT NULL, template TEXT NOT NULL);
    CREATE TABLE rmcore.calls (
        id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, record UUID NOT NULL UNIQUE,
        key TEXT COLLATE "C" NOT NULL, pair TEXT COLLATE "C" NOT NULL,
        shown TEXT NOT NULL CHECK (shown IN ('ab', 'ba')),
        judge BIGINT NOT NULL REFERENCES rmcore.judges, prompt BIGINT NOT NULL REFERENCES rmcore.texts,
        first BIGINT NOT NULL REFERENCES rmcore.texts, second BIGINT NOT NULL REFERENCES rmcore.texts,
        preference DOUBLE PRECISION CHECK (preference BETWEEN -1 AND 1), reason TEXT NOT NULL,
        replied SMALLINT NOT NULL CHECK (replied = 1 OR (replied = 0 AND preference IS NULL)),
        critique TEXT NOT NULL, reply TEXT NOT NULL, reply_cut BIGINT NOT NULL, labels TEXT NOT NULL,
        neutralised BIGINT NOT NULL, attempts BIGINT NOT NULL,
        prompt_tokens BIGINT NOT NULL, completion_tokens BIGINT NOT NULL,
        reasoning_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,
        seconds DOUBLE PRECISION NOT NULL, cost DOUBLE PRECISION, currency TEXT NOT NULL,
        canary SMALLINT NOT NULL, at TEXT NOT NULL, version TEXT NOT NULL,
        answered TEXT NOT NULL, fingerprint TEXT NOT NULL, cut TEXT NOT NULL);
    CREATE INDEX calls_by_key ON rmcore.calls (key);
    CREATE INDEX calls_by_pair ON rmcore.calls (judge, pair);
    CREATE TABLE rmcore.owners (
        id TEXT PRIMARY KEY, host TEXT NOT NULL, pid BIGINT NOT NULL, started TEXT NOT NULL,
        beat TIMESTAMPTZ NOT NULL);
    CREATE TABLE rmcore.claims (key TEXT COLLATE "C" PRIMARY KEY, owner TEXT NOT NULL);
    CREATE INDEX claims_by_owner ON rmcore.claims (owner);
    CREATE TABLE rmcore.limits (
        name TEXT PRIMARY KEY, held_until TIMESTAMPTZ, requests BIGINT NOT NULL DEFAULT 0,
        tokens BIGINT NOT NULL DEFAULT 0);
    CREATE TABLE rmcore.admissions (
        id UUID PRIMARY KEY, name TEXT NOT NULL REFERENCES rmcore.limits, at TIMESTAMPTZ NOT NULL,
        tokens BIGINT NOT NULL);
    CREATE INDEX admissions_by_time ON rmcore.admissions (name, at);
    """,
    # Money, in billionths of the run's currency.
    """
    ALTER TABLE rmcore.limits ADD COLUMN cost BIGINT NOT NULL DEFAULT 0, ADD COLUMN currency TEXT NOT NULL DEFAULT '';
    ALTER TABLE rmcore.admissions ADD COLUMN cost BIGINT NOT NULL DEFAULT 0;
    """,
)
SCHEMA_VERSION: Final = len(_MIGRATIONS)
"""The version this release writes, in ``rmcore.store``."""

LAYOUT_VERSION: Final = 3
"""Of the columns, as the file's migrations count them."""


def prepare(url: str, open_s: float) -> None:
    """Make or migrate the tables; wait up to ``open_s`` for a server that is just starting.

    Raises:
        StoreError: they cannot be used: no server, no rights, another program's schema, a later version.
    """
    until = time.monotonic() + open_s
    while True:
        try:
            with connect(url) as connection:
                _prepare(connection, url)
            return
        except psycopg.Error as error:
            told = meaning(error, url)
            if not _STARTING.search(str(told)) or time.monotonic() > until:
                raise StoreError(str(told)) from None
            time.sleep(0.1)


def version_of(connection: Connection, url: str) -> int:
    """The schema's version; 0 if there is none.

    Raises:
        StoreError: it is of another program or of a later version.
    """
    ours, others = _one(
        connection,
        "SELECT to_regclass('rmcore.store') IS NOT NULL, EXISTS (SELECT FROM pg_class c JOIN pg_namespace n "
        "ON n.oid = c.relnamespace WHERE n.nspname = 'rmcore')",
    )
    if not ours:
        if others:
            raise StoreError(f"{url}: got another program's schema rmcore, expected a verdict store or none")
        return 0
    (version,) = _one(connection, "SELECT max(version) FROM rmcore.store")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{url}: got version {version}, expected at most {SCHEMA_VERSION}. It was written by a later rmcore"
        )
    return int(version)


def _prepare(connection: Connection, url: str) -> None:
    (encoding,) = _one(connection, "SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        raise StoreError(f"{url}: got a database in {encoding}, expected one in UTF8")
    if version_of(connection, url) == SCHEMA_VERSION:
        return
    with in_transaction(connection):
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
        version = version_of(connection, url)  # again: another process may have been quicker
        if version < SCHEMA_VERSION:
            for step in _MIGRATIONS[version:]:
                connection.execute(step)
            connection.execute("DELETE FROM rmcore.store")
            connection.execute("INSERT INTO rmcore.store (version) VALUES (%s)", (SCHEMA_VERSION,))


def _one(connection: Connection, query: str) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row
