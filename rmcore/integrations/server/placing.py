"""Which of several servers a group belongs to: rendezvous hashing, the same at every server and every client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

__all__ = ["group_key", "owner", "ranked"]


def group_key(*parts: object) -> bytes:
    """32 bytes that say which group is meant.

    Args:
        parts: numbers and texts; 1 and "1" are different ones.
    """
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode("ascii")).digest()


def ranked(key: bytes, names: Sequence[str]) -> list[str]:
    """All names, the owner of ``key`` first, then who would own it without the first, and so on."""
    return sorted(names, key=lambda name: hashlib.sha256(key + name.encode()).digest(), reverse=True)


def owner(key: bytes, names: Sequence[str]) -> str:
    """The name with the greatest hash together with ``key`` (Thaler and Ravishankar, 1998), whatever their order."""
    return max(names, key=lambda name: hashlib.sha256(key + name.encode()).digest())
