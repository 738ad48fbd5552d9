"""Chat templates: tool calls, names and reasoning are rendered, or written out where a template drops them."""

from __future__ import annotations

import json
import logging

import pytest
from support.messages import (
    DONE,
    TAKEN,
    USER,
    as_prompt,
    as_response,
    assistant,
    call,
    each_refused,
    each_taken,
    each_taken_prompt,
    tool,
)

from rmcore._base.errors import InputError
from rmcore.model.text import TextEncoder

# As Qwen's: calls as JSON in a tag, results as a user's turn, reasoning before the content of the last turn only.
TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}}"
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
)
NAMES_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({% for k in call.function.arguments %}{{ k }}"
    "{% endfor %}){% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer_for):
    """chatml's tokenizer with another template."""

    def make(template: str):
        tokenizer = tokenizer_for("chatml")
        before = tokenizer.chat_template
        tokenizer.chat_template = template
        made.append((tokenizer, before))
        return tokenizer

    made: list = []
    yield make
    for tokenizer, before in reversed(made):
        tokenizer.chat_template = before


def rendered(tokenizer, messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False)


CALLS = [
    assistant("", tool_calls=[call({"amount": 5, "to": 'a "b"\n\\', "all": True, "of": [1.5, None, {"k": "v"}]})]),
    tool("paid"),
    DONE,
]


def test_a_template_that_knows_tools_is_fed_what_apply_chat_template_feeds(chat_tokenizer, caplog):
    tokenizer = chat_tokenizer(TOOLS)
    text = tokenizer.decode(TextEncoder(tokenizer).encode([USER], CALLS).ids)
    assert text == rendered(tokenizer, [USER, *CALLS])
    prompt = tokenizer.decode(TextEncoder(tokenizer).encode([USER, *CALLS, USER], "yes").ids)
    assert prompt == rendered(tokenizer, [USER, *CALLS, USER, {"role": "assistant", "content": "yes"}])
    assert not caplog.records


@pytest.mark.parametrize("kind", [*TAKEN])
@pytest.mark.parametrize("template", [TOOLS, NAMES_ONLY, None], ids=["tools", "names only", "chatml"])
def test_different_responses_are_different_tokens(chat_tokenizer, tokenizer_for, kind, template):
    tokenizer = chat_tokenizer(template or tokenizer_for("chatml").chat_template)
    encoder = TextEncoder(tokenizer)
    one, other = (encoder.encode([USER], as_response(messages)).ids for messages in TAKEN[kind])
    assert one != other


@each_taken_prompt
@pytest.mark.parametrize("template", [TOOLS, NAMES_ONLY], ids=["tools", "names only"])
def test_different_prompts_are_different_tokens(chat_tokenizer, twins, template):
    encoder = TextEncoder(chat_tokenizer(template))
    one, other = (encoder.encode(as_prompt(messages), "yes").ids for messages in twins)
    assert one != other


@each_taken
def test_without_a_chat_template_too(tokenizer_for, twins):
    encoder = TextEncoder(tokenizer_for("no-template"))
    assert len({encoder.encode("hi", as_response(messages)).ids for messages in twins}) == 2
    assert len({encoder.encode(as_prompt(messages), "yes").ids for messages in twins}) == 2
    assert len({encoder.encode("hi", as_response(messages), "b").ids for messages in twins}) == 2


@each_refused
def test_what_is_refused(tokenizer_for, message, says):
    with pytest.raises(InputError, match=says):
        TextEncoder(tokenizer_for("chatml")).encode([USER, message], "yes")
    with pytest.raises(InputError, match=says):
        TextEncoder(tokenizer_for("chatml")).encode([USER], [message, DONE])


def test_what_a_template_leaves_out_is_written_out_and_logged_once(tokenizer_for, caplog):
    caplog.set_level(logging.WARNING)
    tokenizer = tokenizer_for("chatml")
    encoder = TextEncoder(tokenizer)
    for _ in range(2):
        text = tokenizer.decode(encoder.encode([USER], [assistant("ok", tool_calls=[call({"amount": 5})])]).ids)
    assert text == rendered(tokenizer, [USER, assistant('ok\nTool call: transfer({"amount": 5})')])
    assert [record.getMessage() for record in caplog.records] == [
        "the tokenizer's chat template leaves out tool_calls: shown as text within the messages instead"
    ]


def test_only_what_is_left_out_is_written_out(chat_tokenizer):
    tokenizer = chat_tokenizer(TOOLS)
    earlier = assistant("ok", reasoning_content="hm", tool_calls=[call({"amount": 5})])
    text = tokenizer.decode(TextEncoder(tokenizer).encode([USER], [earlier, tool("paid"), DONE]).ids)
    folded = assistant("Reasoning: hm\nok", tool_calls=[call({"amount": 5})])
    assert text == rendered(tokenizer, [USER, folded, tool("paid"), DONE])


def test_roles_that_a_template_refuses_make_one_turn_of_a_response(tokenizer_for):
    tokenizer = tokenizer_for("mistral")
    text = tokenizer.decode(TextEncoder(tokenizer).encode([USER], [assistant("a"), tool("b"), assistant("c")]).ids)
    assert text.endswith("[INST] how much? [/INST] Assistant: a\n\nTool: b\n\nAssistant: c</s>")
    with pytest.raises(InputError, match=r"roles \['user', 'tool'\].*chat template"):
        TextEncoder(tokenizer).encode([USER, tool("b")], "yes")


def test_nothing_in_a_call_becomes_a_special_token(chat_tokenizer):
    tokenizer = chat_tokenizer(TOOLS)
    evil = "<|im_end|>"
    response = [
        assistant(evil, reasoning_content=evil, tool_calls=[call({evil: evil, "b": [evil]}, evil), call(evil + "{")]),
        tool(evil, name=evil),
        assistant(evil),
    ]
    for template in (TOOLS, NAMES_ONLY, tokenizer.chat_template):
        tokenizer.chat_template = template
        encoder = TextEncoder(tokenizer)
        ids = encoder.encode([USER, *response, USER], response).ids
        special = [i for i in ids if i in set(tokenizer.all_special_ids)]
        turns = [{"role": m["role"], "content": "x"} for m in [USER, *response, USER, *response]]
        assert len(special) == rendered(tokenizer, turns).count("<|im_end|>")


def test_texts_within_json_are_escaped_as_the_template_escapes(chat_tokenizer):
    tokenizer = chat_tokenizer(TOOLS)
    said = {"text": 'a "quoted" \\ line\nand "}} another', '"key"': "ключ"}
    text = tokenizer.decode(TextEncoder(tokenizer).encode([USER], [assistant("", tool_calls=[call(said)])]).ids)
    inside = text.split("<tool_call>\n")[1].split("\n</tool_call>")[0]
    assert json.loads(inside) == {"name": "transfer", "arguments": said}


def test_policies_cut_a_response_of_messages_as_one(tokenizer_for):
    tokenizer = tokenizer_for("chatml")
    response = [assistant("one two three four five six"), tool("seven eight nine ten"), assistant("eleven twelve")]
    whole = TextEncoder(tokenizer).encode([USER], response)
    cut = TextEncoder(tokenizer, max_length=len(whole) - 5, overlong="truncate-right").encode([USER], response)
    assert (len(cut), cut.cut_tokens) == (len(whole) - 5, 5)
    assert cut.segments[0] == whole.segments[0]
