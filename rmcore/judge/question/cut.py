"""Texts that are longer than a judge's context: what is left out, by one rule for both responses.

Of a text that is too long the beginning and the end are shown, with a marker line between them that no text can hold.
Both responses have the same number of tokens at most, so neither is favoured, whichever is shown first. The prompt is
shortened last: only where the responses, each with an eighth of the room, do not fit in beside it.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

from rmcore._base.large import PIECE, pieces

__all__ = ["NO_CUT", "Cut", "cut_to_fit", "ends", "estimate_tokens"]

_LEAST = 64
"""Fewer tokens of a text tell nothing."""
_CHARS = 16
"""Most characters a token that are looked at: blanks may be a hundred to a token, and are no loss."""
_SEGMENT = 48
"""Tokens of the two marker lines around a segment, whose random words no tokenizer knows."""
_WORDS = (string.ascii_letters + " ").encode()
_ASCII = bytes(range(128))


@dataclass(frozen=True, slots=True)
class Cut:
    """How many characters are left out of the middle of each text; false where all of them are shown."""

    prompt: int = 0
    first: int = 0
    second: int = 0

    def __bool__(self) -> bool:
        return bool(self.prompt or self.first or self.second)

    def exchanged(self) -> Cut:
        """The same with the responses in the other order."""
        return Cut(self.prompt, self.second, self.first)

    def to_list(self) -> list[int]:
        """Prompt, first, second."""
        return [self.prompt, self.first, self.second]


NO_CUT = Cut()


def ends(text: str, gone: int) -> tuple[str, str]:
    """The beginning and the end of ``text`` that are left when ``gone`` characters of its middle are not shown."""
    kept = max(len(text) - gone, 0)
    tail = kept // 2
    return text[: kept - tail], text[len(text) - tail :]


def estimate_tokens(text: str) -> int:
    """Tokens of ``text`` by a tokenizer that is not known, from above for prose and code in most scripts.

    A token for three ASCII letters or spaces, for each other ASCII character, and for two bytes of any other.
    """
    if len(text) > PIECE:
        return sum(map(estimate_tokens, pieces(text)))
    raw = text.encode("utf-8", "surrogatepass")
    words = len(raw) - len(raw.translate(None, _WORDS))
    others = len(raw.translate(None, _ASCII))
    return -(-words // 3) + (len(raw) - words - others) + -(-others // 2)


def cut_to_fit(
    texts: tuple[str, str, str], segments: tuple[int, int, int], room: int, size: Callable[[str], int]
) -> Cut | None:
    """What to leave out so that prompt, first and second need ``room`` tokens at most; ``None``: they cannot.

    Args:
        texts: each as one text.
        segments: in how many segments each is shown if it is whole.
        room: tokens for all three.
        size: tokens of a text as it is shown.
    """
    sizes = [_size(text, parts, room, size) for text, parts in zip(texts, segments, strict=True)]
    if sum(sizes) <= room:
        return NO_CUT
    prompt, first, second = sizes
    least = max(_LEAST + _SEGMENT, room // 8)
    reserved = min(first, least) + min(second, least)
    most = max(room - reserved, 0)
    if most < min(prompt, _LEAST + _SEGMENT):
        return None
    left = room - min(prompt, most)
    cap = max(left // 2, left - min(first, second))  # the shorter one leaves the other what it does not need
    if cap < least and cap < max(first, second):
        return None
    caps = (most, cap, cap)
    gone = [
        0 if whole <= most else _gone(text, most - _SEGMENT, size)
        for text, whole, most in zip(texts, sizes, caps, strict=True)
    ]
    return Cut(*gone)


def _size(text: str, segments: int, room: int, size: Callable[[str], int]) -> int:
    if len(text) > _CHARS * max(room, 1):
        return room + 1 + len(text) // _CHARS  # too long whatever it holds, so not worth reading
    return size(text) + _SEGMENT * segments


def _gone(text: str, most: int, size: Callable[[str], int]) -> int:
    """How many characters must go so that the ends of ``text`` have ``most`` tokens; at least one does."""
    kept = min(len(text) - 1, _CHARS * most)
    while kept > 0:
        head, tail = ends(text, len(text) - kept)
        now = size(head) + size(tail)
        if now <= most:
            break
        kept = min(kept - 1, int(kept * most / now * 0.98))
    return len(text) - max(kept, 0)
