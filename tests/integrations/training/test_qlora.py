"""Adapters on a backbone in 4 bits (QLoRA), by bitsandbytes on a CPU: the adapters learn, the rest stays as it was."""

from __future__ import annotations

import json
import logging

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'rmcore[train]')")

from rmcore._base.errors import InputError
from rmcore.integrations.trl import PairwiseRewardTrainer
from rmcore.model import RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

HEAD = {"num_features": 64, "kernel_scale": 3.0, "layer_size": 8}


@pytest.fixture
def quantised(backbone_of, tmp_path, caplog):
    """The folder of a small Llama in 4 bits, beside the one that it was made of."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'rmcore[quantised]')")
    caplog.set_level(logging.ERROR, "bitsandbytes")
    import transformers

    base = backbone_of(model={"hidden_size": 64, "intermediate_size": 128})
    base.model.save_pretrained(tmp_path / "base")
    asked = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModel.from_pretrained(tmp_path / "base", quantization_config=asked, device_map="cpu")
    model.save_pretrained(tmp_path / "4 bits")
    for name in ("base", "4 bits"):
        base.tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "4 bits"


def gradient_of(trainer):
    trainer.head.length_scale.fill_(2.0)
    torch.nn.init.ones_(trainer.head.beta)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(4)])
    trainer.model.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.compute_loss(trainer.model, batch).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_adapters_on_four_bits(quantised, config_of, preferences, tmp_path):
    peft = pytest.importorskip("peft")
    losses, gradients = {}, {}
    for name in ("4 bits", "base"):
        backbone = Backbone.from_pretrained(
            BackboneConfig(name=str(tmp_path / name), pooling="last"), device="cpu", dtype=torch.float32
        )
        args = config_of(max_steps=8, head_dtype="float32", activation_checkpointing=name == "4 bits")
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules="all-linear")
        trainer = PairwiseRewardTrainer(backbone, args, head=HEAD, train_dataset=preferences, peft_config=lora)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        gradients[name] = gradient_of(trainer)
        trainer.rows(trainer.model)  # in eval mode, after which gradients are what they were
        again = gradient_of(trainer)
        assert all(torch.equal(g, again[n]) for n, g in gradients[name].items())
        assert all(float(g.abs().max()) > 0 for n, g in again.items() if "lora_B" in n)
        trainer.train()
        changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if "lora_" in n}
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if name == "4 bits":
            assert {str(p.dtype) for n, p in trainer.model.named_parameters() if "base_layer.weight" in n} == {
                "torch.uint8"
            }
            four = trainer
    # The same directions, but for what 4 bits round away.
    g, h = (torch.cat([t.flatten() for n, t in gradients[k].items() if "lora_B" in n]) for k in ("4 bits", "base"))
    assert float(torch.cosine_similarity(g, h, dim=0)) > 0.95
    assert sum(losses["4 bits"][-3:]) < 0.7 * sum(losses["4 bits"][:3])
    assert losses["4 bits"][-1] == pytest.approx(losses["base"][-1], abs=0.2)
    four.save_model(str(tmp_path / "model"))
    told = json.loads((tmp_path / "model" / "backbone" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(quantised)
    loaded = RewardModel.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    p = preferences[0]
    ours = four.reward_model.score(p.prompt, [p.chosen, p.rejected])
    # A model that only serves multiplies 4 bits by another kernel.
    found = loaded.score(p.prompt, [p.chosen, p.rejected])
    torch.testing.assert_close(found.preference, ours.preference, rtol=1e-2, atol=1e-2)


def test_four_bits_alone_cannot_be_trained(quantised, config_of, preferences):
    backbone = Backbone.from_pretrained(str(quantised), device="cpu", pooling="last")
    with pytest.raises(InputError, match=r"^peft_config: got None for quantised weights"):
        PairwiseRewardTrainer(backbone, config_of(), head=HEAD, train_dataset=preferences)
