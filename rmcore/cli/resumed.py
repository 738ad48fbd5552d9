"""Going on behind the last result of an interrupted run (``--resume``), where its results are of this input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from rmcore._base.errors import DataError

if TYPE_CHECKING:
    from rmcore.model.data import Group

__all__ = ["behind", "groups_behind", "last_line"]

T = TypeVar("T")


def last_line(last: dict[str, Any] | None, out: str) -> int:
    """The input's line of the ``last`` result in ``out``; 0 where there is none. Raises DataError if it names none."""
    line = 0 if last is None else last.get("line")
    if isinstance(line, bool) or not isinstance(line, int):
        raise DataError(f"{out}: got results that do not say of which line they are, which --resume cannot go on from")
    return line


def behind(
    items: Iterator[T],
    last: dict[str, Any] | None,
    out: str,
    line_of: Callable[[T], int],
    differs: Callable[[T, dict[str, Any]], str | None],
) -> Iterator[T]:
    """The items behind that of the ``last`` result.

    Args:
        items: of the input, in order.
        last: result in ``out``, if there is one.
        out: its file.
        line_of: an item's line.
        differs: how the item on the last result's line is not the one that result is of, or None.

    Raises:
        DataError: the results cannot be of these items.
    """
    line, seen = last_line(last, out), 0
    for item in items:
        seen = line_of(item)
        if seen > line:
            yield item
        elif seen == line and last is not None and (how := differs(item, last)) is not None:
            raise DataError(f"{out}: got {how}: the results there are of another input")
    if seen < line:
        raise DataError(f"{out}: got results up to line {line} of an input that ends with line {seen}")


def groups_behind(groups: Iterator[Group], last: dict[str, Any] | None, out: str) -> Iterator[Group]:
    """The groups behind that of the ``last`` result, which has its id. Raises as :func:`behind`."""

    def differs(group: Group, result: dict[str, Any]) -> str | None:
        if group.id == result.get("id"):
            return None
        return f"the id {result.get('id')!r} for line {group.line}, which has {group.id!r}"

    return behind(groups, last, out, lambda group: group.line, differs)
