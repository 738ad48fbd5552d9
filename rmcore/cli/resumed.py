"""Going on behind the results of an interrupted run (``--resume``), where each is what was written of this input."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from rmcore._base.errors import DataError
from rmcore.cli.records import Chain

if TYPE_CHECKING:
    from rmcore.model.data import Group

__all__ = ["behind", "groups_behind", "last_line", "signed_behind"]

T = TypeVar("T")

_logger = logging.getLogger(__name__)
_REMEDY = "Cut the file off before that line and --resume again, or begin anew with --overwrite"


def last_line(last: Mapping[str, Any] | None, out: str) -> int:
    """The input's line of the ``last`` result in ``out``; 0 where there is none. Raises DataError if it names none."""
    line = 0 if last is None else last.get("line")
    if isinstance(line, bool) or not isinstance(line, int):
        raise DataError(f"{out}: got results that do not say of which line they are, which --resume cannot go on from")
    return line


def behind(
    items: Iterator[T],
    done: Iterator[dict[str, Any]],
    out: str,
    line_of: Callable[[T], int],
    differs: Callable[[T, dict[str, Any]], str | None],
) -> Iterator[T]:
    """The items behind that of the last result. One before it may have no result: it could not be scored, say.

    Args:
        items: of the input, in order.
        done: the results that are there, in order.
        out: their file.
        line_of: an item's line.
        differs: how the item on a result's line is not the one that the result is of, or None.

    Raises:
        DataError: a result cannot be of these items.
    """
    number, seen, result = 1, 0, next(done, None)
    line = last_line(result, out)
    for item in items:
        seen = line_of(item)
        if result is None:
            yield item
        elif seen > line:
            raise DataError(f"{out}: line {number}: got a result of line {line}, which the input has not")
        elif seen == line:
            if (how := differs(item, result)) is not None:
                raise DataError(f"{out}: line {number}: got {how}")
            number, result = number + 1, next(done, None)
            line = last_line(result, out)
    if result is not None:
        raise DataError(f"{out}: line {number}: got a result of line {line} of an input that ends with line {seen}")


def groups_behind(groups: Iterator[Group], done: Iterator[dict[str, Any]], out: str, chain: Chain) -> Iterator[Group]:
    """The groups behind that of the last result; ``chain`` goes on from that one. Raises as :func:`behind`.

    Of results without digests, which earlier versions wrote, line and id are looked at, and a warning says so.
    """
    from rmcore.model.data.results import group_digest

    def other(group: Group, result: dict[str, Any]) -> str | None:
        if group.id == result.get("id"):
            return None
        other = f"the id {result.get('id')!r} for line {group.line}, which has {group.id!r}"
        return f"{other}: the results there are of another input"

    checked = "the line and the id of each"
    return signed_behind(groups, done, out, chain, lambda group: group.line, group_digest, other, checked)


def signed_behind(
    items: Iterator[T],
    done: Iterator[dict[str, Any]],
    out: str,
    chain: Chain,
    line_of: Callable[[T], int],
    digest_of: Callable[[T], str],
    other: Callable[[T, dict[str, Any]], str | None],
    checked: str,
) -> Iterator[T]:
    """:func:`behind` for results that carry a ``digest``, each of which is held against its item and those before it.

    Args:
        items: of the input, in order.
        done: the results that are there, in order.
        out: their file.
        chain: goes on from the last of them.
        line_of: an item's line.
        digest_of: what of an item a result's digest is made of.
        other: how the item on a result's line is another than the result's, as can be told without a digest.
        checked: what that looks at, for the warning where there are no digests.
    """
    signed: bool | None = None

    def differs(item: T, result: dict[str, Any]) -> str | None:
        nonlocal signed
        if (how := other(item, result)) is not None:
            return how
        digest = result.get("digest")
        if signed is None:
            signed = digest is not None
            if not signed:
                _logger.warning("%s: results without digests: only %s were checked", out, checked)
        if not signed:
            return None
        if str(digest).partition("-")[0] != chain.run:
            return (
                "a result of another model, or of other options than these. Give those, or a new name, or begin anew "
                "with --overwrite"
            )
        if digest != chain.add({**result, "digest": digest_of(item)})["digest"]:
            return (
                f"a result that is not what was written of line {line_of(item)}: it was changed, one before it is "
                f"gone, or it is of another input. {_REMEDY}"
            )
        return None

    return behind(items, done, out, line_of, differs)
