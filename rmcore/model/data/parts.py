"""One of several equal parts of a source, in its order: what each process of a distributed job reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from rmcore._base.errors import reject

__all__ = ["WHOLE", "Part", "count_lines", "rows_of"]

T = TypeVar("T")


class Part(NamedTuple):
    """Part number ``which`` of ``of``, from 0. Their sizes differ by one row at most, so some may be empty."""

    which: int = 0
    of: int = 1
    unit: int = 1
    """Rows that stay together: parts begin at multiples of it, and differ by one of it at most."""

    def bounds(self, count: int) -> tuple[int, int]:
        """The rows of this part, of ``count``: from the first up to before the second number."""
        units = -(-count // self.unit)
        low, high = units * self.which // self.of, units * (self.which + 1) // self.of
        return min(low * self.unit, count), min(high * self.unit, count)

    def check(self, source: object) -> None:
        """Raise InputError for a part there is not, or of a source that can be read once only."""
        if not 0 <= self.which < self.of:
            reject("part", f"{self.which} of {self.of}", "a number from 0 up to before the number of parts")
        if self.of == 1:
            return
        if source == "-":
            reject("data", "'-' in one of several processes", "a file or hf://org/name, which each can read")
        if not isinstance(source, (str, Path)) and not hasattr(source, "__len__"):
            reject("data", f"{type(source).__name__} in one of several processes", "rows whose number is known")


WHOLE = Part()


def rows_of(rows: Iterable[T], part: Part) -> Iterator[tuple[int, T]]:
    """(1-based number, row) of a part of rows whose number is known, or of all of them."""
    if part.of == 1:
        yield from enumerate(rows, 1)
        return
    given: Any = rows
    low, high = part.bounds(len(given))
    if hasattr(given, "select"):  # a datasets.Dataset, which need not decode the others
        yield from enumerate(given.select(range(low, high)), low + 1)
    else:
        yield from enumerate(itertools.islice(given, low, high), low + 1)


def count_lines(stream: BinaryIO) -> int:
    """How many lines of a stream are not blank."""
    return sum(1 for line in stream if line.strip())
