"""Shared beginnings computed once in training: losses and gradients are those of texts in rows of their own."""

from __future__ import annotations

import math

import pytest
import torch

from rmcore._base.errors import BackendError, InputError
from rmcore.integrations.training import PairDataset, TrainingPair
from rmcore.integrations.trl import PairwiseRewardTrainer

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

HEAD = {"num_features": 64, "kernel_scale": 3.0, "layer_size": 8}


@pytest.fixture
def pairs(preferences):
    """Two prompts, two pairs of each, one of them twice; responses of different lengths."""
    chosen = [preferences[0], preferences[1], preferences[3], preferences[3]]
    return [
        TrainingPair(p.prompt, p.chosen + " and runs home" * (k % 2), p.rejected, 0.9 - 0.2 * k, 0.1 * k, 1 + k % 2)
        for k, p in enumerate(chosen)
    ]


def step_of(trainer, pairs):
    """(loss, gradients, tokens) of one batch, as ``Trainer.training_step`` takes it."""
    data = PairDataset(trainer.backbone, pairs, trainer.mode)
    batch = trainer.data_collator([data[k] for k in range(len(pairs))])
    trainer.create_optimizer()
    loss = trainer.training_step(trainer.model, batch, num_items_in_batch=len(pairs))
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    found["head.beta"] = trainer.head.beta.grad.clone()
    return loss, found, batch["input_ids"].numel()


@pytest.mark.parametrize("mode", ["difference", "concat"])
@pytest.mark.parametrize("reading", [{"pooling": "last"}, {"pooling": "mean"}, {"pooling": "last", "layer": 1}])
def test_losses_and_gradients_are_those_of_padded_rows(mode, reading, backbone_of, config_of, pairs):
    found = {}
    for name, settings in {
        "padded": {},
        "shared": {"share_prefixes": True},
        "checkpointed": {"share_prefixes": True, "gradient_checkpointing": True},
    }.items():
        backbone = backbone_of(length_feature=0.5, **reading)
        trainer = PairwiseRewardTrainer(
            backbone, config_of(**settings), head={**HEAD, "mode": mode, "length_scale": 2.0}, train_dataset=pairs
        )
        torch.nn.init.normal_(trainer.head.beta, generator=torch.Generator().manual_seed(1))
        found[name] = step_of(trainer, pairs)
    loss, gradients, tokens = found.pop("padded")
    for mine, others, count in found.values():
        assert count < 0.8 * tokens
        torch.testing.assert_close(mine, loss, rtol=1e-5, atol=0)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = float(gradient.abs().max())
            apart = float((others[name] - gradient).abs().max())
            # β's gradient is a difference of features up to √(2/D), whose arguments are a few roundings apart.
            rounding = 1e-6 * math.sqrt(2 / trainer.head.config.num_features) if name == "head.beta" else 0.0
            assert apart <= 1e-4 * scale + rounding, (name, apart / scale)


def test_a_run_trains_and_fits_what_it_would_with_padding(backbone_of, config_of, pairs, tmp_path):
    """With adapters, evaluations between steps, and the model that comes of it."""
    peft = pytest.importorskip("peft")
    base = backbone_of("qwen3")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    runs = []
    for shared in (False, True):
        args = config_of(
            share_prefixes=shared, eval_strategy="steps", eval_steps=2, posterior_at_evaluation=True,
            head_dtype="float32", adam_epsilon=1e-3, max_steps=3, per_device_eval_batch_size=3,
        )  # fmt: skip
        torch.manual_seed(0)  # adapters are drawn
        trainer = PairwiseRewardTrainer(
            str(tmp_path / "base"), args, head={**HEAD, "mode": "concat"}, train_dataset=pairs, eval_dataset=pairs,
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    told = [[entry.get("loss", entry.get("eval_loss")) for entry in run.state.log_history[:-1]] for run in runs]
    assert told[1] == pytest.approx(told[0], rel=1e-4)
    beta = runs[0].frozen.beta
    torch.testing.assert_close(runs[1].frozen.beta, beta, rtol=0, atol=1e-3 * float(beta.abs().max()))


@pytest.mark.parametrize("settings", [{"padding_free": True}, {"share_prefixes": True}, {}])
def test_the_loss_of_an_evaluation_is_a_mean_of_pairs(settings, backbone_of, config_of, preferences):
    """Not of batches, of which the last is smaller, however texts lie in one."""
    args = config_of(per_device_eval_batch_size=4, **settings)
    head = {**HEAD, "length_scale": 2.0}
    trainer = PairwiseRewardTrainer(backbone_of(), args, head=head, train_dataset=preferences)
    torch.nn.init.normal_(trainer.head.beta, std=3.0, generator=torch.Generator().manual_seed(1))
    found = trainer.evaluate(preferences[:5])
    assert found["eval_loss"] == pytest.approx(found["eval_log_loss"], rel=1e-5)


def test_what_cannot_share_is_refused(backbone_of, config_of, preferences, monkeypatch):
    args = config_of(share_prefixes=True)
    for backbone, why in (
        (backbone_of("bert", pooling="mean"), "an encoder"),
        (backbone_of(model={"attention_dropout": 0.1}), "attention_dropout 0 and not 0.1"),
    ):
        with pytest.raises(InputError, match=rf"^share_prefixes: got True, expected False.*{why}"):
            PairwiseRewardTrainer(backbone, args, head=HEAD, train_dataset=preferences)
    with pytest.raises(InputError, match=r"^share_prefixes"):
        config_of(share_prefixes=True, padding_free=True)
    trainer = PairwiseRewardTrainer(backbone_of(), args, head=HEAD, train_dataset=preferences)
    layer = trainer.model.layers[1]
    monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(BackendError, match=r"^share_prefixes: got 1 of 2 layers"):
        trainer.rows(trainer.model)
