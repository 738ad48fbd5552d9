"""Weights that others have quantised: which library they need is said, and what loads scores as transformers' own."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.families import LAYOUTS
from support.models import TOKENIZERS, _model

from rmcore._base.errors import CheckpointError, InputError
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.check import check_model
from rmcore.model.reward_model import RewardModel
from rmcore.model.training_pairs import Preference

PAIRS = [Preference(f"what is {k}?", f"a good answer {k}", "a bad one, and long " * (k + 1)) for k in range(4)]


def quantised(folder: Path, **values: object) -> Path:
    """A tiny classifier whose configuration says how its weights are quantised."""
    tokenizer = TOKENIZERS["llama"]()
    _model("llama-classifier", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": values}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"pip install bitsandbytes accelerate \(or 'rmcore\[q",
        ),
        ({"load_in_8bit": True}, "pip install bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "pip install gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel accelerate"),
        ({"quant_method": "compressed-tensors"}, r"pip install compressed-tensors \(or 'rmcore\[quantised\]'\)"),
        ({"quant_method": "fp8"}, "pip install accelerate"),
        ({"quant_method": "mxfp4"}, "pip install kernels triton accelerate"),
        ({"quant_method": "torchao"}, "pip install torchao"),
    ],
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, values, told):
    quantised(tmp_path, **values)
    monkeypatch.setattr("rmcore.model.libraries.importlib.util.find_spec", lambda name: None)
    for load in (Backbone.from_pretrained, Backbone.from_reward_model):
        with pytest.raises(CheckpointError, match=told):
            load(str(tmp_path), device="cpu")


def test_of_the_hub_too(fake_hub, tmp_path, monkeypatch):
    fake_hub.add("me/rm", quantised(tmp_path / "rm", quant_method="gptq", bits=4))
    monkeypatch.setattr("rmcore.model.libraries.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="'me/rm', whose weights are quantised by gptq, expected gptqmodel and"):
        Backbone.from_reward_model("me/rm", device="cpu")


def test_an_adapter_without_peft(tmp_path, monkeypatch):
    values = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.setattr("rmcore.model.libraries.importlib.util.find_spec", lambda name: None)
    for load in (Backbone.from_pretrained, Backbone.from_reward_model):
        with pytest.raises(CheckpointError, match=r"pip install peft \(or 'rmcore\[peft\]'\)"):
            load(str(tmp_path), device="cpu")


def test_a_method_that_transformers_does_not_know(tmp_path):
    """It would warn, and take the weights as they are."""
    with pytest.raises(CheckpointError, match="quantised by seven-bit, expected a method that transformers knows"):
        Backbone.from_reward_model(str(quantised(tmp_path, quant_method="seven-bit")), device="cpu")


@pytest.fixture
def bitsandbytes(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    caplog.set_level(logging.ERROR, "bitsandbytes")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_scores_as_transformers_does(tmp_path, bitsandbytes, bits):
    tokenizer = TOKENIZERS["llama"]()
    made: Any = _model("llama-classifier", tokenizer, hidden_size=64, intermediate_size=128)
    made.save_pretrained(tmp_path / "full")
    asked = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    loader = transformers.AutoModelForSequenceClassification
    own = loader.from_pretrained(tmp_path / "full", quantization_config=asked, device_map="cpu").eval()
    own.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    model = RewardModel.from_pretrained(tmp_path / "rm", device="cpu")
    text = model.backbone.encoder.encode("what?", "good")
    with torch.no_grad():
        theirs = float(own(input_ids=torch.tensor([text.ids])).logits)
        full = float(made.eval()(input_ids=torch.tensor([text.ids])).logits)
    assert float(model.row_scores(model.backbone.hidden([text]))) == pytest.approx(theirs, rel=1e-4)
    assert theirs != pytest.approx(full, rel=1e-4)
    report = check_model(model, PAIRS)
    assert report.passed, report.to_markdown()
    assert "quantised" in report.facts["model"]
    upgraded = RewardModel.upgrade(model.backbone, PAIRS)
    with pytest.raises(InputError, match="'embed' for quantised weights, expected 'name'"):
        upgraded.save_pretrained(tmp_path / "saved", backbone="embed")
    upgraded.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved", device="cpu").score("what?", ["good", "bad"])
    assert torch.equal(again.uncertainty, upgraded.score("what?", ["good", "bad"]).uncertainty)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("asked", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4", "8"])
def test_weights_that_are_not_quantised_though_their_configuration_says_so(tmp_path, backbone_path, asked):
    """They loaded, and the first text ended in an AssertionError of bitsandbytes'."""
    shutil.copytree(backbone_path, tmp_path / "plain")
    file = tmp_path / "plain" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for method in ({"quant_method": "bitsandbytes"}, {}):
        file.write_text(json.dumps(config | {"quantization_config": asked | method}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"query\.weight is float32, not quantised\. Expected weights that"):
            Backbone.from_pretrained(str(tmp_path / "plain"), device="cpu", pooling="mean")


@pytest.mark.parametrize("name", ["inf-orm", "armorm"])
def test_a_familys_body_may_be_quantised_and_its_head_not(tmp_path, bitsandbytes, name):
    layout = LAYOUTS[name]
    tiny = layout.make()
    tiny.body.save_pretrained(tmp_path / "body")
    asked = transformers.BitsAndBytesConfig(load_in_8bit=True)
    own = transformers.AutoModel.from_pretrained(tmp_path / "body", quantization_config=asked, device_map="cpu").eval()
    own.save_pretrained(tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    tiny.tensors = {layout.prefix + key: value for key, value in tensors.items()} | layout.head
    config = json.loads((tmp_path / "own" / "config.json").read_text(encoding="utf-8"))
    tiny.config["quantization_config"], tiny.body = config["quantization_config"], own
    chat = [{"role": "user", "content": "what is it?"}]
    found = RewardModel.from_pretrained(tiny.write(tmp_path / "rm"), device="cpu").score([chat], [["a dog"]])[0]
    assert found.scores.tolist() == pytest.approx([layout.reference(tiny, "what is it?", "a dog")], abs=1e-4)
    last = sorted(layout.head)[-1]
    tiny.tensors[last] = tiny.tensors[last].to(torch.int8)
    with pytest.raises(CheckpointError, match=f"{last}: got torch.int8, expected the head as it is"):
        RewardModel.from_pretrained(tiny.write(tmp_path / "rm"), device="cpu")


# -- GGUF ------------------------------------------------------------------------------------------------------------

_NAMES = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, model: Any) -> None:
    """A Llama as llama.cpp's converter writes it; the last layer's ``ffn_down`` in 8 bits, the others as they are."""
    gguf = pytest.importorskip("gguf")
    c = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for name, value in model.state_dict().items():
        own = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}.get(name, "")
        if not own:
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            own = f"blk.{layer}.{_NAMES[part]}.weight"
            n = heads.get(_NAMES[part])
            if n is not None:  # llama.cpp turns neighbours, transformers halves
                value = value.reshape(n, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        if own == f"blk.{c.num_hidden_layers - 1}.ffn_down.weight":
            packed = gguf.quants.quantize(value.numpy(), kind)
            writer.add_tensor(own, packed, raw_dtype=kind)
            value.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))  # what a reader makes of it
        else:
            writer.add_tensor(own, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path) -> tuple[Path, Any]:
    tokenizer, file = TOKENIZERS["llama"](), tmp_path / "gguf" / "tiny.gguf"
    model: Any = _model("llama", tokenizer, hidden_size=32, intermediate_size=64, max_position_embeddings=128)
    file.parent.mkdir()
    write_gguf(file, model)
    tokenizer.save_pretrained(file.parent)
    return file, model.eval()


