"""A critique, and whether it is one: what can be told of it without a model."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from rmcore._base.errors import reject
from rmcore._base.prompt import Prompt, Response, canonical_response, response_text
from rmcore.judge.base import JudgeUsage
from rmcore.judge.question.sanitise import blank

__all__ = ["MAX_CHARS", "Critic", "Critique", "bounded", "junk_reason"]

MAX_CHARS = 4_096
"""Longest critique kept, in characters, unless a critic is told otherwise."""

_LEAST_WORDS = 4
_WORDS = re.compile(r"\w+", re.UNICODE)
_GRAM = 5
_ECHOED = 0.7
_PACKED = 0.12  # of its bytes, deflated; prose has 0.35 to 0.6
_PACKED_FROM = 300


@dataclass(frozen=True, slots=True)
class Critique:
    """What a critic wrote of one response, or why it wrote nothing.

    Attributes:
        text: the critique, empty where there is none.
        reason: why there is none (``timeout``, ``http_500``, ``refusal``, ...); ``length`` beside a text that a limit
            on tokens ended.
        junk: why the text is no critique to speak of (:func:`junk_reason`); it is kept all the same.
        cut: characters left out of it, since it was longer than the critic's bound.
        model: who wrote it.
        usage: what it cost.
    """

    text: str
    reason: str = ""
    junk: str = ""
    cut: int = 0
    model: str = ""
    usage: JudgeUsage = field(default_factory=JudgeUsage)

    @property
    def failed(self) -> bool:
        """True where there is no text."""
        return not self.text


@runtime_checkable
class Critic(Protocol):
    """Anything that writes critiques: as many a response as it was made for, in order, failures among them."""

    async def critiques(self, items: Sequence[tuple[Prompt, Response]]) -> list[tuple[Critique, ...]]:
        """Critiques of each (prompt, response). Never raises because of one of them."""
        ...


def bounded(text: str, most: int) -> tuple[str, int]:
    """``text`` without white space around it, its first ``most`` characters at most, and how many are left out."""
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        reject("max_chars", repr(most)[:40], "a number of characters, at least 1")
    text = text.strip()
    return text[:most], max(len(text) - most, 0)


def junk_reason(text: str, response: Response = "") -> str:
    """Why ``text`` says nothing of ``response``; empty for what may be a critique.

    - ``empty``: nothing that a reader sees;
    - ``short``: fewer than four words;
    - ``repeats``: the same over and over (it packs to an eighth of its size, or a line makes up most of it);
    - ``echo``: most of its runs of five words stand in the response itself.

    These are counts, not a judgement: what passes may be wrong.
    """
    if blank(text):
        return "empty"
    words = _WORDS.findall(text.casefold())
    if len(words) < _LEAST_WORDS:
        return "short"
    raw = text.encode("utf-8", "surrogatepass")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    most = max(map(lines.count, set(lines)))
    if (most >= 3 and most * 2 > len(lines)) or (
        len(raw) >= _PACKED_FROM and len(zlib.compress(raw, 6)) < _PACKED * len(raw)
    ):
        return "repeats"
    own = _grams(words)
    theirs = _grams(_WORDS.findall(response_text(canonical_response(response)).casefold()))
    if own and len(own & theirs) >= _ECHOED * len(own):
        return "echo"
    return ""


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[k : k + _GRAM]) for k in range(len(words) - _GRAM + 1)}
