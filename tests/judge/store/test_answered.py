"""Who answered is recorded: in the log, in verdicts, prices and statistics; files from before have no word of it."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import httpx
import pytest

from rmcore.judge import ChatJudge, ClientOptions, JudgePrompt, Pair, VerdictStore
from rmcore.judge.store import database as database_module
from rmcore.judge.store.ledger import VerdictLedger
from rmcore.judge.store.prices import PriceTable, answering_model, price_call

PAIR = Pair("p-win", "a", "b")
PRICES = PriceTable({"small": {"prompt": 1e6, "completion": 0}, "large": {"prompt": 1e7, "completion": 0}})


@pytest.fixture
def served():
    """A judge whose endpoint answers as ``model``; it counts its requests."""

    def make(model, store=None, asked="small", **kwargs):
        seen = []

        def answer(request):
            seen.append(request)
            labels = JudgePrompt.parse(json.loads(request.content)["messages"]).labels
            body = {
                "choices": [{"message": {"content": f"<verdict>{labels.tie}</verdict>"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 2, "completion_tokens": 1},
                "model": model,
                "system_fingerprint": "fp_1",
            }
            return httpx.Response(200, json=body)

        options = ClientOptions(transport=httpx.MockTransport(answer))
        judge = ChatJudge("http://127.0.0.1:9/v1", asked, None, client=options, store=store, orders="one", **kwargs)
        return judge, seen

    return make


def test_another_model_is_named_priced_stored_and_warned_of_once(ask, served, tmp_path, caplog):
    path = tmp_path / "v.db"
    judge, _ = served("large", path, prices=PRICES)
    with caplog.at_level("WARNING"):
        first, second = ask(judge, PAIR, Pair("p-loss", "a", "b"))
    assert {first.judge, second.judge} == {"large"}
    assert first.usage.cost == 20
    assert caplog.text.count("answers as 'large'") == 1
    again, seen = served("small", path, prices=PRICES)
    assert ask(again).judge == "large", "what the store holds is by whom it was"
    assert not seen
    with VerdictLedger(path) as ledger:
        assert {(c.model, c.answered, c.answering, c.fingerprint) for c in ledger.calls()} == {
            ("small", "large", "large", "fp_1")
        }
        stats = ledger.stats(PRICES)
        assert stats["models"] == {"large": 2}
        assert stats["cost"] == {"USD": 40}
        assert {pair.model for pair in ledger.pairs()} == {"large"}


@pytest.mark.parametrize(
    "said", ["small", "SMALL", "org/small", "small-2024-08-06", "small-0613", "/m/small.gguf", "", 3]
)
def test_the_model_that_was_asked_by_another_form_of_its_name(ask, served, caplog, said):
    judge, _ = served(said, prices=PRICES)
    with caplog.at_level("WARNING"):
        verdict = ask(judge)
    assert (verdict.judge, verdict.usage.cost) == ("small", 2)
    assert "answers as" not in caplog.text


def test_an_alias_of_the_latest_release_stands_for_it():
    for asked in ("claude-latest", "claude:latest"):
        for said in ("claude", "claude-20241022", "anthropic/Claude-2024-10-22", "claude-latest", "claude@20241022"):
            assert answering_model(asked, said) == asked
        for said in ("claude-mini", "claude-mini-latest", "claud", "claude-2", "gpt"):
            assert answering_model(asked, said) == said


@pytest.mark.parametrize("said", ["small-mini", "smaller", "not-small", "small-turbo-2024-08-06", "large"])
def test_likeness_is_not_enough(said):
    assert answering_model("small", said) == said


def test_the_price_is_that_of_the_very_name_if_there_is_one():
    from rmcore.judge import JudgeUsage

    usage = JudgeUsage(calls=1, prompt_tokens=1)
    table = PriceTable({"m": {"prompt": 1e6, "completion": 0}, "m-2024-08-06": {"prompt": 3e6, "completion": 0}})
    assert price_call(table, usage, "m", "", "m-2024-08-06").cost == 3
    assert price_call(table, usage, "m", "", "m-2025-01-01").cost == 1
    assert price_call(table, usage, "m", "", "other").unpriced_calls == 1


def test_a_key_in_a_models_name_is_not_kept(ask, mock_judge, secret, chat_reply):
    def answer(request):
        body = json.loads(chat_reply(request, "<verdict>$tie</verdict>").content)
        return httpx.Response(200, json=body | {"model": f"m {secret}"})

    assert secret not in ask(mock_judge(answer, api_key_env="RMCORE_TEST_KEY", orders="one")).judge


def test_a_file_of_the_first_version_is_read_and_brought_up_to_date(tmp_path, ask, served, monkeypatch):
    path = tmp_path / "old.db"
    with monkeypatch.context() as old:  # as the first release wrote it
        old.setattr(database_module, "_MIGRATIONS", database_module._MIGRATIONS[:1])
        old.setattr(database_module, "SCHEMA_VERSION", 1)
        VerdictStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
    with VerdictLedger(path) as ledger:
        assert ledger.calls() == []
        assert ledger.stats()["calls"] == 0
    ask(served("large", path)[0])
    with VerdictLedger(path) as ledger:
        assert [call.answered for call in ledger.calls()] == ["large"]


@pytest.mark.parametrize(
    ("reuse", "asked_again"),
    [("replies", 0), ("verdicts", 1), ({"length", "unparsable"}, 1), (["refusal"], 0), ((), 0)],
)
def test_replies_without_a_verdict_are_asked_again_by_reason(tmp_path, ask, mock_judge, chat_reply, reuse, asked_again):
    path, seen = tmp_path / "v.db", []

    def answer(request):
        seen.append(request)
        return chat_reply(request, "I cannot say.")

    for policy in ("replies", reuse):
        with VerdictStore(path, reuse=policy) as store:
            assert ask(mock_judge(answer, store=store, orders="one")).reason == "unparsable"
    assert len(seen) == 1 + asked_again