def test_a_gguf_file_is_a_body(gguf_file, tmp_path, preferences):
    file, own = gguf_file
    backbone = Backbone.from_pretrained(str(file), device="cpu", dtype=torch.float32)
    assert (backbone.config.name, backbone.config.gguf_file) == (str(file.parent), "tiny.gguf")
    assert not backbone.quantised  # floats by now, and moved like any others
    text = backbone.encoder.encode("what?", "good")
    with torch.no_grad():
        theirs = own(input_ids=torch.tensor([text.ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(backbone.hidden([text])[0], theirs, rtol=1e-4, atol=1e-5)
    model, _ = RewardModel.fit(backbone, preferences, num_features=16)
    with pytest.raises(InputError, match="'embed' for quantised weights"):
        model.save_pretrained(tmp_path / "saved", backbone="embed")
    model.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again.score("what?", ["a", "b"]).logit, model.score("what?", ["a", "b"]).logit)
    file.write_bytes(file.read_bytes()[:-4] + b"four")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf changed since the model was saved"):
        RewardModel.from_pretrained(tmp_path / "saved", device="cpu")


def test_what_a_gguf_file_cannot_be(gguf_file, monkeypatch):
    file, _ = gguf_file
    for load in (lambda: Backbone.from_reward_model(str(file)), lambda: RewardModel.from_pretrained(file)):
        with pytest.raises(CheckpointError, match=r"gguf', (a GGUF file, )?expected a"):
            load()
    with pytest.raises(CheckpointError, match=r"without none\.gguf"):
        Backbone.from_pretrained(str(file.parent), gguf_file="none.gguf", device="cpu")
    with pytest.raises(InputError, match=r"gguf_file.*no reward head"):
        BackboneConfig(str(file.parent), kind="classifier", pooling="classifier", gguf_file="tiny.gguf")
    monkeypatch.setattr("rmcore.model.libraries.importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"by gguf, expected gguf to load them: pip install gguf \(or"):
        Backbone.from_pretrained(str(file), device="cpu")
