"""Training the layer and the backbone: the loss falls, the bound holds, the same seed is the same run."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.head import SNGPHead
from rmcore.head.fit import fit
from rmcore.model import Preference, RewardModel, training
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.training import finetune, train_layer

BOUND = 0.95


@pytest.fixture(scope="module")
def noisy(make_data):
    """Four channels that matter among 28 louder ones that do not: what a trained W can find and a kernel cannot."""

    def make(seed, pairs=1200):
        data = make_data(rows=800, size=32, pairs=pairs, seed=seed, dtype=torch.float32)
        data.hidden[:, 4:] *= 2
        return data

    return make


def head_of(h=32, **config):
    return SNGPHead(h, **({"num_features": 128, "layer_size": 8, "kernel_scale": 3.0, "ridge": 0.3} | config))


def norm(head):
    return float(torch.linalg.matrix_norm(head.normalized_weight(converged=True).detach().double(), 2))


def held_out_loss(head, data):
    rewards = head.score(data.hidden, backend="torch").logit
    g = rewards[data.pairs[:, 0]] - rewards[data.pairs[:, 1]]
    return float(torch.nn.functional.binary_cross_entropy_with_logits(g, data.labels))


# -- the layer -------------------------------------------------------------------------------------------------------


def test_training_the_layer_beats_a_random_one(noisy):
    data, held_out = noisy(0), noisy(1)
    random = head_of()
    trained = head_of()
    report = train_layer(trained, data.hidden, data.labels, data.pairs, epochs=8, batch_size=64, lr=8e-3)
    assert len(report.losses) == 8
    assert report.steps == 8 * math.ceil(1200 / 64)
    assert report.best_epoch == 8
    assert report.validation_losses == ()
    assert report.losses[-1] < report.losses[0] - 0.1
    assert norm(trained) <= BOUND * (1 + 1e-5)
    losses = [
        held_out_loss(fit(h, data.hidden, data.labels, pairs=data.pairs, dtype=torch.float32)[0], held_out)
        for h in (random, trained)
    ]
    assert losses[1] < losses[0] - 0.05


def test_the_bound_holds_at_every_step(noisy, monkeypatch):
    """What a training forward really multiplies by, with σ from one step of power iteration."""
    data = noisy(0)
    norms, normalized = [], SNGPHead.normalized_weight

    def watched(self, *, converged=False):
        weight = normalized(self, converged=converged)
        norms.append(float(torch.linalg.matrix_norm(weight.detach(), 2)))
        return weight

    head = head_of()
    with torch.no_grad():
        head.weight.mul_(5)
    monkeypatch.setattr(SNGPHead, "normalized_weight", watched)
    train_layer(head, data.hidden, data.labels, data.pairs, epochs=2, batch_size=128, lr=5e-3)
    # σ is at most one optimiser step behind a converged one: lr on each of 8·32 entries is at most 16·5e-3
    assert max(norms) <= BOUND * 1.05
    assert len(norms) >= 20


def test_the_same_seed_is_the_same_run(noisy):
    data = noisy(0)

    def run(seed):
        head = head_of()
        report = train_layer(head, data.hidden, data.labels, data.pairs, epochs=2, seed=seed)
        return report, {name: t.clone() for name, t in head.state_dict().items()}

    torch.manual_seed(1)
    (first, weights), (other, _) = run(0), run(1)
    torch.manual_seed(2)
    again, same = run(0)
    assert first == again
    assert all(torch.equal(t, same[name]) for name, t in weights.items())
    assert first != other


def test_the_epoch_with_the_least_validation_loss_is_kept(noisy):
    data, held_out = noisy(0, pairs=60), noisy(1)
    head = head_of(ridge=1e-3)
    validation = (held_out.hidden, held_out.labels, held_out.pairs)
    report = train_layer(head, data.hidden, data.labels, data.pairs, epochs=40, batch_size=16, lr=2e-2,
                         validation=validation)  # fmt: skip
    losses = report.validation_losses
    assert len(losses) == 41
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # β is still zero
    assert report.best_epoch == losses.index(min(losses)) < 40  # 60 pairs are soon learned by heart
    kept = training._head_loss(head, *validation)
    assert kept == pytest.approx(min(losses), rel=1e-6)


def test_the_length_scale_is_set_before_the_start_and_kept(noisy):
    data = noisy(0)
    head = head_of()
    expected = head_of().set_length_scale(data.hidden)
    train_layer(head, data.hidden, data.labels, data.pairs, epochs=1)
    assert float(head.length_scale) == pytest.approx(expected, rel=1e-6)
    frozen, _ = fit(head, data.hidden, data.labels, pairs=data.pairs)
    assert frozen.config.length_scale == pytest.approx(expected, rel=1e-6)
    own = head_of(length_scale=3.5)
    train_layer(own, data.hidden, data.labels, data.pairs, epochs=1)
    assert float(own.length_scale) == 3.5


@pytest.mark.parametrize("training_mode", [True, False])
def test_the_mode_is_left_as_it_was(noisy, training_mode):
    data = noisy(0)
    head = head_of().train(training_mode)
    train_layer(head, data.hidden, data.labels, data.pairs, epochs=1, validation=(*data[:3],))
    assert head.training is training_mode


def test_concat_heads_train_their_offset(noisy):
    data = noisy(0)
    head = head_of(mode="concat")
    labels = (data.hidden[:, 0] > -0.8).float()  # mostly 1
    calls = []
    report = train_layer(head, data.hidden, labels, epochs=4, batch_size=100, lr=1e-2,
                         progress=lambda *call: calls.append(call))  # fmt: skip
    assert report.losses[-1] < report.losses[0]
    assert float(head.beta0.detach()) > 0
    assert calls[0] == ("training", 1, 32)
    assert calls[-1] == ("training", 32, 32)
    frozen, _ = fit(head, data.hidden, labels, dtype=torch.float32)
    assert frozen.beta0 == float(head.beta0.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hidden_states_come_in_any_dtype(noisy, dtype):
    data = noisy(0)
    report = train_layer(head_of(), data.hidden.to(dtype), data.labels, data.pairs, epochs=1)
    assert math.isfinite(report.losses[0])


def test_states_made_under_inference_mode_can_be_trained_on(noisy):
    data = noisy(0)
    with torch.inference_mode():
        hidden, labels = data.hidden * 1, data.labels * 1
    assert train_layer(head_of(), hidden, labels, data.pairs, epochs=1).steps == 5


def test_a_diverging_run_is_reported_and_undone(noisy):
    data = noisy(0)
    head = head_of()
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"^loss: got .*Lower the learning rate"):
        train_layer(head, data.hidden, data.labels, data.pairs, epochs=5, lr=1e36)
    assert all(torch.equal(p, before[name]) for name, p in head.named_parameters())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("epochs", {"epochs": 0}),
        ("batch_size", {"batch_size": 0}),
        ("lr", {"lr": 0.0}),
        ("lr", {"lr": math.nan}),
        ("weight_decay", {"weight_decay": -1.0}),
        ("pairs", {"pairs": None}),
        ("pairs", {"pairs": torch.tensor([[0, 800]])}),
        ("labels", {"labels": torch.ones(3)}),
        ("labels", {"labels": torch.full((1200,), 2.0)}),
        ("hidden", {"hidden": torch.ones(800, 31)}),
        ("validation: labels", {"validation": (torch.ones(2, 32), torch.ones(2), torch.tensor([[0, 1]]))}),
    ],
)
def test_what_does_not_fit_is_named(noisy, name, changes):
    data = noisy(0)
    given = {"hidden": data.hidden, "labels": data.labels, "pairs": data.pairs} | changes
    with pytest.raises(InputError, match=f"^{name}: got .*, expected "):
        train_layer(head_of(), **given)


def test_a_head_without_a_layer_has_nothing_to_train(noisy):
    data = noisy(0)
    with pytest.raises(InputError, match=r"^head: got layer_size=None.*rmcore\.head\.fit\.fit"):
        train_layer(SNGPHead(32), data.hidden, data.labels, data.pairs)


# -- the backbone ----------------------------------------------------------------------------------------------------

WORDS = ["good", "kind", "clear", "bad", "rude", "vague", "the", "answer", "is", "a", "question", "why", "how"]


def tiny_backbone(pooling="mean", dtype=torch.float32, **config):
    """A two-layer BERT of width 32 with random weights and one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=64, max_position_embeddings=64
            )
        )  # fmt: skip
    return Backbone(model.to(dtype).eval(), fast, BackboneConfig(pooling=pooling, **config))


