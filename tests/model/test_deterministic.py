"""``deterministic="batch"``: no bit of a score depends on what else is scored in the call."""

from __future__ import annotations

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.engine import RewardEngine
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.reward_model import RewardModel

PROMPTS = ["tell me about the quick brown fox", "what is the capital of France? " * 3, "hi"]
GROUPS = [
    ["a good dog", "a bad dog " * 9, "the fox runs home"],
    ["Paris", "Paris is the capital", "a good answer is short, correct and polite " * 4],
    ["the quick fox", "one", "x"],
]


def deterministic(backbone: Backbone) -> Backbone:
    return Backbone(backbone.model, backbone.tokenizer, backbone.config, deterministic="batch")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_state_is_the_same_alone_and_among_others(make_backbone, kind):
    backbone = deterministic(make_backbone(kind, pooling="mean"))
    texts = [backbone.encoder.encode(p, r) for p, group in zip(PROMPTS, GROUPS, strict=True) for r in group]
    together = backbone.hidden(texts)
    for order in ([4], [8, 4], [4, 0, 1, 2, 3]):
        assert torch.equal(backbone.hidden([texts[k] for k in order]), together[order])
    assert backbone.stats.packed_tokens == 0
    assert backbone.stats.padded_tokens == backbone.stats.tokens  # nothing is padded, and nothing shared


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_a_group_scores_the_same_whatever_is_scored_with_it(make_backbone, preferences, mode, backend):
    fitted, _ = RewardModel.fit(make_backbone("llama", pooling="mean"), preferences, mode=mode, num_features=64)
    model = RewardModel(deterministic(fitted.backbone), fitted.head)
    for score in (
        lambda p, g: [(s.logit, s.variance) for s in model.score(p, g, backend=backend)],
        lambda p, g: [(s.logit, s.variance) for s in RewardEngine(model, backend=backend).score(p, g)],
        lambda p, g: [
            (s.logit, s.variance if s.novelty is None else s.novelty)
            for s in RewardEngine(model, backend=backend, novelty=mode == "difference").score(p, g)
        ],
    ):
        together = score(PROMPTS, GROUPS)
        for k in (0, 1, 2):
            alone = score([PROMPTS[k]], [GROUPS[k]])[0]
            assert all(map(torch.equal, alone, together[k]))
        turned = score(PROMPTS[::-1], GROUPS[::-1])
        assert all(torch.equal(turned[2 - k][n], together[k][n]) for k in range(3) for n in range(2))


def test_it_is_part_of_who_encoded(make_backbone):
    """States that were kept by a batching backbone are not taken for those of one that does not batch."""
    backbone = make_backbone("llama")
    backbone.files = {"model.safetensors": "0"}
    alone = deterministic(backbone)
    alone.files = backbone.files
    assert backbone.identity != alone.identity


def test_what_it_may_be(make_backbone):
    backbone = make_backbone("llama")
    with pytest.raises(InputError, match="deterministic"):
        Backbone(backbone.model, backbone.tokenizer, BackboneConfig(), deterministic="kernels")
