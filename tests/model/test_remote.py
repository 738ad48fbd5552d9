"""States from a server: the scores are the local ones within its dtype, and what a server may get wrong is refused."""

from __future__ import annotations

import asyncio
import base64
import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.state_server import StateServer

from rmcore._base.client.breaker import BreakerPolicy
from rmcore._base.client.options import ClientOptions
from rmcore._base.errors import BackendError, CheckpointError, InputError, NonFiniteError
from rmcore._base.retry import RetryPolicy
from rmcore.engine import RewardEngine
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.check import check_model, served
from rmcore.model.reward_model import RewardModel
from rmcore.model.state_cache import StateCache

URL = "http://localhost:8000"
AT_ONCE = RetryPolicy(max_attempts=3, base_s=0.0, max_retry_after_s=5.0)


class Clock:
    """Waits take no time, and are remembered."""

    def __init__(self) -> None:
        self.time, self.waits = 0.0, []

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


PROMPTS = ["tell me about the fox", "what is the capital of France?"]
GROUPS = [["a good dog", "a bad dog " * 3, "home"], ["Paris", "Paris is the capital"]]


def remote(local: Backbone, stand_in: StateServer, options: dict[str, Any] | None = None, **kwargs: Any) -> Backbone:
    client = ClientOptions(**{"transport": stand_in, "retry": AT_ONCE, "max_reply_bytes": 1 << 24, **(options or {})})
    return Backbone.from_server(URL, tokenizer=local.tokenizer, client=client, config=local.config, **kwargs)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_are_the_local_ones(make_backbone, preferences, kind, pooling):
    local = make_backbone("llama", pooling=pooling)
    fitted, _ = RewardModel.fit(local, preferences, num_features=32)
    server = StateServer(local.model)
    model = RewardModel(remote(local, server, server=kind), fitted.head)
    ours, theirs = (RewardEngine(m).score(PROMPTS, GROUPS) for m in (model, fitted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.logit, other.logit, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.variance, other.variance, rtol=1e-4, atol=1e-5)
    sent = server.requests[-1]
    if kind == "vllm":
        assert sent["task"] == ("embed" if pooling == "last" else "token_embed")
        assert sent["use_activation"] is False


def test_within_the_servers_dtype(make_backbone):
    local = make_backbone("llama")
    texts = [local.encoder.encode(p, r) for p, group in zip(PROMPTS, GROUPS, strict=True) for r in group]
    ours = remote(local, StateServer(local.model, dtype=torch.bfloat16)).hidden(texts)
    theirs = local.hidden(texts)
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


def test_many_texts_are_many_requests_of_few(make_backbone):
    local = make_backbone("llama")
    server = StateServer(local.model)
    backbone = remote(local, server)
    texts = [local.encoder.encode("what?", f"{k} good") for k in range(30)]
    seen: list[int] = []
    rows = backbone.hidden(texts, progress=lambda done, _: seen.append(done))
    torch.testing.assert_close(rows, local.hidden(texts), rtol=1e-4, atol=1e-5)
    assert [len(r["input"]) for r in server.requests[1:]].count(8) == 3
    assert backbone.stats.computed_tokens == backbone.stats.tokens == seen[-1]
    assert backbone.positions == 256


def test_an_overloaded_server_is_asked_again_after_what_it_asks(make_backbone):
    local, clock = make_backbone("llama"), Clock()
    server = StateServer(local.model)
    backbone = remote(local, server, {"clock": clock})
    text = local.encoder.encode("a", "b")
    server.failures = [503, 429]
    torch.testing.assert_close(backbone.hidden([text]), local.hidden([text]), rtol=1e-4, atol=1e-5)
    assert clock.waits == [1.0, 1.0]
    server.failures = [503, 503, 503]
    with pytest.raises(BackendError, match=r"/pooling: got http_503: overloaded after 3 tries"):
        backbone.hidden([text])
    server.failures = [400]
    with pytest.raises(BackendError, match=r"http_400: .* after 1 tries"):
        backbone.hidden([text])


def test_a_server_that_is_down_is_left_alone(make_backbone):
    """The judge's breaker: after some failures in a row nothing is sent, until one probe gets through."""
    local, clock = make_backbone("llama"), Clock()
    server = StateServer(local.model)
    policy = BreakerPolicy(failures=3, cooldown_s=10.0, patience_s=0.0)
    backbone = remote(local, server, {"clock": clock, "breaker": policy, "retry": RetryPolicy(max_attempts=1)})
    text = local.encoder.encode("a", "b")
    server.failures = [500] * 3
    for _ in range(3):
        with pytest.raises(BackendError, match="http_500"):
            backbone.hidden([text])
    asked = len(server.requests)
    with pytest.raises(BackendError, match="breaker_open: http_500 after 0 tries"):
        backbone.hidden([text])
    assert len(server.requests) == asked
    clock.time += 11.0
    torch.testing.assert_close(backbone.hidden([text]), local.hidden([text]), rtol=1e-4, atol=1e-5)
    assert backbone.model.client.state.breaker.state == "closed"


def test_the_judges_limits_and_deadlines_hold(make_backbone):
    local, clock = make_backbone("llama"), Clock()
    server = StateServer(local.model)
    backbone = remote(local, server, {"clock": clock, "tokens_per_minute": 100, "concurrency": 1})
    texts = [local.encoder.encode("what?", f"{k} good") for k in range(24)]
    torch.testing.assert_close(backbone.hidden(texts), local.hidden(texts), rtol=1e-4, atol=1e-5)
    assert 119 <= clock.time <= 181  # three requests, of which no two have room in one minute
    late = remote(local, StateServer(local.model), {"clock": clock}, deadline_s=0.5)
    late.model.client.exchange.connections.transport.failures = [503]  # which asks for a second
    with pytest.raises(BackendError, match="http_503: overloaded after 1 tries"):
        late.hidden(texts[:1])


def test_what_came_before_a_server_went_is_kept(make_backbone, tmp_path, monkeypatch):
    """Nothing is lost: with a cache of states a second call asks for the others alone."""
    local = make_backbone("llama")
    server = StateServer(local.model)
    backbone = remote(local, server, {"concurrency": 1, "retry": RetryPolicy(max_attempts=1)})
    backbone.state_cache = StateCache(tmp_path / "states", "served", backbone.hidden_size)
    texts = [local.encoder.encode("what?", f"{k} good") for k in range(30)]
    server.gone_after = len(server.requests) + 2
    with pytest.raises(BackendError, match=r"/pooling: got connection: .*after 1 tries"):
        backbone.hidden(texts)
    server.gone_after, asked = None, len(server.requests)
    torch.testing.assert_close(backbone.hidden(texts), local.hidden(texts), rtol=1e-4, atol=1e-5)
    assert backbone.stats.cached == 16
    assert sum(len(request["input"]) for request in server.requests[asked:]) == 14


def first_data(change: Any) -> Any:
    """A reply whose first text's states are changed; they are lists then, as a server without base64 has them."""

    def spoil(reply: dict[str, Any]) -> dict[str, Any]:
        for entry in reply["data"]:
            entry["data"] = np.frombuffer(base64.b64decode(entry["data"]), "<f4").tolist()
            if entry["index"] == 0:
                entry["data"] = change(entry["data"])
        return reply

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda reply: [reply], r"texts \[\], expected of 0 to 1"),
        (lambda reply: {}, r"texts \[\], expected"),
        (lambda reply: {"data": [None, 3]}, r"texts \[\], expected"),
        (lambda reply: reply | {"data": reply["data"][:1]}, r"texts \[1\], expected of 0 to 1"),
        (lambda reply: reply | {"data": [e | {"index": 0} for e in reply["data"]]}, r"texts \[0\]"),
        (lambda reply: reply | {"data": [e | {"index": [0]} for e in reply["data"]]}, "another form"),
        (first_data(lambda row: row[:-1]), r"shape \(31,\) for \d+ tokens, expected \(32,\)"),
        (first_data(lambda row: [row, row]), r"shape \(2, 32\)"),
        (first_data(lambda row: [row, row[:3]]), "neither base64 of float32 nor numbers"),
        (first_data(lambda row: ["x", *row[1:]]), "neither base64"),
        (first_data(lambda row: "no*base64"), "neither base64"),
        (first_data(lambda row: "AAAAAA=="[:6]), "neither base64"),
        (first_data(lambda row: None), "shape"),
        (lambda reply: reply | {"usage": {"prompt_tokens": 3}}, r"read 3 tokens, expected the \d+ that were sent"),
        (lambda reply: {"error": {"message": "it fell over", "code": 503}}, "http_503: it fell over after 3 tries"),
    ],
)
def test_a_reply_that_is_no_states_is_named(make_backbone, spoil, told):
    local = make_backbone("llama")
    server = StateServer(local.model)
    backbone = remote(local, server, {"clock": Clock()})
    server.spoil = spoil
    with pytest.raises(BackendError, match=told):
        backbone.hidden([local.encoder.encode("what?", word) for word in ("good", "bad")])


