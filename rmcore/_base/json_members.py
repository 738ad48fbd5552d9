"""JSON objects in which no key comes twice: Python's parser would keep the last value and drop the others silently."""

from __future__ import annotations

from typing import Any

__all__ = ["DuplicateKeyError", "unique_members"]


class DuplicateKeyError(ValueError):
    """A key comes twice in a JSON object."""


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of an object, as ``object_pairs_hook`` of :func:`json.loads`.

    Raises:
        DuplicateKeyError: naming the first key that comes twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(f"the key {key!r:.80} comes twice")
            seen.add(key)
    return found
