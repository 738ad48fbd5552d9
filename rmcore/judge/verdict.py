"""Reading a judge's reply: the final answer only, whole labels only, and no verdict where there is doubt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rmcore.judge.base import Outcome

__all__ = ["MAX_CRITIQUE", "Labels", "Parsed", "parse_verdict"]

MAX_CRITIQUE = 32_768
"""Longest critique kept, in characters: enough for any real one, and no reply can fill the memory."""

_TAG = re.compile(r"<\s{0,8}verdict\s{0,8}>([^<>]{0,200})<\s{0,8}/\s{0,8}verdict\s{0,8}>", re.IGNORECASE)
_THINK_OPEN = re.compile(r"<\s{0,8}think\s{0,8}>", re.IGNORECASE)
_THINK_CLOSE = re.compile(r"<\s{0,8}/\s{0,8}think\s{0,8}>", re.IGNORECASE)
_DECORATION = " \t\r\n*_`\"'"  # what models put around a label they mean


@dataclass(frozen=True, slots=True)
class Labels:
    """The words one call asks its judge to answer with, each inside ``<verdict>…</verdict>``.

    ``win`` means that the response shown first is better, ``loss`` the one shown second, ``tie`` neither.
    """

    win: str
    loss: str
    tie: str

    def outcome(self, text: str) -> Outcome | None:
        """Which verdict ``text`` is: the whole label, case and surrounding emphasis aside; ``None`` if it is none."""
        word = text.strip(_DECORATION).upper()
        if word == self.win.upper():
            return "win"
        if word == self.loss.upper():
            return "loss"
        return "tie" if word == self.tie.upper() else None

    def label(self, outcome: Outcome) -> str:
        """The word that stands for ``outcome``."""
        return {"win": self.win, "loss": self.loss, "tie": self.tie}[outcome]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reply says: ``outcome`` from the side of the response shown first, or ``None`` with a ``reason``.

    ``reason`` is one of ``length``, ``filter``, ``refusal``, ``no_content``, ``conflicting``, ``unparsable``.
    ``critique`` is the final answer without its verdict tags, at most :data:`MAX_CRITIQUE` characters.
    """

    outcome: Outcome | None
    reason: str = ""
    critique: str = ""


def parse_verdict(reply: object, labels: Labels) -> Parsed:
    """Read one reply: a chat-completions choice, its message alone, or the bare text.

    Only the final answer counts. Reasoning is never searched, whether it comes in a field of its own
    (``reasoning_content``, ``reasoning``) or inline up to the *last* ``</think>``; a ``<think>`` left open means that
    the reply was cut off. A reply with ``finish_reason`` ``length`` or ``content_filter``, a refusal or no content
    gives no verdict whatever its text says. In the answer, every ``<verdict>LABEL</verdict>`` with a whole label of
    ours counts, in any number, if all agree; labels that disagree are ``conflicting``. A last tag that holds anything
    but a label takes back what stood before it: ``unparsable``.

    Total: any object whatever gives a :class:`Parsed`, never an exception.
    """
    if isinstance(reply, str):
        return _read(reply, labels)
    if not isinstance(reply, Mapping):
        return Parsed(None, "unparsable")
    message = reply.get("message", reply)
    if not isinstance(message, Mapping):
        return Parsed(None, "unparsable")
    finish = reply.get("finish_reason")
    content = message.get("content")
    if isinstance(content, list):
        content, refused = _join_parts(content)
    else:
        refused = False
    text = content if isinstance(content, str) else ""
    if finish in ("length", "max_tokens"):
        return Parsed(None, "length", text[:MAX_CRITIQUE])
    if finish == "content_filter":
        return Parsed(None, "filter", text[:MAX_CRITIQUE])
    if refused or message.get("refusal"):
        return Parsed(None, "refusal", text[:MAX_CRITIQUE])
    if content is not None and not isinstance(content, str):
        return Parsed(None, "unparsable")
    return _read(text, labels)


def _join_parts(parts: list[object]) -> tuple[str | None, bool]:
    """The text of a content given as a list of typed parts, and whether one of them is a refusal."""
    texts, refused = [], False
    for part in parts:
        if isinstance(part, Mapping):
            refused = refused or part.get("type") == "refusal"
            text = part.get("text")
            # Parts of other types ("thinking", "reasoning") are not the answer.
            if part.get("type") in ("text", "output_text") and isinstance(text, str):
                texts.append(text)
    return ("".join(texts) if texts else None), refused


def _read(text: str, labels: Labels) -> Parsed:
    """Read a complete message text."""
    answer_from = 0
    for close in _THINK_CLOSE.finditer(text):
        answer_from = close.end()
    answer = text[answer_from:]
    if _THINK_OPEN.search(answer):
        return Parsed(None, "length")
    if not answer.strip():
        return Parsed(None, "no_content")
    critique = _TAG.sub("", answer).strip()[:MAX_CRITIQUE]
    found = [labels.outcome(tag.group(1)) for tag in _TAG.finditer(answer)]
    outcomes = {outcome for outcome in found if outcome is not None}
    if len(outcomes) > 1:
        return Parsed(None, "conflicting", critique)
    if not found or found[-1] is None:
        return Parsed(None, "unparsable", critique)
    return Parsed(found[-1], "", critique)