def preferences(n=48, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def words(pool, k):
        return " ".join(pool[i] for i in torch.randint(len(pool), (k,), generator=generator).tolist())

    return [
        Preference(
            words(WORDS[9:], 3),
            f"{words(WORDS[:3], 1)} {words(WORDS[6:9], 1 + k % 4)}",
            f"{words(WORDS[3:6], 1)} {words(WORDS[6:9], 1 + k % 3)}",
        )
        for k in range(n)
    ]


def tiny_head(mode="difference", h=32, **config):
    return SNGPHead(h, num_features=64, mode=mode, kernel_scale=3.0, **config)


def weights(backbone):
    return {name: p.detach().clone() for name, p in backbone.model.named_parameters()}


@pytest.mark.parametrize(("mode", "epochs"), [("difference", 6), ("concat", 12)])
def test_finetuning_learns_and_ends_in_eval_mode(mode, epochs):
    backbone, head, data = tiny_backbone(), tiny_head(mode), preferences()
    before = weights(backbone)
    calls = []
    report = finetune(backbone, head, data, epochs=epochs, batch_pairs=8, lr_backbone=2e-3, lr_head=5e-2,
                      progress=lambda *call: calls.append(call))  # fmt: skip
    assert not backbone.model.training
    assert report.steps == 6 * epochs
    assert report.losses[-1] < report.losses[0] - 0.1
    after = weights(backbone)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"} <= moved
    assert all(bool(t.isfinite().all()) for t in after.values())
    assert math.isfinite(float(head.length_scale))
    assert calls[-1] == ("finetuning", 6 * epochs, 6 * epochs)
    model, fitted = RewardModel.fit(backbone, data, head.config, dtype=torch.float32)
    assert fitted.converged
    text = [backbone.encoder.encode("why", "good answer"), backbone.encoder.encode("why", "rude answer")]
    if mode == "difference":
        good, bad = model.head.score(backbone.hidden(text)).logit.tolist()
        assert good > bad


def test_finetuning_is_repeatable_and_leaves_the_global_generator_alone():
    def run(noise):
        torch.manual_seed(noise)
        backbone, head = tiny_backbone(), tiny_head(layer_size=8)
        torch.rand(3)
        state = torch.get_rng_state()
        report = finetune(backbone, head, preferences(16), epochs=2, batch_pairs=4, accumulation=2, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        return report, weights(backbone), head.state_dict()

    (first, w1, h1), (second, w2, h2) = run(1), run(2)
    assert first == second
    assert first.steps == 4
    assert all(torch.equal(w1[name], w2[name]) for name in w1)
    assert all(torch.equal(h1[name], h2[name]) for name in h1)


def test_accumulation_is_a_larger_batch():
    """Without dropout, two halves accumulated are one step on the whole."""

    def run(**sizes):
        backbone, head = tiny_backbone(), tiny_head()
        for module in backbone.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        finetune(backbone, head, preferences(22), lr_backbone=1e-3, warmup=0.0, **sizes)
        return weights(backbone)["encoder.layer.0.output.dense.weight"], head.beta.detach()

    (w1, b1), (w2, b2) = run(batch_pairs=8, accumulation=1), run(batch_pairs=4, accumulation=2)
    # Adam divides a gradient by its own size, so rounding (padding differs) can move an entry near zero gradient by
    # up to a few learning rates; all but those agree.
    assert float((w1 - w2).abs().median()) < 1e-6
    assert float((b1 - b2).abs().median()) < 1e-5


def test_frozen_parameters_stay():
    backbone = tiny_backbone()
    backbone.model.embeddings.requires_grad_(False)
    before = weights(backbone)
    finetune(backbone, tiny_head(), preferences(8), lr_backbone=1e-2)
    after = weights(backbone)
    assert torch.equal(after["embeddings.word_embeddings.weight"], before["embeddings.word_embeddings.weight"])
    assert not torch.equal(after["encoder.layer.0.output.dense.weight"], before["encoder.layer.0.output.dense.weight"])


def test_the_best_weights_of_backbone_and_head_are_kept():
    backbone, head, held_out = tiny_backbone(), tiny_head(), preferences(20, seed=9)
    # The held-out labels contradict the training data, so every step makes them worse.
    held_out = [Preference(p.prompt, p.rejected, p.chosen) for p in held_out]
    before = weights(backbone)
    report = finetune(backbone, head, preferences(), epochs=3, lr_backbone=2e-3, lr_head=5e-2, validation=held_out)
    assert len(report.validation_losses) == 4
    assert report.best_epoch == 0
    assert all(torch.equal(t, before[name]) for name, t in weights(backbone).items())
    assert not head.beta.any()
    assert not backbone.model.training


def test_a_length_feature_and_other_poolings_train():
    for pooling, config in (("first", {}), ("last", {"append_eos": False}), ("mean", {"layer": 1})):
        backbone = tiny_backbone(pooling, length_feature=0.5, **config)
        report = finetune(backbone, tiny_head(h=33), preferences(8))
        assert math.isfinite(report.losses[0])


def test_autocast_reaches_the_backbone():
    report = finetune(tiny_backbone(), tiny_head(), preferences(8), autocast=torch.bfloat16)
    assert math.isfinite(report.losses[0])


def test_a_diverging_run_ends_in_eval_mode():
    backbone = tiny_backbone()
    with pytest.raises(NonFiniteError, match=r"^loss: got .*Lower the learning rate"):
        finetune(backbone, tiny_head(), preferences(), epochs=20, lr_backbone=1e36, warmup=0.0)
    assert not backbone.model.training


def test_half_precision_parameters_are_refused_or_warned_about(caplog):
    with pytest.raises(InputError, match=r"^backbone: got trainable parameters in float16"):
        finetune(tiny_backbone(dtype=torch.float16), tiny_head(), preferences(4))
    with caplog.at_level(logging.WARNING, logger="rmcore"):
        finetune(tiny_backbone(dtype=torch.bfloat16), tiny_head(), preferences(4))
    assert "bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("preferences", {"preferences": []}),
        (r"preferences\[1\]\.label", {"preferences": [*preferences(1), Preference("a", "b", "c", 1.5)]}),
        (r"preferences\[0\]", {"preferences": [Preference("how " * 70, "good", "bad")]}),
        (r"head\.hidden_size", {"head": tiny_head(h=31)}),
        ("epochs", {"epochs": 0}),
        ("batch_pairs", {"batch_pairs": 0}),
        ("accumulation", {"accumulation": -1}),
        ("lr_backbone", {"lr_backbone": 0.0}),
        ("lr_head", {"lr_head": math.inf}),
        ("max_grad_norm", {"max_grad_norm": 0.0}),
        ("warmup", {"warmup": 1.0}),
        ("weight_decay", {"weight_decay": -0.1}),
    ],
)
def test_what_does_not_fit_finetuning_is_named(name, changes):
    given = {"backbone": tiny_backbone(), "head": tiny_head(), "preferences": preferences(2)} | changes
    with pytest.raises(InputError, match=f"^{name}: "):
        finetune(**given)


def test_a_wholly_frozen_backbone_is_refused():
    backbone = tiny_backbone()
    backbone.model.requires_grad_(False)
    with pytest.raises(InputError, match=r"^backbone: got no parameter that requires grad"):
        finetune(backbone, tiny_head(), preferences(2))


def test_finetuning_reports_its_loss_after_each_step(make_backbone, preferences):
    backbone = make_backbone("qwen2", pooling="mean")
    head = SNGPHead(backbone.hidden_size, num_features=16)
    losses: list[float] = []
    report = finetune(backbone, head, preferences[:6], epochs=2, batch_pairs=2, report_loss=losses.append)
    assert len(losses) == report.steps == 6
    assert losses[2] == pytest.approx(report.losses[0], rel=1e-6)
    assert losses[5] == pytest.approx(report.losses[1], rel=1e-6)
