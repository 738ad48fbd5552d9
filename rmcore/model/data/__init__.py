r"""Data in: preferences and groups, streamed, with the line or row of what is wrong in every error.

**Where from**: JSON Lines, or one JSON array of objects, in UTF-8 whatever the locale (a byte-order mark is skipped);
Parquet; each of them also compressed by gzip, bzip2, xz or zstd, which is told by the first bytes; ``-`` for standard
input; a folder written by ``Dataset.save_to_disk``; a data set of the hub, ``hf://org/name`` with ``@revision``,
``/config`` and ``:split`` where needed; or rows: a ``datasets.Dataset`` or any iterable of mappings. zstd, Parquet and
``datasets`` need the extra ``data``.

**Preferences**, one a row (TRL's names; plain or conversational, explicit or implicit prompt)::

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}
    {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": "..."}

Where ``chosen`` and ``rejected`` are whole conversations, the prompt is what they begin with: the messages they share,
or the one that is given beside them. What follows is the response, of several messages if they part earlier. In the
last form the prompt ends with the last "Assistant:" they share. Lists of responses (RewardBench 2) are a pair for each
chosen and each rejected one. The forms of OpenAI, NeMo RL, ms-swift, LLaMA-Factory, HelpSteer3, SHP, PKU-SafeRLHF and
Chatbot Arena are read too, as :mod:`rmcore.model.data.preferences` declares them.

``label`` is the probability that ``chosen`` is better, in [0.5, 1]; 0 is an error, not a pair turned round. Margins and
scores beside a pair are not used, and a warning says so once.

**Groups**, one a row: ``{"id": ..., "prompt": ..., "responses": ["...", ...]}``.

**Attributes**, a response a row as in HelpSteer2: ``{"prompt": ..., "response": ..., "helpfulness": 3, ...}``; null for
what nobody labelled.

Prompts and responses are read as :mod:`rmcore._base.prompt` has them, from text to conversations with tool calls. Other
keys are ignored. ``columns`` maps other names: ``{"prompt": "question"}`` takes the prompt from ``question``, and
``{"prompt": "input.text"}`` from inside ``input``.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rmcore._base.errors import DataError, InputError, reject
from rmcore._base.lines import TABLE, Row, opened, read_json
from rmcore.model.data import attributes, groups, preferences
from rmcore.model.data.attributes import AttributeRow, parse_attributes
from rmcore.model.data.columns import map_columns, parse_columns
from rmcore.model.data.groups import Group, parse_group
from rmcore.model.data.parts import WHOLE, Part, count_lines
from rmcore.model.data.preferences import parse_preference, parse_preferences, says_otherwise, unused_columns
from rmcore.model.data.tables import HUB, hub_rows, object_rows, parquet_rows, saved_rows
from rmcore.model.training_pairs import Preference

__all__ = [
    "AttributeRow",
    "Group",
    "Part",
    "PreferenceRow",
    "Row",
    "Source",
    "parse_attributes",
    "parse_columns",
    "parse_group",
    "parse_preference",
    "parse_preferences",
    "read_attributes",
    "read_groups",
    "read_lines",
    "read_preference_rows",
    "read_preferences",
    "read_rows",
]

log = logging.getLogger(__name__)

Source: TypeAlias = str | Path | Iterable[Mapping[str, Any]]
"""A path, ``-``, an ``hf://`` name, or rows themselves."""

_URL = re.compile(r"(https?|ftp|s3|gs|az|file)://", re.IGNORECASE)
_TABLES = {".csv": "comma-separated text", ".tsv": "tab-separated text", ".xlsx": "a spreadsheet"}


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """The pairs of one row, several where it holds lists of responses; the ``subset`` it names itself one of."""

    pairs: tuple[Preference, ...]
    subset: str | None
    number: int


def read_preferences(
    source: Source, columns: Mapping[str, str] | None = None, *, part: Part = WHOLE, critiques: bool = False
) -> Iterator[Preference]:
    """Yield preferences; raises DataError at the first bad row, naming it. Says once what columns are not used.

    Of one ``part`` of the rows only, where several processes share a source. With ``critiques`` those that stand
    beside the responses too (:mod:`rmcore.model.data.critiques`).
    """
    for row in read_preference_rows(source, columns, part=part, critiques=critiques):
        yield from row.pairs


