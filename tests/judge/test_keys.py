"""The content key: equal texts, equal key; anything else, another."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore._base.prompt import canonical_prompt
from rmcore.judge.keys import pair_key


def test_key_is_the_same_in_every_release():
    # Stored verdicts are found by it: a change here must come with another KEY_VERSION.
    assert pair_key("p", "a", "b") == "5e79596138362fd8e537f2a4b1b7eac6cb9407d844233ec481df835eab301aac"


def test_order_matters():
    assert pair_key("p", "a", "b") != pair_key("p", "b", "a")


def test_text_and_one_message_are_different_prompts():
    assert pair_key("p", "a", "b") != pair_key([{"role": "user", "content": "p"}], "a", "b")


def test_a_conversation_has_the_same_key_in_every_release():
    key = "7c77458b184c6fe9371a82c03cc9080614674d8ee52c24646edb2fe302c13878"
    assert pair_key([{"role": "user", "content": "p"}, {"role": "assistant", "content": ""}], "a", "b") == key


plain_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=5)}),
    min_size=1,
    max_size=3,
)


@given(st.text(max_size=5) | plain_messages, st.text(max_size=5), st.text(max_size=5))
def test_plain_texts_and_messages_keep_the_keys_of_the_first_release(prompt, first, second):
    text = json.dumps(["rmcore.pair", 1, prompt, first, second], sort_keys=True, separators=(",", ":"))
    assert pair_key(prompt, first, second) == hashlib.sha256(text.encode("ascii")).hexdigest()


def test_messages_count_by_what_they_say():
    plain = [{"role": "user", "content": "p"}, {"role": "assistant", "content": ""}]
    dressed = ({"content": "p", "role": "user", "name": None}, {"role": "assistant", "content": None, "tool_calls": []})
    assert pair_key(plain, "a", "b") == pair_key(dressed, "a", "b")
    assert canonical_prompt(dressed) == plain
    assert pair_key([{**plain[0], "name": "x"}, plain[1]], "a", "b") != pair_key(plain, "a", "b")


def test_one_assistant_message_is_its_text():
    assert pair_key("p", [{"role": "assistant", "content": "a"}], "b") == pair_key("p", "a", "b")


def test_boundaries_between_texts_are_part_of_the_key():
    assert pair_key("p", "ab", "c") != pair_key("p", "a", "bc")
    assert pair_key('p","a', "b", "c") != pair_key("p", 'a","b', "c")


@given(st.text(st.characters()), st.text(st.characters()), st.text(st.characters()))
def test_any_text_has_a_key(prompt, first, second):
    # st.characters() includes lone surrogates, which no UTF-8 encoder takes.
    assert len(pair_key(prompt, first, second)) == 64


@pytest.mark.parametrize(
    "prompt",
    [None, 3, [], b"bytes", ["text"], [{"content": "no role"}], [{"role": "user", "content": 3}], [{"role": ""}]],
)
def test_prompts_that_are_none(prompt):
    with pytest.raises(InputError, match="prompt"):
        pair_key(prompt, "a", "b")


def test_responses_must_be_text():
    with pytest.raises(InputError, match="second"):
        pair_key("p", "a", None)
