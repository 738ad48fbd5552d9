"""Backbones from folders: which attention, which dtype, what is damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.backbones import close, encode

import rmcore.model.backbone
from rmcore._base.errors import CheckpointError, InputError
from rmcore.model.backbone import Backbone, BackboneConfig, choose_attention
from rmcore.model.encoding.sharing import PrefixSharing

# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_model, tokenizer_for):
    """A folder with a saved model, by kind and tokenizer."""

    def save(kind: str, tokenizer: str, **overrides) -> str:
        folder = tmp_path_factory.mktemp(kind)
        made = tokenizer_for(tokenizer)
        make_model(kind, made, **overrides).save_pretrained(folder)
        made.save_pretrained(folder)
        return str(folder)

    return save


def test_from_pretrained_gives_the_same_states(saved, make_backbone):
    folder = saved("qwen2", "chatml")
    loaded = Backbone.from_pretrained(folder, device="cpu", pooling="mean", tokens_per_batch=77)
    assert loaded.config == BackboneConfig(name=folder, pooling="mean")
    assert (loaded.tokens_per_batch, loaded.device.type, loaded.model.training) == (77, "cpu", False)
    assert loaded.tokenizer.chat_template is not None
    # The same texts as ids: AutoTokenizer takes the class that belongs to the model's type, which may cut otherwise.
    there = make_backbone("qwen2", pooling="mean")
    close(loaded.hidden(encode(there)), there.hidden(encode(there)))


def test_attention_is_chosen_recorded_and_overridden(saved):
    folder = saved("llama", "llama")
    auto = Backbone.from_pretrained(folder, device="cpu")
    assert auto.attention[0] == auto.model.config._attn_implementation == "sdpa"
    assert auto.attention[1]
    eager = Backbone.from_pretrained(folder, device="cpu", attn_implementation="eager")
    assert eager.attention[0] == eager.model.config._attn_implementation == "eager"
    close(auto.hidden(encode(auto)), eager.hidden(encode(eager)))


@pytest.mark.parametrize(
    ("asked", "packed"),
    [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "padded"), ("flex_attention", "flex")],
)
def test_an_attention_that_is_asked_for_is_that_of_packed_trees_too(saved, monkeypatch, asked, packed):
    """Eager attention has no form for trees; a choice is never swapped for another one behind one's back."""
    monkeypatch.setattr(PrefixSharing, "_trial", lambda *_: None)  # which compiles FlexAttention for long
    backbone = Backbone.from_pretrained(saved("llama", "llama"), device="cpu", attn_implementation=asked)
    told = backbone.explain()
    assert told.backend == packed
    if asked == "eager":
        assert set(told.reasons) == {"flex", "sdpa"}
        assert all("attn_implementation" in why for why in told.reasons.values())
    monkeypatch.setattr(PrefixSharing, "_trial", lambda *_: "it does not run here")
    failing = Backbone.from_pretrained(saved("llama", "llama"), device="cpu", attn_implementation=asked)
    assert failing.explain().backend == "padded"


def test_the_old_name_of_the_option_says_the_new_one(saved):
    with pytest.raises(InputError, match="attention: got 'eager', expected attn_implementation"):
        Backbone.from_pretrained(saved("llama", "llama"), device="cpu", attention="eager")
    with pytest.raises(InputError, match=r"unknown keys.*flavour"):
        Backbone.from_pretrained(saved("llama", "llama"), device="cpu", flavour=1)


def test_a_model_without_sdpa_falls_back_to_eager(tmp_path, tokenizer_for):
    tokenizer = tokenizer_for("bert")
    config = transformers.MPNetConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    assert not transformers.MPNetModel._supports_sdpa
    transformers.MPNetModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = Backbone.from_pretrained(str(tmp_path), device="cpu", pooling="mean")
    assert backbone.attention[0] == "eager"
    assert "sdpa" in backbone.attention[1]
    assert backbone.hidden(encode(backbone)).isfinite().all()
    with pytest.raises(CheckpointError, match="attention"):
        Backbone.from_pretrained(str(tmp_path), device="cpu", attn_implementation="sdpa")


def test_choice_of_attention(monkeypatch):
    found = rmcore.model.loading.importlib.util.find_spec
    monkeypatch.setattr(
        rmcore.model.loading.importlib.util, "find_spec", lambda n: None if n == "flash_attn" else found(n)
    )
    assert choose_attention(torch.device("cuda"), torch.bfloat16) == ("sdpa", "flash-attn is not installed")
    monkeypatch.setattr(rmcore.model.loading.importlib.util, "find_spec", lambda _: sys)
    assert choose_attention(torch.device("cpu"), torch.bfloat16)[0] == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert choose_attention(torch.device("cuda"), torch.bfloat16)[0] == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    assert choose_attention(torch.device("cuda"), torch.bfloat16)[0] == "flash_attention_2"
    assert choose_attention(torch.device("cuda"), torch.float32)[0] == "sdpa"


def test_a_name_that_is_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no-such-model") as caught:
        Backbone.from_pretrained(str(tmp_path / "no-such-model"), device="cpu")
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("damage", ["truncated", "garbage", "config"])
def test_a_damaged_folder(saved, damage):
    folder = Path(saved("llama", "llama"))
    file = folder / ("config.json" if damage == "config" else "model.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"\x00garbage")
    with pytest.raises(CheckpointError, match="backbone"):
        Backbone.from_pretrained(str(folder), device="cpu")


def test_a_classifier_whose_head_was_never_trained(saved):
    """transformers fills missing weights with random numbers and a warning; a reward model must not."""
    folder = saved("llama", "llama")
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        Backbone.from_pretrained(folder, device="cpu", kind="classifier", pooling="classifier")


def test_a_classifier_loads_with_its_scores(saved, make_backbone):
    folder = saved("bert-classifier", "bert")
    loaded = Backbone.from_pretrained(folder, device="cpu", kind="classifier", pooling="classifier")
    there = make_backbone("bert-classifier")
    assert torch.equal(loaded.hidden(encode(there)), there.hidden(encode(there)))
    assert torch.equal(loaded.scalar_head()[0], there.scalar_head()[0])


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "generator"},
        {"pooling": "max"},
        {"pooling": "classifier"},
        {"kind": "classifier"},
        {"kind": "classifier", "pooling": "classifier", "layer": 1},
        {"layer": 0},
        {"length_feature": float("nan")},
    ],
)
def test_bad_configurations(config):
    with pytest.raises(InputError):
        BackboneConfig(**config)


def test_config_round_trip():
    config = BackboneConfig("x", pooling="mean", layer=3, length_feature=0.5, overlong="truncate-right")
    assert BackboneConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="poling"):
        BackboneConfig.from_dict({"poling": "mean"})


def test_a_configuration_and_keywords_do_not_mix():
    with pytest.raises(InputError, match="pooling"):
        Backbone.from_pretrained(BackboneConfig("x"), pooling="mean")
