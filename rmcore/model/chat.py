"""Conversations through a tokenizer's chat template, every text in them kept apart from the template's own.

The template is rendered with a mark in the place of each text (contents, names, what a call's arguments hold); the
marks are then replaced, as the caller tokenises. So no text can produce a special token, and what a template leaves out
is noticed: its mark is missing. Such a field (the tool calls of a template that knows none, the reasoning of an earlier
turn) is written into its message's content as :func:`~rmcore._base.prompt.message_text` shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from rmcore._base.errors import InputError
from rmcore._base.prompt import EXTRA_FIELDS, json_object, message_text

__all__ = ["Part", "render_conversation"]

Render: TypeAlias = Callable[[list[dict[str, Any]]], str]
"""A chat template: messages in, text out; it may raise anything."""

Notice: TypeAlias = Callable[[str], None]
"""Called with the name of a field that a template leaves out."""

# Private-use characters around a number. The quotation mark tells how often a template escaped what it was given:
# within JSON, a text must be escaped as often.
_MARK = '\ue0f0rm{}"\ue0f1'
_MARKED = re.compile('\ue0f0rm(\\d+)(\\\\*)"\ue0f1')


class Part(NamedTuple):
    """A piece of a rendered conversation: template text or a text of message number ``message``."""

    kind: Literal["template", "text"]
    text: str
    message: int = -1
    field: str = ""


class _UnrenderedError(Exception):
    """The template does not render a conversation, and why."""


def render_conversation(render: Render, messages: Sequence[dict[str, Any]], notice: Notice) -> list[Part]:
    """The parts of a rendered conversation, in order; every content is a part of its own (``field`` is ``content``).

    Args:
        render: the chat template.
        messages: in canonical form.
        notice: told of each field that is written into a content instead.

    Raises:
        InputError: the template refuses the roles, or does not render each content once and in order.
    """
    folded: dict[int, set[str]] = {k: set() for k in range(len(messages))}
    extras = {k: set(EXTRA_FIELDS) & message.keys() for k, message in enumerate(messages)}
    try:
        try:
            return _render(render, messages, folded, notice)
        except _UnrenderedError:
            if not any(extras.values()):
                raise
        parts = _render(render, messages, extras, notice)
    except _UnrenderedError as error:
        roles = [message["role"] for message in messages[:-1]]
        raise InputError(
            f"prompt: got roles {roles}, which this tokenizer's chat template refuses or leaves out ({error}), "
            "expected roles it renders, each once and in order, then an assistant turn"
        ) from error
    for field in set[str]().union(*extras.values()):
        notice(field)
    return parts


def _render(
    render: Render, messages: Sequence[dict[str, Any]], folded: dict[int, set[str]], notice: Notice
) -> list[Part]:
    """Render with the ``folded`` fields written into contents, and with those besides that turn out to be left out."""
    for _ in range(2):
        # Numbers and the like stay as they are, since a template may treat them apart; so whether it shows them at all
        # is asked of a rendering in which they are marks too.
        missing: set[tuple[int, str]] = set()
        if any("tool_calls" in message for message in messages):
            missing = _Marks(messages, folded, scalars=True).missing(render)
        marks = _Marks(messages, folded)
        missing = missing or marks.missing(render)
        if not missing:
            return marks.parts(render)
        for k, field in missing:
            folded[k].add(field)
            notice(field)
    raise _UnrenderedError("it leaves out texts")


class _Marks:
    """A conversation whose texts are marks.

    Args:
        messages: in canonical form.
        folded: for each message the fields that are written into its content.
        scalars: mark what arguments hold besides texts, too.
    """

    def __init__(
        self, messages: Sequence[dict[str, Any]], folded: dict[int, set[str]], *, scalars: bool = False
    ) -> None:
        self.folded = folded
        self.scalars = scalars
        self.texts: list[Part] = []
        self.optional: set[int] = set()
        self._message = 0
        called: list[str] = []
        awaited: list[str] = []
        self.unordered: set[tuple[int, str]] = set()
        self.messages: list[dict[str, Any]] = []
        self._rendered: str | None = None
        for self._message, message in enumerate(messages):
            self.messages.append(self._marked(message, folded[self._message], called))
            calls = message.get("tool_calls", ())
            called += [call["function"]["name"] for call in calls]
            awaited = [call["id"] for call in calls if "id" in call] or awaited
            answers = message.get("tool_call_id")
            if answers is not None and awaited and awaited.pop(0) != answers:
                # Most templates show no ids: results then belong to the calls in their order, which this one does not.
                self.unordered |= {(self._message, "tool_call_id")}

    def _marked(self, message: dict[str, Any], folded: set[str], called: Sequence[str]) -> dict[str, Any]:
        marked: dict[str, Any] = {"role": message["role"]}
        content = message_text(message, folded)
        # A template may ask whether there is a content: next to other fields an empty one must stay empty.
        marked["content"] = self._mark("content", content) if content or len(message) == 2 else ""
        for name in ("name", "reasoning_content"):
            if name in message and name not in folded:
                if name == "name" and message["role"] == "tool" and message["name"] in called:
                    self.optional.add(len(self.texts))  # the call has said it
                marked[name] = self._mark(name, message[name])
        if "tool_call_id" in message and "tool_call_id" not in folded:
            marked["tool_call_id"] = message["tool_call_id"]  # a plain word, see rmcore._base.prompt
        if "tool_calls" in message and "tool_calls" not in folded:
            marked["tool_calls"] = [self._marked_call(call) for call in message["tool_calls"]]
        return marked

    def _marked_call(self, call: dict[str, Any]) -> dict[str, Any]:
        text = call["function"]["arguments"]
        found = json_object(text)
        name = self._mark("tool_calls", call["function"]["name"])
        arguments = self._mark("tool_calls", text) if found is None else self._marked_value(found)
        return {**call, "function": {"name": name, "arguments": arguments}}

    def _marked_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._mark("tool_calls", name): self._marked_value(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._marked_value(part) for part in value]
        if isinstance(value, str):
            return self._mark("tool_calls", value)
        return self._mark("tool_calls", json.dumps(value)) if self.scalars else value

    def _mark(self, field: str, text: str) -> str:
        self.texts.append(Part("text", text, self._message, field))
        return _MARK.format(len(self.texts) - 1)

    def missing(self, render: Render) -> set[tuple[int, str]]:
        """(message, field) of what the template leaves out; raises _UnrenderedError where no folding can help."""
        found = [int(number) for number in _MARKED.split(self._text(render))[1::3]]
        contents = [number for number, part in enumerate(self.texts) if part.field == "content"]
        if [number for number in found if number in set(contents)] != contents:
            raise _UnrenderedError("not every content, once and in order")
        lost = set(range(len(self.texts))) - set(found) - self.optional
        return {(self.texts[number].message, self.texts[number].field) for number in lost} | {
            (message, field) for message, field in self.unordered if field not in self.folded[message]
        }

    def parts(self, render: Render) -> list[Part]:
        """The rendered conversation."""
        pieces = _MARKED.split(self._text(render))
        parts = [Part("template", pieces[0])]
        for number, escapes, after in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            part = self.texts[int(number)]
            parts += [part._replace(text=_escaped(part.text, len(escapes))), Part("template", after)]
        return parts

    def _text(self, render: Render) -> str:
        if self._rendered is None:
            try:
                self._rendered = render(self.messages)
            except Exception as error:  # a template is a program and may raise anything
                raise _UnrenderedError(str(error)[:300]) from error
        return self._rendered


def _escaped(text: str, backslashes: int) -> str:
    """``text`` as JSON spells it within quotation marks: once for one backslash before a mark, twice for three."""
    while backslashes:
        text = json.dumps(text, ensure_ascii=False)[1:-1]
        backslashes //= 2
    return text
