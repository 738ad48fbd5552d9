"""A store behind a judge."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from rmcore._base.clock import SystemClock
from rmcore.judge import JudgeUsage, Pair, VerdictStore

# -- behind a judge --------------------------------------------------------------------------------------------------


def test_a_judge_asks_what_the_store_does_not_know(ask, mock_judge, chat_reply, place):
    requests = []

    def handler(request):
        requests.append(request)
        return chat_reply(request, "fine\n<verdict>$win</verdict>")

    pair = Pair("p", "a", "b")
    first = ask(mock_judge(handler, store=place), pair, Pair("p", "b", "a"))
    again = ask(mock_judge(handler, store=place), pair, Pair("p", "b", "a"))
    assert len(requests) == 2  # both pairs are the same two questions
    assert [v.preference for v in first] == [v.preference for v in again] == [0, 0]
    assert sum(v.usage.calls for v in first) == 2
    assert [v.usage for v in again] == [JudgeUsage(cache_hits=2)] * 2
    assert again[0].critique == first[0].critique
    assert {v.judge for v in again} == {"judge-model"}
    ask(mock_judge(handler, store=place, temperature=0.5), pair)
    assert len(requests) == 4


def test_a_judge_that_moved_keeps_its_verdicts_under_its_name(ask, mock_judge, chat_reply, place):
    requests = []

    def handler(request):
        requests.append(request)
        return chat_reply(request, "<verdict>$win</verdict>")

    for port in (1, 2):
        ask(mock_judge(handler, base_url=f"http://127.0.0.1:{port}/v1", judge_id="local", store=place))
    assert len(requests) == 2
    ask(mock_judge(handler, base_url="http://127.0.0.1:2/v1", store=place))
    assert len(requests) == 4


def test_canaries_are_marked(rows, ask, mock_judge, chat_reply, place):
    judge = mock_judge(lambda request: chat_reply(request, "<verdict>$win</verdict>"), store=place, orders="one")
    ask(judge, Pair("p", "a", "b", id="canary:constant:1"), Pair("q", "a", "b", id="mine"))
    assert sorted(rows(place, "canary")) == [(0,), (1,)]


def test_a_pickled_judge_takes_its_store_along(mock_judge, make_judge, place):
    judge = pickle.loads(pickle.dumps(make_judge(store=place, clock=SystemClock())))
    assert judge.store.path == place
    judge.close()


def test_bad_pairs_and_broken_stores_have_reasons(ask, mock_judge, chat_reply, path):
    judge = mock_judge(lambda request: chat_reply(request, "<verdict>$win</verdict>"), store=path)
    assert ask(judge, Pair(None, "a", "b"))[0].reason == "bad_pair"
    for file in path.parent.iterdir():
        file.unlink()
    path.write_bytes(b"no database " * 100)
    assert [v.reason for v in ask(judge, Pair("p", "a", "b"))] == ["store"]


def test_no_key_gets_into_the_file(ask, mock_judge, chat_reply, path, secret):
    judge = mock_judge(
        lambda request: chat_reply(request, f"You said {secret}.\n<verdict>$win</verdict>"),
        api_key_env="RMCORE_TEST_KEY",
        extra_body={"provider": {"api_key": secret}},
        store=path,
    )
    verdict = ask(judge)
    assert not verdict.failed
    assert secret not in verdict.critique
    assert all(secret.encode() not in file.read_bytes() for file in path.parent.iterdir())


def test_finished_verdicts_outlive_a_cancelled_batch(rows, mock_judge, chat_reply, place):
    async def handler(request):
        if "slow" in request.content.decode():
            await asyncio.Event().wait()
        return chat_reply(request, "<verdict>$win</verdict>")

    judge = mock_judge(handler, store=VerdictStore(place))

    async def run():
        batch = asyncio.create_task(judge.judge([Pair("quick", "a", "b"), Pair("slow", "a", "b")]))
        while len(rows(place)) < 2:
            await asyncio.sleep(0.005)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        return await judge.judge([Pair("quick", "a", "b")])

    (verdict,) = asyncio.run(run())
    assert verdict.usage == JudgeUsage(cache_hits=2)
