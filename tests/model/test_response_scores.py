"""RewardModel.score: the model alone, in the names and with the numbers of an engine without a judge."""

from __future__ import annotations

import pytest
import torch
from support.models import own_inputs

from rmcore import RewardEngine, RewardModel
from rmcore._base.errors import InputError
from rmcore.engine.selection import member_uncertainty
from rmcore.model import ResponseScores

PROMPTS = ["tell me about the dog", [{"role": "user", "content": "what is the capital of France?"}], "the fox", "home"]
RESPONSES = [
    ["a good dog", "a bad dog", "the quick fox"],
    ["Paris is the capital.", "numbers 0 1 2"],
    ["a brown fox"],
    ["good answer", "bad", "good answer"],
]


@pytest.fixture(scope="module", params=["difference", "concat", "linear"])
def model(request, make_backbone, preferences) -> RewardModel:
    if request.param == "linear":
        return RewardModel.upgrade(make_backbone("bert-classifier"), preferences, dtype=torch.float32)
    backbone = make_backbone("llama", pooling="mean")
    return RewardModel.fit(backbone, preferences, mode=request.param, num_features=64, dtype=torch.float32)[0]


@pytest.mark.parametrize("orders", ["both", "one"])
def test_the_numbers_are_the_engines(model, orders):
    """Groups of several sizes, of one response, with equal responses, in one call."""
    found = model.score(PROMPTS, RESPONSES, orders=orders)
    expected = RewardEngine(model, orders=orders).score(PROMPTS, RESPONSES)
    assert len(found) == len(expected) == 4
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("preference", "uncertainty", "logit", "variance", "rewards"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-6, atol=1e-9)
            assert getattr(mine, name).dtype == torch.float64
        torch.testing.assert_close(mine.response_uncertainty, member_uncertainty(theirs), rtol=1e-6, atol=1e-9)
    assert float(found[0].preference.abs().max()) > 0.01
    assert float(found[0].uncertainty.max()) > 1.0001


def test_one_prompt_gives_one_result(model):
    one = model.score(PROMPTS[0], RESPONSES[0])
    assert isinstance(one, ResponseScores)
    (listed,) = model.score(PROMPTS[:1], RESPONSES[:1])
    assert torch.equal(one.preference, listed.preference)


def test_equal_responses_have_nothing_between_them_and_no_doubt(model):
    group = model.score("home", ["good answer", "bad", "good answer"])
    assert (float(group.preference[0, 2]), float(group.uncertainty[0, 2])) == (0.0, 1.0)
    assert float(group.rewards[0]) == pytest.approx(float(group.rewards[2]), rel=1e-6)


def test_rewards_rank(make_backbone, preferences):
    model = RewardModel.upgrade(make_backbone("bert-classifier"), preferences, dtype=torch.float32)
    texts = ["a good dog", "a bad fox", "Paris", "the capital of France is Paris"]
    group = model.score("what is it?", texts)
    encode = model.backbone.encoder.encode
    with torch.no_grad():
        own = [
            float(model.backbone.model(**own_inputs(model.backbone, encode("what is it?", t))).logits) for t in texts
        ]
    assert group.ranking.tolist() == sorted(range(4), key=lambda k: -own[k])
    assert float(group.rewards.sum()) == pytest.approx(0, abs=1e-9)
    assert model.score("p", ["alone"]).rewards.tolist() == [0.0]
    assert model.score("p", ["alone"]).response_uncertainty.tolist() == [1.0]


@pytest.mark.parametrize(
    ("prompts", "responses", "named"),
    [
        ("p", "a text", "responses"),
        ("p", [["a"], ["b"]], "since prompts is one text"),
        (["p"], ["a", "b"], "responses"),
        (["p"], ["ab"], r"responses\[0\]"),
        (["p"], [[]], r"responses\[0\]"),
        ([], [], "prompts"),
        ([""], [["a", 1]], r"responses\[0\]\[1\]"),
    ],
)
def test_wrong_nesting_is_named(model, prompts, responses, named):
    with pytest.raises(InputError, match=named):
        model.score(prompts, responses)


def test_an_unknown_order_is_named(model):
    with pytest.raises(InputError, match="orders: got 'two'"):
        model.score(PROMPTS, RESPONSES, orders="two")
