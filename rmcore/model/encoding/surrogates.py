"""Halves of surrogate pairs, which JSON may carry and no tokenizer takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rmcore._base.large import PIECE

__all__ = ["between_pairs", "without_surrogates"]


def without_surrogates(value: Any) -> Any:
    """The same text, or message with all its parts, with U+FFFD for each half of a surrogate pair."""
    if isinstance(value, str):
        return value if value.isascii() else "".join(map(_paired, between_pairs(value)))
    if isinstance(value, dict):
        return {without_surrogates(name): without_surrogates(part) for name, part in value.items()}
    return [without_surrogates(part) for part in value] if isinstance(value, list) else value


def _paired(text: str) -> str:
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def between_pairs(text: str) -> Iterator[str]:
    """Pieces of a text, none of which begins with the second half of a surrogate pair."""
    start = 0
    while len(text) - start > PIECE:
        stop = start + PIECE
        stop += "\udc00" <= text[stop] <= "\udfff"
        yield text[start:stop]
        start = stop
    yield text[start:]
