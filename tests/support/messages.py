"""One table of messages, for the tests of every edge: what is taken and told apart, and what is refused by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

USER = {"role": "user", "content": "how much?"}
DONE = {"role": "assistant", "content": "done"}


def call(arguments: Any, name: str = "transfer", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def assistant(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


class Twins(NamedTuple):
    """Messages that every edge takes, and others that differ from them in one thing."""

    one: list[dict[str, Any]]
    other: list[dict[str, Any]]


TAKEN = {
    "call arguments": Twins(
        [assistant(tool_calls=[call({"amount": 5})])], [assistant(tool_calls=[call({"amount": 6})])]
    ),
    "true is not 1": Twins([assistant(tool_calls=[call({"all": True})])], [assistant(tool_calls=[call({"all": 1})])]),
    "arguments as text": Twins(
        [assistant(tool_calls=[call('{"to": "a"}')])], [assistant(tool_calls=[call('{"to": "b"}')])]
    ),
    "arguments that are no JSON": Twins(
        [assistant(tool_calls=[call("{oops")])], [assistant(tool_calls=[call("{ooops")])]
    ),
    "call name": Twins([assistant("", tool_calls=[call({})])], [assistant("", tool_calls=[call({}, "refuse")])]),
    "call beside content": Twins([assistant("ok")], [assistant("ok", tool_calls=[call({"amount": 5})])]),
    "call without a wrapper": Twins(
        [assistant(tool_calls=[{"name": "f", "arguments": {"x": 1}}])],
        [assistant(tool_calls=[{"name": "f", "arguments": {"x": 2}}])],
    ),
    "tool result": Twins(
        [assistant(tool_calls=[call({}, id="a1")]), tool("paid", tool_call_id="a1", name="transfer")],
        [assistant(tool_calls=[call({}, id="a1")]), tool("failed", tool_call_id="a1", name="transfer")],
    ),
    "whose result": Twins(
        [assistant(tool_calls=[call({}, id="a"), call({}, id="b")]), tool("x", tool_call_id="a")],
        [assistant(tool_calls=[call({}, id="a"), call({}, id="b")]), tool("x", tool_call_id="b")],
    ),
    "tool name": Twins([DONE, tool("4", name="add")], [DONE, tool("4", name="sub")]),
    "reasoning": Twins([assistant("4", reasoning_content="2+2")], [assistant("4", reasoning_content="a guess")]),
    "reasoning, other spellings": Twins([assistant("4", reasoning="2+2")], [assistant("4", thinking="a guess")]),
    "name": Twins([assistant("4", name="ann")], [assistant("4", name="bob")]),
    "text parts": Twins(
        [assistant([{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}])],
        [assistant([{"type": "text", "text": "a"}])],
    ),
    "several messages": Twins([assistant("a"), assistant("b")], [assistant("a"), assistant("c")]),
    "a user's turn within": Twins([DONE, USER, assistant("a")], [DONE, USER, assistant("b")]),
}
"""As the end of a prompt, and as a response (the last message then is :data:`DONE`)."""

TAKEN_PROMPTS = {
    "developer": Twins([{"role": "developer", "content": "be kind"}], [{"role": "developer", "content": "be rude"}]),
    "role": Twins([{"role": "developer", "content": "be kind"}], [{"role": "system", "content": "be kind"}]),
    "user name": Twins([{**USER, "name": "ann"}], [{**USER, "name": "bob"}]),
    "user parts": Twins(
        [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "2+3?"}]}],
    ),
}
"""As a prompt only."""

SAME = {
    "empty fields": Twins(
        [assistant("a")], [assistant("a", name=None, tool_calls=[], reasoning_content="", refusal=None)]
    ),
    "parts": Twins([assistant("ab")], [assistant([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]),
    "arguments": Twins(
        [assistant(tool_calls=[call({"a": 1})])], [assistant("", tool_calls=[call('{"a":1}', id=None, index=0)])]
    ),
    "ids": Twins(
        [assistant(tool_calls=[call({}, id="x")]), tool("4", tool_call_id="x")],
        [assistant(tool_calls=[call({}, id="y")]), tool("4", tool_call_id="y")],
    ),
}
"""Two ways to say the same."""

REFUSED = {
    "empty role": ({"role": "", "content": "a"}, r"\.role: got ''"),
    "no role": ({"content": "a"}, r"\.role: got None"),
    "role of two words": ({"role": "us er", "content": "a"}, r"\.role: got 'us er'"),
    "null content of a user": ({"role": "user", "content": None}, r"\.content: got nothing"),
    "no content at all": ({"role": "assistant"}, r"\.content: got nothing"),
    "image part": (
        assistant([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
        r"\.content: got list with a part of type 'image_url'",
    ),
    "audio part": (assistant([{"type": "input_audio", "input_audio": {"data": "x"}}]), r"type 'input_audio'"),
    "a part's extra": (assistant([{"type": "text", "text": "a", "cache_control": {"x": 1}}]), r"'cache_control'"),
    "unknown key": (assistant("a", mood="odd"), r"\.mood: got str"),
    "refusal": (assistant(refusal="I would rather not."), r"\.refusal: got str"),
    "function_call": (assistant(function_call={"name": "f", "arguments": "{}"}), r"\.function_call: got dict"),
    "call of another type": (assistant(tool_calls=[{"type": "custom", "custom": {"name": "f"}}]), r"\.type: got 'cust"),
    "call without a name": (assistant(tool_calls=[{"type": "function", "function": {}}]), r"\.name: got None"),
    "two reasonings": (assistant("a", reasoning="b", reasoning_content="c"), r"reasoning_content: got another"),
    "an id of two words": (tool("a", tool_call_id="<|im_end|>"), r"\.tool_call_id: got '<\|im"),
}
"""(a message, what the error says)."""

each_taken = pytest.mark.parametrize("twins", TAKEN.values(), ids=list(TAKEN))
each_taken_prompt = pytest.mark.parametrize(
    "twins", [*TAKEN.values(), *TAKEN_PROMPTS.values()], ids=[*TAKEN, *TAKEN_PROMPTS]
)
each_same = pytest.mark.parametrize("twins", SAME.values(), ids=list(SAME))
each_refused = pytest.mark.parametrize(("message", "says"), REFUSED.values(), ids=list(REFUSED))


def as_response(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*messages, DONE]


def as_prompt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [USER, *messages]
