"""What checkpoints and tokenizers of others are like: none of it changes a score, or it is said what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.chat_templates import CHAT_MODELS
from support.families import LAYOUTS
from support.models import TOKENIZERS, _model, own_inputs
from tokenizers import processors
from torch import Tensor

from rmcore._base.errors import CheckpointError, InputError
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.check import check_model
from rmcore.model.reward_model import RewardModel
from rmcore.model.text import TextEncoder
from rmcore.model.training_pairs import Preference

PAIRS = [Preference(f"what is {k}?", f"a good answer {k}", "a bad one, and long " * (k + 1)) for k in range(4)]


def saved(folder: Path, tokenizer: Any, kind: str = "llama-classifier", *, size: str = "5GB", **config: Any) -> Any:
    model = _model(kind, tokenizer, **config)
    model.save_pretrained(folder, max_shard_size=size)
    tokenizer.save_pretrained(folder)
    return model


def test_a_padding_token_beyond_the_embedding(tmp_path):
    """Padding is masked, so that any id will do that the model has."""
    tokenizer = TOKENIZERS["llama"]()
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == known
    saved(tmp_path, tokenizer, vocab_size=known, pad_token_id=None)
    backbone = Backbone.from_reward_model(str(tmp_path), device="cpu", packing="padded")
    report = check_model(RewardModel.upgrade(backbone, PAIRS), PAIRS)
    assert report.passed, report.to_markdown()
    assert "beyond the embedding" in report.facts["padding token"]


def test_a_text_with_a_token_beyond_the_embedding_is_named(tmp_path):
    tokenizer = TOKENIZERS["chatml"]()
    known = len(tokenizer)
    tokenizer.add_tokens(["zebra"])
    saved(tmp_path, tokenizer, vocab_size=known)
    backbone = Backbone.from_reward_model(str(tmp_path), device="cpu")
    backbone.hidden([backbone.encoder.encode("a", "horse")])
    with pytest.raises(CheckpointError, match=rf"token {known} \('zebra'\).*one of the model's {known}"):
        backbone.hidden([backbone.encoder.encode("a", "zebra")])


def test_eos_as_padding_inside_a_text(tmp_path):
    tokenizer = CHAT_MODELS["chatml"]()
    tokenizer.pad_token = tokenizer.eos_token  # ends every turn
    saved(tmp_path, tokenizer)
    report = check_model(RewardModel.from_pretrained(tmp_path, device="cpu"), PAIRS)
    assert report.passed, report.to_markdown()
    assert "the eos token" in report.facts["padding token"]


@pytest.mark.parametrize("family", ["llama3", "gemma", "mistral"])
def test_one_bos(family):
    """These tokenizers put a bos before every text, and these templates write one."""
    tokenizer = CHAT_MODELS[family]()
    model = _model("llama-classifier", tokenizer, pad_token_id=None)
    config = BackboneConfig(kind="classifier", pooling="classifier", append_eos=False)
    backbone = Backbone(model, tokenizer, config)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert backbone.encoder.encode("what?", "good").ids.count(tokenizer.bos_token_id) == 1
    assert check_model(RewardModel.upgrade(backbone, PAIRS), PAIRS).facts["template"].startswith("1 bos")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_side_of_padding_and_truncation_do_not_matter(tmp_path, side):
    tokenizer = TOKENIZERS["llama"]()
    tokenizer.padding_side = tokenizer.truncation_side = side
    tokenizer.model_max_length = 8  # transformers only warns of longer texts
    saved(tmp_path, tokenizer)
    report = check_model(RewardModel.from_pretrained(tmp_path, device="cpu"), PAIRS)
    assert report.passed, report.to_markdown()


def test_sliding_windows(tmp_path):
    """Texts within the window are shared, longer ones have rows of their own; both score as the model's own code."""
    tokenizer = TOKENIZERS["chatml"]()
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    config.update({"intermediate_size": 48, "sliding_window": 64, "num_labels": 1, "max_position_embeddings": 512})
    config.update({"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None})
    transformers.MistralForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = [Preference("what is it? " * n, "good", "a bad answer") for n in (1, 2, 12)]
    report = check_model(RewardModel.from_pretrained(tmp_path, device="cpu"), pairs)
    assert report.passed, report.to_markdown()
    assert any(row.note.startswith("sdpa") for row in report.rows)


@pytest.mark.parametrize("kind", ["Gemma2", "Qwen2", "Phi3", "ModernBert"])
def test_windows_of_some_layers(tmp_path, kind):
    """Layers that alternate, a window behind some layers, one in all, and an encoder's: texts are longer than it."""
    tokenizer = TOKENIZERS["chatml"]()
    own: dict[str, dict[str, Any]] = {
        "Gemma2": {"head_dim": 8, "sliding_window": 16},
        "Qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        "Phi3": {"sliding_window": 16},
        "ModernBert": {"local_attention": 16, "cls_token_id": None, "sep_token_id": None},
    }
    given = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    given |= {"intermediate_size": 48, "num_labels": 1, "max_position_embeddings": 512}
    given |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    given |= {} if kind == "ModernBert" else {"num_key_value_heads": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**given, **own[kind])
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pairs = [Preference("what is it? " * n, "good", "a bad answer " * n) for n in (1, 9)]
    report = check_model(RewardModel.from_pretrained(tmp_path, device="cpu"), pairs)
    assert report.passed, report.to_markdown()


@pytest.mark.parametrize("known", ["neither", "tokenizer"])
def test_no_padding_token(tmp_path, known):
    """Where the model's own code takes no batch at all, rmcore's are padded with a masked token."""
    tokenizer = TOKENIZERS["llama"]()
    if known == "neither":
        tokenizer.pad_token = None
    saved(tmp_path, tokenizer, pad_token_id=None)
    report = check_model(RewardModel.from_pretrained(tmp_path, device="cpu"), PAIRS)
    assert report.passed, report.to_markdown()
    assert report.facts["padding token"] == ("none" if known == "neither" else "0")
    assert any(row.note.startswith("padding token: got none") for row in report.rows)


def test_tied_heads(tmp_path):
    """A classifier ties nothing, whatever its configuration says; a language model's head may be its embedding."""
    tokenizer = TOKENIZERS["llama"]()
    saved(tmp_path / "classifier", tokenizer, tie_word_embeddings=True)
    assert check_model(RewardModel.from_pretrained(tmp_path / "classifier", device="cpu"), PAIRS).passed
    layout = LAYOUTS["nvidia-lm"]
    tiny = layout.make()
    del tiny.tensors["lm_head.weight"]
    tiny.config["tie_word_embeddings"] = True
    model = RewardModel.from_pretrained(tiny.write(tmp_path / layout.name), device="cpu")
    tiny.tensors["lm_head.weight"] = tiny.tensors["model.embed_tokens.weight"]
    found = model.score([[{"role": "user", "content": "what is it?"}]], [["a dog"]])[0].scores.tolist()
    assert found == pytest.approx([layout.reference(tiny, "what is it?", "a dog")], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_checkpoints_of_16_bits(tmp_path, dtype):
    """Read in float32 unless told; in 16 bits the scores are those of the model's own code within their rounding."""
    tokenizer = TOKENIZERS["llama"]()
    model = _model("llama-classifier", tokenizer).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    wide = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert wide.backbone.model.dtype == torch.float32
    text = wide.backbone.encoder.encode("what?", "good")
    own = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = float(own(**own_inputs(wide.backbone, text)).logits)
    assert float(wide.row_scores(wide.backbone.hidden([text]))) == pytest.approx(theirs, rel=1e-4)
    narrow = check_model(RewardModel.from_pretrained(tmp_path, device="cpu", dtype=dtype), PAIRS)
    assert narrow.passed, narrow.to_markdown()


def test_a_relative_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    """And is never taken for a repository of that name on the hub."""
    saved(tmp_path / "m" / "bb", TOKENIZERS["llama"]())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = RewardModel.upgrade(Backbone.from_reward_model("m/bb", device="cpu"), PAIRS)
    model.save_pretrained("rm")
    assert json.loads(Path("rm/rmcore.json").read_text(encoding="utf-8"))["backbone"]["name"] == str(tmp_path / "m/bb")
    ours = model.score("what?", ["a", "b"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(RewardModel.from_pretrained("../rm", device="cpu").score("what?", ["a", "b"]).logit, ours.logit)


def test_a_chat_model_with_plain_prompts_is_asked_by_its_template(tmp_path):
    tokenizer = CHAT_MODELS["qwen3"]()
    model = saved(tmp_path, tokenizer)
    ours = RewardModel.from_pretrained(tmp_path, device="cpu")
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4\n"}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        theirs = float(model(input_ids=ids).logits)
    text = ours.backbone.encoder.encode("2+2?", turns[1]["content"])
    assert list(text.ids) == ids[0].tolist()
    assert float(ours.row_scores(ours.backbone.hidden([text]))) == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("kind", ["bert-classifier", "roberta-classifier"])
def test_an_encoder_is_given_two_texts(kind):
    tokenizer = TOKENIZERS[kind.removesuffix("-classifier")]()
    if kind.startswith("roberta"):
        tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    config = BackboneConfig(kind="classifier", pooling="classifier")
    backbone = Backbone(_model(kind, tokenizer), tokenizer, config)
    for prompt, response in (("what is 2?", "it is two."), (" a ", ""), ([{"role": "user", "content": "why"}], "so")):
        plain = prompt if isinstance(prompt, str) else prompt[0]["content"]
        theirs = tokenizer(plain, response, return_tensors="pt", return_token_type_ids=kind.startswith("bert"))
        text = backbone.encoder.encode(prompt, response)
        assert list(text.ids) == theirs["input_ids"][0].tolist()
        inputs = backbone.model_inputs(torch.tensor([text.ids]), torch.ones(1, len(text), dtype=torch.long))
        assert all(torch.equal(inputs[name], theirs[name]) for name in theirs)
    assert "first" in {segment.name for segment in backbone.encoder.encode("a", "b").segments}


def test_an_adapter_of_another_task_is_no_reward_model(tmp_path, monkeypatch):
    monkeypatch.setattr("rmcore.model.libraries.importlib.util.find_spec", lambda name: object())
    TOKENIZERS["llama"]().save_pretrained(tmp_path)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match="an adapter for CAUSAL_LM, expected one for SEQ_CLS"):
        Backbone.from_reward_model(str(tmp_path), device="cpu")


def test_a_lora_adapter_scores_as_peft_does(tmp_path):
    """Where peft is installed."""
    peft = pytest.importorskip("peft")
    tokenizer = TOKENIZERS["llama"]()
    saved(tmp_path / "base", tokenizer)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "v_proj"])
    own = peft.get_peft_model(base, lora).eval()
    torch.manual_seed(0)
    for name, parameter in own.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    own.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model = RewardModel.upgrade(Backbone.from_reward_model(str(tmp_path / "adapter"), device="cpu"), PAIRS)
    text = model.backbone.encoder.encode("what?", "good")
    with torch.no_grad():
        theirs = float(own(input_ids=torch.tensor([text.ids])).logits)
    assert float(model.row_scores(model.backbone.hidden([text]))) == pytest.approx(theirs, rel=1e-4)
    assert check_model(model, PAIRS).passed


# -- what a body's folder may lack, or hold instead ------------------------------------------------------------------


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def body(tmp_path):
    saved(tmp_path, TOKENIZERS["chatml"](), "qwen2")
    return tmp_path


def load(folder: Path) -> Backbone:
    return Backbone.from_pretrained(str(folder), device="cpu")


@pytest.mark.parametrize("part", ["layers.1.mlp.up_proj.weight", "embed_tokens", ".2.", "norm.weight"])
def test_nothing_of_a_body_is_made_up(body, part):
    def drop(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    changed(body, drop)
    with pytest.raises(CheckpointError, match=r"without .*, which its body wants: nothing is made up"):
        load(body)


def test_a_pooler_that_is_not_there_is_no_matter(tmp_path):
    saved(tmp_path, TOKENIZERS["bert"](), "bert")
    before = load(tmp_path)
    changed(tmp_path, lambda tensors: [tensors.pop(f"pooler.dense.{name}") for name in ("weight", "bias")])
    text = before.encoder.encode("what?", "good")
    assert torch.equal(load(tmp_path).hidden([text]), before.hidden([text]))


def test_tensors_of_layers_that_are_not_computed_are_told(body, caplog):
    changed(body, lambda tensors: tensors.update({"layers.0.mlp.up_proj.weight_scale_inv": torch.ones(4)}))
    load(body)
    assert (
        "no use for 1 tensors of its layers, which are not computed: layers.0.mlp.up_proj.weight_scale" in caplog.text
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_that_nobody_says_how_to_scale(body, dtype):
    name = "layers.1.mlp.up_proj.weight"
    changed(body, lambda tensors: tensors.update({name: (tensors[name] * 100).to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{name} in \w+ and no quantization_config"):
        load(body)


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("pytorch_model-1.bin", "expected safetensors files: weights in other formats may run code"),
        ("../w.safetensors", "expected files of its own folder"),
        ("/w.safetensors", "expected files of its own folder"),
        ("gone.safetensors", "without gone.safetensors, which model.safetensors.index.json names"),
        (7, "expected safetensors files"),
    ],
)
def test_an_index_names_safetensors_of_its_own_folder(body, shard, says):
    """transformers would read the first as a pickle, and the next two from wherever they are."""
    weights = body / "model.safetensors"
    placed = dict.fromkeys(load_file(weights), shard)
    torch.save(load_file(weights), body / "pytorch_model-1.bin")
    weights.rename(body.parent / "w.safetensors")
    (body / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    with pytest.raises(CheckpointError, match=says):
        load(body)


# -- tokens that are drawn at random ---------------------------------------------------------------------------------


def test_dropout_of_merges_is_switched_off(caplog):
    tokenizer, text = TOKENIZERS["chatml"](), ("the quick brown fox", "jumps over the lazy dog")
    before = TextEncoder(tokenizer).encode(*text).ids
    tokenizer.backend_tokenizer.model.dropout = 0.5
    assert len({tuple(tokenizer(text[0])["input_ids"]) for _ in range(20)}) > 1
    encoder = TextEncoder(tokenizer)
    assert {encoder.encode(*text).ids for _ in range(20)} == {before}
    assert "leaves out merges at random (dropout 0.5), which is switched off" in caplog.text


@pytest.mark.parametrize(
    "drawn",
    [
        "{{ ['a', 'b']|random }}",
        "{%- set x = range(9) | \n random -%}{{ x }}",
        "{{ lipsum(1) }}",
        "{{ [[1, 2]]|map('random')|list }}",
        "{% filter random %}ab{% endfilter %}",
    ],
)
def test_a_template_that_draws_at_random_is_refused(drawn):
    tokenizer = TOKENIZERS["chatml"]()
    template = tokenizer.chat_template
    tokenizer.chat_template = template + drawn
    with pytest.raises(InputError, match=r"chat_template: got one with (random|lipsum), which draws at random"):
        TextEncoder(tokenizer)
    TextEncoder(tokenizer, chat="never")
    tokenizer.chat_template = {"default": template, "tools": template + drawn}
    with pytest.raises(InputError, match="which draws at random"):
        TextEncoder(tokenizer)
    tokenizer.chat_template = "{{ lipsum() }}"
    with pytest.raises(InputError, match="lipsum"):
        TextEncoder(tokenizer)
    harmless = "a | random text", "{# x|random, lipsum() #}", "{{ messages[0]['random'] }}{{ messages[0].lipsum }}"
    for text in (*harmless, "{{ ['random'].index('random') }}"):
        tokenizer.chat_template = template + text
        TextEncoder(tokenizer)
