"""Which database a store's name means: a URL of PostgreSQL, or else a file of sqlite."""

from __future__ import annotations

from pathlib import Path

from rmcore._base.errors import reject
from rmcore.judge.store.protocol import Location

__all__ = ["is_url", "locate"]

_SCHEMES = ("postgresql:", "postgres:")


def is_url(name: object) -> bool:
    """Whether ``name`` means a database server, not a file."""
    return isinstance(name, str) and name.startswith(_SCHEMES)


def locate(name: str | Path) -> Location:
    """The place that ``name`` means.

    Raises:
        InputError: it is none, or a URL that cannot be used.
        MissingPackageError: a URL, and there is no psycopg.
    """
    if not isinstance(name, (str, Path)) or not str(name):
        got = type(name).__name__ if name != "" else "an empty one"
        reject("path", got, "the path of a file, or postgresql://[user@]host[:port]/database")
    if isinstance(name, str) and is_url(name):
        from rmcore.judge.store.postgres_url import PostgresUrl

        return PostgresUrl.of(name)
    if isinstance(name, str) and "://" in name:
        reject("path", f"{name.split('://')[0][:40]}://…", "the path of a file, or postgresql://…")
    from rmcore.judge.store.sqlite import SqliteFile

    return SqliteFile(Path(name).absolute())
