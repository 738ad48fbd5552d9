"""Work on large texts off the event loop, in pieces short enough that the loop gets its turn.

A thread alone is not enough: one call into C over ten megabytes holds the interpreter's lock until it is done.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

__all__ = ["LARGE", "PIECE", "ascii_json", "call", "is_large", "pieces"]

T = TypeVar("T")

LARGE = 65_536
"""Characters from which on work on a text goes to a thread: a few milliseconds of it."""
PIECE = 262_144
"""Characters that one call into C is given."""


def is_large(*values: object) -> bool:
    """Whether the texts in ``values`` (pairs, messages, lists) have :data:`LARGE` characters together."""
    seen, waiting = 0, list(values)
    while waiting and seen < LARGE:
        value = waiting.pop()
        seen += 8
        if isinstance(value, str):
            seen += len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            waiting += [getattr(value, part.name, None) for part in dataclasses.fields(value)]
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
