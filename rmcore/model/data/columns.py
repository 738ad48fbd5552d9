"""Other names for columns: ``prompt=question`` takes ``prompt`` from the column ``question``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rmcore._base.errors import InputError, reject

__all__ = ["Holed", "Unreadable", "map_columns", "parse_columns"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In place of a value of a table that Python has nothing for, such as a date in the year 20000, and why.

    It is no text, number or message, so whoever uses the column refuses it, and nobody else minds.
    """

    why: str


class Holed(dict[str, Any]):
    """A row of a table of which some values are :class:`Unreadable`, or have such within them."""


def parse_columns(given: Iterable[str]) -> dict[str, str]:
    """``["prompt=question", "chosen=good,rejected=bad"]`` as a mapping from rmcore's names to the file's.

    Raises InputError for what is no NAME=COLUMN, and for a name that comes twice.
    """
    found: dict[str, str] = {}
    for pair in (part for text in given for part in text.split(",")):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not (name and equals and column):
            reject("columns", repr(pair), "NAME=COLUMN, as in prompt=question")
        if name in found:
            reject("columns", f"{name} twice", "each name once")
        found[name] = column
    return found


def map_columns(row: Mapping[str, Any], columns: Mapping[str, str], known: Collection[str]) -> dict[str, Any]:
    """``row`` with the ``columns`` under their new names besides.

    A column that is not there is looked for inside others, at its dots: ``prompt=input.text``.

    Raises:
        InputError: a name is none of the ``known`` ones, or a column is missing, or one of the known cannot be read, or
            not all that is in it.
    """
    result = dict(row)
    for name, column in columns.items():
        if name not in known:
            reject("columns", repr(name), f"one of {', '.join(sorted(known))}")
        result[name] = _value(row, column, name)
    if isinstance(row, Holed):
        for name, value in result.items():
            if name in known:
                _check_whole(value, columns.get(name, name))
    return result


def _check_whole(value: Any, where: str) -> None:
    if isinstance(value, Unreadable):
        reject(where, f"a value that cannot be read ({value.why})", "one that Python can hold")
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_whole(part, f"{where}.{name}")
    elif isinstance(value, list):
        for k, part in enumerate(value):
            _check_whole(part, f"{where}[{k}]")


def _value(row: Mapping[str, Any], column: str, name: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise InputError(f"columns: no column {column!r} to take {name} from (found {sorted(map(str, row))[:12]})")
        value = value[part]
    return value
