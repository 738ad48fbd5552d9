"""Soft verdicts: the probability of a label, wherever a tokenizer cuts it, and the hard verdict where there is none."""

from __future__ import annotations

import itertools
import json
import math

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import JudgeError
from rmcore.judge import ChatJudge, JudgePrompt, Labels, Pair, combine_orders, exchanged
from rmcore.judge.question.soft import Soft, soft_preference
from rmcore.ops import reference

LABELS = Labels("KQXVD", "PLMZT", "WRGHB")
PAIR = Pair("p-win", "a", "b")


def token(text, probability=1.0, others=None, as_bytes=None):
    """One entry of ``logprobs.content``; ``others`` maps alternatives to probabilities."""
    entry = {"token": text, "logprob": math.log(probability), "bytes": as_bytes}
    listed = {text: probability} | (others or {})
    entry["top_logprobs"] = [
        {"token": t, "logprob": math.log(p) if p else -9999.0, "bytes": None} for t, p in listed.items()
    ]
    return entry


def choice(*entries):
    return {
        "message": {"content": "".join(e["token"] for e in entries if isinstance(e, dict))},
        "finish_reason": "stop",
        "logprobs": {"content": list(entries)},
    }


def read(*entries, outcome="win", labels=LABELS):
    return soft_preference(choice(*entries), labels, outcome)


TAG = [token("Because", 0.3), token(".\n"), token("<verdict"), token(">")]
END = [token("QXVD"), token("</verdict>")]


def test_two_labels():
    soft = read(*TAG, token("K", 0.6, {"P": 0.2}), *END)
    assert soft.preference == pytest.approx((0.6 - 0.2) / 0.8)
    assert soft.preference == pytest.approx(2 * (0.6 / 0.8) - 1)
    assert soft.mass == pytest.approx(0.8)


def test_the_least_mass_is_an_option():
    entries = choice(*TAG, token("K", 0.2, {"P": 0.1}), *END)
    weak = soft_preference(entries, LABELS, "win")
    assert (weak.reason, weak.preference) == ("mass", pytest.approx(0.1 / 0.5))
    for least in (0.25, 0.0):
        enough = soft_preference(entries, LABELS, "win", least)
        assert (enough.reason, enough.preference) == ("", pytest.approx(0.1 / 0.3))
    strict = soft_preference(choice(*TAG, token("K", 0.6, {"P": 0.2}), *END), LABELS, "win", 0.9)
    assert (strict.reason, strict.preference) == ("mass", pytest.approx(0.4 / 0.9))
    for options, says in (({"soft": True, "min_mass": 1.5}, "0 to 1"), ({"min_mass": 0.2}, "without soft=True")):
        with pytest.raises(JudgeError, match=says):
            ChatJudge("http://127.0.0.1:1/v1", "m", None, **options)


def test_entries_left_as_json_are_read_alike():
    """As those of long replies are."""
    entries = [*TAG, token("K", 0.5, {"P": 0.2, "W": 0.3}), *END]
    assert read(*(json.dumps(entry).encode() for entry in entries)) == read(*entries)
    assert read(entries[0], *(json.dumps(entry).encode() for entry in entries[1:])) == read(*entries)


def test_a_tie_has_its_share():
    assert read(*TAG, token("K", 0.5, {"P": 0.2, "W": 0.3}), *END).preference == pytest.approx(0.3)


def test_every_token_that_begins_a_label_counts_for_it():
    others = {"KQ": 0.2, "kqx": 0.05, " K": 0.05, "KQXVD</": 0.05, "PL": 0.1, "**P": 0.05, "Z": 0.1, "KZ": 0.1, "": 0.1}
    soft = read(*TAG, token("K", 0.3, others), *END)
    win, loss = 0.3 + 0.2 + 0.05 + 0.05 + 0.05, 0.1 + 0.05
    assert soft.preference == pytest.approx((win - loss) / (win + loss))
    assert soft.mass == pytest.approx(win + loss)


