"""Work on large texts off the event loop, in pieces short enough that the loop gets its turn.

A thread alone is not enough: one call into C over ten megabytes holds the interpreter's lock until it is done.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # it is there, undocumented
from typing import Any, TypeVar

__all__ = [
    "HUGE",
    "LARGE",
    "MOST_VALUES",
    "PIECE",
    "TooManyValuesError",
    "ascii_json",
    "call",
    "find_all",
    "is_large",
    "pieces",
    "read_json",
]

T = TypeVar("T")
_Pairs = Callable[[list[tuple[str, Any]]], Any]

LARGE = 65_536
"""Characters from which on work on a text goes to a thread: a few milliseconds of it."""
PIECE = 65_536
"""Characters that one call into C is given: at most 4 ms of it (``str.translate``, 55 ns a character)."""
HUGE = 1_048_576
"""Characters from which on work is done one text after the other."""
MOST_VALUES = 250_000
"""Lists and objects that a large text may hold. The collector of garbage looks at all that are alive in one piece."""


class TooManyValuesError(ValueError):
    """A large text with more lists and objects than it may hold."""


def is_large(*values: object) -> bool:
    """Whether the texts and bytes in ``values`` (pairs, messages, lists) are :data:`LARGE` together."""
    return _size(values, LARGE) >= LARGE


def _size(values: tuple[object, ...], enough: int) -> int:
    """Characters and bytes in ``values``, counted until they are ``enough``."""
    seen, waiting = 0, list(values)
    while waiting and seen < enough:
        value = waiting.pop()
        seen += 8
        if isinstance(value, (str, bytes)):
            seen += len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            waiting += [getattr(value, part.name, None) for part in dataclasses.fields(value)]
        elif hasattr(type(value), "model_fields"):  # pydantic's
            waiting += vars(value).values()
    return seen


async def call(work: Callable[..., T], *args: Any) -> T:
    """``work(*args)``, in a thread if the texts among ``args`` are large.

    Of the large and of the huge ones one at a time for a loop. Threads that work in the interpreter gain nothing by
    being several, and the loop, which waits for its turn like any of them, waits for a piece of each.
    """
    size = _size(args, HUGE)
    if size < LARGE:
        return work(*args)
    async with _lane(size >= HUGE):
        return await asyncio.to_thread(work, *args)


_lanes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[asyncio.Lock, asyncio.Lock]]
_lanes, _lanes_lock = weakref.WeakKeyDictionary(), threading.Lock()


def _lane(huge: bool) -> asyncio.Lock:
    """The running loop's lane for large, or for huge texts; a huge one does not keep the others waiting."""
    with _lanes_lock:
        return _lanes.setdefault(asyncio.get_running_loop(), (asyncio.Lock(), asyncio.Lock()))[huge]


def pieces(text: str) -> Iterator[str]:
    """``text`` in pieces."""
    return (text[k : k + PIECE] for k in range(0, len(text), PIECE))


def ascii_json(value: object, *, sort_keys: bool = False, compact: bool = False) -> str:
    """``json.dumps(value)``, the same characters, for values whose texts may be large."""
    item, colon = (",", ":") if compact else (", ", ": ")

    def write(value: object) -> Iterator[str]:
        if isinstance(value, str) and len(value) > PIECE:
            yield '"'
            for piece in pieces(value):
                yield json.dumps(piece)[1:-1]
            yield '"'
        elif isinstance(value, Mapping) and is_large(value):
            entries = [(str(name), inner) for name, inner in value.items()]
            for k, (name, inner) in enumerate(sorted(entries, key=lambda one: one[0]) if sort_keys else entries):
                yield ("{" if k == 0 else item) + json.dumps(name) + colon
                yield from write(inner)
            yield "}"
        elif isinstance(value, (list, tuple)) and is_large(value):
            for k, inner in enumerate(value):
                yield "[" if k == 0 else item
                yield from write(inner)
            yield "]"
        else:
            yield json.dumps(value, sort_keys=sort_keys, separators=(item, colon))

    return "".join(write(value))


def find_all(pattern: re.Pattern[str], text: str, reach: int, start: int = 0) -> Iterator[re.Match[str]]:
    """``pattern.finditer(text, start)``, for a pattern that looks at no more than ``reach`` characters."""
    done = start
    for begin in range(start, len(text), _WINDOW):
        for found in pattern.finditer(text, max(begin, done), begin + _WINDOW + reach):
            if found.start() >= begin + _WINDOW:
                break
            done = found.end()
            yield found


