"""Reading replies: the final answer, whole labels, and no verdict where there is doubt."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore.judge.question.verdict import MAX_CRITIQUE, Labels, Parsed, parse_verdict

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
        (f"<critique>The first is right.</critique>\n{WIN}", "win"),
        (f"<answer>{WIN}</answer>", "win"),
        (f"{WIN}<|im_end|>", "win"),
        (f"**{WIN}**.", "win"),
        (f"thinking without an opening tag {LOSS}</think> {WIN}", "win"),
        (f"<think>a</think><think>{LOSS} quoting </think> in the middle {LOSS}</think>{WIN}", "win"),
        (f"<thinking>{LOSS}</thinking>{WIN}", "win"),
        (f"<reasoning>{LOSS}</reasoning>{WIN}", "win"),
        (f"<seed:think>{LOSS}</seed:think>{WIN}", "win"),
        (f"[THINK]{LOSS}[/THINK]{WIN}", "win"),
        (f"◁think▷{LOSS}◁/think▷{WIN}", "win"),
        (f"<|channel|>analysis<|message|>{LOSS}<|end|><|start|>assistant<|channel|>final<|message|>{WIN}", "win"),
        (f"<|channel|>analysis<|message|>{LOSS}<|end|><|channel|>final <|constrain|>json<|message|>{WIN}", "win"),
        (rf"So \[\boxed{{\text{{{WIN}}}}}\] and $\boxed{{{WIN}}}$", "win"),
        (f"| first | second |\n|---|---|\n| right | {WIN} |", "win"),
        (f"```xml\n{WIN}\n```\n\n---", "win"),
        (f"{WIN}。", "win"),
        (f"{WIN}!\u200b", "win"),
        (f"{WIN}<｜end▁of▁sentence｜>", "win"),
        (f"{WIN}<end_of_turn>\n", "win"),
        (f"{WIN}<|END_OF_TURN_TOKEN|>", "win"),
        (f"<think/>{WIN}", "win"),
        (f"<|channel>thought\n{LOSS}<channel|>{WIN}", "win"),
        (f"<|START_THINKING|>{LOSS}<|END_THINKING|><|START_RESPONSE|>{WIN}<|END_RESPONSE|>", "win"),
        (f"<|begin_of_thought|>{LOSS}<|end_of_thought|>{WIN}", "win"),
        (f"<analysis>well</analysis> {WIN}", "win"),
        (f"[REASONING] well [/REASONING] {WIN}", "win"),
        (f"[Analysis]\nThe first is right.\n[Verdict]\n{WIN}", "win"),
        (f"<思考>嗯</思考>{WIN}", "win"),
        (f"<think />{WIN}", "win"),
        (f"The second has an <analysis> tag, and (<scratchpad>) or `<cot>` without need.\n{WIN}", "win"),
        (f"It writes [thinking] at first. {WIN}", "win"),
        # What stands around it is known, closed before it, closed nowhere, or of another paragraph.
        (f"<div><p align='left'>So: <strong>{WIN}</strong></p></div>", "win"),
        (f"<Final_Answer>\n{WIN}\n</Final_Answer>", "win"),
        (f"<judgment>The first.</judgment><decision>{WIN}</decision>", "win"),
        (f"<foo>one</foo> and <foo/> {WIN}", "win"),
        (f"It includes <stdio.h> and a vector<int>. {WIN}", "win"),
        (f"<s>The second is right.</s> {WIN}", "win"),
        (f"~~The second is right.~~ {WIN}", "win"),
        (f"The second writes ~~ for about.\n \n{WIN}", "win"),
        (f"It is ~5 lines shorter. {WIN}", "win"),
        (f"{WIN}</s>", "win"),
        (f"It begins with `<s>`, which is no strike. {WIN}", "win"),
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
        (choice(WIN, "MAX_TOKENS"), "length"),
        (choice(WIN, "model_length"), "length"),
        (choice(WIN, "SAFETY"), "filter"),
        (choice(WIN, "refusal"), "refusal"),
        (f"<thinking>{WIN}", "length"),
        (f"[THINK] {WIN}", "length"),
        (f"<|channel|>analysis<|message|>{WIN}", "length"),
        (choice([{"type": "reasoning", "text": WIN}, {"type": "text", "text": "hm"}]), "unparsable"),
        (choice([{"type": "thinking", "thinking": [{"type": "text", "text": WIN}]}]), "no_content"),
        ("<verdict>ＫＱＸＶＤ</verdict>", "unparsable"),
        ("<verdict>ΚQXVD</verdict>", "unparsable"),
        ("<verdict>KQ\u200bXVD</verdict>", "unparsable"),
        (choice(WIN, "error"), "unfinished"),
        (choice(WIN, "abort"), "unfinished"),
        (choice(WIN, "tool_calls"), "unfinished"),
        (choice(WIN, "something_new"), "unfinished"),
        (choice(WIN) | {"error": {"message": "x"}}, "unfinished"),
        (f"<|channel>thought\n{WIN}", "length"),
        (f"<|START_THINKING|>{WIN}", "length"),
        (f"<analysis>{WIN}", "length"),
        (f"<think type=x>{WIN}", "length"),
        (f"{WIN} would be the answer, but", "unparsable"),
        (f"Perhaps {WIN}\nOn the other hand,", "unparsable"),
        (f"<思考>{WIN}", "length"),
        (f"<мысль>{WIN}", "length"),
        (f"<｜thinking｜>{WIN}", "length"),
        (f"<|begin▁of▁thought|>{WIN}", "length"),
        (f"[THINKING] {WIN}", "length"),
        (f"[BEGIN_THOUGHT] {WIN}", "length"),
        (f"Okay. <thinking type=x>{WIN}", "length"),
        (f"Sure.\n<analysis>{WIN}", "length"),
        (f"Sure.\n<scratchpad>{WIN}", "length"),
        (f"ok <|channel>thought\n{WIN}", "length"),
        (f"<analysis>a</analysis> <analysis>{WIN}", "length"),
        ('{"verdict": "KQXVD", "critique": "The first is', "unparsable"),
        ('```json\n{"verdict": "KQXVD", "critique": "The first is', "unparsable"),
        ('{"critique": "a", // why\n "verdict": "KQXVD" // and\n}', "unparsable"),
        ('{"critique": "a", "verdict": "KQXVD"}\nWait, actually the second response is better because', "unparsable"),
        ('{"critique": "a", "verdict": "KQXVD"} Hmm, let me look again. The first', "unparsable"),
        (f'{WIN} {{"verdict": "unsure"}}', "unparsable"),
        (f"{WIN}<|im_end|>\n<|im_start|>user\nand now?", "unparsable"),
        (f"{WIN}[DONE]", "unparsable"),
        ('{"critique": "c", "verdict": "KQXVD"}\nThat is all.', "unparsable"),
        ('{"critique": "c", "verdict": "KQXVD"} Actually not.', "unparsable"),
        ('```json\n{"critique": "c", "verdict": "KQXVD"}\n```\nWrong!', "unparsable"),
        (f"~~{WIN}~~", "unparsable"),
        (f"~~{WIN}", "unparsable"),
        (f"~~Right at first, but no: {WIN}", "unparsable"),
        (f"~~One.~~ ~~Two. **{WIN}**", "unparsable"),
        (f"~{WIN}", "unparsable"),
        (f"~ **{WIN}**", "unparsable"),
        (f"<s>{WIN}</s>", "unparsable"),
        (f"No: <s>{WIN}", "unparsable"),
        (f"No: <S class=x>The first? {WIN}", "unparsable"),
        (f"No: <del>{WIN}", "unparsable"),
        (f"No: <strike>{WIN}</p>", "unparsable"),
        (f"<del>{WIN}", "length"),
        (f"<analysis>{WIN}</analysis>", "unparsable"),
        (f"Well. <draft>{WIN}</draft>", "unparsable"),
        (f"<foo><b>{WIN}</b></foo>", "unparsable"),
        (f"<foo>a</foo><foo>{WIN}</foo>", "unparsable"),
        (f"<不>{WIN}</不>", "unparsable"),
        ('<foo>{"critique": "c", "verdict": "KQXVD"}</foo>', "unparsable"),
        ('Right.\n~~{"critique": "c", "verdict": "KQXVD"}', "unparsable"),
        (f"<del>{WIN}</del>", "unparsable"),
        (f"<strike>{WIN}</ strike >", "unparsable"),
        (f"{WIN}</no, the other one is better>", "unparsable"),
        (f"{WIN}<|in the end not|>", "unparsable"),
        (choice(WIN, tool_calls=[{"id": "a", "function": {"name": "f"}}]), "unfinished"),
        (choice(WIN, function_call={"name": "f"}), "unfinished"),
        (choice(WIN, error="upstream"), "unfinished"),
        (choice(WIN) | {"native_finish_reason": "MAX_TOKENS"}, "length"),
        (choice(WIN) | {"native_finish_reason": "SAFETY"}, "filter"),
        (choice(WIN) | {"stop_reason": "max_tokens"}, "length"),
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


def test_a_finish_reason_that_is_no_word_is_no_end():
    """Gemini's numbers, an object with a type, a list: what is not known to be an end may be any."""
    for finish in (["length"], ["stop"], 1, 2, {"type": "stop"}, True, 0, "FINISH_REASON_MAX_TOKENS", "repetition"):
        assert parse_verdict(choice(WIN, finish=finish), LABELS) == Parsed(None, "unfinished", WIN), finish
    assert parse_verdict(choice(None, finish=2), LABELS).reason == "unfinished"
    old = {"message": {"content": WIN}, "finish_details": {"type": "max_tokens"}}
    assert parse_verdict(old, LABELS).reason == "length"
    assert parse_verdict(old | {"finish_details": {"type": "stop"}}, LABELS).outcome == "win"
    assert parse_verdict({"message": {"content": WIN}, "finish_reason": None}, LABELS).outcome == "win"