def read_preference_rows(
    source: Source, columns: Mapping[str, str] | None = None, *, part: Part = WHOLE, critiques: bool = False
) -> Iterator[PreferenceRow]:
    """The same by rows, each with what its column ``subset`` or ``section`` holds; raises as read_preferences."""
    told: set[str] = set()
    otherwise: Counter[str] = Counter()
    name = _name(source)
    for row in read_rows(source, part):
        try:
            value = map_columns(row.value, columns or {}, preferences.COLUMNS)
            pairs = tuple(parse_preferences(value, critiques=critiques))
            subset = _subset(value)
        except InputError as error:
            raise DataError(str(error), source=name, line=row.number, unit=row.unit) from error
        for column in unused_columns(value):
            if column not in told:
                told.add(column)
                log.warning("%s: the column %s is not used: %s", name, column, _WHY_UNUSED.get(column, _NO_MARGINS))
        otherwise.update(filter(None, [says_otherwise(value)]))
        yield PreferenceRow(pairs, subset, row.number)
    for columns_read, count in otherwise.items():
        log.warning("%s: in %d rows %s say that rejected is the better one; chosen counts", name, count, columns_read)


def _subset(value: Mapping[str, Any]) -> str | None:
    for column in preferences.SUBSETS:
        said = value.get(column)
        if said is None or said == "":
            continue
        if isinstance(said, bool) or not isinstance(said, (str, int)):
            reject(column, f"{type(said).__name__}", "a text or an integer")
        return str(said)
    return None


def read_groups(
    source: Source, columns: Mapping[str, str] | None = None, *, critiques: bool = False, part: Part = WHOLE
) -> Iterator[Group]:
    """Yield groups, with ``critiques`` theirs too, of one ``part`` of the rows; raises DataError at the first bad row,
    naming it.
    """
    for row in read_rows(source, part):
        try:
            group = parse_group(map_columns(row.value, columns or {}, groups.COLUMNS), critiques=critiques)
        except InputError as error:
            raise DataError(str(error), source=_name(source), line=row.number, unit=row.unit) from error
        yield replace(group, line=row.number)


def read_attributes(
    source: Source,
    names: Sequence[str],
    columns: Mapping[str, str] | None = None,
    *,
    limits: tuple[float, float] | None = None,
) -> Iterator[AttributeRow]:
    """Yield responses with their attributes' labels (:func:`~rmcore.model.data.attributes.parse_attributes`).

    Raises DataError at the first bad row, naming it. Says how many have no label at all.
    """
    attributes.check_attributes(names, limits)
    empty, known = 0, attributes.COLUMNS | set(names)
    for row in read_rows(source):
        try:
            found = parse_attributes(map_columns(row.value, columns or {}, known), names, limits)
        except InputError as error:
            raise DataError(str(error), source=_name(source), line=row.number, unit=row.unit) from error
        empty += all(math.isnan(label) for label in found.labels)
        yield replace(found, line=row.number)
    if empty:
        log.warning("%s: %d rows have no label of %s", _name(source), empty, ", ".join(names))


def read_lines(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every row; raises DataError for one that is not a JSON object in UTF-8."""
    for row in read_rows(source):
        yield row.number, row.value


_NO_MARGINS = "a pair counts the same by whatever margin it was won. A label in [0.5, 1] says how sure it is"
_WHY_UNUSED = {
    "label": "it holds a word, not the probability that chosen is better",
    "tools": "prompts are rendered without the list of tools",
    "chat_template_kwargs": "prompts are rendered without them",
}


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def read_rows(source: Source, part: Part = WHOLE) -> Iterator[Row]:
    """The objects of a source as they stand, each with its number; raises DataError for what is none.

    Of one ``part`` only those: of JSON Lines the others are counted and not parsed, of Parquet and of datasets they are
    not read. Raises InputError for a part of what can be read once only, such as standard input.
    """
    part.check(source)
    if not isinstance(source, (str, Path)):
        yield from object_rows(source, _name(source), part)
        return
    name = str(source)
    if name.startswith(HUB):
        yield from hub_rows(name, part)
        return
    if name != "-" and Path(source).is_dir():
        yield from saved_rows(Path(source), part)
        return
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]  # .csv.gz too
    if (what := next((_TABLES[suffix] for suffix in suffixes if suffix in _TABLES), None)) is not None:
        how = TABLE.replace("read_csv", "read_excel") if what == "a spreadsheet" else TABLE
        raise DataError(f"{name}: {what} is not read. {how}")
    if (scheme := _URL.match(name)) is not None:
        reject("data", f"{name!r:.200}, a URL", "a file, - or hf://org/name", f"Download it first ({scheme[1]})")
    wanted, array = None, False
    if part.of > 1:
        with opened(source) as (stream, head):
            array = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            if not head.startswith(b"PAR1") and not array:
                wanted = part.bounds(count_lines(stream))
    with opened(source) as (stream, head):
        if head.startswith(b"PAR1"):
            yield from parquet_rows(stream, name, part)
        elif array:
            rows = list(read_json(stream, name))
            yield from itertools.islice(rows, *part.bounds(len(rows)))
        else:
            yield from read_json(stream, name, wanted)
