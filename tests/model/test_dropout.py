"""MC dropout through a backbone: the masks are the network's, whatever is batched, and nothing is left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from rmcore._base.errors import InputError
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.dropout import _Masks, dropout_layers, dropout_pairs, dropout_states
from rmcore.model.reward_model import RewardModel
from rmcore.model.state_cache import StateCache

TEXTS = [
    ("the quick brown fox", "jumps over the lazy dog"),
    ("what is the capital of France?", "Paris is the capital of France. " * 3),
    ("what is the capital of France?", "Paris is a good answer"),
    ("what is the capital of France?", "the lazy dog"),
]


def encode(backbone: Backbone):
    return [backbone.encoder.encode(prompt, response) for prompt, response in TEXTS]


@pytest.fixture(scope="module")
def bert(make_backbone) -> Backbone:
    return make_backbone("bert", pooling="mean")


@pytest.fixture(scope="module")
def phi(tokenizer_for) -> dict[str, Backbone]:
    """A decoder with dropout, its shared beginnings packed and not."""
    import transformers

    tokenizer = tokenizer_for("llama")
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, resid_pdrop=0.2, embd_pdrop=0.1, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.PhiModel(config).eval()
    return {how: Backbone(model, tokenizer, BackboneConfig(), packing=how) for how in ("sdpa", "padded")}


def test_the_states_are_those_of_the_network_with_its_masks(bert, make_backbone):
    """Against the same model whose dropout layers are replaced by products with the vectors of a pass."""
    found = dropout_states(bert, encode(bert), passes=2, seed=5)
    plain = bert.hidden(encode(bert))
    for number, states in enumerate(found):
        other = make_backbone("bert", pooling="mean")
        masks = _Masks(5, number, dropout_layers(other))
        for name in masks.layers:
            parent, _, child = name.rpartition(".")
            setattr(other.model.get_submodule(parent), child, _Product(masks, name, other.model.config))
        torch.testing.assert_close(states, other.hidden(encode(other)), rtol=1e-5, atol=2e-6)
        assert float((states - plain).abs().max()) > 1e-2
    assert float((found[0] - found[1]).abs().max()) > 1e-2


class _Product(nn.Module):
    def __init__(self, masks: _Masks, name: str, config) -> None:
        super().__init__()
        self.name, self.masks, self.p = name, masks, 0.0
        self.width = config.hidden_size

    def forward(self, x):
        generator_free = torch.empty(self.width)
        return x * self.masks.of(self.name, generator_free)


def test_draws_go_by_seed_and_not_by_what_is_batched(bert, phi):
    texts = encode(bert)
    found = dropout_states(bert, texts, passes=3, seed=1)
    assert torch.equal(found, dropout_states(bert, texts, passes=3, seed=1))
    alone = torch.cat([dropout_states(bert, [text], passes=3, seed=1) for text in texts], 1)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=2e-6)
    assert torch.equal(found[:2], dropout_states(bert, texts, passes=2, seed=1))
    assert not torch.allclose(found, dropout_states(bert, texts, passes=3, seed=2), atol=1e-3)
    packed, padded = (dropout_states(phi[how], encode(phi[how]), passes=3) for how in ("sdpa", "padded"))
    assert phi["sdpa"].stats.packed_tokens > 0
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)
    assert float((packed[0] - packed[1]).abs().max()) > 1e-2


def test_a_mask_drops_its_share_and_keeps_the_mean():
    masks = torch.stack([_Masks(0, number, {"a": 0.3}).of("a", torch.empty(1, 64)) for number in range(200)])
    assert masks.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    dropped = float((masks == 0).double().mean())
    assert dropped == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / masks.numel()) ** 0.5)
    other = torch.stack([_Masks(0, number, {"b": 0.3}).of("b", torch.empty(1, 64)) for number in range(200)])
    agree = float(((masks == 0) == (other == 0)).double().mean())  # of independent draws 0.3² + 0.7²
    assert agree == pytest.approx(0.58, abs=0.02)


def test_the_model_is_left_as_it_was_even_by_a_pass_that_fails(bert, monkeypatch):
    texts = encode(bert)
    before = bert.hidden(texts)
    training = {name: module.training for name, module in bert.model.named_modules()}

    def as_before() -> None:
        assert {name: module.training for name, module in bert.model.named_modules()} == training
        assert not any(module._forward_hooks for module in bert.model.modules())
        assert torch.equal(bert.hidden(texts), before)

    dropout_states(bert, texts, passes=1)
    as_before()
    with monkeypatch.context() as patch:
        patch.setattr(bert.model.encoder.layer[1], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dropout_states(bert, texts, passes=1)
    as_before()


def test_other_threads_states_have_no_masks(bert):
    texts = encode(bert)
    before, found = bert.hidden(texts), []
    entered = threading.Event()

    def told(done: int, _total: int) -> None:
        entered.set()

    def others() -> None:
        entered.wait(10)
        found.extend(bert.hidden(texts) for _ in range(4))

    thread = threading.Thread(target=others)
    thread.start()
    drawn = dropout_states(bert, texts, passes=8, progress=told)
    thread.join()
    assert all(torch.equal(states, before) for states in found)
    assert torch.equal(drawn, dropout_states(bert, texts, passes=8))


def test_kept_states_are_neither_read_nor_written(make_backbone, tmp_path):
    backbone = make_backbone("bert", pooling="mean")
    backbone.state_cache = StateCache(tmp_path, "states", backbone.hidden_size)
    before = backbone.hidden(encode(backbone))
    found = dropout_states(backbone, encode(backbone), passes=1)
    assert float((found[0] - before).abs().max()) > 1e-2
    assert torch.equal(backbone.hidden(encode(backbone)), before)
    assert backbone.state_cache is not None


def test_pairs_have_the_variance_of_their_difference(make_backbone, preferences):
    model, _ = RewardModel.fit(make_backbone("bert", pooling="mean"), preferences[:8], num_features=32)
    responses = ["a good fox", "a bad fox", "a good fox", "short and polite"]
    found = dropout_pairs(model, ["tell me"], [responses], passes=6, seed=3)
    texts = [model.backbone.encoder.encode("tell me", response) for response in responses]
    states = dropout_states(model.backbone, texts, passes=6, seed=3)
    rewards = torch.stack([model.row_scores(rows) for rows in states])
    difference = rewards[:, 0] - rewards[:, 1]
    assert float(found.logit[0]) == pytest.approx(float(difference.mean()))
    assert float(found.variance[0]) == pytest.approx(float(difference.var(correction=0)))
    assert float(found.variance[1]) == 0, "equal responses are equal under every mask"
    assert torch.equal(found.epistemic, found.variance)
    assert found.aleatoric is None


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {}, "backbone: got LlamaModel, which has no dropout"),
        ("bert", {"rate": 1.0}, "rate: got 1.0"),
        ("bert", {"passes": 0}, "passes: got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(kind, change, message, make_backbone):
    backbone = make_backbone(kind)
    with pytest.raises(InputError, match=message):
        dropout_states(backbone, encode(backbone), **change)


def test_a_rate_of_ones_own_masks_layers_whose_own_is_nothing(make_backbone):
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    backbone = make_backbone("bert", model=silent)
    with pytest.raises(InputError, match="which has no dropout"):
        dropout_layers(backbone)
    assert set(dropout_layers(backbone, 0.25).values()) == {0.25}
    found = dropout_states(backbone, encode(backbone), passes=1, rate=0.25)
    assert float((found[0] - backbone.hidden(encode(backbone))).abs().max()) > 1e-2
