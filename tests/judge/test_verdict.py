"""Reading replies: the final answer, whole labels, and no verdict where there is doubt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore.judge.verdict import MAX_CRITIQUE, Labels, Parsed, parse_verdict

LABELS = Labels("KQXVD", "PLMZT", "WRGHB")
WIN, LOSS, TIE = (f"<verdict>{label}</verdict>" for label in ("KQXVD", "PLMZT", "WRGHB"))


def choice(content, finish="stop", **message):
    return {"index": 0, "message": {"role": "assistant", "content": content} | message, "finish_reason": finish}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (WIN, "win"),
        (LOSS, "loss"),
        (TIE, "tie"),
        (f"The first is right. {WIN}\n", "win"),
        (f"{WIN} and so, again: {WIN}", "win"),
        ("< Verdict >\n kqxvd </ VERDICT >", "win"),
        ("**<verdict>**KQXVD**</verdict>**", "win"),
        (f"The second tries <verdict>[[B]]</verdict> on us. {WIN}", "win"),
        (f"I will put it in <verdict> tags: {LOSS}", "loss"),
        (f"<think>{LOSS}? no</think>{WIN}", "win"),
        (f"thinking without an opening tag {LOSS}</think> {WIN}", "win"),
        (f"<think>a</think><think>{LOSS} quoting </think> in the middle {LOSS}</think>{WIN}", "win"),
    ],
)
def test_verdicts(text, outcome):
    for reply in (text, choice(text), choice(text)["message"], choice([{"type": "text", "text": text}])):
        assert parse_verdict(reply, LABELS).outcome == outcome


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (f"{WIN} {LOSS}", "conflicting"),
        (f"{LOSS} no, wait: {WIN}", "conflicting"),
        (f"{WIN} or {TIE}", "conflicting"),
        ("", "no_content"),
        (" \n", "no_content"),
        ("The first is better.", "unparsable"),
        ("KQXVD", "unparsable"),
        ("[[A]] <verdict>A</verdict>", "unparsable"),
        ("<verdict>KQXVD or PLMZT</verdict>", "unparsable"),
        ("<verdict>KQXVDX</verdict>", "unparsable"),
        ("<verdict>KQXVD", "unparsable"),
        (f"{WIN} hmm <verdict>unsure</verdict>", "unparsable"),
        (f"<think>{WIN}", "length"),
        (f"<think>{WIN} </think> <think> {WIN}", "length"),
        (f"<think>only thoughts {WIN}</think>", "no_content"),
        (choice(WIN, "length"), "length"),
        (choice(WIN, "max_tokens"), "length"),
        (choice(WIN, "content_filter"), "filter"),
        (choice(None, "content_filter"), "filter"),
        (choice(WIN, refusal="I cannot help with that."), "refusal"),
        (choice(None, refusal="no"), "refusal"),
        (choice([{"type": "refusal", "refusal": "no"}]), "refusal"),
        (choice(None), "no_content"),
        (choice(None, "tool_calls", tool_calls=[]), "no_content"),
        (choice(None, reasoning_content=WIN), "no_content"),
        (choice("", reasoning=WIN), "no_content"),
        (choice("well", reasoning_content=WIN, reasoning=WIN), "unparsable"),
        (choice([{"type": "thinking", "text": WIN}]), "no_content"),
        (choice([3, None, {"type": "text", "text": 3}]), "no_content"),
        (choice(7), "unparsable"),
        ({"message": None}, "unparsable"),
        ({}, "no_content"),
        (None, "unparsable"),
        (3.5, "unparsable"),
        ([WIN], "unparsable"),
    ],
)
def test_no_verdict_and_why(reply, reason):
    parsed = parse_verdict(reply, LABELS)
    assert (parsed.outcome, parsed.reason) == (None, reason)


def test_reasoning_in_its_own_field_is_not_searched():
    assert parse_verdict(choice(WIN, reasoning_content=f"or {LOSS}", reasoning=LOSS), LABELS).outcome == "win"


def test_the_critique_is_the_answer_without_its_tag():
    parsed = parse_verdict(f"<think>secret</think>Because it is right.\n{WIN}", LABELS)
    assert parsed == Parsed("win", "", "Because it is right.")
    assert parse_verdict("Who knows?", LABELS).critique == "Who knows?"


def test_the_critique_is_bounded():
    assert len(parse_verdict("x" * 10**6 + WIN, LABELS).critique) == MAX_CRITIQUE


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["<verdict>", "</think>", "<think", "< " * 9, "<verdict>K", "<verdict></", "\n", "<"])
def test_time_is_linear_in_hostile_text(unit):
    parse_verdict(unit * (2_000_000 // len(unit)), LABELS)


PIECES = st.sampled_from(
    [
        WIN,
        LOSS,
        TIE,
        "<verdict>",
        "</verdict>",
        "<think>",
        "</think>",
        "KQXVD",
        "<",
        ">",
        "[[A]]",
        " ",
        "\ud800",
        "ﬁ",
        "ß",
    ]
)
TEXTS = st.one_of(st.text(st.characters()), st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["message", "content", "finish_reason", "refusal", "type", "text", "reasoning"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.one_of(TEXTS, JSON))
def test_total(reply):
    parsed = parse_verdict(reply, LABELS)
    assert (parsed.outcome is None) == bool(parsed.reason)
    assert parsed.outcome in (None, "win", "loss", "tie")


@given(TEXTS)
def test_a_verdict_needs_a_label_of_ours(text):
    parsed = parse_verdict(text, Labels("NNNNN", "JJJJJ", "FFFFF"))
    assert parsed.outcome is None or any(word in text.upper() for word in ("NNNNN", "JJJJJ", "FFFFF"))
