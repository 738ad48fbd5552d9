"""What needs no judge, what is cut for it, and verdicts that were recorded."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from support.chat_client import PAIR

from rmcore.judge import (
    ChatJudge,
    Fault,
    JudgePrompt,
    JudgeUsage,
    Pair,
    RecordedJudge,
    ReplayServer,
)

# -- by rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", ["both", "one"])
@pytest.mark.parametrize(
    ("first", "second", "preference", "reason"),
    [
        ("same", "same", 0, "rule:identical"),
        ("", "", 0, "rule:identical"),
        ("", " \n", 0, "rule:both_blank"),
        ("\u200b", "\u3164", 0, "rule:both_blank"),
        ("", "text", -1, "rule:blank"),
        ("text", " \t", 1, "rule:blank"),
        ("\ufeff", ".", -1, "rule:blank"),
    ],
)
def test_what_needs_no_judge_costs_nothing(ask, mock_judge, chat_reply, orders, first, second, preference, reason):
    judge = mock_judge(lambda r: chat_reply(r, "<verdict>$tie</verdict>"), orders=orders)
    asked, ruled, after = ask(judge, PAIR, Pair("p", first, second), PAIR)
    assert (ruled.preference, ruled.reason, ruled.judge) == (preference, reason, "rule")
    assert (ruled.failed, ruled.flipped, ruled.critique) == (False, False, "")
    assert ruled.usage == JudgeUsage()
    assert asked.judge == after.judge == "judge-model"
    assert (asked.reason, asked.usage.calls) == ("", 2 if orders == "both" else 1)
    assert judge.counts[reason] == 1


def test_without_rules_everything_is_asked(ask, mock_judge, chat_reply):
    judge = mock_judge(lambda r: chat_reply(r, "<verdict>$win</verdict>"), rules=False)
    for first, second in (("", ""), ("", "x"), ("x", "x")):
        verdict = ask(judge, Pair("p", first, second))[0]
        assert (verdict.usage.calls, verdict.flipped, verdict.judge) == (2, True, "judge-model")
    assert not judge.counts


def test_a_pair_that_is_no_text_is_not_decided_by_rule(ask, mock_judge, chat_reply):
    judge = mock_judge(lambda r: chat_reply(r, "<verdict>$win</verdict>"))
    assert [v.reason for v in ask(judge, Pair("p", None, None), Pair("p", 3, ""))] == ["bad_pair", "bad_pair"]


# -- the length cap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", ["both", "one"])
def test_a_cut_is_recorded(ask, mock_judge, chat_reply, orders):
    shown = []

    def handler(request):
        question = JudgePrompt.parse(json.loads(request.content)["messages"])
        shown.append({question.first, question.second})
        return chat_reply(request, "<verdict>$tie</verdict>")

    judge = mock_judge(handler, orders=orders, max_response_chars=5)
    long, short = ask(judge, Pair("p", "x" * 12, "y" * 8), Pair("p", "x" * 5, "y"))
    assert (long.reason, long.failed) == ("cut:10", False)
    assert short.reason == ""
    assert {"x" * 5, "y" * 5} in shown
    assert judge.counts["cut"] == (2 if orders == "both" else 1)


def test_a_cut_and_another_note(ask, make_judge, recorded):
    pair = Pair("p-win", "a" * 9, "b")
    row = {"prompt": "p-win", "first": "aaa", "second": "b", "verdict": "win", "order": "ab"}
    recorded = RecordedJudge.from_rows([row])
    with ReplayServer(recorded, faults=[Fault(404)]) as server:
        verdict = ask(make_judge(server.base_url, max_response_chars=3, concurrency=1), pair)[0]
    assert (verdict.preference, verdict.reason) == (1, "one_order:http_404; cut:6")


def test_output_and_cap_of_the_prompt_stand_unless_they_are_given(make_judge):
    prompt = JudgePrompt(output="json_schema", max_response_chars=9)
    assert make_judge(prompt=prompt).prompt == prompt
    assert make_judge(prompt=prompt, output="text", max_response_chars=8).prompt == JudgePrompt(max_response_chars=8)


# -- real verdicts ---------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("output", ["text", "json_schema"])
def test_recorded_flips_of_a_strong_judge_over_http(ask, make_judge, output):
    """GPT-4's verdicts on LLMBar under the Vanilla prompt, in both orders: 30 of 419 flip, and no pair is lost."""
    folder = os.environ.get("RMCORE_DATA")
    if not folder or not (path := Path(folder) / "llmbar.jsonl.gz").exists():
        pytest.skip("RMCORE_DATA does not point to a folder with llmbar.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        data = [json.loads(line) for line in lines]
    words = {1: "win", 0: "loss", None: None}
    rows = [
        {"prompt": r["prompt"], "first": r["chosen"], "second": r["rejected"], "order": order}
        | {"verdict": words[r["judges"][f"GPT-4/Vanilla/{order}"]]}
        for r in data
        for order in ("ab", "ba")
    ]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        # Asked the wrong way round every second time: what is recorded does not depend on who is called first.
        pairs = [Pair(r["prompt"], r["chosen"], r["rejected"]) for r in data]
        pairs = [Pair(p.prompt, p.second, p.first) if i % 2 else p for i, p in enumerate(pairs)]
        verdicts = ask(make_judge(server.base_url, output=output), *pairs)
    assert (len(verdicts), sum(v.flipped for v in verdicts)) == (419, 30)
    # Every verdict is what the two recorded ones make together: their mean, or the one there is.
    for i, (verdict, row) in enumerate(zip(verdicts, data, strict=True)):
        told = [row["judges"][f"GPT-4/Vanilla/{order}"] for order in ("ab", "ba")]
        signs = [2 * value - 1 for value in told if value is not None]
        expected = sum(signs) / len(signs) if signs else None
        assert verdict.preference == (expected if expected is None or i % 2 == 0 else -expected)
    assert server.requests == 838


def test_what_is_counted_as_a_call(ask, tmp_path):
    """Calls are requests that this judge made: what the store, a rule or the same question answered is none."""
    texts = [(f"p{k}", "a", "b") for k in range(4)]
    rows = [{"prompt": p, "first": a, "second": b, "verdict": "win"} for p, a, b in texts]
    four = [Pair(*one) for one in texts]
    turned = Pair("p1", "b", "a")
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        for number, (pairs, calls, hits) in enumerate(
            (
                ([four[0]], 2, 0),
                (four, 6, 2),  # four pairs in both orders, one of which the store knew
                ([four[1], four[1], turned], 0, 6),
                ([four[1], Pair("p1", "a", "a"), Pair("p1", "a", "")], 0, 2),
            )
        ):
            before = server.requests
            judge = ChatJudge(server.base_url, "m", None, store=tmp_path / "v.db")
            usage = JudgeUsage.total(verdict.usage for verdict in ask(judge, *pairs))
            assert (usage.calls, usage.cache_hits) == (calls, hits), number
            assert usage.calls == usage.attempts == server.requests - before
        # New, and three times in one call: asked once, the others wait for it.
        judge = ChatJudge(server.base_url, "m", None, store=tmp_path / "w.db")
        before = server.requests
        usage = JudgeUsage.total(verdict.usage for verdict in ask(judge, four[2], four[2], four[2]))
        assert (usage.calls, usage.cache_hits) == (server.requests - before, 4) == (2, 4)