def read_json(
    text: str | bytes,
    object_pairs_hook: _Pairs | None = None,
    *,
    unread: str | None = None,
    most_values: int = MOST_VALUES,
) -> Any:
    """``json.loads(text)``, the same values, for a text that may be large.

    Args:
        text: JSON.
        object_pairs_hook: as of ``json.loads``.
        unread: objects with this field, or with a value that has it, in lists longer than a piece, are checked and left
            as JSON in ``bytes``, which the collector of garbage has nothing to do with: log-probabilities are a dozen
            objects a token, and of all tokens one is looked at.
        most_values: lists and objects, and strings and words in lists longer than a piece, that a text of more than
            one piece may hold, those left unread aside.

    Raises:
        TooManyValuesError: it holds more.
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    if len(text) <= PIECE:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    if text.startswith("\ufeff"):
        raise ValueError("a byte-order mark")
    reader = _Reader(text, object_pairs_hook, unread, most_values)
    value, end = reader.value(_skip(text, 0))
    if _skip(text, end) != len(text):
        raise ValueError(f"more than one value, from character {end}")
    return value


_WINDOW = 32_768
_DENSE = 2_000
_SPACE = re.compile(r"[ \t\n\r]{0,65536}")
# Characters as JSON spells them, in whole: an escape, and two that spell one character, are not taken apart.
_CHARACTERS = re.compile(
    r'(?:[^"\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}'
    r"(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?=[^\\]|\\[^u]|\\u(?![dD][c-fC-F])[0-9a-fA-F]{4})))*+"
)
_AFTER = frozenset(",]} \t\n\r")
_NUMBERS = re.compile(
    r"(?:-?(?:0|[1-9][0-9]{0,99})(?:\.[0-9]{1,99})?(?:[eE][+-]?[0-9]{1,9})?[ \t\n\r]{0,9},[ \t\n\r]{0,9})*+"
)


def _skip(text: str, at: int) -> int:
    """Where the white space from ``at`` on ends."""
    while True:
        end = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if end == at:
            return end
        at = end


def _has(value: dict[str, Any], field: str) -> bool:
    return field in value or any(isinstance(inner, dict) and field in inner for inner in value.values())


class _Reader:
    """Values of a large text: small ones by the parser in C, from a piece of it, larger ones part by part."""

    def __init__(self, text: str, hook: _Pairs | None, unread: str | None, most_values: int) -> None:
        self._text, self._hook, self._unread = text, hook, unread
        self._most = self._left = most_values
        self._scan = json.JSONDecoder(object_pairs_hook=hook).raw_decode
        self._start, self._piece = 0, ""

    def value(self, at: int) -> tuple[Any, int]:
        """The value that begins at ``at``, and where it ends."""
        begins = self._text[at : at + 1]
        self._count(1)
        for again in (False, True):
            if again or not self._start <= at < self._start + len(self._piece):
                if again and self._start == at:
                    break
                self._start, self._piece = at, self._text[at : at + PIECE]
                if self._piece.count("[") + self._piece.count("{") > _DENSE:
                    # What does not end in the piece is made in vain, at every depth, and collected as garbage.
                    self._piece = self._piece[: PIECE // 16]
            try:
                found, end = self._scan(self._piece, at - self._start)
            except ValueError:  # cut off, or no JSON: reading it part by part will tell
                continue
            # A number may go on behind the piece.
            if self._piece[end : end + 1] in _AFTER or self._start + end == len(self._text):
                if begins in ("[", "{"):
                    span = at - self._start, end
                    self._count(self._piece.count("[", *span) + self._piece.count("{", *span) - 1)
                return found, self._start + end
        if begins == '"':
            return self._string(at + 1)
        if begins == "[":
            return self._list(at)
        if begins == "{":
            return self._object(at)
        return self._scan(self._text, at)  # a number that is longer than a piece

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise TooManyValuesError(f"more than {self._most} lists and objects")

    def _list(self, at: int) -> tuple[list[Any], int]:
        text, found = self._text, list[Any]()
        at = _skip(text, at + 1)
        if text[at : at + 1] == "]":
            return found, at + 1
        while True:
            numbers = _NUMBERS.match(text, at, at + PIECE).end()  # type: ignore[union-attr]  # it matches nothing, too
            if numbers > at:  # the last comma promises another value
                found += json.loads(f"[{text[at:numbers].rstrip()[:-1]}]")
                at = _skip(text, numbers)
                continue
            start, left = at, self._left
            value, at = self.value(at)
            if self._unread is not None and isinstance(value, dict) and _has(value, self._unread):
                value, self._left = text[start:at].encode("utf-8", "surrogatepass"), left
            found.append(value)
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                return found, at + 1
            if text[at : at + 1] != ",":
                raise ValueError(f"no comma at character {at}")
            at = _skip(text, at + 1)

    def _object(self, at: int) -> tuple[Any, int]:
        text, pairs = self._text, []
        at = _skip(text, at + 1)
        if text[at : at + 1] == "}":
            at += 1
        else:
            while True:
                if text[at : at + 1] != '"':
                    raise ValueError(f"no name at character {at}")
                name, at = self._string(at + 1)
                at = _skip(text, at)
                if text[at : at + 1] != ":":
                    raise ValueError(f"no colon at character {at}")
                value, at = self.value(_skip(text, at + 1))
                pairs.append((name, value))
                at = _skip(text, at)
                if text[at : at + 1] == "}":
                    at += 1
                    break
                if text[at : at + 1] != ",":
                    raise ValueError(f"no comma at character {at}")
                at = _skip(text, at + 1)
        return (dict(pairs) if self._hook is None else self._hook(pairs)), at

    def _string(self, at: int) -> tuple[str, int]:
        """The text whose first character is at ``at``, and where it ends, its quotation mark included."""
        text, found = self._text, []
        while True:
            end = _CHARACTERS.match(text, at, at + PIECE).end()  # type: ignore[union-attr]  # it matches nothing, too
            found.append(scanstring(text[at:end] + '"', 0)[0])
            if text[end : end + 1] == '"':
                return "".join(found), end + 1
            if end == at:
                raise ValueError(f"a text that does not end, or a wrong escape, at character {at}")
            at = end
