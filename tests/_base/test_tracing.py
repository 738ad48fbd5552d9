"""Spans: nothing without OpenTelemetry; with it the stages of a call under one, and no text in any."""

from __future__ import annotations

import json
import sys

import pytest

CHILD = """
import asyncio, json, sys
import httpx, torch
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

memory = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)

from rmcore.engine import RewardEngine
from rmcore.engine.routing import AlwaysRoute
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit
from rmcore.judge import ChatJudge, ClientOptions, JudgePrompt, RetryPolicy

def answer(request):
    asked = json.loads(request.content)
    if "xyzzy" in json.dumps(asked["messages"]):
        return httpx.Response(400, json={"error": {"message": "SECRET words"}})
    labels = JudgePrompt.parse(asked["messages"]).labels
    text = f"SECRET critique <verdict>{labels.win}</verdict>"
    usage = {"prompt_tokens": 11, "completion_tokens": 5}
    message = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage, "model": "m-1"}
    return httpx.Response(200, json=message)

torch.set_num_threads(1)
torch.manual_seed(0)
hidden = torch.randn(40, 8)
pairs = torch.randint(40, (60, 2))
head = fit(SNGPHead(HeadConfig(8, num_features=16)), hidden, torch.randint(2, (60,)).float(), pairs=pairs,
           dtype=torch.float32, backend="torch")[0]
options = ClientOptions(transport=httpx.MockTransport(answer), retry=RetryPolicy(max_attempts=1))
judge = ChatJudge(
    "http://judge.example:8000/v1", "m", None, client=options, orders="one", temperature=0.5, max_tokens=64
)
engine = RewardEngine(head, judge, AlwaysRoute(), backend="torch")
prompts, responses = ["SECRET prompt", "xyzzy"], [["SECRET a", "b"], ["c", "d"]]
engine.score_hidden(hidden[:4], [2, 2], prompts=prompts, responses=responses)
asyncio.run(engine.score_hidden_async(hidden[:4], [2, 2], prompts=prompts, responses=responses))
try:
    engine.score_hidden(hidden[:4] * torch.nan, [2, 2], prompts=prompts, responses=responses)
except ValueError:
    pass
told = [
    {"name": s.name, "id": s.context.span_id, "parent": s.parent and s.parent.span_id, "trace": s.context.trace_id,
     "kind": s.kind.name, "status": s.status.status_code.name, "attributes": dict(s.attributes),
     "events": len(s.events), "description": s.status.description}
    for s in memory.get_finished_spans()
]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def spans(warm_python):
    pytest.importorskip("opentelemetry.sdk", reason="no opentelemetry-sdk: pip install 'rmcore[otel]'")
    child = warm_python.start(CHILD, modules=("torch", "rmcore.engine.engine", "rmcore.head.fit", "rmcore.judge"))
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def test_the_stages_of_a_call_are_under_one_span_whatever_thread_or_loop_they_run_on(spans):
    roots = [span for span in spans if span["name"] == "rmcore.score"]
    assert len(roots) == 3
    for root in roots[:2]:
        assert root["parent"] is None
        below = [span for span in spans if span["trace"] == root["trace"] and span is not root]
        names = sorted(span["name"] for span in below)
        assert names == ["chat m", "chat m", "rmcore.head", "rmcore.judge"]
        by_id = {span["id"]: span for span in [root, *below]}
        parents = {span["name"]: by_id[span["parent"]]["name"] for span in below}
        assert parents == {"chat m": "rmcore.judge", "rmcore.head": "rmcore.score", "rmcore.judge": "rmcore.score"}
        assert root["attributes"] == {
            "rmcore.groups": 2, "rmcore.responses": 4, "rmcore.pairs": 2, "rmcore.routed": 2, "rmcore.judge_failed": 1,
        }  # fmt: skip
    assert roots[2]["status"] == "ERROR"
    assert roots[2]["attributes"] == {"error.type": "NonFiniteError"}


def test_a_chat_is_named_by_the_conventions_for_generative_models(spans):
    good, bad = (
        next(span for span in spans if span["name"] == "chat m" and ("error.type" in span["attributes"]) == failed)
        for failed in (False, True)
    )
    asked = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 64, "gen_ai.request.temperature": 0.5,
        "server.address": "judge.example", "server.port": 8000, "rmcore.attempts": 1,
    }  # fmt: skip
    answered = {"gen_ai.response.model": "m-1", "gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 5}
    assert good["attributes"] == asked | answered
    assert good["kind"] == bad["kind"] == "CLIENT"
    assert bad["attributes"] == asked | {"error.type": "http_400"}
    assert bad["status"] == "ERROR"


def test_no_span_holds_a_text(spans):
    assert "SECRET" not in json.dumps(spans)
    assert not any(span["events"] or span["description"] for span in spans)


def test_without_opentelemetry_a_span_is_nothing(monkeypatch):
    from rmcore._base import tracing

    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    with tracing.span("rmcore.x", rmcore__n=1) as span:
        span.set(rmcore__m=2)
        span.fail("reason")
        assert not span.recording
    with pytest.raises(ZeroDivisionError), tracing.span("rmcore.x"):
        1 / 0  # noqa: B018
    assert "opentelemetry.trace" not in sys.modules
