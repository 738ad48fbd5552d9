"""The verdict store's file: its schema, how it is opened, and the statements that write and look up one call.

One sqlite database in WAL mode. ``calls`` is a log that is only ever appended to: a row for every question that was put
to a judge, whatever came of it. Texts and judges stand in tables of their own, once each. ``claims`` and ``owners``
say who is asking what at this moment; they hold nothing worth keeping.

What its columns hold is in :mod:`rmcore.judge.store.rows`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rmcore.judge.store.protocol import Reuse, StoreError
from rmcore.judge.store.records import Question, Reply
from rmcore.judge.store.rows import REPLY_COLUMNS, call_row, digest, dump_text, judge_row, load_text, reply_of

__all__ = ["SCHEMA_VERSION", "Reuse", "StoreError", "find_reply", "insert_call", "load_text", "open_database"]

_APPLICATION_ID: Final = 0x726D7673  # "rmvs": tells our files from other people's databases
_BUSY_S: Final = 30.0

_MIGRATIONS: Final = (
    # Step n takes a file from version n to n + 1; an empty file is version 0. Released steps are never edited (so the
    # count of sanitised sequences keeps its first name, `neutralised`).
    """
    CREATE TABLE texts (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, body TEXT NOT NULL);
    CREATE TABLE judges (
        id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE,
        judge TEXT NOT NULL, model TEXT NOT NULL, parameters TEXT NOT NULL, template TEXT NOT NULL);
    CREATE TABLE calls (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL, pair TEXT NOT NULL, shown TEXT NOT NULL CHECK (shown IN ('ab', 'ba')),
        judge INTEGER NOT NULL REFERENCES judges, prompt INTEGER NOT NULL REFERENCES texts,
        first INTEGER NOT NULL REFERENCES texts, second INTEGER NOT NULL REFERENCES texts,
        preference REAL CHECK (preference BETWEEN -1 AND 1), reason TEXT NOT NULL,
        replied INTEGER NOT NULL CHECK (replied IN (0, 1) AND (replied OR preference IS NULL)),
        critique TEXT NOT NULL, reply TEXT NOT NULL, reply_cut INTEGER NOT NULL, labels TEXT NOT NULL,
        neutralised INTEGER NOT NULL, attempts INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        reasoning_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
        seconds REAL NOT NULL, cost REAL, currency TEXT NOT NULL,
        canary INTEGER NOT NULL, at TEXT NOT NULL, version TEXT NOT NULL);
    CREATE INDEX calls_by_key ON calls (key);
    CREATE INDEX calls_by_pair ON calls (judge, pair);
    CREATE TABLE owners (
        id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL, beat REAL NOT NULL);
    CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL);
    """,
    """
    ALTER TABLE calls ADD COLUMN answered TEXT NOT NULL DEFAULT '';
    ALTER TABLE calls ADD COLUMN fingerprint TEXT NOT NULL DEFAULT ''
    """,
    "ALTER TABLE calls ADD COLUMN cut TEXT NOT NULL DEFAULT '[0, 0, 0]'",
)
SCHEMA_VERSION: Final = len(_MIGRATIONS)
"""The version this release writes, in the file's ``user_version``."""


_REMEDY = (
    "It is damaged, or no store, and is left as it is: name another file for new verdicts; what of it can be read "
    "`sqlite3 FILE .recover | sqlite3 NEW` may save"
)
_PROTECTED = (
    "This user must be able to write to the file, and to its folder, where sqlite keeps its log: change who may, or "
    "name another file"
)


