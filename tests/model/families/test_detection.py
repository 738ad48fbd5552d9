"""Which family a model is taken for, what is refused, and models whose own code is run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from support.families import HIDDEN, LAYOUTS
from typer.testing import CliRunner

from rmcore import Backbone, Preference, RewardModel
from rmcore._base.errors import CheckpointError, InputError, NonFiniteError
from rmcore.cli import app
from rmcore.model.families.registry import FAMILIES, family_of
from rmcore.model.families.table import markdown

CHAT = [[{"role": "user", "content": "what is it?"}]]


def spoilt(name: str, folder: Path, **config: object) -> Path:
    tiny = LAYOUTS[name].make()
    tiny.config.update(config)
    return tiny.write(folder / name)


def test_a_gated_model_that_calls_itself_a_classifier_is_not_taken_for_one(tmp_path):
    """RLHFlow/Online-RLHF#23: served as a plain classifier it was off by 2.0, in silence."""
    folder = spoilt("armorm", tmp_path, architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    assert Backbone.from_reward_model(str(folder), device="cpu").config.family == "armorm"
    with pytest.raises(CheckpointError, match="num_objectives"):
        Backbone.from_reward_model(str(folder), device="cpu", family="classifier")


def test_a_tensor_left_over_in_a_classifier_is_refused(tmp_path):
    tiny = LAYOUTS["classifier"].make()
    tiny.tensors["gate.weight"] = torch.zeros(1, HIDDEN)
    with pytest.raises(CheckpointError, match=r"gate\.weight"):
        RewardModel.from_pretrained(tiny.write(tmp_path / "rm"), device="cpu")


@pytest.mark.parametrize("name", ["classifier", "armorm"])
def test_a_tensor_of_the_body_with_another_shape_is_named(tmp_path, name):
    tiny = LAYOUTS[name].make()
    tiny.tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, HIDDEN)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight of shape \(3, 16\).*\(24, 16\)"):
        RewardModel.from_pretrained(tiny.write(tmp_path / "rm"), device="cpu")


def test_a_language_models_head_in_a_classifiers_files_is_no_matter(tmp_path):
    tiny = LAYOUTS["classifier"].make()
    tiny.tensors["lm_head.weight"] = torch.zeros(tiny.config["vocab_size"], HIDDEN)
    RewardModel.from_pretrained(tiny.write(tmp_path / "rm"), device="cpu")


@pytest.mark.parametrize("name", ["classifier", "inf-orm"])
@pytest.mark.parametrize("key", ["score_temperature", "pooling_type", "reward_scale"])
def test_a_configuration_key_that_may_change_scores_is_named(tmp_path, name, key):
    with pytest.raises(CheckpointError, match=f"'{key}'.*family '{name}'"):
        RewardModel.from_pretrained(spoilt(name, tmp_path, **{key: 2}), device="cpu")


def test_keys_of_the_body_and_of_no_consequence_are_let_be(tmp_path):
    harmless = {"pretraining_tp": 1, "unsloth_version": "2024.9", "attention_bias": False, "score_scale": None}
    RewardModel.from_pretrained(spoilt("inf-orm", tmp_path, **harmless), device="cpu")


def test_two_outputs_without_names_are_said_to_be_a_mean(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        RewardModel.from_pretrained(spoilt("trl-two-labels", tmp_path), device="cpu")
    assert "two outputs" in caplog.text


@pytest.mark.parametrize(
    "config", [{"id2label": {str(k): f"LABEL_{k}" for k in range(3)}}, {"problem_type": "single_label_classification"}]
)
def test_a_classifier_of_classes_is_no_reward_model(tmp_path, config):
    with pytest.raises(CheckpointError, match=r"classifier with \d outputs"):
        RewardModel.from_pretrained(spoilt("trl-two-labels", tmp_path, **config), device="cpu")


def test_a_language_model_is_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"no family.*LlamaForCausalLM.*lm_head"):
        RewardModel.from_pretrained(
            LAYOUTS["nvidia-lm"].make().write(tmp_path / "Llama-3.3-70B-Instruct"), device="cpu"
        )


def test_family_says_what_the_files_do_not(tmp_path):
    layout = LAYOUTS["nvidia-lm"]
    tiny = layout.make()
    folder = tiny.write(tmp_path / "mine")
    found = RewardModel.from_pretrained(folder, device="cpu", family="nvidia-lm").score(CHAT, [["a dog"]])[0]
    assert found.scores.tolist() == pytest.approx([layout.reference(tiny, "what is it?", "a dog")], abs=1e-5)
    with pytest.raises(InputError, match=r"family.*'nvidia'.*nvidia-lm"):
        RewardModel.from_pretrained(folder, device="cpu", family="nvidia")


