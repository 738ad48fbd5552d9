"""Labels from a judge: probabilities of both orders averaged, and what is refused instead of becoming a tie."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.judge import ChatJudge, ClientOptions, JudgePrompt, Pair, RecordedJudge, ReplayServer, Verdict, VerdictStore
from rmcore.judge.labelling import LabelPolicy, asked_orders, soft_label
from rmcore.judge.orders import Asked
from rmcore.judge.question.constitution import Constitution
from rmcore.judge.store.ledger import VerdictLedger

PAIR = Pair("a prompt", "one", "two")
PRINCIPLES = tuple(f"Principle number {k}." for k in range(7))


def labelled(judge, *pairs, policy=None):
    return [soft_label(one, policy) for one in asyncio.run(asked_orders(judge, pairs or (PAIR,)))]


def soft(forward, backward, **more):
    return Asked(Verdict(forward, **more), Verdict(backward))


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_both_orders_are_averaged_and_exchanging_the_responses_turns_the_label_round(f, b):
    found = soft_label(soft(f, b))
    assert found.probability == pytest.approx(((1 + f) / 2 + (1 + b) / 2) / 2, abs=1e-12)
    assert (found.forward, found.backward) == ((1 + f) / 2, (1 + b) / 2)
    assert found.flipped == (f * b < 0)
    assert soft_label(soft(-b, -f)).probability == pytest.approx(1 - found.probability, abs=1e-12)


def test_hard_verdicts_are_the_limits_of_soft_ones():
    """As a judge grows sure, its soft label goes to the hard one's 0, ½ or 1."""
    for f, b, hard in ((1, 1, 1.0), (-1, -1, 0.0), (1, -1, 0.5)):
        gaps = [abs(soft_label(soft(f * p, b * p)).probability - hard) for p in (0.9, 0.99, 0.999999)]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 1e-6
        assert soft_label(soft(float(f), float(b))).probability == hard


def test_what_is_no_label_is_refused_with_its_reason_and_never_a_tie():
    sure, none = Verdict(0.8), Verdict.none("timeout")
    cases = [
        (Asked(sure, replace_reason(0.1, "weak:mass")), "one_order:mass"),
        (Asked(replace_reason(0.1, "weak:mass"), replace_reason(0.1, "cut:4; weak:mass")), "mass"),
        (Asked(replace_reason(1.0, "hard:no_logprobs"), sure), "one_order:hard:no_logprobs"),
        (Asked(sure, none), "one_order:timeout"),
        (Asked(none, none), "timeout"),
        (Asked(), "not_asked"),
    ]
    for asked, reason in cases:
        found = soft_label(asked)
        assert (found.probability, found.reason) == (None, reason)
    keep = LabelPolicy(hard="keep", one_order="keep")
    assert soft_label(Asked(sure, none), keep).probability == pytest.approx(0.9)
    assert soft_label(Asked(replace_reason(1.0, "hard:position"), sure), keep).probability == pytest.approx(0.95)
    # Asked in one order on purpose, or decided by rule: that is the label.
    assert soft_label(Asked(backward=sure)).backward == pytest.approx(0.9)
    assert soft_label(Asked(rule=Verdict(0.0, "rule:identical"))).probability == 0.5
    for wrong in ({"hard": "drop"}, {"one_order": ""}):
        with pytest.raises(InputError, match="'keep' or 'refuse'"):
            LabelPolicy(**wrong)


def replace_reason(preference, reason):
    return Verdict(preference, reason)


def test_recorded_soft_verdicts_come_back_over_http_as_probabilities(tmp_path):
    """A recorded 2P − 1 goes out as log-probabilities of the labels and is read back: a soft judge's whole path."""
    rows = [
        {"prompt": "a prompt", "first": "one", "second": "two", "verdict": 0.5, "order": "ab"},
        {"prompt": "a prompt", "first": "one", "second": "two", "verdict": -0.25, "order": "ba"},
        {"prompt": "tied", "first": "one", "second": "two", "verdict": "tie"},
    ]
    recorded = RecordedJudge.from_rows(rows)
    (direct,) = labelled(recorded)
    assert (direct.forward, direct.backward) == (0.75, 0.375)
    with ReplayServer(recorded) as server:
        judge = ChatJudge(server.base_url, "m", None, soft=True, store=tmp_path / "v.db")
        one, tied = labelled(judge, PAIR, Pair("tied", "one", "two"))
        judge.close()
    assert one.forward == pytest.approx(0.75, abs=1e-9)
    assert one.backward == pytest.approx(0.375, abs=1e-9)
    assert one.flipped
    assert tied.probability == 0.5
    for wrong in (1.5, True, "maybe"):
        with pytest.raises(InputError, match="a number in"):
            RecordedJudge.from_rows([rows[0] | {"verdict": wrong}])


def test_an_endpoint_without_log_probabilities_gives_no_soft_label(chat_reply):
    def answer(request):
        if "logprobs" in json.loads(request.content):
            return httpx.Response(400, json={"error": {"message": "logprobs is not supported"}})
        return chat_reply(request, "<verdict>$win</verdict>")

    options = ClientOptions(transport=httpx.MockTransport(answer))
    judge = ChatJudge("http://127.0.0.1:9/v1", "m", None, soft=True, client=options)
    assert labelled(judge)[0].reason == "hard:no_logprobs"
    assert labelled(judge, policy=LabelPolicy(hard="keep"))[0].probability == 0.5  # first place wins both times


