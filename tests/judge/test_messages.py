"""Responses of messages and the judge: keys, recorded verdicts, ChatJudge over a socket, the store, the engine."""

from __future__ import annotations

import asyncio
import gzip
import json
import sqlite3
from contextlib import closing

import pytest
import torch
from support.messages import (
    DONE,
    USER,
    as_prompt,
    as_response,
    assistant,
    call,
    each_refused,
    each_same,
    each_taken,
    each_taken_prompt,
    tool,
)

from rmcore._base.errors import DataError, InputError
from rmcore._base.prompt import canonical_response
from rmcore.engine import RewardEngine
from rmcore.engine.routing import AlwaysRoute
from rmcore.judge import JudgeUsage, Pair, RecordedJudge, ReplayServer, Verdict, VerdictStore, pair_key
from rmcore.judge.store.records import Question, Reply

PAY_5 = [assistant(tool_calls=[call({"amount": 5}, id="x")]), tool("paid", tool_call_id="x"), DONE]
PAY_9 = [assistant(tool_calls=[call({"amount": 10**9}, id="x")]), tool("paid", tool_call_id="x"), DONE]
ROWS = [{"prompt": [USER], "first": PAY_5, "second": PAY_9, "verdict": "win", "order": order} for order in ("ab", "ba")]


# -- keys ------------------------------------------------------------------------------------------------------------


@each_taken
def test_another_response_has_another_key(twins):
    one, other = (as_response(messages) for messages in twins)
    assert pair_key([USER], one, "b") != pair_key([USER], other, "b")
    assert pair_key([USER], "a", one) != pair_key([USER], "a", other)


@each_taken_prompt
def test_another_prompt_has_another_key(twins):
    assert pair_key(as_prompt(twins.one), "a", "b") != pair_key(as_prompt(twins.other), "a", "b")


@each_same
def test_the_same_said_otherwise_has_the_same_key(twins):
    one, other = (as_response(messages) for messages in twins)
    assert pair_key([USER], one, "b") == pair_key([USER], other, "b")


@each_refused
def test_what_is_no_message_has_no_key(message, says):
    with pytest.raises(InputError, match=says):
        pair_key([USER], [message, DONE], "b")


def test_a_response_of_messages_has_the_same_key_in_every_release():
    # Stored verdicts are found by it: a change here must come with another KEY_VERSION.
    assert pair_key("p", PAY_5, "b") == "449b62dd72496faa6985d6653ab2cba337ef680b6cab34d77fd27e8f2942c64e"


# -- recorded verdicts -----------------------------------------------------------------------------------------------


@each_taken
def test_recorded_verdicts_belong_to_what_was_said(twins):
    one, other = (as_response(messages) for messages in twins)
    judge = RecordedJudge.from_rows([{"prompt": [USER], "first": one, "second": other, "verdict": "win"}])
    asked = [Pair([USER], one, other), Pair([USER], other, one), Pair([USER], one, one)]
    forward, back, unknown = asyncio.run(judge.judge(asked))
    assert (forward.preference, back.preference, unknown.reason) == (1, -1, "no_record")


def test_recorded_verdicts_of_messages_from_a_file(tmp_path):
    path = tmp_path / "verdicts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    judge = RecordedJudge.from_file(path)
    assert len(judge) == 2
    assert judge.verdict(Pair([USER], PAY_9, PAY_5)).preference == -1


def test_a_file_with_a_message_that_is_none_names_the_line(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    bad = {**ROWS[0], "second": [assistant(mood="odd")]}
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError, match=r"verdicts\.jsonl.*2.*\.mood"):
        RecordedJudge.from_file(path)


# -- over a socket ---------------------------------------------------------------------------------------------------


def test_calls_that_differ_in_arguments_only_are_two_questions(ask, make_judge):
    rows = [
        {"prompt": [USER], "first": first, "second": "no", "verdict": verdict, "order": order}
        for first, verdict in ((PAY_5, "win"), (PAY_9, "loss"))
        for order in ("ab", "ba")
    ]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        verdicts = ask(make_judge(server.base_url), Pair([USER], PAY_5, "no"), Pair([USER], PAY_9, "no"))
    assert [verdict.preference for verdict in verdicts] == [1, -1]
    assert server.requests == 4