def test_the_sampled_label_need_not_be_the_likelier():
    assert read(*TAG, token("K", 0.2, {"P": 0.6}), *END).preference == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("entries", "preference"),
    [
        ([token("<verdict"), token(">KQ", 0.75, {">P": 0.25}), token("XVD</verdict>")], 0.5),
        ([token("<verdict>"), token(" KQXVD", 0.75, {" PLMZT": 0.15, "P": 0.1}), token("</verdict>")], 0.5),
        ([token("<verdict>\n"), token("**"), token("KQXVD", 0.75, {"PLMZT": 0.25}), token("**\n</verdict>")], 0.5),
        ([token('{"critique": "é…", "verdict":'), token(' "K', 0.75, {' "PL': 0.25}), token('QXVD"}')], 0.5),
        ([token('{"verdict": "'), token("K", 0.75, {"P": 0.25}), token('QXVD", "critique": ""}')], 0.5),
        # everything in one token: the alternatives must be the same up to the label
        ([token("<verdict>KQXVD</verdict>", 0.6, {"<verdict>PLMZT</verdict>": 0.2, "KQXVD": 0.2})], 0.5),
    ],
)
def test_wherever_the_tokenizer_cuts(entries, preference):
    assert read(*entries).preference == pytest.approx(preference)


def test_an_alternative_that_leaves_the_tag_is_none_of_the_labels():
    soft = read(
        token("<verdict"), token(">KQ", 0.6, {"(P": 0.1, " P": 0.1, ">": 0.1, ">PL": 0.1}), token("XVD</verdict>")
    )
    assert (soft.preference, soft.mass) == (pytest.approx(0.5 / 0.7), pytest.approx(0.7))


def test_the_last_statement_of_the_verdict_is_the_one_that_counts():
    early = [token("<verdict>"), token("K", 0.5, {"P": 0.5}), token("QXVD</verdict> Again: ")]
    late = [token("<verdict>"), token("K", 0.9, {"P": 0.1}), token("QXVD</verdict>")]
    assert read(*early, *late).preference == pytest.approx(0.8)


def test_tokens_of_half_a_character():
    halves = [token("�", as_bytes=[0xE2, 0x82]), token("�", as_bytes=[0xAC])]
    assert read(*halves, *TAG, token("K", 0.75, {"P": 0.25}), *END).preference == pytest.approx(0.5)


def test_reasoning_among_the_tokens_is_passed_over():
    thoughts = [token("<think>"), token("<verdict>"), token("P", 0.9, {"K": 0.1}), token("LMZT</verdict></think>")]
    assert read(*thoughts, *TAG, token("K", 0.75, {"P": 0.25}), *END).preference == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (choice(), "no_logprobs"),
        ({"message": {"content": "x"}}, "no_logprobs"),
        ({"logprobs": None}, "no_logprobs"),
        ({"logprobs": {"content": [3]}}, "no_logprobs"),
        ({"logprobs": {"tokens": ["K"], "token_logprobs": [-1]}}, "no_logprobs"),
        (None, "no_logprobs"),
        (choice(token("The first.")), "position"),
        (choice(token("<verdict>"), token("P"), token("LMZT</verdict>")), "position"),
        (choice(*TAG, {"token": "K"}, *END), "mass"),
        (choice(*TAG, {"token": "K", "logprob": "-1", "top_logprobs": {"K": -1}}, *END), "mass"),
        (choice(*TAG, {"token": "K", "logprob": float("nan"), "top_logprobs": [None]}, *END), "mass"),
        (choice(*TAG, {"token": "K", "logprob": 0.7, "top_logprobs": []}, *END), "mass"),
        (choice(*TAG, token("K", 0.9, {"P": 0.9}), *END), "no_logprobs"),
        # Nothing of the token that was written, or of any other: a number made of the rest would be a guess.
        (
            choice(*TAG, {"token": "K", "logprob": 0.7, "top_logprobs": [{"token": "P", "logprob": -2}]}, *END),
            "no_logprobs",
        ),
        (
            choice(*TAG, {"token": "K", "logprob": -math.inf, "top_logprobs": [{"token": "P", "logprob": -1}]}, *END),
            "no_logprobs",
        ),
        (choice(*TAG, token("K", 0.8), *END), "no_logprobs"),
        (choice(*TAG, {"token": "K", "logprob": -0.3}, *END), "no_logprobs"),
    ],
)
def test_where_there_is_no_soft_verdict(given, reason):
    soft = soft_preference(given, LABELS, "win")
    assert (soft.preference, soft.reason) == (None, reason)


