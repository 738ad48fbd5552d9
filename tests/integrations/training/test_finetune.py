"""Fine-tuning in one call, on transformers' Trainer: it learns, repeats, keeps the best, names what is wrong."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.head import SNGPHead
from rmcore.model import Preference, RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

from rmcore.integrations.training.finetune import finetune

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
