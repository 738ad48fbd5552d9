"""Work on large texts off the event loop, in pieces short enough that the loop gets its turn.

A thread alone is not enough: one call into C over ten megabytes holds the interpreter's lock until it is done.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # it is there, undocumented
from typing import Any, TypeVar

__all__ = ["LARGE", "PIECE", "ascii_json", "call", "find_all", "is_large", "pieces", "read_json"]

T = TypeVar("T")
_Pairs = Callable[[list[tuple[str, Any]]], Any]

LARGE = 65_536
"""Characters from which on work on a text goes to a thread: a few milliseconds of it."""
PIECE = 262_144
"""Characters that one call into C is given."""


def is_large(*values: object) -> bool:
    """Whether the texts and bytes in ``values`` (pairs, messages, lists) are :data:`LARGE` together."""
    seen, waiting = 0, list(values)
    while waiting and seen < LARGE:
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
    return seen >= LARGE


async def call(work: Callable[..., T], *args: Any) -> T:
    """``work(*args)``, in a thread if the texts among ``args`` are large."""
    return await asyncio.to_thread(work, *args) if is_large(*args) else work(*args)


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


def read_json(text: str | bytes, object_pairs_hook: _Pairs | None = None) -> Any:
    """``json.loads(text)``, the same values, for a text that may be large.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    if len(text) <= PIECE:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    if text.startswith("\ufeff"):
        raise ValueError("a byte-order mark")
    reader = _Reader(text, object_pairs_hook)
    value, end = reader.value(_skip(text, 0))
    if _skip(text, end) != len(text):
        raise ValueError(f"more than one value, from character {end}")
    return value


_WINDOW = 32_768
_SPACE = re.compile(r"[ \t\n\r]{0,65536}")
# Characters as JSON spells them, in whole: an escape, and two that spell one character, are not taken apart.
_CHARACTERS = re.compile(
    r'(?:[^"\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}'
    r"(?:\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?=[^\\]|\\[^u]|\\u(?![dD][c-fC-F])[0-9a-fA-F]{4})))*+"
)
_AFTER = frozenset(",]} \t\n\r")


def _skip(text: str, at: int) -> int:
    """Where the white space from ``at`` on ends."""
    while True:
        end = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if end == at:
            return end
        at = end


class _Reader:
    """Values of a large text: small ones by the parser in C, from a piece of it, larger ones part by part."""

    def __init__(self, text: str, hook: _Pairs | None) -> None:
        self._text, self._hook = text, hook
        self._scan = json.JSONDecoder(object_pairs_hook=hook).raw_decode
        self._start, self._piece = 0, text[:PIECE]

    def value(self, at: int) -> tuple[Any, int]:
        """The value that begins at ``at``, and where it ends."""
        begins = self._text[at : at + 1]
        for again in (False, True):
            if again or not self._start <= at < self._start + len(self._piece):
                if again and self._start == at:
                    break
                self._start, self._piece = at, self._text[at : at + PIECE]
            try:
                found, end = self._scan(self._piece, at - self._start)
            except ValueError:  # cut off, or no JSON: reading it part by part will tell
                continue
            # A number may go on behind the piece.
            if self._piece[end : end + 1] in _AFTER or self._start + end == len(self._text):
                return found, self._start + end
        if begins == '"':
            return self._string(at + 1)
        if begins == "[":
            return self._list(at)
        if begins == "{":
            return self._object(at)
        return self._scan(self._text, at)  # a number that is longer than a piece

    def _list(self, at: int) -> tuple[list[Any], int]:
        text, found = self._text, list[Any]()
        at = _skip(text, at + 1)
        if text[at : at + 1] == "]":
            return found, at + 1
        while True:
            value, at = self.value(at)
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