def test_a_label_that_is_certain_needs_no_alternatives():
    assert read(*TAG, token("K", 1.0), *END).preference == 1.0


def test_labels_that_begin_alike_cannot_be_told_apart():
    labels = Labels("KQXVD", "KLMZT", "WRGHB")
    assert read(*TAG, token("K"), *END, labels=labels) == Soft(None, reason="labels")


TEXT = "Réponse: <b>one</b>\n<verdict> KQXVD </verdict>"


@given(st.sets(st.integers(1, len(TEXT) - 1)), st.floats(0.05, 0.95))
def test_any_tokenization_gives_the_same(cuts, share):
    bounds = [0, *sorted(cuts), len(TEXT)]
    at = TEXT.index("K")
    entries = []
    for start, end in itertools.pairwise(bounds):
        text = TEXT[start:end]
        if start <= at < end:
            other = text[: at - start] + "PLMZT"
            entries.append(token(text, 0.9 * share, {other: 0.9 * (1 - share)}))
        else:
            entries.append(token(text))
    soft = read(*entries)
    assert soft.preference == pytest.approx(2 * share - 1)
    assert soft.mass == pytest.approx(0.9)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["logprobs", "content", "token", "logprob", "bytes", "top_logprobs", "message"]), inner
        )
    ),
    max_leaves=12,
)
LOOSE_TOKEN = st.fixed_dictionaries(
    {},
    optional={
        "token": st.sampled_from(["<verdict>", "KQXVD", "K", "</verdict>", '"verdict":"', '"', "\ud800"]) | JSON,
        "logprob": st.floats() | st.sampled_from([-1, 0, True, 10**400, -(10**400), "x"]),
        "bytes": st.lists(st.integers(-1, 300), max_size=4) | JSON,
        "top_logprobs": st.lists(st.fixed_dictionaries({"token": st.text(max_size=2), "logprob": st.floats()})) | JSON,
    },
)


@given(JSON | st.lists(LOOSE_TOKEN, max_size=6).map(lambda tokens: {"logprobs": {"content": tokens}}))
def test_total(given_choice):
    soft = soft_preference(given_choice, LABELS, "win")
    assert (soft.preference is None) == bool(soft.reason)
    assert soft.preference is None or -1 <= soft.preference <= 1


def test_labels_drawn_can_always_be_told_apart():
    for _ in range(300):
        labels = JudgePrompt().render("p", "a", "b").labels
        assert len({labels.win[0], labels.loss[0], labels.tie[0]}) == 3


# -- through the judge -----------------------------------------------------------------------------------------------


@pytest.fixture
def soft_handler():
    """An endpoint with P(first), P(second) and P(tie) at the label's first letter."""

    def make(win, loss, tie=0.0, seen=None):
        def handler(request):
            payload = json.loads(request.content)
            if seen is not None:
                seen.append(payload)
            labels = JudgePrompt.parse(payload["messages"]).labels
            likely = max(((win, labels.win), (loss, labels.loss), (tie, labels.tie)))[1]
            mass = {labels.win[0]: win, labels.loss[0]: loss, labels.tie[0]: tie}
            entries = [token("<verdict>"), token(likely[0], mass[likely[0]], mass), token(likely[1:] + "</verdict>")]
            return httpx.Response(200, json={"choices": [choice(*entries)]})

        return handler

    return make