def test_only_safetensors_are_read(tmp_path):
    tiny = LAYOUTS["inf-orm"].make()
    folder = tiny.write(tmp_path / "rm")
    (folder / "model.safetensors").unlink()
    torch.save(tiny.tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        RewardModel.from_pretrained(folder, device="cpu")


def test_sharded_files_are_read(tmp_path):
    from safetensors.torch import save_file

    layout = LAYOUTS["armorm"]
    tiny = layout.make()
    folder = tiny.write(tmp_path / "rm")
    (folder / "model.safetensors").unlink()
    names = sorted(tiny.tensors)
    shards = {f"model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for file, own in shards.items():
        save_file({name: tiny.tensors[name].contiguous() for name in own}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = RewardModel.from_pretrained(folder, device="cpu").score(CHAT, [["a dog"]])[0]
    assert found.scores.tolist() == pytest.approx([layout.reference(tiny, "what is it?", "a dog")], abs=1e-5)


@pytest.mark.parametrize("name", ["armorm", "grm-mlp", "qrm"])
def test_in_bfloat16_a_score_is_right_to_the_bodys_digits(tmp_path, name):
    folder = spoilt(name, tmp_path)
    exact, short = (
        RewardModel.from_pretrained(folder, device="cpu", dtype=dtype).score(CHAT, [["a dog", "a fox runs"]])[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    scale = float(exact.scores.abs().max())
    torch.testing.assert_close(short.scores, exact.scores, rtol=0, atol=0.1 * max(scale, 1))
    assert not torch.equal(short.scores, exact.scores)


# -- a model's own code ----------------------------------------------------------------------------------------------


CONFIGURATION = """from transformers import LlamaConfig
class XConfig(LlamaConfig):
    model_type = "my_reward"
"""
MODELING = """import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from .configuration_x import XConfig
class XRM(LlamaPreTrainedModel):
    config_class = XConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        last = attention_mask.sum(1) - 1 if attention_mask is not None else -1
        logits = self.score(states) * SCALE
        return SequenceClassifierOutput(logits=logits[torch.arange(len(logits)), last])
"""


def with_code(folder: Path, scale: float, loader: str = "AutoModelForSequenceClassification") -> Path:
    tiny = LAYOUTS["classifier"].make()
    tiny.config |= {"model_type": "my_reward", "architectures": ["XRM"]}
    if loader == "AutoModel":  # which knows nothing of labels
        del tiny.config["id2label"], tiny.config["label2id"]
    tiny.config["auto_map"] = {
        "AutoConfig": "configuration_x.XConfig",
        loader: "modeling_x.XRM",
    }
    tiny.write(folder)
    (folder / "configuration_x.py").write_text(CONFIGURATION)
    (folder / "modeling_x.py").write_text(MODELING.replace("SCALE", str(scale)))
    return folder


@pytest.fixture
def nobody(monkeypatch):
    """Who would answer a question."""
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115


@pytest.mark.usefixtures("remote_code", "nobody")
def test_code_runs_when_trusted_only_and_nobody_is_asked(tmp_path):
    folder = with_code(tmp_path / "own", 1.0)
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        RewardModel.from_pretrained(folder, device="cpu")
    model = RewardModel.from_pretrained(folder, device="cpu", trust_remote_code=True)
    assert model.backbone.config.family == "remote-code"
    layout = LAYOUTS["classifier"]
    expected = layout.reference(layout.make(), "what is it?", "a dog")
    assert model.score(CHAT, [["a dog"]])[0].scores.tolist() == pytest.approx([expected], abs=1e-5)
    upgraded = RewardModel.upgrade(model.backbone, [Preference(CHAT[0], "a good dog", "a bad dog")])
    upgraded.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    again = RewardModel.from_pretrained(tmp_path / "saved", device="cpu", trust_remote_code=True)
    assert again.score(CHAT, [["a dog"]])[0].scores.tolist() == pytest.approx([expected], abs=1e-5)
    other = RewardModel.from_pretrained(
        with_code(tmp_path / "auto", 1.0, "AutoModel"), device="cpu", trust_remote_code=True
    )
    assert other.score(CHAT, [["a dog"]])[0].scores.tolist() == pytest.approx([expected], abs=1e-5)
    scaled = with_code(tmp_path / "scaled", 3.0)  # its score is not its last layer's output
    with pytest.raises(CheckpointError, match="own code says"):
        RewardModel.from_pretrained(scaled, device="cpu", trust_remote_code=True)


# -- the command line, the table -------------------------------------------------------------------------------------


def test_the_command_line_lists_and_names_families(tmp_path):
    listed = CliRunner().invoke(app, ["families"])
    assert listed.exit_code == 0
    assert [line.split("\t")[0] for line in listed.stdout.splitlines()] == sorted(f.name for f in FAMILIES)
    folder = LAYOUTS["nvidia-lm"].make().write(tmp_path / "mine")
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": CHAT[0], "chosen": "a good dog", "rejected": "a bad dog"}
    pairs.write_text(json.dumps(row) + "\n")
    call = ["upgrade", str(folder), str(pairs), "--device", "cpu", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 1
    assert "no family" in refused.stderr
    made = CliRunner().invoke(app, [*call, "--family", "nvidia-lm"])
    assert made.exit_code == 0, made.stderr
    assert RewardModel.from_pretrained(tmp_path / "out", device="cpu").backbone.config.family == "nvidia-lm"


def test_the_documentations_table_is_the_registrys():
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    assert markdown() in page, "run `rmcore families --markdown`"


def test_names_are_of_one_family_each():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert family_of("armorm").head is not None


# -- what loads must be what it says ---------------------------------------------------------------------------------


def test_who_has_no_architecture_is_told_by_the_body(tmp_path):
    """Eurus' and UltraRM's heads have one name, and their texts are written differently."""
    for name in ("eurus", "ultrarm"):
        tiny = LAYOUTS[name].make()
        del tiny.config["architectures"]
        model = RewardModel.from_pretrained(tiny.write(tmp_path / name), device="cpu")
        assert model.backbone.config.family == name
        found = model.score("what is it?", ["a dog"]).scores.tolist()
        assert found == pytest.approx([LAYOUTS[name].reference(tiny, "what is it?", "a dog")], abs=1e-5)


def test_a_cost_is_never_taken_for_a_reward(tmp_path):
    """Their files differ in one key, and their signs are opposite."""
    tiny = LAYOUTS["beaver-cost"].make()
    with pytest.raises(CheckpointError, match=r"'score_type': 'cost', family 'beaver' has 'reward'"):
        RewardModel.from_pretrained(tiny.write(tmp_path / "cost"), device="cpu", family="beaver")
    del tiny.config["score_type"]
    folder = tiny.write(tmp_path / "neither")
    with pytest.raises(CheckpointError, match=r"no family.*score_head\.weight.*family= names one"):
        RewardModel.from_pretrained(folder, device="cpu")
    named = RewardModel.from_pretrained(folder, device="cpu", family="beaver-cost").score("what is it?", ["a dog"])
    wanted = LAYOUTS["beaver-cost"].reference(LAYOUTS["beaver-cost"].make(), "what is it?", "a dog")
    assert named.scores.tolist() == pytest.approx([wanted], abs=1e-5)


def test_half_a_normaliser_is_none(tmp_path):
    tiny = LAYOUTS["beaver"].make()
    del tiny.tensors["normalizer.var"]
    with pytest.raises(CheckpointError, match=r"normalizer\.var"):
        RewardModel.from_pretrained(tiny.write(tmp_path / "rm"), device="cpu")


@pytest.mark.parametrize("name", ["classifier", "inf-orm"])
def test_how_outputs_are_held_is_no_matter(tmp_path, name):
    layout = LAYOUTS[name]
    model = RewardModel.from_pretrained(spoilt(name, tmp_path, return_dict=False), device="cpu")
    found = model.score(CHAT, [["a dog"]])[0].scores.tolist()
    assert found == pytest.approx([layout.reference(layout.make(), "what is it?", "a dog")], abs=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_of_another_shape_or_with_nan_is_named(tmp_path, name):
    """Whatever is wrong with its last tensor."""
    layout = LAYOUTS[name]
    tensor = sorted(layout.head)[-1] if layout.head else "lm_head.weight"
    for change in (lambda t: torch.cat([t, t]).unsqueeze(0), lambda t: torch.full_like(t, torch.nan)):
        tiny = layout.make()
        held = tiny.tensors if tensor in tiny.tensors else next(iter(tiny.files.values()))
        where = tensor if tensor in held else sorted(held)[-1]
        if not held[where].is_floating_point():
            held[where] = held[where].double()
        held[where] = change(held[where])
        with pytest.raises((CheckpointError, NonFiniteError)):
            RewardModel.from_pretrained(tiny.write(tmp_path / layout.name), device="cpu").score(
                CHAT if not layout.text else ["what is it?"], [["a dog", "a fox"]]
            )
