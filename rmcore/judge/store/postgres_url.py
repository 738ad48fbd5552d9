"""Where a store in PostgreSQL is: ``postgresql://[user@]host[:port]/database[?option=value]``, as libpq reads it.

A URL stands in shell histories, process lists, logs and reports, so it may hold no password: that comes from
``PGPASSWORD``, from the file that ``PGPASSFILE`` names (``~/.pgpass``), or from a service file, all of which libpq
reads by itself. Hence the URL can be shown wherever a file's path would be.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn
from urllib.parse import parse_qsl, urlsplit

from rmcore._base.clock import Clock
from rmcore._base.errors import MissingPackageError, reject

if TYPE_CHECKING:
    from rmcore.judge.store.postgres import PostgresDatabase, PostgresReader

__all__ = ["PostgresUrl"]

_SECRET: Final = ("password", "passwd", "sslpassword", "oauth_client_secret")
_REMEDY: Final = "set PGPASSWORD, or write a line into the file that PGPASSFILE names (~/.pgpass)"


@dataclass(frozen=True, slots=True)
class PostgresUrl:
    """The place of a store in PostgreSQL (:class:`~rmcore.judge.store.protocol.Location`); make it with :meth:`of`."""

    url: str

    @classmethod
    def of(cls, url: str) -> PostgresUrl:
        """The place that ``url`` means.

        Raises:
            InputError: it holds a password, or libpq cannot read it; the message does not repeat it.
            MissingPackageError: psycopg is not installed.
        """
        try:
            parts = urlsplit(url)
            held = parts.password is not None or "@" in (parts.netloc.rpartition("@")[0])
            options = {name.casefold() for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        except ValueError:
            _refuse("one that cannot be read")
        if held or options & set(_SECRET):
            _refuse("one with a password in it", _REMEDY)
        if importlib.util.find_spec("psycopg") is None:
            raise MissingPackageError("a store in PostgreSQL needs psycopg: pip install 'rmcore[postgres]'")
        import psycopg
        from psycopg.conninfo import conninfo_to_dict

        try:
            conninfo_to_dict(url)
        except psycopg.Error:  # its words may repeat parts of the URL
            _refuse("one that libpq cannot read")
        return cls(url)

    def __str__(self) -> str:
        return self.url

    def check(self, open_s: float) -> None:
        """Make the tables if there are none, or bring them to this release's version."""
        from rmcore.judge.store.postgres_schema import prepare

        prepare(self.url, open_s)

    def connect(self, lease_s: float, clock: Clock) -> PostgresDatabase:
        """A connection of a new owner."""
        from rmcore.judge.store.owner import Owner
        from rmcore.judge.store.postgres import PostgresDatabase

        return PostgresDatabase(self.url, Owner.new(), lease_s, clock)

    def read(self) -> PostgresReader:
        """Open it for reading."""
        from rmcore.judge.store.postgres import PostgresReader

        return PostgresReader(self.url)


def _refuse(got: str, remedy: str = "") -> NoReturn:
    reject("store", got, "postgresql://[user@]host[:port]/database without a password", remedy)
