"""A saved model is for the backbone it was fitted on: a folder whose deciding files differ is refused, by name."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.folders import preference_rows
from support.old_folders import as_0_1_0_wrote_it
from typer.testing import CliRunner

from rmcore._base.errors import CheckpointError, InputError
from rmcore.cli import app
from rmcore.head.checkpoint import _SINCE_0_1_0, check_digest
from rmcore.model import Backbone, Preference, RewardModel, folder_files
from rmcore.model.folder_files import check_files, folder_digests
from rmcore.model.loading import Options, with_base

PAIRS = [Preference(**row) for row in preference_rows(6)]


@pytest.fixture(params=["name", "embed"])
def saved(request, backbone_path: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder, and the folder of its backbone."""
    source = tmp_path / "bert"
    shutil.copytree(backbone_path, source)
    backbone = Backbone.from_pretrained(str(source), device="cpu", pooling="mean")
    model, _ = RewardModel.fit(backbone, PAIRS, num_features=8, dtype=torch.float32)
    model.save_pretrained(tmp_path / "rm", backbone=request.param)
    return tmp_path / "rm", source if request.param == "name" else tmp_path / "rm" / "backbone"


def overwrite_one_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.layer.0.output.dense.bias"][3] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def change_do_lower_case(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_lower_case": True}))


def another_of_the_same_width(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)


def add_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


CHANGES = {
    overwrite_one_weight: "model.safetensors changed",
    change_do_lower_case: "tokenizer_config.json changed",
    lambda folder: (folder / "tokenizer.json").unlink(): "tokenizer.json missing",
    another_of_the_same_width: "model.safetensors changed",
    add_an_adapter: "adapter_config.json new",
    lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"): "chat_template.jinja new",
    lambda folder: (folder / "model.safetensors").write_bytes(b""): "model.safetensors changed",
    lambda folder: (folder / "Tokenizer.JSON").write_text("{}"): "Tokenizer.JSON new",
    lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"): "model.safetensors missing",
    lambda folder: (folder / "dict.txt").write_text("word 1"): "dict.txt new",
}


@pytest.mark.parametrize(("change", "told"), list(CHANGES.items()), ids=list(CHANGES.values()))
def test_a_changed_backbone_is_refused_by_file(saved: tuple[Path, Path], change, told: str, tmp_path: Path) -> None:
    model, folder = saved
    RewardModel.from_pretrained(model, device="cpu")
    change(folder)
    with pytest.raises(CheckpointError, match=told):
        RewardModel.from_pretrained(model, device="cpu")
    groups = tmp_path / "groups.jsonl"
    groups.write_text(json.dumps({"prompt": "red", "responses": ["good", "bad"]}))
    result = CliRunner().invoke(app, ["score", str(model), str(groups)])
    assert result.exit_code == 1
    assert told in result.output
    assert not result.stdout


def test_what_decides_nothing_may_change(saved: tuple[Path, Path]) -> None:
    model, folder = saved
    for name in ("README.md", "trainer_state.json", "generation_config.json", "training.py"):
        (folder / name).write_text("{}")
    RewardModel.from_pretrained(model, device="cpu")


