"""Prompts, messages and responses: the one notion that every edge of the library has of them.

A **prompt** is text, or a conversation: a non-empty list of messages. A **response** is text, one message, or the
several messages of a policy that called tools; one assistant message that holds nothing but text is that text.

A **message** is a mapping of ``role`` (one plain word), ``content`` (text, or text parts, which are joined; ``None``
for an assistant), and perhaps ``name``, ``reasoning_content`` (also spelled ``reasoning`` or ``thinking``),
``tool_calls`` and ``tool_call_id``, in the form of OpenAI's chat completions or of transformers' chat templates. A
field that is ``None`` or empty says nothing and is as good as absent. Anything else (an image, an unknown part, an
unknown field that holds something) is refused by name: nothing that a message says is dropped.

The canonical forms are what is compared, hashed, stored and sent: equal canonical forms are equal prompts or responses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from rmcore._base.errors import reject
from rmcore._base.json_members import unique_members

__all__ = [
    "EXTRA_FIELDS",
    "Canonical",
    "Message",
    "Prompt",
    "Response",
    "canonical_group",
    "canonical_groups",
    "canonical_json",
    "canonical_prompt",
    "canonical_response",
    "check_nesting",
    "check_prompt",
    "check_response",
    "content_key",
    "conversation_text",
    "json_object",
    "message_text",
    "response_text",
    "says_nothing",
    "text_length",
]

Message: TypeAlias = Mapping[str, Any]
"""One chat message: ``{"role": ..., "content": ...}``, and what else the module describes."""

Prompt: TypeAlias = str | Sequence[Message]
"""A plain-text prompt, or a conversation as a list of messages."""

Response: TypeAlias = str | Message | Sequence[Message]
"""Text, a message, or a list of messages at least one of which is the assistant's."""

Canonical: TypeAlias = str | list[dict[str, Any]]
"""A prompt or a response in canonical form: text, or messages whose ``content`` is a string, whose ``arguments`` are
JSON text and whose call ids count the calls."""

