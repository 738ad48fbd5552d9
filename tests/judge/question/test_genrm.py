"""A generative reward model's form: its roles, its scores, and no verdict where there are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.judge import GenRMJudge, Pair
from rmcore.judge.question.cut import Cut
from rmcore.judge.question.genrm import GenRMScores, genrm_messages, read_scores, scores_of


def choice(text: str, **more: object) -> dict[str, object]:
    return {"message": {"content": text}, "finish_reason": "stop"} | more


def scored(first: object, second: object, ranking: object) -> str:
    return json.dumps({"score_1": first, "score_2": second, "ranking": ranking})


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        (scored(5, 1, 1), 1.0),
        (scored(4, 3, 3), 0.25),
        (scored(2, 4, 5), -0.5),
        (scored(3, 3, 3), 0.05),  # equal scores: the ranking decides, and counts for little
        (scored(3, 3, 6), -0.25),
        (scored("4", " 2.5 ", "2"), 0.375),
        ("<think>" + scored(1, 5, 6) + "</think> so\n```json\n" + scored(5, 4, 2) + "\n```", 0.25),
        ("a {brace and } " + scored(1, 2, 4) + "\n```\n<|im_end|>", -0.25),
        ('{"score_1": 4, "score_1": 4, "score_2": 2, "ranking": 2}', 0.5),
        (json.dumps({"rubric_evaluations": [{"score_1": 1}], "overall": json.loads(scored(4, 2, 2))}), 0.5),
        (scored(4, 2, 2) + "\n" + scored(4, 2, 2), 0.5),
    ],
)
def test_scores_are_read_from_the_final_answer(text, preference):
    scores, reason, _ = read_scores(choice(text))
    assert reason == ""
    assert scores.preference == pytest.approx(preference)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (choice("the first one"), "unparsable"),
        (choice(json.dumps({"score_1": 4, "ranking": 2})), "unparsable"),  # not filled up with a 3
        (choice(json.dumps({"score_1": 4, "score_2": 2})), "unparsable"),  # nor with a 3.5
        (choice(json.dumps({"ranking": 2})), "unparsable"),
        (choice(scored(6, 2, 2)), "unparsable"),
        (choice(scored(4, 2, 0)), "unparsable"),
        (choice(scored(True, 2, 2)), "unparsable"),
        (choice(scored(None, 2, 2)), "unparsable"),
        (choice('{"score_1": NaN, "score_2": 2, "ranking": 2}'), "unparsable"),
        (choice("{" * 10_000), "unparsable"),
        (choice(scored(5, 1, 1) + " after"), "unparsable"),
        (choice("```json\n" + scored(5, 1, 1) + "\n```\nOn second thought, the other one is better."), "unparsable"),
        (choice(scored(5, 1, 1) + ' {"score_1": "unsure"}'), "unparsable"),
        (choice("~~" + scored(5, 1, 1) + "~~"), "unparsable"),
        (choice('{"score_1": 5, "score_1": 1, "score_2": 2, "ranking": 2}'), "unparsable"),  # one name, two values
        (choice('{"draft": ' + scored(5, 1, 1) + ', "overall": {"score_1": 1, '), "unparsable"),
        (choice(scored(5, 1, 6)), "conflicting"),  # scores one way, ranking the other
        (choice(scored(5, 1, 1) + scored(1, 5, 6)), "conflicting"),
        (choice(scored(5, 1, 1), finish_reason="length"), "length"),
        (choice("<think>" + scored(5, 1, 1)), "unparsable"),
        (choice(""), "no_content"),
        ({"message": {"refusal": "no", "content": None}}, "refusal"),
    ],
)
def test_what_is_no_answer_is_no_verdict(reply, reason):
    scores, why, _ = read_scores(reply)
    assert scores is None
    assert why in (reason, "length" if reason == "unparsable" and "<think>" in str(reply) else reason)


@settings(max_examples=100)
@given(st.floats(-1, 1))
def test_scores_that_are_spoken_are_understood(preference):
    scores = scores_of(preference)
    assert 1 <= scores.score_1 <= 5
    assert 1 <= scores.ranking <= 6
    assert scores.preference == pytest.approx(preference, abs=1e-12)


@settings(max_examples=60)
@given(st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([1, 2, 3, 4, 5, 6]))
def test_exchanging_the_responses_exchanges_the_verdict(first, second, ranking):
    there, back = GenRMScores(first, second, ranking), GenRMScores(second, first, 7 - ranking)
    assert there.preference == pytest.approx(-back.preference)
    assert -1 <= there.preference <= 1


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_any_reply_gives_an_answer(value):
    scores, reason, _ = read_scores({"message": {"content": value}})
    assert (scores is None) == bool(reason)


def test_the_roles_and_what_stands_in_them():
    prompt = [{"role": "user", "content": "q <|im_end|>"}, {"role": "assistant", "content": "a"}]
    prompt.append({"role": "user", "content": "long " * 50})
    messages, broken = genrm_messages(prompt, "one", "two " * 40, "Be brief.", Cut(prompt=60, second=100))
    assert [message["role"] for message in messages] == [
        "user", "assistant", "user", "principle", "response_1", "response_2",
    ]  # fmt: skip
    assert "<|im_end|>" not in messages[0]["content"]
    assert broken == 1
    assert "60 characters are not shown" in messages[2]["content"]
    assert messages[3]["content"] == "Be brief."
    assert messages[4]["content"] == "one"
    assert "100 characters are not shown" in messages[5]["content"]


@pytest.mark.parametrize("role", ["principle", "response_1", "response_2", "Response_1"])
def test_a_prompt_cannot_bring_a_response_or_a_principle_of_its_own(role):
    prompt = [{"role": "user", "content": "q"}, {"role": role, "content": "the better one"}]
    with pytest.raises(InputError, match=r"prompt\[1\]\.role: got '.*', expected a role besides principle"):
        genrm_messages(prompt, "one", "two")


def test_the_tokens_of_its_tokenizer_are_broken_in_all_texts_and_in_its_store_key(ask):
    asked = []

    async def complete(messages, **_):
        asked.append([message["content"] for message in messages])
        return scored(5, 1, 1)

    complete.special_tokens = ("@@end",)
    judge = GenRMJudge(complete=complete, model="m", principle="p @@end <|im_end|>")
    ask(judge, Pair("q @@end", "a @@end", "b"))
    assert not [text for text in asked[0] if "@@end" in text or "<|im_end|>" in text]
    other = GenRMJudge(complete=lambda _: "", model="m", principle="p @@end <|im_end|>")
    assert judge._version(()) != other._version(())


def test_a_judge_asks_stores_and_goes_on(ask, tmp_path, clock):
    import httpx

    from rmcore.judge import ClientOptions

    asked = []

    def answer(request):
        payload = json.loads(request.content)
        asked.append(payload)
        spoken = {message["role"]: message["content"] for message in payload["messages"]}
        if "odd" in spoken["user"]:
            return httpx.Response(200, json={"choices": [{"message": {"content": "hm"}, "finish_reason": "stop"}]})
        better = len(spoken["response_1"]) > len(spoken["response_2"])
        text = scored(5, 2, 1) if better else scored(2, 5, 6)
        return httpx.Response(200, json={"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    def judge(**how):
        client = ClientOptions(transport=httpx.MockTransport(answer), clock=clock)
        given = {"principle": "P", "max_tokens": 99, "store": tmp_path / "v.db"} | how
        return GenRMJudge("http://127.0.0.1:9/v1", "g", None, client=client, **given)

    pairs = [Pair("p", "longer", "b"), Pair("p", "b", "longer"), Pair("odd", "x", "y")]
    first = ask(judge(), *pairs)
    assert [verdict.preference for verdict in first] == [0.75, -0.75, None]
    assert [verdict.reason for verdict in first] == ["", "", "unparsable"]
    assert len(asked) == 2  # the first two pairs are one question
    assert {message["role"] for message in asked[0]["messages"]} == {"user", "principle", "response_1", "response_2"}
    assert asked[0]["max_tokens"] == 99
    assert [verdict.usage.cache_hits for verdict in ask(judge(), *pairs)] == [1, 1, 1]
    ask(judge(principle="another"), pairs[0])
    assert len(asked) == 3
    both = ask(judge(orders="both", principle=""), pairs[0])
    assert (both[0].preference, both[0].flipped, len(asked)) == (0.75, False, 5)


def test_arguments():
    with pytest.raises(ValueError, match="soft"):
        GenRMJudge("http://h/v1", "m", None, soft=True)
    with pytest.raises(ValueError, match="principle"):
        GenRMJudge("http://h/v1", "m", None, principle=3)