def test_llama_cpp_may_pool_the_last_token(make_backbone):
    local = make_backbone("llama")
    server = StateServer(local.model)
    server.pools_last = True
    text = local.encoder.encode("what?", "good")
    rows = remote(local, server, server="llamacpp").hidden([text])
    torch.testing.assert_close(rows, local.hidden([text]), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        BackendError, match=r"states of 1 of \d+ tokens: start llama-server with --embeddings --pooling none"
    ):
        remote(make_backbone("llama", pooling="mean"), server, server="llamacpp").hidden([text])


def test_a_server_that_cuts_texts_is_named(make_backbone):
    local = make_backbone("llama", pooling="mean")
    server = StateServer(local.model)
    backbone = remote(local, server)
    own = server._states
    server._states = lambda ids: own(ids[:4])
    with pytest.raises(BackendError, match="cuts texts"):
        backbone.hidden([local.encoder.encode("what is it?", "good")])
    other = remote(local, StateServer(local.model), server="sglang")
    stand_in = other.model.client.exchange.transport
    stand_in.spoil = lambda reply: [entry | {"meta_info": entry["meta_info"] | {"prompt_tokens": 2}} for entry in reply]
    with pytest.raises(BackendError, match="read 2 tokens"):
        other.hidden([local.encoder.encode("what is it?", "good")])
    stand_in.spoil = lambda reply: reply[:0]
    with pytest.raises(BackendError, match="states of 0 texts, expected 1"):
        other.hidden([local.encoder.encode("what is it?", "good")])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_states_that_are_not_finite_are_named_like_any_others(make_backbone, preferences, value):
    local = make_backbone("llama")
    fitted, _ = RewardModel.fit(local, preferences, num_features=32)
    server = StateServer(local.model)
    model = RewardModel(remote(local, server), fitted.head)
    server.spoil = first_data(lambda row: [value, *row[1:]])
    with pytest.raises(NonFiniteError):
        model.score("what?", ["good", "bad"])