EXTRA_FIELDS = ("name", "tool_call_id", "reasoning_content", "tool_calls")
"""What a canonical message may have besides ``role`` and ``content``, in the order of :func:`message_text`."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_FIELDS = ("role", "content", "name", "tool_call_id", *_REASONING, "tool_calls")
# A role and an id reach chat templates as template text, and a role is part of a judge's marker lines.
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_ID = re.compile(r"[A-Za-z0-9_.:/-]{1,200}")


# -- canonical forms -------------------------------------------------------------------------------------------------


def canonical_prompt(prompt: Prompt, where: str = "prompt") -> Canonical:
    """``prompt`` in its canonical form. Plain text and a one-message conversation of the same words stay different.

    Raises:
        InputError: it is neither a string nor a non-empty sequence of messages; what is wrong is named, from ``where``
            on.
    """
    if isinstance(prompt, str):
        return prompt
    return _numbered(_messages(prompt, where, "a string or a non-empty list of messages"), "pcall")


def canonical_response(response: Response, where: str = "response") -> Canonical:
    """``response`` in its canonical form: text wherever it is nothing but an assistant's text.

    Raises:
        InputError: it is no string, message or list of messages, or none of them is the assistant's; what is wrong is
            named from ``where`` on.
    """
    if isinstance(response, str):
        return response
    if isinstance(response, Mapping):
        messages = [_message(response, where)]
    else:
        messages = _messages(response, where, "a string, a message or a non-empty list of messages")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        reject(where, f"messages of the roles {roles[:8]}", "at least one of the role assistant")
    if len(messages) == 1 and messages[0].keys() == {"role", "content"}:
        return str(messages[0]["content"])
    return _numbered(messages, "rcall")


def check_prompt(prompt: object, where: str = "prompt") -> None:
    """Raise InputError, naming the place from ``where`` on, for what :func:`canonical_prompt` refuses."""
    canonical_prompt(prompt, where)  # type: ignore[arg-type]  # finding out is the purpose


def check_response(response: object, where: str = "response") -> None:
    """Raise InputError, naming the place from ``where`` on, for what :func:`canonical_response` refuses."""
    canonical_response(response, where)  # type: ignore[arg-type]  # finding out is the purpose


def content_key(value: Response) -> Hashable:
    """What is equal, and hashes equally, for equal canonical forms."""
    return value if isinstance(value, str) else ("messages", canonical_json(value))


def canonical_json(value: Response) -> str:
    """ASCII JSON of a canonical form: equal texts for equal forms, whatever the order of a message's fields."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def check_nesting(prompts: object, responses: object) -> None:
    """Raise InputError unless both are lists of one length, with a group at least; what is in them is not looked at."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        reject("prompts", type(prompts).__name__, "a list with one prompt a group")
    if isinstance(responses, str) or not isinstance(responses, Sequence):
        reject("responses", type(responses).__name__, "a list with one list of responses a prompt")
    if not prompts:
        reject("prompts", "an empty list", "at least one prompt")
    if len(prompts) != len(responses):
        reject("responses", f"{len(responses)} groups", f"{len(prompts)}, one a prompt")


def canonical_group(
    prompt: Prompt, responses: Sequence[Response], prompt_name: str = "prompt", name: str = "responses"
) -> tuple[Canonical, list[Canonical]]:
    """A prompt and its responses in canonical form; raises InputError unless there is a non-empty list of them."""
    canonical = canonical_prompt(prompt, prompt_name)
    if isinstance(responses, str) or not isinstance(responses, Sequence):
        reject(name, type(responses).__name__, "a list of responses")
    if not responses:
        reject(name, "an empty list", "at least one response")
    return canonical, [canonical_response(response, f"{name}[{i}]") for i, response in enumerate(responses)]


def canonical_groups(
    prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]]
) -> tuple[list[Canonical], list[list[Canonical]]]:
    """Prompts and responses in canonical form; raises as :func:`check_nesting` and :func:`canonical_group`."""
    check_nesting(prompts, responses)
    groups = [
        canonical_group(prompt, group, f"prompts[{k}]", f"responses[{k}]")
        for k, (prompt, group) in enumerate(zip(prompts, responses, strict=True))
    ]
    return [prompt for prompt, _ in groups], [group for _, group in groups]


# -- as text ---------------------------------------------------------------------------------------------------------


def message_text(message: Mapping[str, Any], fields: Collection[str] = EXTRA_FIELDS) -> str:
    """Everything a canonical message says but its role, as text: its content between lines for its other ``fields``."""
    lines = []
    for name, title in (("name", "Name"), ("tool_call_id", "Result of"), ("reasoning_content", "Reasoning")):
        if name in fields and name in message:
            lines.append(f"{title}: {message[name]}")
    calls = message.get("tool_calls", ()) if "tool_calls" in fields else ()
    if message["content"] or not (lines or calls):
        lines.append(message["content"])
    for call in calls:
        number = f" {call['id']}" if "id" in call else ""
        lines.append(f"Tool call{number}: {call['function']['name']}({call['function']['arguments']})")
    return "\n".join(lines)


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Canonical messages as ``Role: text`` paragraphs."""
    return "\n\n".join(f"{message['role'].capitalize()}: {message_text(message)}" for message in messages)


def response_text(response: Response, where: str = "response") -> str:
    """Everything a response says as one text: for models without a chat template, and where a length is asked for.

    Raises as :func:`canonical_response`.
    """
    canonical = canonical_response(response, where)
    if isinstance(canonical, str):
        return canonical
    return message_text(canonical[0]) if len(canonical) == 1 else conversation_text(canonical)


def text_length(canonical: Canonical) -> int:
    """Characters of a canonical prompt or response, its messages as :func:`message_text` shows them."""
    return len(canonical) if isinstance(canonical, str) else sum(len(message_text(message)) for message in canonical)


# -- one message -----------------------------------------------------------------------------------------------------


