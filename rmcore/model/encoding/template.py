"""The text around prompts and responses, and the pieces that a text of rmcore's own form is put together from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rmcore._base.errors import reject
from rmcore._base.prompt import Canonical, conversation_text

__all__ = [
    "CRITIQUE_TEXT",
    "CRITIQUE_TURN",
    "PairTemplate",
    "Piece",
    "as_messages",
    "one_text",
    "plain_pieces",
    "template_pieces",
    "two_text_pieces",
]

_FIELD = re.compile(r"\{(prompt|first|second|critique)\}")

CRITIQUE_TURN = (
    "The following is a break down on the correctness and usefulness of the assistant's response to my question: "
)
"""How a user turn with a critique begins, behind the response that it is of: CLoud's words (Ankner et al. 2024)."""

CRITIQUE_TEXT = "\n\n### Critique\n{critique}"
"""The same where no chat template is used."""


@dataclass(frozen=True)
class PairTemplate:
    """The text around the named segments; ``{prompt}``, ``{first}`` and ``{second}`` are the only fields.

    ``single`` is used in difference mode (prompt and first), ``pair`` in concat mode. With a conversation, the part
    after ``{prompt}`` becomes the assistant turn of the tokenizer's chat template.
    """

    single: str = "{prompt}\n\n{first}"
    pair: str = "{prompt}\n\n### Response A\n{first}\n\n### Response B\n{second}"

    def __post_init__(self) -> None:
        for name, wanted in (("single", ["prompt", "first"]), ("pair", ["prompt", "first", "second"])):
            found = _FIELD.findall(getattr(self, name))
            if found != wanted:
                reject(f"template.{name}", f"fields {found}", f"exactly {wanted}, in that order")


class Piece(NamedTuple):
    """A part of a text that is tokenised on its own.

    Attributes:
        segment: the segment that begins with it; empty where the one before goes on.
        kind: ``literal`` is template text, ``content`` is hostile text, ``field`` names a response, ``ids`` what the
            tokenizer itself puts around texts.
        text: that text or name.
    """

    segment: str
    kind: Literal["literal", "content", "field", "ids"]
    text: str


def template_pieces(template: str, prompt: str | None) -> list[Piece]:
    """Literals and fields of a template; a literal belongs to the segment that follows it."""
    parts = _FIELD.split(template)
    pieces: list[Piece] = []
    for literal, name in zip(parts[0::2], [*parts[1::2], ""], strict=True):
        pieces.append(Piece(name, "literal", literal))
        if name == "prompt":
            pieces.append(Piece("prompt", "content", prompt or ""))
        elif name:
            pieces.append(Piece(name, "field", name))
    return pieces


def plain_pieces(prompt: Canonical, template: str) -> list[Piece]:
    """A text without a chat template: the tokenizer's own tokens around what ``template`` says."""
    text = prompt if isinstance(prompt, str) else conversation_text(prompt) + "\n\nAssistant:"
    return [Piece("prompt", "ids", "prefix"), *template_pieces(template, text), Piece("", "ids", "suffix")]


def two_text_pieces(prompt: Canonical, texts: dict[str, str]) -> list[Piece]:
    """The tokenizer's own form for a question and an answer."""
    critique = template_pieces(CRITIQUE_TEXT, None) if "critique" in texts else []
    asked = Piece("", "content", one_text(prompt))
    if not texts["first"] and not critique:  # transformers makes one text of it
        return [Piece("prompt", "ids", "prefix"), asked, Piece("", "ids", "suffix")]
    pieces = [Piece("prompt", "ids", "start"), asked, Piece("", "ids", "between"), Piece("first", "field", "first")]
    return [*pieces, *critique, Piece("", "ids", "end")]


def one_text(prompt: Canonical) -> str:
    """A prompt for a model that takes a question and an answer."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].keys() == {"role", "content"}:
        return str(prompt[0]["content"])
    return conversation_text(prompt) + "\n\nAssistant:"


def as_messages(prompt: Canonical) -> list[dict[str, Any]]:
    """A prompt as a conversation: a plain text is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