def test_normalised_states_are_refused(make_backbone):
    local = make_backbone("llama")
    with pytest.raises(BackendError, match="states of length 1, expected raw ones"):
        remote(local, StateServer(local.model, normalises=True))


def test_a_prefix_cache_that_keeps_states_back(make_backbone):
    """The last token's state always comes; of the others a mean would miss some."""
    local = make_backbone("llama")
    text = local.encoder.encode("what is it?", "good")
    server = StateServer(local.model, cached=3)
    rows = remote(local, server, server="sglang").hidden([text])
    torch.testing.assert_close(rows, local.hidden([text]), rtol=1e-4, atol=1e-5)
    mean = make_backbone("llama", pooling="mean")
    with pytest.raises(BackendError, match="--disable-radix-cache"):
        remote(mean, server, server="sglang").hidden([text])


def test_the_key_is_sent_and_never_told(make_backbone, monkeypatch):
    local = make_backbone("llama")
    server = StateServer(local.model)
    with pytest.raises(BackendError, match="STATES_KEY"):
        remote(local, server, api_key_env="STATES_KEY")
    monkeypatch.setenv("STATES_KEY", "s3cret")
    backbone = remote(local, server, api_key_env="STATES_KEY")
    assert set(server.keys) == {"Bearer s3cret"}
    server.failures = [401]
    with pytest.raises(BackendError) as caught:
        backbone.hidden([local.encoder.encode("a", "b")])
    assert "s3cret" not in str(caught.value) + repr(backbone.model)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"server": "tgi"}, "server"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"model": "other"}, "served"),
        ({"api_key_env": "a key"}, "api_key_env"),
    ],
)
def test_what_makes_no_sense(make_backbone, kwargs, named):
    local = make_backbone("llama")
    with pytest.raises((InputError, BackendError), match=named):
        remote(local, StateServer(local.model), **kwargs)
    with pytest.raises(InputError, match="url"):
        Backbone.from_server("localhost", tokenizer=local.tokenizer)
    config = BackboneConfig(kind="classifier", pooling="classifier")
    with pytest.raises(InputError, match="config"):
        Backbone.from_server(URL, tokenizer=local.tokenizer, config=config)


def test_a_head_fitted_on_served_states_is_saved_without_them(make_backbone, preferences, tmp_path):
    served_body = remote(make_backbone("llama"), StateServer(make_backbone("llama").model))
    model, _ = RewardModel.fit(served_body, preferences, num_features=32)
    model.save_pretrained(tmp_path / "rm")
    with pytest.raises(CheckpointError, match=r"come from a server, expected backbone=Backbone\.from_server"):
        RewardModel.from_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm", backbone=served_body)
    assert torch.equal(again.score("what?", ["a", "b"]).logit, model.score("what?", ["a", "b"]).logit)
    with pytest.raises(InputError, match="'embed' for hidden states from a server"):
        model.save_pretrained(tmp_path / "embedded", backbone="embed")


def test_check_shows_it(make_backbone, preferences):
    model = RewardModel.upgrade(make_backbone("llama-classifier"), preferences, dtype=torch.float32)
    body = model.backbone.model.model
    right = served(model.backbone, URL, client=ClientOptions(transport=StateServer(body)))
    report = check_model(model, preferences[:3], remote=right)
    row = next(row for row in report.rows if "server" in row.name)
    assert report.passed, report.to_markdown()
    assert row.worst is not None
    assert row.worst <= report.tolerance
    other = copy.deepcopy(body)
    with torch.no_grad():
        other.layers[0].mlp.down_proj.weight.mul_(1.5)
    wrong = served(model.backbone, URL, client=ClientOptions(transport=StateServer(other)))
    assert not check_model(model, preferences[:3], remote=wrong).passed
