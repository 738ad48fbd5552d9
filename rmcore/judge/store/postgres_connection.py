"""A connection to PostgreSQL whose every statement ends in bounded time, and what its errors mean.

A server that hangs (a stopped process, a cable pulled out) sends nothing, not even an error, and libpq would wait for
ever: so whoever waits here gives up after ``QUIET_S`` without a sign, and the connection is dropped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from typing import Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from rmcore.judge.store.protocol import StoreError, UnreachableStoreError

__all__ = ["QUIET_S", "Connection", "connect", "in_transaction", "meaning"]

T = TypeVar("T")

QUIET_S: Final = 5.0
"""Longest silence of a server in the middle of a statement."""

_BEGIN: Final = (
    # Whoever is stopped in the middle of a transaction holds locks; the server ends that for the others.
    "BEGIN; SET LOCAL lock_timeout = '4s'; SET LOCAL statement_timeout = '20s'; "
    "SET LOCAL idle_in_transaction_session_timeout = '3s'"
)
_KEEPALIVES: Final = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}
# Connection lost, rolled back (a deadlock), out of resources (a full disk), a lock not had, ended by an operator.
_PASSING: Final = ("08", "40", "53", "55P03", "57", "25P03")


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """psycopg's, with an end to every wait."""

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Consume ``gen``, unless the server falls silent."""
        return super().wait(_bounded(gen), *args, **kwargs)


def _bounded(gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    until = time.monotonic() + QUIET_S
    try:
        state = next(gen)
        while True:
            ready = yield state
            now = time.monotonic()
            if ready:
                until = now + QUIET_S
            elif now > until:
                raise psycopg.OperationalError(f"no sign of the server for {QUIET_S:g} s")
            state = gen.send(ready)
    except StopIteration as stop:
        return stop.value


def connect(url: str) -> Connection:
    """A connection in autocommit mode, which prepares no statements (a pooler such as PgBouncer may stand between).

    Raises:
        psycopg.Error: there is none to be had.
    """
    own: dict[str, Any] = {"connect_timeout": 3, "application_name": "rmcore", **_KEEPALIVES}
    given = conninfo_to_dict(url)
    ours = {name: value for name, value in own.items() if name not in given}
    connection = Connection.connect(url, autocommit=True, prepare_threshold=None, **ours)
    assert isinstance(connection, Connection)
    return connection


@contextlib.contextmanager
def in_transaction(connection: Connection) -> Iterator[None]:
    """Begin, and commit unless it ends with an error: then the connection is of no further use to the caller."""
    connection.execute(_BEGIN)
    yield
    connection.execute("COMMIT")


def meaning(error: psycopg.Error, url: str) -> StoreError:
    """``error`` as the store's own: worth another try or not. No value of a statement is in it."""
    state = error.sqlstate
    # The server's first line only: the others can quote what a statement held.
    words = (error.diag.message_primary or str(error)).strip().splitlines() or [type(error).__name__]
    passing = state is None or state.startswith(_PASSING)
    if isinstance(error, (psycopg.ProgrammingError, psycopg.DataError)):
        passing = False
    return (UnreachableStoreError if passing else StoreError)(f"{url}: {words[0][:300]}")
