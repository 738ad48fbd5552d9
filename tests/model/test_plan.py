"""The planner against what torch holds at its peak, and against sums done by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.live_bytes import LiveBytes

from rmcore._base.errors import CheckpointError, InputError
from rmcore.model.plan import PlanConfig, plan_training


def described(kind: str, **changes: object):
    import transformers as t

    common = {"vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    common |= {"intermediate_size": 256, **changes}
    if kind == "bert":
        return t.BertConfig(**common)
    decoder = {"num_key_value_heads": 2, "head_dim": 24}
    return (t.LlamaConfig if kind == "llama" else t.Qwen3Config)(**common | decoder)


def measured(config, plan: PlanConfig) -> int:
    """Most bytes of tensors alive at once, over two training steps of the backbone."""
    import transformers as t

    model = t.AutoModel.from_config(config).train()
    model.config.use_cache = False
    if plan.checkpointing:
        model.gradient_checkpointing_enable()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.zeros(2 * plan.batch, plan.length, dtype=torch.long)
    live = LiveBytes()
    for p in model.parameters():
        live.add(p.data)
    with live:
        for _ in range(2):  # the second has AdamW's state from the start
            with torch.autocast("cpu", torch.bfloat16) if plan.bf16 else nullcontext():
                rows = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, -1]
            loss = rows.float().square().mean()
            del rows
            loss.backward()
            del loss
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("llama", False), ("qwen3", False), ("bert", False), ("llama", True)]
)
def test_peak_memory_is_within_15_percent_of_what_is_measured(kind, checkpointing):
    config = described(kind, num_hidden_layers=3)
    for batch, length, bf16 in ((2, 96, False), *([(1, 8, False), (1, 32, True)] if kind == "llama" else [])):
        plan = PlanConfig(batch=batch, prompt=length // 2, response=length // 2, bf16=bf16,
                          checkpointing=checkpointing, layer_size=None, features=1)  # fmt: skip
        assert plan_training(config, plan).memory == pytest.approx(measured(config, plan), rel=0.15), (batch, bf16)


def test_counts_done_by_hand():
    config = described("llama")
    plan = plan_training(config, PlanConfig(batch=1, prompt=10, response=5, pairs=7, bf16=False, mode="concat"))
    h, inner, kv, vocab, layers = 96, 256, 48, 500, 4
    layer = 2 * h * h + 2 * h * kv + 3 * h * inner + 2 * h
    assert plan.parameters == plan.trained == vocab * h + layers * layer + h
    assert plan.weights == plan.gradients == 4 * plan.parameters
    assert plan.optimiser == 8 * plan.parameters
    tokens, length = 2 * 7 * 20, 20
    assert plan.flop == (2 * (layers * layer + h) + 2 * layers * length * h) * tokens * (3 + 1)
    assert plan.steps == 7
    assert plan.hours == pytest.approx(plan.flop / (989e12 * 0.4) / 3600)
    assert f"{plan.memory / 1e9:.2f}" in plan.to_markdown()


def test_sharding_checkpointing_and_adapters_save_what_they_save():
    config = described("llama", hidden_size=256, intermediate_size=704)
    usual = {"batch": 2, "prompt": 32, "response": 32}
    whole = plan_training(config, PlanConfig(**usual))
    sharded = plan_training(config, PlanConfig(**usual, gpus=4, strategy="fsdp"))
    assert sharded.optimiser == whole.optimiser / 4
    assert sharded.activations == whole.activations
    assert plan_training(config, PlanConfig(**usual, gpus=4)).gradients == 2 * whole.gradients
    again = plan_training(config, PlanConfig(**usual, checkpointing=True))
    assert again.activations < 0.6 * whole.activations
    assert again.flop == pytest.approx(whole.flop * 5 / 4)
    adapters = plan_training(config, PlanConfig(**usual, lora=8))
    linear = 4 * (2 * (256 + 96) + 2 * (256 + 48) + 3 * (256 + 704))  # four layers of q and o, k and v, the MLP
    assert adapters.trained == 8 * linear
    assert adapters.weights == 4 * adapters.trained + 2 * whole.parameters
    assert adapters.flop == pytest.approx(whole.flop * 3 / 4)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"gpus": 0}, "gpus"), ({"mfu": 1.5}, "mfu"), ({"lora": 0}, "lora"), ({"strategy": "tp"}, "strategy"),
     ({"epochs": -1}, "epochs")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(changes, name):
    with pytest.raises(InputError, match=f"^{name}"):
        PlanConfig(**changes)


def test_a_backbone_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="which has no configuration"):
        plan_training(str(tmp_path / "nothing"), PlanConfig())