def test_a_folder_of_an_older_rmcore_is_not_checked(saved: tuple[Path, Path]) -> None:
    model, folder = saved
    values = json.loads((model / "rmcore.json").read_text())
    assert set(values["backbone_files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    as_0_1_0_wrote_it(model)
    overwrite_one_weight(folder)
    RewardModel.from_pretrained(model, device="cpu")


def test_a_digest_that_was_lost_is_damage(saved: tuple[Path, Path]) -> None:
    """Whatever a later version wrote besides tells the folder from one of 0.1.0, which has none."""
    model, _ = saved
    file = model / "rmcore.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in whole.items() if name != "digest"}))
    with pytest.raises(CheckpointError, match=r"rmcore\.json: got no digest beside 'backbone_files'"):
        RewardModel.from_pretrained(model, device="cpu")
    for nothing in (None, "", 0, [], whole["digest"][:-1]):
        with pytest.raises(CheckpointError, match="differ from those saved by the digest"):
            check_digest(model, whole | {"digest": nothing})
    as_0_1_0_wrote_it(model)
    old = json.loads(file.read_text())
    check_digest(model, old)
    RewardModel.from_pretrained(model, device="cpu")
    later = [(place, name) for place, names in _SINCE_0_1_0.items() for name in names]
    assert ("", "positions") in later
    for place, name in later:
        damaged = json.loads(file.read_text())
        section = damaged
        for part in filter(None, place.split(".")):
            section = section[part]
        section[name] = None
        with pytest.raises(CheckpointError, match=f"no digest beside '{place and place + '.'}{name}'"):
            check_digest(model, damaged)


def test_code_that_runs_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modeling.py").write_text("1")
    assert set(folder_digests(tmp_path)) == {"config.json"}
    assert set(folder_digests(tmp_path, code=True)) == {"config.json", "modeling.py"}


def test_shards_that_an_index_names_elsewhere_are_part_of_it(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    (model / "part").mkdir(parents=True)
    other.mkdir()
    for file in (model / "part" / "1.safetensors", other / "2.safetensors"):
        file.write_bytes(b"tensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part/1.safetensors", "b": "../other/2.safetensors"}}))
    before = folder_digests(model)
    assert set(before) == {index.name, "part/1.safetensors", "../other/2.safetensors"}
    (other / "2.safetensors").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"with \.\./other/2\.safetensors changed"):
        check_files(model, before, folder_digests(model))
    (model / "part" / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"with part/1\.safetensors missing"):
        check_files(model, before, folder_digests(model))
    for damaged in ("", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        assert set(folder_digests(model)) == {index.name}


def test_an_adapter_is_the_model_below_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_model.safetensors").write_bytes(b"low rank")
    told = adapter / "adapter_config.json"
    told.write_text(json.dumps({"base_model_name_or_path": "base"}))
    monkeypatch.chdir(tmp_path)
    before = folder_digests(adapter)
    own = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(before) == own | {"base_model/config.json", "base_model/model.safetensors"}
    (base / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match=r"base_model/model\.safetensors changed"):
        check_files(adapter, before, folder_digests(adapter))
    monkeypatch.chdir(base)  # where there is no such folder, and transformers would ask the hub for that name
    assert folder_digests(adapter)["base_model"] == "base"
    with pytest.raises(CheckpointError, match=r"base_model/config\.json, base_model/model\.safetensors missing"):
        check_files(adapter, before, folder_digests(adapter))
    check_files(adapter, {name: before[name] for name in own}, folder_digests(adapter))  # of an older rmcore
    (adapter / "config.json").write_text("{}")  # a whole model with an adapter in its folder
    assert set(folder_digests(adapter)) == own | {"config.json"}


def test_trained_weights_are_not_saved_by_the_name_of_the_old_ones(backbone_path: Path, tmp_path: Path) -> None:
    backbone = Backbone.from_pretrained(str(backbone_path), device="cpu", pooling="mean")
    model, _ = RewardModel.fit(backbone, PAIRS, num_features=8, dtype=torch.float32)
    assert backbone.identity is not None
    with torch.no_grad():
        next(iter(backbone.model.parameters())).add_(1)
    assert backbone.identity is None
    with pytest.raises(InputError, match="'name' for weights that were trained since"):
        model.save_pretrained(tmp_path / "rm")
    model.save_pretrained(tmp_path / "rm", backbone="embed")
    RewardModel.from_pretrained(tmp_path / "rm", device="cpu")


def test_a_large_file_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RMCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_files, "_LARGE", 4)
    monkeypatch.setattr(folder_files, "_SETTLED_S", 0.0)
    read: list[str] = []
    digest = folder_files.digest_file
    monkeypatch.setattr(folder_files, "digest_file", lambda file: read.append(file.name) or digest(file))
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(b"12345678")
    first = folder_digests(folder)
    assert folder_digests(folder) == first
    assert read == ["model.safetensors"]
    times = os.stat(file)
    time.sleep(0.02)
    file.write_bytes(b"12345679")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a program would that hides its traces
    assert folder_digests(folder) != first
    assert read == ["model.safetensors"] * 2


def test_a_relative_base_that_is_not_found_is_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("base", "adapter", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    monkeypatch.chdir(tmp_path)
    recorded = folder_digests(tmp_path / "adapter")
    assert "by the relative path 'base': from another folder than" in caplog.text
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"an adapter of 'base', which was a folder when .*, and is none from "):
        with_base(folder_digests(tmp_path / "adapter"), recorded, Options())
