"""Texts beyond a limit: what is cut, in which order, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.segments import parts, prompts, special_ids, texts

from rmcore._base.errors import InputError
from rmcore.model.encoding.limits import _level
from rmcore.model.text import PairTemplate, TextEncoder, TextLimit

# -- over-long texts -------------------------------------------------------------------------------------------------


def words(count: int) -> str:
    return " ".join(str(k % 10) for k in range(count))


def test_error_names_both_counts_and_the_way_out(tokenizer_for):
    encoder = TextEncoder(tokenizer_for("llama"), max_length=16)
    total = len(TextEncoder(tokenizer_for("llama")).encode(words(40), "good"))
    with pytest.raises(InputError) as caught:
        encoder.encode(words(40), "good")
    assert f"{total} tokens" in str(caught.value)
    assert "16" in str(caught.value)
    assert "truncate-prompt-left" in str(caught.value)


@pytest.mark.parametrize("policy", ["error", "truncate-prompt-left", "truncate-right", "truncate-longest"])
def test_a_text_of_exactly_the_limit_is_whole(tokenizer_for, policy):
    tokenizer = tokenizer_for("bert")
    whole = TextEncoder(tokenizer).encode(words(20), "good")
    same = TextEncoder(tokenizer, max_length=len(whole), overlong=policy).encode(words(20), "good")
    assert same == whole
    assert same.cut_tokens == 0


@pytest.mark.parametrize("second", [None, "a bad answer"])
def test_prompt_left_keeps_responses_and_the_newest_of_the_prompt(tokenizer_for, second):
    tokenizer = tokenizer_for("llama")
    whole = TextEncoder(tokenizer).encode(words(60), "a good answer", second)
    cut = TextEncoder(tokenizer, max_length=len(whole) - 30, overlong="truncate-prompt-left").encode(
        words(60), "a good answer", second
    )
    assert cut.cut_tokens == 30
    assert cut.content_tokens == whole.content_tokens  # before any cut
    assert cut.segments[1:] == whole.segments[1:]
    kept, all_of_it = parts(cut)["prompt"], parts(whole)["prompt"]
    assert kept[0] == tokenizer.bos_token_id
    assert kept[1:] == all_of_it[31:]


def test_prompt_left_drops_the_oldest_turns_first(tokenizer_for):
    tokenizer = tokenizer_for("chatml")
    turns = [{"role": "user", "content": c} for c in (words(20), "the quick fox", "what is the capital")]
    whole = TextEncoder(tokenizer).encode(turns, "Paris")
    first = len(tokenizer(words(20))["input_ids"])
    cut = TextEncoder(tokenizer, max_length=len(whole) - first, overlong="truncate-prompt-left").encode(turns, "Paris")
    text = tokenizer.decode(cut.ids)
    emptied = "<|im_start|>user\n<|im_end|>\n<|im_start|>user\nthe quick fox<|im_end|>\n"
    assert text.startswith(emptied)  # template text is never cut
    assert text.endswith("Paris<|im_end|>\n")


def test_prompt_left_refuses_responses_that_are_too_long(tokenizer_for):
    encoder = TextEncoder(tokenizer_for("llama"), max_length=20, overlong="truncate-prompt-left")
    with pytest.raises(InputError, match="at most 20"):
        encoder.encode("hi", words(60))


def test_right_takes_from_the_longest_response_first(tokenizer_for):
    tokenizer = tokenizer_for("llama")
    template = PairTemplate(pair="{prompt}{first}{second}")
    long, short = words(50), words(20)
    whole = TextEncoder(tokenizer, template=template).encode("the fox", long, short)
    sizes = {name: len(ids) for name, ids in parts(whole).items()}
    for drop in (10, sizes["first"] - sizes["second"], sizes["first"] - sizes["second"] + 8):
        cut = TextEncoder(tokenizer, template=template, max_length=len(whole) - drop, overlong="truncate-right").encode(
            "the fox", long, short
        )
        ours = parts(cut)
        assert ours["prompt"] == parts(whole)["prompt"]
        for name in ("first", "second"):
            assert ours[name] == parts(whole)[name][: len(ours[name])]
        if drop <= sizes["first"] - sizes["second"]:
            assert ours["second"] == parts(whole)["second"]
        else:
            assert abs(len(ours["first"]) - len(ours["second"])) <= 1
        assert cut.cut_tokens == drop


def test_right_takes_the_prompts_end_last(tokenizer_for):
    tokenizer = tokenizer_for("llama")
    template = PairTemplate(single="{prompt}{first}")
    whole = TextEncoder(tokenizer, template=template).encode(words(20), "good")
    cut = TextEncoder(tokenizer, template=template, max_length=8, overlong="truncate-right").encode(words(20), "good")
    first = parts(whole)["first"]
    assert parts(cut)["first"] == first[:2]  # a quarter of the limit is the responses': they are not cut to nothing
    assert parts(cut)["prompt"] == parts(whole)["prompt"][:6]


@pytest.mark.parametrize("response", [2, 10, 60])
def test_right_leaves_the_response_a_quarter_before_the_prompt_is_cut(tokenizer_for, response):
    tokenizer = tokenizer_for("llama")
    template = PairTemplate(single="{prompt}{first}")
    encoder = TextEncoder(tokenizer, template=template, max_length=64, overlong="truncate-right")
    cut = encoder.encode("the " * 100, "fox " * response)
    sizes = {name: len(ids) for name, ids in parts(cut).items()}
    whole = len(parts(TextEncoder(tokenizer, template=template).encode("", "fox " * response))["first"])
    assert sizes["first"] == min(whole, 16)
    assert sum(sizes.values()) == 64


@pytest.mark.parametrize("policy", ["truncate-right", "truncate-longest"])
def test_a_response_of_which_nothing_would_be_left_is_refused(tokenizer_for, policy):
    tokenizer = tokenizer_for("llama")
    template = PairTemplate(pair="{prompt}{first}{second}")
    encoder = TextEncoder(tokenizer, template=template, max_length=2, overlong=policy)  # bos, and one more
    assert len(TextEncoder(tokenizer, template=template, max_length=3, overlong=policy).encode("the", "a", "b")) == 3
    with pytest.raises(InputError, match="never cuts a response to nothing"):
        encoder.encode("the", "a", "b")


def test_an_overlong_text_may_stay_unread(tokenizer_for):
    encoder = TextEncoder(tokenizer_for("llama"), max_length=16, overlong="no-reward")
    long = encoder.encode("hi", words(60))
    assert long.unread
    assert len(long) == 0
    assert long.content_tokens > 16
    assert not encoder.encode("hi", "fox").unread
    assert encoder.encode("hi", words(60), limit=TextLimit(16, "truncate-right")).cut_tokens > 0
    assert not encoder.encode("hi", words(60), limit=TextLimit(None)).unread


@pytest.mark.parametrize(("positions", "told"), [(None, "larger max_length"), (64, "64 positions"), (16, "no more")])
def test_the_remedies_named_exist(tokenizer_for, positions, told):
    encoder = TextEncoder(tokenizer_for("llama"), max_length=16, positions=positions)
    with pytest.raises(InputError, match=told) as caught:
        encoder.encode(words(40), "good")
    assert ("larger max_length" in str(caught.value)) == (positions != 16)
    for policy in str(caught.value).split("overlong policy: ")[1].split(", "):
        TextEncoder(tokenizer_for("llama"), max_length=16, overlong=policy).encode(words(40), "good")


@pytest.mark.parametrize(("prompt", "response"), [(50, 20), (20, 50), (35, 35)])
def test_longest_shortens_what_is_longest(tokenizer_for, prompt, response):
    tokenizer = tokenizer_for("bert")
    template = PairTemplate(single="{prompt}[SEP]{first}")
    texts = " ".join(["quick"] * prompt), " ".join(["fox"] * response)
    for limit in (100, 60, 43, 42, 12, 5):
        # The tokenizer's own policy for two texts; it splits an odd cut of equal texts the other way round.
        theirs = tokenizer(*texts, truncation="longest_first", max_length=limit)["input_ids"]
        ours = TextEncoder(tokenizer, template=template, max_length=limit, overlong="truncate-longest").encode(*texts)
        assert len(ours) == len(theirs)
        separator = list(ours.ids).index(tokenizer.sep_token_id)
        assert abs(separator - theirs.index(tokenizer.sep_token_id)) <= 1
        assert ours.ids[0] == tokenizer.cls_token_id
        assert ours.ids[-1] == tokenizer.sep_token_id


@given(
    units=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=4),
    least=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    excess=st.integers(0, 40),
)
def test_units_are_cut_as_if_a_token_at_a_time_from_the_longest(units, least, excess):
    sizes = [size for unit in units for size in unit]
    places = iter(range(len(sizes)))
    own = [[next(places) for _ in unit] for unit in units]
    right, expected, cut = [0] * len(sizes), [0] * len(sizes), 0
    done = _level(own, sizes, right, excess, least)
    left = [sum(unit) for unit in units]
    while cut < excess and (spare := [n for n in range(len(units)) if left[n] > least[n]]):
        longest = max(spare, key=lambda n: left[n])
        left[longest] -= 1
        cut += 1
        expected[next(k for k in reversed(own[longest]) if expected[k] < sizes[k])] += 1
    assert (done, right) == (cut, expected)


def test_a_limit_the_template_alone_exceeds(tokenizer_for):
    for policy in ("truncate-right", "truncate-prompt-left", "truncate-longest"):
        with pytest.raises(InputError, match="at most 3"):
            TextEncoder(tokenizer_for("chatml"), max_length=3, overlong=policy, chat="always").encode("a", "b")


@pytest.mark.parametrize("family", ["bert", "llama", "qwen"])
@pytest.mark.parametrize("policy", ["truncate-prompt-left", "truncate-right", "truncate-longest"])
@given(prompt=prompts, first=texts, second=st.none() | texts, limit=st.integers(1, 60))
def test_never_longer_than_the_limit_and_nothing_but_content_is_cut(
    tokenizer_for, family, policy, prompt, first, second, limit
):
    tokenizer = tokenizer_for(family)
    free = TextEncoder(tokenizer, append_eos=True)
    whole = free.encode(prompt, first, second)
    try:
        cut = TextEncoder(tokenizer, append_eos=True, max_length=limit, overlong=policy).encode(prompt, first, second)
    except InputError:
        # All content but a token of each response that has any.
        cuttable = whole.content_tokens
        if policy != "truncate-prompt-left":
            cuttable -= sum(bool(free.encode("", text).content_tokens) for text in (first, second or ""))
        if policy == "truncate-prompt-left":
            empty = [{"role": "user", "content": ""}] if not isinstance(prompt, str) else ""
            cuttable -= free.encode(empty, first, second).content_tokens
        assert len(whole) - cuttable > limit
        return
    assert len(cut) == min(len(whole), limit)
    assert cut.cut_tokens == len(whole) - len(cut) <= cut.content_tokens == whole.content_tokens
    special = special_ids(tokenizer)
    assert [i for i in cut.ids if i in special] == [i for i in whole.ids if i in special]
    if policy == "truncate-prompt-left":
        assert [s for s in cut.segments if s.name != "prompt"] == [s for s in whole.segments if s.name != "prompt"]
