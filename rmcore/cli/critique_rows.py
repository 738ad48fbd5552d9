"""Rows of ``rmcore critique``: what of one is criticised, what is written of it, and how it is known again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import DataError, InputError, reject
from rmcore.cli.records import Chain, json_line
from rmcore.cli.resumed import signed_behind

if TYPE_CHECKING:
    from rmcore._base.prompt import Canonical
    from rmcore.judge.critics.critique import Critique
    from rmcore.model.data import Row

__all__ = ["FAILURES", "Done", "RowParts", "parts_of", "row_digest", "rows_behind", "written"]

FAILURES = "critique_failures"
"""The column that says of a row's critiques why some are missing that may be there another day; most rows lack it."""

_LASTING = frozenset({"too_long", "bad_pair"})


@dataclass(frozen=True)
class RowParts:
    """The responses of a row, in order, each with its prompt; whether they are those of a group or a pair."""

    items: tuple[tuple[Canonical, Canonical], ...]
    group: bool


def parts_of(row: Row, names: dict[str, str]) -> RowParts:
    """What is criticised of a row; raises DataError, by its line, for one that has no responses, or cannot be written
    again with its critiques.
    """
    from rmcore._base.prompt import canonical_prompt, canonical_response
    from rmcore.model.data import groups, parse_group, parse_preferences, preferences
    from rmcore.model.data.columns import map_columns

    try:
        value = map_columns(row.value, names, groups.COLUMNS | preferences.COLUMNS)
        for name, part in row.value.items():
            _as_json(name, part)
        if "responses" in value:
            group = parse_group(value)
            return RowParts(tuple((group.prompt, response) for response in group.responses), True)
        found = parse_preferences(value)
        if len(found) != 1:
            reject("chosen, rejected", f"{len(found)} pairs", "one pair a row")
    except InputError as error:
        raise DataError(str(error), source="rows", line=row.number, unit=row.unit) from error
    item = found[0]
    prompt = canonical_prompt(item.prompt)
    return RowParts(tuple((prompt, canonical_response(one)) for one in (item.chosen, item.rejected)), False)


def written(row: Row, read: RowParts, found: Sequence[Sequence[Critique]], *, drop_junk: bool) -> dict[str, Any]:
    """A row with the critiques of its responses, its line, and what tells which row it was made of."""
    texts = [[one.text for one in own if one.text and not (drop_junk and one.junk)] for own in found]
    failures = [[one.reason for one in own if _asked_again(one)] for own in found]
    own = {name: _as_json(name, part) for name, part in row.value.items()}
    record = {**own, "critiques": _by_response(read, texts), "line": row.number}
    record.pop(FAILURES, None)  # of an input that was criticised before
    if any(failures):
        record[FAILURES] = _by_response(read, failures)
    return {**record, "digest": row_digest(row)}


def _as_json(name: str, value: Any) -> Any:
    """A value of a table as a line of JSON holds it: dates and decimals as text. Raises InputError for others."""
    if isinstance(value, (list, tuple)):
        return [_as_json(name, part) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(f"{name}.{key}", part) for key, part in value.items()}
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Decimal) and value.is_finite():
        return str(value)
    if not (value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))):
        got = str(value) if isinstance(value, (float, Decimal)) else f"a value of type {type(value).__name__}"
        reject(name, got, "what a line of JSON can hold", "Leave the column out of the input")
    return value


def _by_response(read: RowParts, values: list[list[str]]) -> Any:
    return values if read.group else dict(zip(("chosen", "rejected"), values, strict=True))


def _asked_again(critique: Critique) -> bool:
    """Whether it is missing since it failed on its way: what the critic itself answered it would answer again."""
    from rmcore.judge.question.verdict import UNANSWERED

    return critique.failed and critique.reason not in UNANSWERED and critique.reason not in _LASTING


def row_digest(row: Row) -> str:
    """Of all that a row holds: 16 hex characters."""
    return hashlib.sha256(json.dumps(row.value, sort_keys=True, default=str).encode("ascii")).hexdigest()[:16]


class Done:
    """What is known of the rows that were written before, once they were looked at.

    Attributes:
        digests: of each row that they were made of, by its line.
        failed: rows of which critiques failed on their way.
    """

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}
        self.failed: list[Row] = []

    def rewritten(
        self, results: Iterator[dict[str, Any]], again: dict[int, dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The results that are there, those ``again`` in their places, as they are handed to a new chain."""
        for result in results:
            line = result["line"]
            yield again.get(line) or {**result, "digest": self.digests[line]}


def rows_behind(
    rows: Iterator[Row], done: Iterator[dict[str, Any]], out: str, chain: Chain, known: Done
) -> Iterator[Row]:
    """The rows behind that of the last result; ``chain`` goes on from that one, and ``known`` is filled.

    Raises DataError, by the result's line, where one is not what was written of this input by the same critic.
    """

    def other(row: Row, result: dict[str, Any]) -> str | None:
        known.digests[row.number] = row_digest(row)
        if FAILURES in result:
            known.failed.append(row)
        own = {name: result[name] for name in ("critiques", "line", "digest", FAILURES) if name in result}
        given = {name: value for name, value in row.value.items() if name != FAILURES}
        if json.loads(json_line({**given, **own})) == result:
            return None
        return f"another row for line {row.number}: the results there are of another input"

    return signed_behind(rows, done, out, chain, lambda row: row.number, row_digest, other, "rows, and no critiques,")
