"""Prompts, messages and responses: one canonical form, nothing dropped, what is no text refused by name."""

from __future__ import annotations

import pytest
from support.messages import (
    DONE,
    USER,
    as_prompt,
    as_response,
    assistant,
    call,
    each_refused,
    each_same,
    each_taken,
    each_taken_prompt,
    tool,
)

from rmcore._base.errors import InputError
from rmcore._base.prompt import (
    canonical_json,
    canonical_prompt,
    canonical_response,
    check_prompt,
    check_response,
    content_key,
    json_object,
    response_text,
    text_length,
)


@each_taken
def test_responses_that_differ_are_told_apart(twins):
    one, other = (canonical_response(as_response(messages)) for messages in twins)
    assert one != other
    assert content_key(one) != content_key(other)
    assert response_text(one) != response_text(other)
    assert canonical_response(one) == one
    assert canonical_json(canonical_response(one)) == canonical_json(one)


@each_taken_prompt
def test_prompts_that_differ_are_told_apart(twins):
    one, other = (canonical_prompt(as_prompt(messages)) for messages in twins)
    assert one != other
    assert canonical_prompt(one) == one


@each_same
def test_two_ways_to_say_the_same(twins):
    assert canonical_response(twins.one) == canonical_response(twins.other)
    assert content_key(canonical_prompt(twins.one)) == content_key(canonical_prompt(twins.other))


@each_refused
def test_what_is_refused_is_named(message, says):
    with pytest.raises(InputError, match=rf"p\[1\].*{says}"):
        check_prompt([USER, message], "p")
    with pytest.raises(InputError, match=rf"r\[0\].*{says}"):
        check_response([message, DONE], "r")


@pytest.mark.parametrize(
    "response", ["a", {"role": "assistant", "content": "a"}, [{"role": "assistant", "content": "a"}], (assistant("a"),)]
)
def test_one_assistant_text_is_that_text(response):
    assert canonical_response(response) == "a"


def test_a_response_is_the_assistants():
    with pytest.raises(InputError, match=r"response: got messages of the roles \['tool'\]"):
        canonical_response([tool("4")])


@pytest.mark.parametrize("prompt", [{"role": "user", "content": "a"}, [], None, b"a", 3])
def test_what_is_no_prompt(prompt):
    with pytest.raises(InputError, match="prompt: got"):
        check_prompt(prompt)


def test_a_plain_text_is_never_a_conversation_that_reads_alike():
    turns = canonical_response([assistant("a"), tool("b")])
    assert content_key(response_text(turns)) != content_key(turns)
    assert canonical_prompt("a") != canonical_prompt([{"role": "user", "content": "a"}])


def test_everything_that_is_said_is_in_the_text():
    turns = [
        assistant("Let me see.", reasoning_content="which account?", tool_calls=[call({"amount": 5}, id="x1")]),
        tool("paid", tool_call_id="x1", name="transfer"),
        assistant("Done."),
    ]
    assert response_text(turns) == (
        'Assistant: Reasoning: which account?\nLet me see.\nTool call rcall0001: transfer({"amount": 5})\n\n'
        "Tool: Name: transfer\nResult of: rcall0001\npaid\n\nAssistant: Done."
    )
    assert text_length(canonical_response(turns)) > len("Let me see.which account?transferpaidDone.")


@pytest.mark.parametrize(
    "text", ["[1]", "3", "{", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 0.1000000000000000055}', '{"a": 1.00}']
)
def test_arguments_that_would_not_come_back_stay_text(text):
    assert json_object(text) is None
    message = canonical_response(assistant(tool_calls=[call(text)]))[0]
    assert message["tool_calls"][0]["function"]["arguments"] == text


@pytest.mark.parametrize("arguments", [{"a": float("nan")}, {"a": object()}, [1], 3])
def test_arguments_that_are_no_json_object(arguments):
    with pytest.raises(InputError, match=r"response.tool_calls\[0\].function.arguments"):
        canonical_response(assistant(tool_calls=[call(arguments)]))


def test_completions_become_text():
    assert response_text("plain") == "plain"
    assert response_text([{"role": "assistant", "content": "one"}]) == "one"
    assert (
        response_text(
            [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        )
        == "ab"
    )
    turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    assert response_text(turns) == "Assistant: \n\nTool: 42\n\nAssistant: It is 42."


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (7, r"c: got int"),
        ([], r"c: got an empty list"),
        (["text"], r"c\[0\]: got str"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], r"c\[0\].content: got list"),
        ([{"role": "assistant", "content": 5}], r"c\[0\].content: got int"),
    ],
)
def test_what_is_no_text_is_refused(completion, message):
    with pytest.raises(InputError, match=message):
        response_text(completion, "c")
