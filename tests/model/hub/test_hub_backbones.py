"""Backbones and adapters that are names on the hub, and their commits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save
from support.hub import FakeHub, read_folder
from support.hub_models import load, scores, with_lora

from rmcore import Backbone, Preference, RewardModel
from rmcore._base.errors import CheckpointError
from rmcore.head import checkpoint

# -- backbones -------------------------------------------------------------------------------------------------------


def test_a_backbone_keeps_its_commit(fake_hub: FakeHub, backbone_path: Path, tmp_path: Path) -> None:
    first = fake_hub.add("they/bert", backbone_path)
    backbone = Backbone.from_pretrained("they/bert", device="cpu", pooling="mean")
    assert (backbone.config.name, backbone.config.revision) == ("they/bert", first)
    model, _ = RewardModel.fit(backbone, [Preference("red", "good", "bad")], num_features=8, dtype=torch.float32)
    model.save_pretrained(tmp_path / "rm")
    fake_hub.repos["they/bert"].commit({**read_folder(backbone_path), "model.safetensors": b"of somebody else"})
    loaded = load(str(tmp_path / "rm"))
    assert torch.equal(scores(loaded), scores(model))
    assert loaded.backbone.config.revision == first
    fake_hub.repos["they/bert"].commits.pop(first)
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    with pytest.raises(CheckpointError, match=rf"'they/bert' \(revision '{first}'\).*no such revision"):
        load(str(tmp_path / "rm"))


def test_a_backbone_in_pickles_is_refused(fake_hub: FakeHub, backbone_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(backbone_path, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    fake_hub.add("they/old", folder)
    for name in (str(folder), "they/old"):
        with pytest.raises(CheckpointError, match=r"safetensors"):
            Backbone.from_pretrained(name, device="cpu")
    assert not any(m == "GET" and path.endswith(".bin") for m, path in fake_hub.requests)


@pytest.fixture
def with_code(backbone_path: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A backbone that brings a Python file, as a model type of its own or of transformers'."""

    def make(model_type: str) -> Path:
        folder = tmp_path / model_type
        shutil.copytree(backbone_path, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.Own", "AutoModel": "code.Model"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text(
            "from pathlib import Path\nfrom transformers import BertConfig, BertModel\n"
            f"Path({str(tmp_path / 'ran')!r}).touch()\n"
            "class Own(BertConfig):\n    model_type = 'bert_own'\n"
            "class Model(BertModel):\n    config_class = Own\n"
        )
        return folder

    return make


@pytest.mark.usefixtures("remote_code")
def test_code_beside_a_backbone_runs_only_where_asked_for(
    with_code: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody_is_asked(*_: object) -> str:
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", nobody_is_asked)
    Backbone.from_pretrained(str(with_code("bert")), device="cpu")  # transformers has that one itself
    folder = with_code("bert_own")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        Backbone.from_pretrained(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()
    backbone = Backbone.from_pretrained(str(folder), device="cpu", trust_remote_code=True)
    assert type(backbone.model).__name__ == "Model"
    assert (tmp_path / "ran").exists()


def test_another_commit_written_into_a_model_is_refused(fake_hub: FakeHub, backbone_path: Path, tmp_path: Path) -> None:
    first = fake_hub.add("they/bert", backbone_path)
    backbone = Backbone.from_pretrained("they/bert", device="cpu", pooling="mean")
    model, _ = RewardModel.fit(backbone, [Preference("red", "good", "bad")], num_features=8, dtype=torch.float32)
    model.save_pretrained(tmp_path / "rm")
    other = fake_hub.repos["they/bert"].commit({**read_folder(backbone_path), "vocab.txt": b"other"})
    file = tmp_path / "rm" / "rmcore.json"
    values = json.loads(file.read_text())
    for revision in (other, "main", None):
        values["backbone"]["revision"] = revision
        file.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="differ from those saved by the digest"):
            load(str(tmp_path / "rm"))
    values["backbone"] |= {"revision": first, "name": "me/mirror"}  # a commit's hash says what is in it, wherever
    file.write_text(json.dumps(values))
    fake_hub.repos["me/mirror"] = fake_hub.repos["they/bert"]
    assert torch.equal(scores(load(str(tmp_path / "rm"))), scores(model))
    values["digest"] = checkpoint._digest(values, commit=False)  # of an earlier rmcore
    file.write_text(json.dumps(values))
    load(str(tmp_path / "rm"))


def test_an_adapter_keeps_the_commit_of_the_model_below_it(
    fake_hub: FakeHub, backbone_path: Path, tmp_path: Path
) -> None:
    first = fake_hub.add("they/bert", backbone_path)
    backbone = with_lora("they/bert")
    model, _ = RewardModel.fit(backbone, [Preference("red", "good", "bad")], num_features=8, dtype=torch.float32)
    model.save_pretrained(tmp_path / "rm", backbone="embed")
    told = json.loads((tmp_path / "rm" / "rmcore.json").read_text())["backbone_files"]
    assert told["base_model"] == f"they/bert@{first}"
    changed = read_folder(backbone_path)
    tensors = load_file(backbone_path / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1
    changed["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    second = fake_hub.repos["they/bert"].commit(changed)
    loaded = load(str(tmp_path / "rm"))
    torch.testing.assert_close(scores(loaded), scores(model))
    shutil.copytree(tmp_path / "rm" / "backbone", tmp_path / "adapter")
    loaded.backbone.config = replace(loaded.backbone.config, name=str(tmp_path / "adapter"))
    loaded.save_pretrained(tmp_path / "again")
    again = load(str(tmp_path / "again"))
    torch.testing.assert_close(scores(again), scores(model))
    fresh = Backbone.from_pretrained(str(tmp_path / "adapter"), device="cpu", pooling="mean")
    assert fresh.files["base_model"] == f"they/bert@{second}"
    assert fresh.identity != again.backbone.identity, "no state of the one is taken for the other's"


def test_an_adapter_on_the_hub_is_loaded_with_the_model_below_it(
    fake_hub: FakeHub, backbone_path: Path, tmp_path: Path
) -> None:
    first = fake_hub.add("they/bert", backbone_path)
    own = with_lora("they/bert")
    own.model.save_pretrained(tmp_path / "adapter")
    own.tokenizer.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    commit = fake_hub.add("they/lora", tmp_path / "adapter")
    backbone = Backbone.from_pretrained("they/lora", device="cpu", pooling="mean")
    assert (backbone.config.name, backbone.config.revision) == ("they/lora", commit)
    assert backbone.files["base_model"] == f"they/bert@{first}"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(backbone.files)
    pairs = [Preference("red", "good", "bad")]
    model, _ = RewardModel.fit(backbone, pairs, num_features=8, dtype=torch.float32)
    torch.testing.assert_close(
        scores(model), scores(RewardModel.fit(own, pairs, num_features=8, dtype=torch.float32)[0])
    )
    model.save_pretrained(tmp_path / "rm")
    changed = read_folder(backbone_path)
    tensors = load_file(backbone_path / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1
    changed["model.safetensors"] = save(tensors, metadata={"format": "pt"})
    fake_hub.repos["they/bert"].commit(changed)  # what it was fitted on is what it is loaded with
    assert torch.equal(scores(load(str(tmp_path / "rm"))), scores(model))
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for base in (str(backbone_path), "./bert", "", None):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": base}))
        fake_hub.add("they/other", tmp_path / "adapter")
        with pytest.raises(CheckpointError, match=r"expected one whose adapter_config\.json names its model by a hub"):
            Backbone.from_pretrained("they/other", device="cpu", pooling="mean")
