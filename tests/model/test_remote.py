"""States from a server: the scores are the local ones within its dtype, and what a server may get wrong is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.state_server import StateServer

from rmcore._base.errors import BackendError, InputError
from rmcore._base.retry import RetryPolicy
from rmcore.engine import RewardEngine
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.check import check_model, served
from rmcore.model.reward_model import RewardModel

URL = "http://localhost:8000"
AT_ONCE = RetryPolicy(max_attempts=3, base_s=0.0, max_retry_after_s=5.0)
PROMPTS = ["tell me about the fox", "what is the capital of France?"]
GROUPS = [["a good dog", "a bad dog " * 3, "home"], ["Paris", "Paris is the capital"]]


def remote(local: Backbone, stand_in: StateServer, **kwargs: Any) -> Backbone:
    return Backbone.from_server(
        URL, tokenizer=local.tokenizer, transport=stand_in, retry=AT_ONCE, config=local.config, **kwargs
    )


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
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
    local = make_backbone("llama")
    server = StateServer(local.model)
    backbone = remote(local, server)
    waits: list[float] = []

    class Clock:
        def now(self) -> float:
            return 0.0

        def wall(self) -> float:
            return 0.0

        async def sleep(self, seconds: float) -> None:
            waits.append(seconds)

    backbone.model._clock = Clock()
    text = local.encoder.encode("a", "b")
    server.failures = [503, 429]
    torch.testing.assert_close(backbone.hidden([text]), local.hidden([text]), rtol=1e-4, atol=1e-5)
    assert waits == [1.0, 1.0]
    server.failures = [503, 503, 503]
    with pytest.raises(BackendError, match=r"HTTP 503: .*overloaded.* after 3 tries"):
        backbone.hidden([text])
    server.failures = [400]
    with pytest.raises(BackendError, match=r"HTTP 400: .* after 1 tries"):
        backbone.hidden([text])


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
    [({"server": "tgi"}, "server"), ({"concurrency": 0}, "concurrency"), ({"model": "other"}, "served")],
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


def test_check_shows_it(make_backbone, preferences):
    model = RewardModel.upgrade(make_backbone("llama-classifier"), preferences, dtype=torch.float32)
    body = model.backbone.model.model
    right = served(model.backbone, URL, transport=StateServer(body))
    report = check_model(model, preferences[:3], remote=right)
    row = next(row for row in report.rows if "server" in row.name)
    assert report.passed, report.to_markdown()
    assert row.worst is not None
    assert row.worst <= report.tolerance
    other = copy.deepcopy(body)
    with torch.no_grad():
        other.layers[0].mlp.down_proj.weight.mul_(1.5)
    wrong = served(model.backbone, URL, transport=StateServer(other))
    assert not check_model(model, preferences[:3], remote=wrong).passed