def open_database(path: str | Path, *, read_only: bool = False, busy_s: float = _BUSY_S) -> sqlite3.Connection:
    """Open a store, made with mode 0600 and brought to this release's version unless ``read_only``.

    The connection is in autocommit mode and may be handed to one other thread. Opening it waits up to ``busy_s`` for
    locks of others, and so does each statement later; then it fails with "database is locked".

    Raises:
        StoreError: the file is damaged, foreign, of a later version, not to be written to, or (``read_only``) missing
            or empty;
            or it lies where sqlite cannot keep a write-ahead log, such as a network file system.
    """
    path = Path(path).absolute()
    try:
        if not read_only:
            _create_file(path)
            _check_writable(path)
        elif not path.is_file():
            raise StoreError(f"{path}: got {'no file' if path.is_dir() else 'nothing'}, expected a verdict store")
        return _open(path, read_only, busy_s)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened ({error.strerror or type(error).__name__})") from None
    except sqlite3.Error as error:
        raise StoreError(f"{path}: no usable verdict store ({error}){remedy(error)}") from None


def remedy(error: sqlite3.Error) -> str:
    """What to do about a damaged or protected file, to go behind the error; empty for errors of another kind."""
    if "readonly" in str(error):
        return f". {_PROTECTED}"
    damaged = any(words in str(error) for words in ("malformed", "not a database", "no such table", "no such column"))
    return f". {_REMEDY}" if damaged else ""


def _open(path: Path, read_only: bool, busy_s: float) -> sqlite3.Connection:
    until = time.monotonic() + busy_s
    database = _connect(path, "ro" if read_only else "rw", busy_s)
    try:
        _wait_until(database, until)
        database.execute("BEGIN")  # one view: another process may be making the store at this moment
        version = _check_owner(database, path)
        database.execute("COMMIT")
        if read_only:
            if not version:
                raise StoreError(f"{path}: got an empty file, expected a verdict store")
            _check_schema(database, path, version)
            return database
        _begin_wal(database, path, until)
        if version < SCHEMA_VERSION:
            _wait_until(database, until)
            _migrate(database, path)
        _check_schema(database, path, SCHEMA_VERSION)
        database.execute(f"PRAGMA busy_timeout = {int(busy_s * 1000)}")
    except BaseException:
        database.close()
        raise
    return database


def _wait_until(database: sqlite3.Connection, until: float) -> None:
    """Statements wait for locks until then."""
    database.execute(f"PRAGMA busy_timeout = {max(1, int((until - time.monotonic()) * 1000))}")


def _create_file(path: Path) -> None:
    """Make an empty file that nobody else may read; sqlite gives its log the same mode. Leave an existing one alone."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        pass


def _check_writable(path: Path) -> None:
    """Else sqlite opens it for reading, and the first question finds out that nothing can be kept."""
    logs = [Path(f"{path}-wal"), Path(f"{path}-shm")]
    beside = logs if all(log.exists() for log in logs) else [path.parent]  # the folder, to make them in
    for one in (path, *beside):
        if not os.access(one, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise StoreError(f"{path}: {one} cannot be written to. {_PROTECTED}")


def _connect(path: Path, mode: str, busy_s: float) -> sqlite3.Connection:
    def connect(options: str) -> sqlite3.Connection:
        url = f"file:{urllib.parse.quote(str(path))}?{options}"
        database = sqlite3.connect(url, uri=True, timeout=busy_s, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA trusted_schema = OFF")  # the file may be somebody else's: run no code of its own
            database.execute("PRAGMA schema_version").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    try:
        return connect(f"mode={mode}")
    except sqlite3.OperationalError:
        # A finished store in a folder where no log can be made, as on read-only media.
        if mode != "ro" or Path(f"{path}-wal").exists() or os.access(path.parent, os.W_OK):
            raise
        return connect("mode=ro&immutable=1")


def _check_owner(database: sqlite3.Connection, path: Path) -> int:
    """The file's version, if it is ours or empty."""
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (objects,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION_ID and (application or version or objects):
        raise StoreError(f"{path}: got another program's database, expected a verdict store")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path}: got version {version}, expected at most {SCHEMA_VERSION}. It was written by a later rmcore"
        )
    return int(version)