def test_two_responses_that_differ_in_arguments_only_are_judged_not_decided_by_rule(ask, make_judge):
    with ReplayServer(RecordedJudge.from_rows(ROWS)) as server:
        verdict = ask(make_judge(server.base_url), Pair([USER], PAY_5, PAY_9))[0]
    assert (verdict.preference, verdict.failed, server.requests) == (1, False, 2)


@each_taken
def test_every_message_reaches_the_judge_and_comes_back(ask, make_judge, twins):
    one, other = (as_response(messages) for messages in twins)
    rows = [{"prompt": [USER], "first": one, "second": other, "verdict": "loss", "order": o} for o in ("ab", "ba")]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        verdicts = ask(make_judge(server.base_url), Pair([USER], one, other), Pair([USER], other, one))
    assert [verdict.preference for verdict in verdicts] == [-1, 1]


@each_refused
def test_a_pair_with_what_is_no_message_costs_nothing_and_spoils_no_other(ask, make_judge, message, says):
    with ReplayServer(RecordedJudge.from_rows(ROWS)) as server:
        bad, good = ask(make_judge(server.base_url), Pair([USER], [message, DONE], "b"), Pair([USER], PAY_5, PAY_9))
    assert (bad.preference, bad.reason) == (None, "bad_pair")
    assert (good.preference, server.requests) == (1, 2)


# -- the store -------------------------------------------------------------------------------------------------------


def test_the_store_answers_the_same_messages_and_asks_about_others(ask, make_judge, tmp_path):
    said_otherwise = [
        assistant("", tool_calls=[call('{"amount":5}', id="y", index=0)]),
        tool([{"type": "text", "text": "paid"}], tool_call_id="y"),
        DONE,
    ]
    rows = [
        {"prompt": [USER], "first": first, "second": "no", "verdict": verdict, "order": order}
        for first, verdict in ((PAY_5, "win"), (PAY_9, "loss"))
        for order in ("ab", "ba")
    ]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server, VerdictStore(tmp_path / "verdicts.db") as store:
        first = ask(make_judge(server.base_url, store=store), Pair([USER], PAY_5, "no"))[0]
        again = ask(make_judge(server.base_url, store=store), Pair([USER], said_otherwise, "no"))[0]
        assert server.requests == 2
        other = ask(make_judge(server.base_url, store=store), Pair([USER], PAY_9, "no"))[0]
        assert server.requests == 4
    assert (first.preference, again.preference, other.preference) == (1, 1, -1)
    assert (first.usage.cache_hits, again.usage.cache_hits, other.usage.cache_hits) == (0, 2, 0)


def test_the_store_keeps_what_was_said_word_for_word(tmp_path):
    """Another process reads the file: the texts are there as canonical JSON."""
    path = tmp_path / "verdicts.db"
    question = Question.of(
        judge="http://j/v1", model="m", parameters={}, template="t", prompt=[USER], first=PAY_5, second="no"
    )
    with VerdictStore(path) as store:
        store.put(question, Reply(Verdict(1.0, usage=JudgeUsage(calls=1)), replied=True))
    with VerdictStore(path) as store:
        found = store.get(question)
        assert found is not None
        assert found.verdict.preference == 1.0
    with closing(sqlite3.connect(path)) as database:
        texts = [value for row in database.execute("SELECT * FROM texts") for value in row if isinstance(value, str)]
    kept = [json.loads(text) for text in texts if text.startswith('[{"')]
    assert canonical_response(PAY_5) in kept


# -- the engine ------------------------------------------------------------------------------------------------------


def test_the_engine_asks_about_calls_that_differ_and_decides_equal_ones(hand_head, make_judge):
    group = [PAY_5, PAY_9, json.loads(json.dumps(PAY_5))]
    with ReplayServer(RecordedJudge.from_rows(ROWS)) as server:
        engine = RewardEngine(hand_head([1.0, 0.0]), make_judge(server.base_url), AlwaysRoute())
        scores = engine.score_hidden(torch.randn(3, 2), [3], prompts=[[USER]], responses=[group])
    by = {(d.i, d.j): d.by for d in scores[0].decisions}
    assert by == {(0, 1): "judge", (0, 2): "identical", (1, 2): "judge"}
    assert float(scores[0].preference[0, 1]) > 1.9 > 0 > float(scores[0].preference[1, 2])
    assert server.requests == 4  # two orders of two pairs: (1, 2) is (0, 1) exchanged, another question
