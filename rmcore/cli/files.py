"""Options that name a file to be read: all are declared by :func:`file_read`, so that what is wrong with one is told by
the option too, before anything else is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from rmcore._base.errors import InputError, reject
from rmcore.cli.checks import check_readable
from rmcore.cli.console import reported_errors

__all__ = ["check_named_file", "file_read", "reading"]


def file_read(*flags: str, help: str, rows: bool = False) -> Any:
    """An option that is a file's name; a file that cannot be read ends the command with the option and the name.

    Args:
        flags: as of ``typer.Option``.
        help: likewise.
        rows: what is read are rows, from wherever :func:`rmcore.model.data.read_rows` takes them: a folder of the
            datasets library, the hub or standard input too.
    """

    def check(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
        if value is None or ctx.resilient_parsing:
            return value
        with reported_errors():
            check_named_file(max(param.opts, key=len), value, rows=rows)
        return value

    return typer.Option(*flags, help=help, callback=check)


@contextmanager
def reading(option: str, path: str | Path) -> Iterator[None]:
    """What is wrong with what a file holds is told by the option too."""
    try:
        yield
    except InputError as error:
        if Path(path).name not in str(error):  # of an argument, not of the file
            raise
        raise InputError(f"{option}: {error}") from error


def check_named_file(option: str, path: str | Path, *, rows: bool = False) -> None:
    """Raise InputError, by the option, where a file cannot be read."""
    name = str(path)
    try:
        if rows:
            check_readable(name)
        elif os.path.isdir(name):
            reject(option, f"{name!r}, a folder", "a file")
        elif not os.access(name, os.R_OK):
            os.stat(name)  # says what is wrong with the name, unless it is the permission
            reject(option, repr(name), "a file that can be read: permission denied")
    except OSError as error:
        reject(option, repr(name), f"a file that can be read: {(error.strerror or str(error)).lower()}")