def test_a_soft_judge(ask, mock_judge, soft_handler):
    seen = []
    judge = mock_judge(soft_handler(0.6, 0.2, 0.0, seen), soft=True, top_logprobs=7, orders="one")
    verdict = ask(judge)
    sign = (
        1 if seen[0]["messages"][1]["content"].index("\na\n") < seen[0]["messages"][1]["content"].index("\nb\n") else -1
    )
    assert verdict.preference == pytest.approx(sign * 0.5)
    assert (seen[0]["logprobs"], seen[0]["top_logprobs"]) == (True, 7)
    assert (verdict.reason, verdict.failed, judge.counts["soft"]) == ("", False, 1)


def test_both_orders_are_averaged(ask, mock_judge, soft_handler):
    """A judge with a leaning to the first place, whatever stands there: what is left is no preference."""
    verdict = ask(mock_judge(soft_handler(0.6, 0.2), soft=True))
    assert (verdict.preference, verdict.flipped) == (0.0, True)


def test_what_a_soft_preference_becomes(ask, mock_judge, soft_handler):
    """J interpolates the probability between ε and 1 − ε: sure is ±2, undecided is 0."""
    for q in (1.0, 0.5, 0.0, -1.0):
        p = 0.5 + q * (0.5 - 0.12)
        assert float(reference.verdict_logit(q)) == pytest.approx(math.log(p / (1 - p)), abs=1e-12)
    values = reference.verdict_logit(torch.linspace(-1, 1, 41))
    assert bool((values.diff() > 0).all())


def test_without_logprobs_the_verdict_is_hard_and_says_so(ask, mock_judge, chat_reply):
    judge = mock_judge(lambda r: chat_reply(r, "<verdict>$tie</verdict>"), soft=True)
    verdict = ask(judge)
    assert (verdict.preference, verdict.reason, judge.counts["hard:no_logprobs"]) == (0.0, "hard:no_logprobs", 2)


def test_little_mass_counts_for_less_not_more(ask, mock_judge, soft_handler):
    judge = mock_judge(soft_handler(0.3, 0.1), soft=True, orders="one")
    verdict = ask(judge)
    assert (abs(verdict.preference), verdict.reason) == (pytest.approx(0.4), "weak:mass")
    assert judge.counts["soft"] == 1


@given(st.floats(1e-3, 0.499), st.floats(0, 1))
def test_weak_evidence_is_never_louder_than_its_mass(mass, share):
    soft = read(*TAG, token("K", mass * share + 1e-9, {"P": mass * (1 - share)}), *END)
    assert soft.reason == "mass"
    assert abs(soft.preference) <= mass / 0.5 + 1e-6


def test_an_endpoint_that_refuses_logprobs(ask, mock_judge, chat_reply, caplog):
    def handler(request):
        if "logprobs" in json.loads(request.content):
            message = "You are not allowed to request logprobs from this model; 'logprobs' is not supported."
            return httpx.Response(400, json={"error": {"message": message, "param": "logprobs"}})
        return chat_reply(request, "<verdict>$tie</verdict>")

    judge = mock_judge(handler, soft=True, concurrency=1)
    with caplog.at_level("WARNING"):
        verdicts = ask(judge, PAIR, Pair("p2", "a", "b"))
    assert [(v.preference, v.reason) for v in verdicts] == [(0.0, "hard:no_logprobs")] * 2
    assert judge.counts["refused:logprobs"] == 1
    assert list(judge.dropped) == ["logprobs"]
    assert sum("does not take logprobs" in r.getMessage() for r in caplog.records) == 1


def test_softness_survives_exchange_and_combination():
    from rmcore.judge import Verdict

    forward, backward = Verdict(0.4, reason="hard:mass"), exchanged(Verdict(-0.2, reason="cut:3"))
    both = combine_orders(forward, backward)
    assert (both.preference, both.flipped, both.reason) == (pytest.approx(0.3), False, "hard:mass; cut:3")


@pytest.mark.parametrize("number", [0, 1, 21, 2.5])
def test_bad_settings(mock_judge, soft_handler, number):
    with pytest.raises(JudgeError, match="top_logprobs"):
        mock_judge(soft_handler(1, 0), soft=True, top_logprobs=number)
