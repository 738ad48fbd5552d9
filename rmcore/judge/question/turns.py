"""Prompts and responses as the named segments of a question, and back.

A text is one segment. A conversation is a segment a message (``message user``), followed by one for each thing the
message says besides its content: ``name``, ``tool_call_id`` and ``reasoning_content`` as they are, each tool call as
JSON (``call``). Those of a response begin with its name (``first message assistant``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rmcore._base.errors import reject
from rmcore._base.prompt import (
    Canonical,
    canonical_prompt,
    canonical_response,
    conversation_text,
    json_object,
    message_text,
)

__all__ = ["as_text", "assemble", "segments"]

_MESSAGE = "message "
_CALL = "call"
_TEXTS = ("name", "tool_call_id", "reasoning_content")


def segments(name: str, value: Canonical) -> list[tuple[str, str]]:
    """(segment name, text) of a prompt or a response in canonical form; ``name`` is prompt, first or second."""
    if isinstance(value, str):
        return [(name, value)]
    owner = "" if name == "prompt" else f"{name} "
    found = []
    for message in value:
        found.append((f"{owner}{_MESSAGE}{message['role']}", message["content"]))
        found += [(owner + field, message[field]) for field in _TEXTS if field in message]
        found += [(owner + _CALL, _call_text(call)) for call in message.get("tool_calls", ())]
    return found


def as_text(value: Canonical) -> str:
    """A prompt or a response in canonical form as one text."""
    if isinstance(value, str):
        return value
    return message_text(value[0]) if len(value) == 1 else conversation_text(value)


def assemble(found: Iterable[tuple[str, str]]) -> dict[str, Canonical]:
    """The inverse of :func:`segments`, for a question's segments in their order.

    Raises:
        InputError: they are none that :func:`segments` makes.
    """
    texts: dict[str, Canonical] = {}
    turns: dict[str, list[dict[str, Any]]] = {}
    for name, text in found:
        if name in ("prompt", "first", "second"):
            texts[name] = text
            continue
        owner, _, kind = name.partition(" ") if name.startswith(("first ", "second ")) else ("prompt", "", name)
        if kind.startswith(_MESSAGE):
            turns.setdefault(owner, []).append({"role": kind.removeprefix(_MESSAGE), "content": text})
        elif owner in turns and kind == _CALL:
            turns[owner][-1].setdefault("tool_calls", []).append(json_object(text))
        elif owner in turns and kind in _TEXTS:
            turns[owner][-1][kind] = text
        else:
            reject("messages", f"a segment {name[:40]!r}", "those of a prompt and two responses")
    for owner, messages in turns.items():
        if owner in texts:
            reject("messages", f"{owner} twice", "prompt, first and second once each")
        texts[owner] = canonical_prompt(messages) if owner == "prompt" else canonical_response(messages, owner)
    return texts


def _call_text(call: dict[str, Any]) -> str:
    function = call["function"]
    arguments = json_object(function["arguments"])
    shown = {"name": function["name"], "arguments": function["arguments"] if arguments is None else arguments}
    return json.dumps(({"id": call["id"]} if "id" in call else {}) | shown, ensure_ascii=False)