def _messages(value: object, where: str, expected: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)) or not value:
        reject(where, "an empty list" if isinstance(value, (list, tuple)) else type(value).__name__, expected)
    return [_message(message, f"{where}[{k}]") for k, message in enumerate(value)]


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        reject(where, type(value).__name__, 'a message: {"role": ..., "content": ...}')
    role = value.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        reject(f"{where}.role", repr(role)[:80], "one plain word such as 'user'")
    said = {name: part for name, part in value.items() if name not in ("role", "content") and not says_nothing(part)}
    for name in said:
        if name not in _FIELDS:
            reject(f"{where}.{name!s:.40}", type(said[name]).__name__, f"nothing but {', '.join(_FIELDS)}")
    silent = role == "assistant" and ("content" in value or bool(said))
    message: dict[str, Any] = {"role": role, "content": _content(value.get("content"), where, silent)}
    if "name" in said:
        message["name"] = _string(said["name"], f"{where}.name")
    if "tool_call_id" in said:
        message["tool_call_id"] = _id(said["tool_call_id"], f"{where}.tool_call_id")
    thoughts = {_string(said[name], f"{where}.{name}") for name in _REASONING if name in said}
    if len(thoughts) > 1:
        reject(f"{where}.reasoning_content", f"another text than in {' or '.join(_REASONING[1:])}", "one of them")
    if thoughts:
        message["reasoning_content"] = thoughts.pop()
    if "tool_calls" in said:
        calls = said["tool_calls"]
        if not isinstance(calls, (list, tuple)):
            reject(f"{where}.tool_calls", type(calls).__name__, "a list of calls")
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(calls)]
    return message


def _content(value: object, where: str, silent: bool) -> str:
    """The text of a content; ``silent`` allows for none."""
    if isinstance(value, str):
        return value
    where = f"{where}.content"
    if says_nothing(value):
        if not silent:
            reject(where, "nothing" if value is None else "an empty list", "text")
        return ""
    if not isinstance(value, (list, tuple)):
        reject(where, type(value).__name__, "text, or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            reject(where, f"list with a part of type {kind!r:.60}", "text, or a list of text parts")
        for name, said in part.items():
            if name not in ("type", "text") and not says_nothing(said):
                reject(where, f"list with a part that has {name!r:.60}", "parts of a type and a text")
        texts.append(part["text"])
    return "".join(texts)


def _tool_call(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        reject(where, type(value).__name__, "a call: an id, a function's name and arguments")
    # An index is the call's place among the others, which the list has already.
    call = {name: part for name, part in value.items() if name != "index" and not says_nothing(part)}
    kind = call.pop("type", "function")
    if kind != "function":
        reject(f"{where}.type", repr(kind)[:80], "'function'")
    number = call.pop("id", None)
    function, rest = (call.pop("function"), call) if "function" in call else (call, {})
    if not isinstance(function, Mapping):
        reject(f"{where}.function", type(function).__name__, "a name and arguments")
    unknown = [*rest, *(name for name in function if name not in ("name", "arguments"))]
    for name in unknown:
        if not says_nothing({**rest, **function}[name]):
            reject(f"{where}.{name!s:.40}", "something", "nothing but an id, a function's name and arguments")
    name = _string(function.get("name"), f"{where}.function.name")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    result: dict[str, Any] = {} if number is None else {"id": _id(number, f"{where}.id")}
    return {**result, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(value: object, where: str) -> str:
    """Arguments as JSON text, in one spelling if they are an object; what a model wrote that is none stays as it is."""
    if says_nothing(value):
        return "{}"
    if isinstance(value, str):
        found = json_object(value)
        return value if found is None else json.dumps(found, ensure_ascii=False)
    if not isinstance(value, Mapping):
        reject(where, type(value).__name__, "an object, or the JSON text of one")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reject(where, f"values that are no JSON ({type(error).__name__})", "JSON values")


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that ``text`` is; ``None`` if it is none, or one that would not come back as it was."""

    def number(digits: str) -> float:
        if repr(float(digits)) != digits:
            raise ValueError("another number than the nearest float")
        return float(digits)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique_members, parse_float=number, parse_constant=constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _numbered(messages: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """The same with calls counted in place of their ids, which are random and say nothing but who answers whom.

    Nine letters and digits, as some chat templates demand; of a prompt and of a response with different beginnings,
    since they are put together. An id that none of the calls has stays as it is.
    """
    numbers: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            if "id" in call:
                call["id"] = numbers.setdefault(call["id"], f"{prefix}{len(numbers) + 1:04d}")
        if "tool_call_id" in message:
            message["tool_call_id"] = numbers.get(message["tool_call_id"], message["tool_call_id"])
    return messages


def says_nothing(value: object) -> bool:
    """Whether a field's value is as good as absent: None, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and len(value) == 0)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        reject(where, type(value).__name__ if value else repr(value), "a non-empty string")
    return value


def _id(value: object, where: str) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        reject(where, repr(value)[:80], "one word of letters, digits and . _ : / -")
    return value