def _check_schema(database: sqlite3.Connection, path: Path, version: int) -> None:
    """All tables and columns are there: else the first reply would be bought before it is known that none is kept."""
    missing = sorted(_columns_of(version) - _columns(database))
    if missing:
        raise StoreError(f"{path}: got a store without {', '.join(missing[:3])}, expected them. {_REMEDY}")


def _columns(database: sqlite3.Connection) -> frozenset[str]:
    """``table.column`` of all tables."""
    query = "SELECT m.name || '.' || p.name FROM sqlite_master m, pragma_table_info(m.name) p WHERE m.type = 'table'"
    return frozenset(str(name) for (name,) in database.execute(query))


@functools.cache
def _columns_of(version: int) -> frozenset[str]:
    """What a store of that version has."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        for step in _MIGRATIONS[:version]:
            for statement in step.split(";"):
                database.execute(statement)
        return _columns(database)


def _begin_wal(database: sqlite3.Connection, path: Path, until: float) -> None:
    """Switch to the write-ahead log, which lets readers and a writer work at once."""
    while True:
        try:
            _wait_until(database, until)
            # Asking for it again is free. sqlite does not wait for others here by itself.
            (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise StoreError(f"{path}: got journal mode {mode!r}, expected a local file system, where sqlite can use WAL")


def _migrate(database: sqlite3.Connection, path: Path) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        version = _check_owner(database, path)  # again: another process may have been quicker
        for step in _MIGRATIONS[version:]:
            for statement in step.split(";"):
                database.execute(statement)
        database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    except BaseException:
        database.execute("ROLLBACK")
        raise


# -- calls -----------------------------------------------------------------------------------------------------------


def find_reply(database: sqlite3.Connection, key: str, reuse: Reuse) -> Reply | None:
    """What answers the question ``key`` without a call: the first verdict, or else the latest reply without one.

    The *first* verdict, so that the answer stays what it was, even if a question was bought twice.
    """
    not_again = () if isinstance(reuse, str) else tuple(reuse)
    row = database.execute(
        f"SELECT {REPLY_COLUMNS} FROM calls "  # noqa: S608
        "WHERE key = ? AND replied AND (preference IS NOT NULL OR (? "
        "AND reason NOT IN (SELECT value FROM json_each(?)))) "
        "ORDER BY preference IS NULL, CASE WHEN preference IS NULL THEN -id ELSE id END LIMIT 1",
        (key, reuse != "verdicts", json.dumps(not_again)),
    ).fetchone()
    return None if row is None else reply_of(row)


def insert_call(database: sqlite3.Connection, question: Question, reply: Reply, at: float, version: str) -> None:
    """Append one call, inside the caller's transaction. ``at`` is in seconds since the Unix epoch."""
    row = call_row(question, reply, at, version)
    row["judge"] = _judge_id(database, question)
    for name in ("prompt", "first", "second"):
        row[name] = _text_id(database, getattr(question, name))
    names = ", ".join(row)
    database.execute(f"INSERT INTO calls ({names}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))  # noqa: S608


def _text_id(database: sqlite3.Connection, text: object) -> int:
    body = dump_text(text)
    return _id(database, "texts", body, lambda: {"body": body})


def _judge_id(database: sqlite3.Connection, question: Question) -> int:
    row = judge_row(question)
    return _id(database, "judges", dump_text(list(row.values())), lambda: row)


def _id(database: sqlite3.Connection, table: str, content: str, row: Callable[[], dict[str, str]]) -> int:
    """The id of a row of ``table`` that is found by the hash of its content and made if it is not there."""
    key = digest(content)
    found = database.execute(f"SELECT id FROM {table} WHERE hash = ?", (key,)).fetchone()  # noqa: S608
    if found is None:
        values = row()
        names = ", ".join(values)
        added = database.execute(
            f"INSERT INTO {table} (hash, {names}) VALUES (?{', ?' * len(values)})",  # noqa: S608
            (key, *values.values()),
        )
        return int(added.lastrowid or 0)
    return int(found[0])
