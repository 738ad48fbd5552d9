"""Pairs that want a label: those of a group's responses, or those of preferences that people labelled already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rmcore._base.errors import DataError, InputError
from rmcore._base.lines import Row
from rmcore._base.prompt import Canonical, canonical_prompt, canonical_response
from rmcore.model.data import groups, preferences
from rmcore.model.data.columns import map_columns
from rmcore.model.data.groups import parse_group
from rmcore.model.data.preferences import parse_preferences

__all__ = ["Candidate", "candidates"]

_KNOWN = groups.COLUMNS | preferences.COLUMNS


@dataclass(frozen=True, slots=True)
class Candidate:
    """Two responses to a prompt.

    Attributes:
        prompt, first, second: in canonical form.
        line: the row's number, from 1.
        i, j: which responses of the row they are; of a preference 0 (chosen) and 1 (rejected).
        id: the row's own name, if it has one.
        human: how probable people hold it that ``first`` is better; ``None`` where the row does not say.
    """

    prompt: Canonical
    first: Canonical
    second: Canonical
    line: int
    i: int
    j: int
    id: str | int | None = None
    human: float | None = None


def candidates(
    rows: Iterable[Row],
    pairs_of: Callable[[int], Iterable[tuple[int, int]]],
    columns: Mapping[str, str] | None = None,
    *,
    source: str = "rows",
) -> Iterator[Candidate]:
    """The pairs of rows, in order: groups (``prompt``, ``responses``), preferences in any known form, or both mixed.

    Args:
        rows: as :func:`rmcore.model.data.read_rows` gives them.
        pairs_of: which pairs (i, j) of a group of K responses are wanted.
        columns: rmcore's names to the rows' own.
        source: for error messages.

    Raises:
        DataError: at the first row that is neither, naming it.
    """
    for row in rows:
        try:
            value = map_columns(row.value, columns or {}, _KNOWN)
            if "responses" in value:
                yield from _of_group(value, row.number, pairs_of)
            else:
                yield from _of_preferences(value, row.number)
        except InputError as error:
            raise DataError(str(error), source=source, line=row.number, unit=row.unit) from error


def _of_group(
    value: Mapping[str, Any], line: int, pairs_of: Callable[[int], Iterable[tuple[int, int]]]
) -> Iterator[Candidate]:
    group = parse_group(value)
    for i, j in pairs_of(len(group.responses)):
        yield Candidate(group.prompt, group.responses[i], group.responses[j], line, i, j, group.id)


def _of_preferences(value: Mapping[str, Any], line: int) -> Iterator[Candidate]:
    name = value.get("id")
    name = name if isinstance(name, (str, int)) and not isinstance(name, bool) else None
    for k, item in enumerate(parse_preferences(value)):
        texts = canonical_prompt(item.prompt), canonical_response(item.chosen), canonical_response(item.rejected)
        yield Candidate(*texts, line, 2 * k, 2 * k + 1, name, item.label)
