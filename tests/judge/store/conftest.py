"""One suite for both databases: ``place`` is a file of sqlite, and (``make test-postgres``) one of PostgreSQL."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

import pytest
from support.postgres import PostgresServer, postgres_server

from rmcore.judge import VerdictStore
from rmcore.judge.store.location import is_url

BOTH = [pytest.param("sqlite", id="sqlite"), pytest.param("postgres", id="postgres", marks=pytest.mark.postgres)]


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def database(server) -> str:
    return server.new_database()


@pytest.fixture(params=BOTH)
def place(request, tmp_path):
    """Where a store may be: a path, or a URL."""
    return tmp_path / "verdicts.db" if request.param == "sqlite" else request.getfixturevalue("database")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "verdicts.db"


@pytest.fixture
def store(place) -> Iterator[VerdictStore]:
    with VerdictStore(place) as store:
        yield store


@pytest.fixture
def execute():
    """Run one statement in a store behind its back; what it returns."""

    def execute(place, query: str):
        if is_url(place):
            import psycopg

            with psycopg.connect(place, autocommit=True, options="-c search_path=rmcore") as connection:
                cursor = connection.execute(query)
                return cursor.fetchall() if cursor.description else []
        with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as database:
            return database.execute(query).fetchall()

    return execute
