"""Conversations through a tokenizer's chat template, and which of its text is whose.

The template is rendered with a mark in the place of each text (contents, names, what a call's arguments hold), so what
it leaves out is noticed: the mark is missing. Such a field (the tool calls of a template that knows none, the reasoning
of an earlier turn) is written into its message's content as :func:`~rmcore._base.prompt.message_text` shows it.

The same messages are then rendered as they are, since a template may trim a text, or cut it at ``</think>``; where the
texts stand in that rendering is found by holding it against the one with marks.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from rmcore._base.errors import InputError
from rmcore._base.large import find_all
from rmcore._base.prompt import EXTRA_FIELDS, json_object, message_text

__all__ = ["Known", "Part", "Place", "Rendering", "render_conversation", "render_pieces"]

Render: TypeAlias = Callable[[list[dict[str, Any]]], str]
"""A chat template: messages in, text out; it may raise anything."""

Known: TypeAlias = "dict[tuple[str, ...], list[Part]]"
"""By roles the parts of a conversation that has nothing but contents."""

_MOST_KNOWN = 1024

Notice: TypeAlias = Callable[[str], None]
"""Called with the name of a field that a template leaves out."""

# Private-use characters around a number. The quotation mark tells how often a template escaped what it was given:
# within JSON, a text must be escaped as often.
_MARK = '\ue0f0rm{}"\ue0f1'
_MARKED = re.compile('\ue0f0rm(\\d+)(\\\\*)"\ue0f1')
_HIDDEN = re.compile("\ue0f2(\\d+)\ue0f3")  # ends unlike a mark, so that none shares its end


class Part(NamedTuple):
    """A piece of a rendered conversation: template text or a text of message number ``message``."""

    kind: Literal["template", "text"]
    text: str
    message: int = -1
    field: str = ""


class Place(NamedTuple):
    """Characters ``start`` to ``stop`` of a rendered conversation, which are what a text of ``message`` became."""

    start: int
    stop: int
    message: int


class Rendering(NamedTuple):
    """A conversation as its template renders it.

    Attributes:
        text: all of it.
        places: of its texts, in order and apart.
        spelt: characters (start, stop) of texts that spell a special token.
    """

    text: str
    places: tuple[Place, ...]
    spelt: tuple[tuple[int, int], ...] = ()


class _UnrenderedError(Exception):
    """The template does not render a conversation, and why."""


def render_pieces(render: Render, messages: Sequence[dict[str, Any]], notice: Notice) -> list[Part]:
    """The parts of a conversation rendered with marks, in order, template and texts by turns.

    Args:
        render: the chat template.
        messages: in canonical form.
        notice: told of each field that is written into a content instead.

    Raises:
        InputError: the template refuses the roles, or does not render each content once and in order.
    """
    return _folded(render, messages, notice, None)[0]


def render_conversation(
    render: Render,
    messages: Sequence[dict[str, Any]],
    notice: Notice,
    *,
    answer: int,
    special: re.Pattern[str] | None = None,
    known: Known | None = None,
) -> Rendering:
    """A conversation just as the template renders it, and where its texts are in that.

    Args:
        render: the chat template.
        messages: in canonical form.
        notice: told of each field that is written into a content instead, and of a response of which the template
            leaves out a part.
        answer: number of the message that a response begins with. Where a template rewrites a response, all that
            depends on it counts as one text of this message.
        special: finds special tokens; what texts hold of it is told in the result, and no template acts on it.
        known: what earlier calls with this template have learnt of it; may be shared between threads.

    Raises as :func:`render_pieces`.
    """
    guard = _Guard(special)
    parts, folded = _folded(render, messages, notice, known)
    parts = [part._replace(text=guard.hide(part.text)) if part.kind == "text" else part for part in parts]
    text = _rendered(render, _Marks(messages, folded, marked=range(0), show=guard.hide).messages)
    places, end = _align(text, parts)
    if end is None:
        # The template treats this response apart. What differs from a rendering in which the response is a mark is it.
        begun = _rendered(
            render, _Marks(messages, folded, marked=range(answer, len(messages)), show=guard.hide).messages
        )
        start, stop = _difference(text, begun)
        places = [place for place in places if place.stop <= start and place.message < answer]
        places.append(Place(start, stop, answer))
        said = "".join("".join(part.text.split()) for part in parts if part.message >= answer)
        if said not in "".join(text[places[-2].stop if len(places) > 1 else 0 :].split()):
            notice("a part of a response, or changes it")
    return guard.revealed(text, places)


class _Guard:
    """Hides special tokens that texts spell from a template, and from those who look for special tokens in its text."""

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self._pattern = None if special is None else re.compile(f"{special.pattern}|\ue0f2")
        self._hidden: list[str] = []

    def hide(self, text: str) -> str:
        """``text`` with numbers between private-use characters for what is hidden."""
        if self._pattern is None:
            return text
        shown, done = [], 0
        for found in find_all(self._pattern, text, len(self._pattern.pattern)):
            shown += [text[done : found.start()], self._number(found)]
            done = found.end()
        return "".join([*shown, text[done:]])

    def _number(self, found: re.Match[str]) -> str:
        if found[0] not in self._hidden:
            self._hidden.append(found[0])
        return f"\ue0f2{self._hidden.index(found[0])}\ue0f3"

    def revealed(self, text: str, places: Sequence[Place]) -> Rendering:
        """The rendering with what was hidden."""
        if not self._hidden:
            return Rendering(text, tuple(places))
        pieces = _HIDDEN.split(text)
        shown = [pieces[0]]
        spelt: list[tuple[int, int]] = []
        # Where hidden texts end, and by how much all that follows is moved.
        ends, moves = [0], [0]
        at, hidden_at = len(pieces[0]), len(pieces[0])
        for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
            name = self._hidden[int(number)]
            spelt.append((at, at + len(name)))
            shown += [name, after]
            at += len(name)
            hidden_at += len(number) + 2
            ends.append(hidden_at)
            moves.append(at - hidden_at)
            at += len(after)
            hidden_at += len(after)

        def moved(position: int) -> int:
            return position + moves[bisect.bisect_right(ends, position) - 1]

        found = (place._replace(start=moved(place.start), stop=moved(place.stop)) for place in places)
        return Rendering("".join(shown), tuple(found), tuple(spelt))


def _folded(
    render: Render, messages: Sequence[dict[str, Any]], notice: Notice, known: Known | None
) -> tuple[list[Part], dict[int, set[str]]]:
    """Parts, and by message the fields that its content holds in them."""
    folded: dict[int, set[str]] = {k: set() for k in range(len(messages))}
    # With marks for contents, nothing but the roles decides what is rendered.
    roles = tuple(message["role"] for message in messages)
    plain = known is not None and all(len(message) == 2 for message in messages)
    if known is not None and plain and roles in known:
        return [
            part if part.kind == "template" else part._replace(text=messages[part.message]["content"])
            for part in known[roles]
        ], folded
    parts, folded = _folded_anew(render, messages, notice, folded)
    if known is not None and plain and len(known) < _MOST_KNOWN:
        known[roles] = parts
    return parts, folded


def _folded_anew(
    render: Render, messages: Sequence[dict[str, Any]], notice: Notice, folded: dict[int, set[str]]
) -> tuple[list[Part], dict[int, set[str]]]:
    extras = {k: set(EXTRA_FIELDS) & message.keys() for k, message in enumerate(messages)}
    try:
        try:
            return _render(render, messages, folded, notice), folded
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
        notice(f"{field}: shown as text within the messages instead")
    return parts, extras


def _rendered(render: Render, messages: list[dict[str, Any]]) -> str:
    try:
        return render(messages)
    except Exception as error:  # a template is a program and may raise anything
        raise InputError(
            f"prompt and response: got texts that this tokenizer's chat template refuses ({str(error)[:300]}), "
            "expected ones it renders"
        ) from error


def _align(text: str, parts: Sequence[Part]) -> tuple[list[Place], int | None]:
    """Where the texts of ``parts`` are in ``text``, as they are or trimmed, as far as that is so; the end if it is."""
    places: list[Place] = []
    at = 0
    for k, part in enumerate(parts):
        if part.kind == "template":
            if not text.startswith(part.text, at):
                return places, None
            at += len(part.text)
            continue
        after = parts[k + 1].text
        shape = next((shape for shape in _shapes(part.text) if text.startswith(shape + after, at)), None)
        if shape is None:
            return places, None
        places.append(Place(at, at + len(shape), part.message))
        at += len(shape)
    return places, at if at == len(text) else None


def _shapes(text: str) -> Iterator[str]:
    yield text
    for characters in (None, "\n"):
        yield from (text.strip(characters), text.lstrip(characters), text.rstrip(characters))


def _difference(text: str, other: str) -> tuple[int, int]:
    """The shortest part of ``text`` outside of which it is ``other``."""
    start = _common(text, other)
    return start, len(text) - _common(text[start:][::-1], other[start:][::-1])


def _common(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(text), len(other)))


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
            notice(f"{field}: shown as text within the messages instead")
    raise _UnrenderedError("it leaves out texts")


class _Marks:
    """A conversation whose texts are marks.

    Args:
        messages: in canonical form.
        folded: for each message the fields that are written into its content.
        scalars: mark what arguments hold besides texts, too.
        marked: numbers of the messages whose texts become marks; None for all. Those of others are shown.
        show: how texts are shown that are no marks.
    """

    def __init__(
        self,
        messages: Sequence[dict[str, Any]],
        folded: dict[int, set[str]],
        *,
        scalars: bool = False,
        marked: range | None = None,
        show: Callable[[str], str] = str,
    ) -> None:
        self.folded = folded
        self.scalars = scalars
        self.show = show
        self.marked = range(len(messages)) if marked is None else marked
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
        if self._message not in self.marked:
            return self.show(text)
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