# -- principles ------------------------------------------------------------------------------------------------------


def test_principles_are_drawn_by_content_the_same_in_both_orders():
    constitution = Constitution(PRINCIPLES, per_question=2, seed=3)
    seen = {constitution.drawn(f"prompt {k}", "one", "two") for k in range(40)}
    assert len(seen) > 8
    assert all(len(drawn) == 2 and list(drawn) == sorted(drawn) for drawn in seen)
    for k in range(10):
        drawn = constitution.drawn(f"prompt {k}", "one", "two")
        assert constitution.drawn(f"prompt {k}", "two", "one") == drawn
        more = Constitution((*PRINCIPLES, "Another."), per_question=2, seed=3).drawn(f"prompt {k}", "one", "two")
        assert more == drawn or "Another." in more
    others = [Constitution(PRINCIPLES, 2, seed=4).drawn(f"prompt {k}", "one", "two") for k in range(40)]
    assert len({constitution.drawn(f"prompt {k}", "one", "two") == o for k, o in enumerate(others)}) == 2


def test_a_constitution_file_and_what_is_wrong_with_one(tmp_path):
    file = tmp_path / "principles.txt"
    file.write_text("# ours\n\n  Be honest.\nBe brief, $contract or not.\n", encoding="utf-8")
    assert Constitution.from_file(file, per_question=2).principles == ("Be honest.", "Be brief, $contract or not.")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"principles.txt: not UTF-8"):
        Constitution.from_file(file)
    for wrong, says in (
        (((),), "from 1 to how many"),
        ((("a", "a"),), "each principle once"),
        (((" ",),), r"principles\[0\]"),
        ((("a",), 2), "from 1 to how many"),
        ((("a",), 1, "x"), "an integer"),
        (("abc",), "a sequence of texts"),
    ):
        with pytest.raises(InputError, match=says):
            Constitution(*wrong)


def test_a_principle_is_a_line_whatever_else_unicode_calls_a_lines_end(tmp_path):
    file = tmp_path / "principles.txt"
    file.write_bytes("Be honest\u2028and kind.\r\nBe\x0bbrief\x85.\n".encode())
    assert Constitution.from_file(file).principles == ("Be honest\u2028and kind.", "Be\x0bbrief\x85.")
    file.write_bytes("Be brief.\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"principles\.txt: got NUL characters, as UTF-16 text has them"):
        Constitution.from_file(file)


def test_the_judge_is_shown_the_pairs_principles_and_each_draw_is_a_question_of_its_own(tmp_path):
    asked = []

    def answer(request):
        asked.append(json.loads(request.content)["messages"])
        labels = JudgePrompt.parse(asked[-1]).labels
        message = {"role": "assistant", "content": f"<verdict>{labels.win}</verdict>"}
        return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}]})

    store = VerdictStore(tmp_path / "v.db")
    options = ClientOptions(transport=httpx.MockTransport(answer))
    draws = {seed: Constitution(PRINCIPLES, seed=seed).drawn(PAIR.prompt, PAIR.first, PAIR.second) for seed in range(9)}
    other = next(seed for seed, drawn in draws.items() if drawn != draws[0])
    for seed in (0, 0, other):
        constitution = Constitution(PRINCIPLES, per_question=1, seed=seed)
        judge = ChatJudge("http://127.0.0.1:9/v1", "m", None, client=options, constitution=constitution, store=store)
        labelled(judge, policy=LabelPolicy(hard="keep"))
        drawn = constitution.drawn(PAIR.prompt, PAIR.first, PAIR.second)[0]
        assert all(drawn in messages[0]["content"] for messages in asked[-2:])
        others = [text for text in PRINCIPLES if text != drawn]
        assert not any(text in messages[0]["content"] for messages in asked[-2:] for text in others)
    assert len(asked) == 4  # the second run had its answers from the store, the third asked by another principle
    store.close()
    with VerdictLedger(tmp_path / "v.db") as ledger:
        assert len({call.template for call in ledger.calls()}) == 2


def test_principles_stand_before_the_texts_in_any_template():
    texts = ("p", "f", "s")
    plain = JudgePrompt().render(*texts).messages
    assert "principles" not in plain[0]["content"]
    ruled = JudgePrompt(principles=("Be kind. $prompt",)).render(*texts)
    assert ruled.messages[0]["content"].startswith("Judge by these principles before all else:\n- Be kind. $prompt\n")
    assert JudgePrompt.parse(ruled.messages).prompt == "p"
    user = "$contract $prompt $first $second"
    (bare,) = JudgePrompt(system="", user=user, principles=("Be kind.",)).render(*texts).messages
    assert bare["content"].index("Be kind.") < bare["content"].index("<<<")
    own = JudgePrompt(system="X $principles Y $contract", user="$prompt $first $second", principles=("Be kind.",))
    assert "X Judge by these principles" in own.render(*texts).messages[0]["content"]
    assert (
        len({JudgePrompt().version, JudgePrompt(principles=("a",)).version, JudgePrompt(principles=("b",)).version})
        == 3
    )
    for system, wrong in (
        ("$principles $principles $contract", "$prompt $first $second"),
        ("$contract", "$prompt $first $second $principles"),
    ):
        with pytest.raises(InputError, match="principles"):
            JudgePrompt(system=system, user=wrong)