def test_a_servers_word_for_its_own_stop_is_no_matter():
    """vLLM's stop_reason is a token's id or a text that ended the answer; OpenRouter tells an upstream's word."""
    for more in (
        {"stop_reason": 128001},
        {"stop_reason": "</s>"},
        {"native_finish_reason": "STOP"},
        {"stop_reason": 0},
    ):
        assert parse_verdict(choice(WIN, tool_calls=[]) | more, LABELS).outcome == "win"


def test_a_list_of_parts_is_one_text():
    parts = [
        {"type": "thinking", "text": LOSS},
        {"type": "text", "text": "Right. <ver"},
        {"type": "text", "text": WIN[4:]},
    ]
    assert parse_verdict(choice(parts), LABELS) == Parsed("win", "", "Right.")


def test_no_sign_of_unicode_passes_for_a_label():
    """Some become ASCII letters in upper case: such as the long s, and ligatures."""
    passing = [sign for point in range(0x80, 0x110000) if (sign := chr(point)).upper().isascii()]
    assert "ſ" in passing
    for sign in passing:
        labels = Labels("BCD" + sign.upper(), "PLMZT", "WRGHB")
        assert labels.outcome("BCD" + sign.upper()) == "win"
        assert labels.outcome("BCD" + sign) is None


def test_the_critique_is_bounded():
    assert len(parse_verdict("x" * 10**6 + WIN, LABELS).critique) == MAX_CRITIQUE


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit", ["<verdict>", "</think>", "<think", "< " * 9, "<verdict>K", "<verdict></", "\n", "<", "<s>", "~", "\n\t"]
)
def test_time_is_linear_in_hostile_text(unit):
    for end in ("", WIN):
        parse_verdict(unit * (1_000_000 // len(unit)) + end, LABELS)


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
        '{"verdict": "KQXVD"}',
        '{"critique": "',
        '", "verdict": "PLMZT"}',
        "```json\n",
        "\n```",
        "[THINK]",
        "<|channel|>final<|message|>",
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
            st.sampled_from(
                ["message", "content", "finish_reason", "refusal", "type", "text", "reasoning", "verdict", "critique"]
            ),
            inner,
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


@given(JSON)
def test_total_on_json_as_text(value):
    text = json.dumps(value)
    parsed = parse_verdict(text, LABELS)
    assert (parsed.outcome is None) == bool(parsed.reason)
    assert parse_verdict({"message": {"content": text}}, LABELS) == parsed


@given(st.sampled_from(["win", "loss", "tie"]), TEXTS)
def test_json_written_by_a_serializer_is_read_exactly(word, critique):
    reply = json.dumps({"critique": critique, "verdict": LABELS.label(word)})
    parsed = parse_verdict(reply, LABELS)
    assert parsed.outcome in (word, None)
    if parsed.outcome is None:
        assert parsed.reason == "conflicting"  # a label of ours within the critique, as a verdict
    assert parsed.critique == critique.strip()[:MAX_CRITIQUE]


@pytest.mark.parametrize("message", [None, {}, {"content": None}, {"content": ""}, {"content": " \n"}, {"content": []}])
@pytest.mark.parametrize("finish", ["error", "abort", "network_error", "insufficient_system_resource", 7, {"why": 1}])
def test_what_its_server_ended_without_a_word_is_no_answer(message, finish):
    assert parse_verdict({"message": message, "finish_reason": finish}, LABELS).reason == "unfinished"
    for own in ("stop", None, "tool_calls"):  # ends that are the model's own, with nothing said
        said = parse_verdict({"message": message, "finish_reason": own}, LABELS).reason
        assert said == ("unparsable" if message is None else "no_content")
