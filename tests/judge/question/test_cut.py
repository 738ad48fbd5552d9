"""What is left out of texts that are too long: both responses alike, the prompt last, never more than there is room."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore.judge import JudgePrompt
from rmcore.judge.keys import call_key
from rmcore.judge.question.cut import NO_CUT, Cut, cut_to_fit, ends, estimate_tokens

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40).flatmap(
    lambda unit: st.integers(0, 200).map(lambda times: unit * times)
)
PARTS = (1, 1, 1)


def shown(text: str, gone: int) -> int:
    return sum(map(estimate_tokens, ends(text, gone))) if gone else estimate_tokens(text)


@given(TEXTS, TEXTS, TEXTS, st.integers(-5, 3000))
def test_what_is_shown_fits_and_is_the_same_whichever_comes_first(prompt, first, second, room):
    cut = cut_to_fit((prompt, first, second), PARTS, room, estimate_tokens)
    other = cut_to_fit((prompt, second, first), PARTS, room, estimate_tokens)
    assert other == (None if cut is None else cut.exchanged())
    if cut is None:
        return
    sizes = [shown(text, gone) for text, gone in zip((prompt, first, second), cut.to_list(), strict=True)]
    assert sum(sizes) <= max(room, 0)
    assert all(0 <= gone <= len(text) for text, gone in zip((prompt, first, second), cut.to_list(), strict=True))


@given(TEXTS, TEXTS, st.integers(400, 3000))
def test_equal_lengths_are_cut_equally(prompt, text, room):
    cut = cut_to_fit((prompt, text, text), PARTS, room, estimate_tokens)
    assert cut is None or cut.first == cut.second


def test_the_prompt_is_cut_last():
    long = "word " * 4000
    assert cut_to_fit(("short prompt", long, long), PARTS, 2000, estimate_tokens).prompt == 0
    both = cut_to_fit((long, long, long), PARTS, 2000, estimate_tokens)
    kept = [len(long) - gone for gone in both.to_list()]
    assert kept[0] > kept[1] == kept[2] > 0
    assert cut_to_fit((long, "a", "b"), PARTS, 2000, estimate_tokens).to_list()[1:] == [0, 0]


def test_a_long_response_does_not_take_the_room_of_a_short_one():
    cut = cut_to_fit(("p", "x y " * 100_000, "a short answer"), PARTS, 1000, estimate_tokens)
    assert cut.second == 0 < cut.first


def test_where_there_is_no_room_nothing_fits():
    long = "word " * 4000
    assert cut_to_fit((long, long, long), PARTS, 100, estimate_tokens) is None
    assert cut_to_fit(("", "", ""), PARTS, 0, lambda text: 0) is None


@given(TEXTS, TEXTS, TEXTS, st.lists(st.integers(0, 5000), min_size=3, max_size=3))
def test_a_cut_question_reads_back_as_its_ends(prompt, first, second, gone):
    gone = [min(n, len(text)) for n, text in zip(gone, (prompt, first, second), strict=True)]
    question = JudgePrompt().render(prompt, first, second, random.Random(0), Cut(*gone))
    parsed = JudgePrompt.parse(question.messages)
    for text, n, back in zip((prompt, first, second), gone, (parsed.prompt, parsed.first, parsed.second), strict=True):
        assert back == ("".join(ends(text, n)) if n else text)
    assert (question.cut_prompt, *question.cut) == tuple(gone)


def test_the_marker_of_a_cut_is_none_that_a_text_can_write():
    source = random.Random(0)
    fake = "<<<abc:cut 9 characters>>>"
    question = JudgePrompt().render("p", f"x\n{fake}\ny", "long " * 100, source, Cut(second=100))
    text = question.messages[-1]["content"]
    assert fake not in text
    assert text.count(f"<<<{question.token}:cut 100 characters>>>") == 1
    assert text.count("[cut: 100 characters]") == 1


def test_a_response_of_messages_is_cut_as_one_text():
    messages = [{"role": "assistant", "content": "first " * 50}, {"role": "user", "content": "and then? " * 50}]
    messages.append({"role": "assistant", "content": "last " * 50})
    question = JudgePrompt().render(messages, messages, "b", random.Random(0), Cut(prompt=200, first=300))
    parsed = JudgePrompt.parse(question.messages)
    assert parsed.first.startswith("Assistant: first")
    assert parsed.first.endswith("last ")
    assert parsed.prompt.startswith("Assistant: first")


def test_a_cut_has_a_key_of_its_own_and_whole_texts_keep_theirs():
    whole = call_key("j", "m", {}, "t", "s")
    assert whole == call_key("j", "m", {}, "t", "s", (0, 0, 0))
    assert len({whole, *(call_key("j", "m", {}, "t", "s", cut) for cut in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))}) == 4
    assert not NO_CUT


@pytest.mark.parametrize("text", ["word " * 1000, "0123456789" * 100, "界" * 500, "🙂" * 500, "\ud800" * 9, "", "a"])
def test_the_estimate_is_between_a_fifth_of_the_characters_and_all_bytes(text):
    raw = text.encode("utf-8", "surrogatepass")
    assert len(text) / 5 <= estimate_tokens(text) <= len(raw)
