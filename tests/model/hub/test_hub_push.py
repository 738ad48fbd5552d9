"""What is pushed to the hub."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from support.folders import preference_rows
from support.hub import FakeHub, read_folder
from support.hub_models import TOKEN, load, scores, with_lora

from rmcore import Backbone, Preference, RewardModel
from rmcore._base.errors import CheckpointError, InputError

# -- up --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def token(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.usefixtures("token")
def test_what_was_pushed_is_loaded(fake_hub: FakeHub, model: RewardModel) -> None:
    url = model.push_to_hub("me/rm", private=True, commit_message="first")
    repo = fake_hub.repos["me/rm"]
    assert url == f"{fake_hub.url}/me/rm/commit/{repo.refs['main']}"
    assert repo.private is True
    files = repo.files()
    assert {"rmcore.json", "head.safetensors", "README.md", "backbone/model.safetensors"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt", ".py"))]
    loaded = load("me/rm")
    assert torch.equal(scores(loaded), scores(model))
    assert loaded.head.posterior is not None


@pytest.mark.usefixtures("token")
def test_all_that_a_model_consists_of_is_pushed_and_fetched(
    fake_hub: FakeHub, backbone_path: Path, tmp_path: Path
) -> None:
    backbone = Backbone.from_pretrained(str(backbone_path), device="cpu", pooling="mean", chat="never")
    backbone.tokenizer.chat_template = {"default": "{{ messages }}", "other": "{{ messages[0] }}"}
    pairs = [Preference(**row) for row in preference_rows(60)]
    model, _ = RewardModel.fit(backbone, pairs, num_features=8, dtype=torch.float32, error_prior=True)
    assert model.error_prior is not None
    model.add_estimator("laplace", pairs)
    model.push_to_hub("me/rm")
    model.save_pretrained(tmp_path / "rm", backbone="embed")
    assert set(read_folder(tmp_path / "rm")) <= set(fake_hub.repos["me/rm"].files())
    loaded = load("me/rm")
    assert loaded.error_prior is not None
    assert set(loaded.estimators) == {"laplace"}
    assert set(loaded.backbone.tokenizer.chat_template) == {"default", "other"}
    assert torch.equal(scores(loaded), scores(model))


@pytest.mark.usefixtures("token")
def test_an_adapter_of_a_folder_is_not_pushed(fake_hub: FakeHub, backbone_path: Path) -> None:
    backbone = with_lora(str(backbone_path))
    model, _ = RewardModel.fit(backbone, [Preference("red", "good", "bad")], num_features=8, dtype=torch.float32)
    with pytest.raises(InputError, match="an adapter of a model in a folder of this machine"):
        model.push_to_hub("me/rm")
    assert fake_hub.requests == []


@pytest.mark.usefixtures("token")
def test_nothing_of_this_machine_is_pushed(fake_hub: FakeHub, model: RewardModel, backbone_path: Path) -> None:
    model.push_to_hub("me/rm", include_posterior=False)
    for name, data in fake_hub.repos["me/rm"].files().items():
        assert str(backbone_path).encode() not in data, name
        assert TOKEN.encode() not in data, name
    assert load("me/rm").head.posterior is None


@pytest.mark.usefixtures("token")
def test_a_backbone_of_the_hub_is_named_not_copied(fake_hub: FakeHub, backbone_path: Path) -> None:
    commit = fake_hub.add("they/bert", backbone_path)
    backbone = Backbone.from_pretrained("they/bert", device="cpu", pooling="mean")
    model, _ = RewardModel.fit(backbone, [Preference("red", "good", "bad")], num_features=8, dtype=torch.float32)
    model.push_to_hub("me/rm", backbone="embed")
    model.push_to_hub("me/rm")
    files = fake_hub.repos["me/rm"].files()
    assert not [name for name in files if name.startswith("backbone/")], "what the second push lacks is deleted"
    section = json.loads(files["rmcore.json"])["backbone"]
    assert (section["name"], section["revision"]) == ("they/bert", commit)
    assert torch.equal(scores(load("me/rm")), scores(model))


@pytest.mark.usefixtures("token")
def test_the_card_says_what_the_model_is_and_stays_as_edited(fake_hub: FakeHub, model: RewardModel) -> None:
    model.push_to_hub("me/rm")
    repo = fake_hub.repos["me/rm"]
    text = repo.files()["README.md"].decode()
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("rmcore", "text-classification")
    assert "reward-model" in card.data.tags
    for said in ('RewardModel.from_pretrained("me/rm")', "difference mode", "32 rff", "float32", "embedded"):
        assert said in text
    repo.commit({**repo.files(), "README.md": b"my own words"})
    model.push_to_hub("me/rm")
    assert repo.files()["README.md"] == b"my own words"


@pytest.mark.usefixtures("token")
def test_a_branch_is_pushed_to(fake_hub: FakeHub, model: RewardModel, embedded: Path) -> None:
    main = fake_hub.add("me/rm", embedded)
    repo = fake_hub.repos["me/rm"]
    repo.refs["next"] = main
    model.push_to_hub("me/rm", branch="next")
    assert repo.refs["main"] == main
    assert repo.refs["next"] != main
    with pytest.raises(CheckpointError, match=r"'me/rm' \(revision 'none'\).*no such revision"):
        model.push_to_hub("me/rm", branch="none")


def test_a_push_that_the_hub_does_not_take(fake_hub: FakeHub, model: RewardModel) -> None:
    with pytest.raises(CheckpointError, match=r"'me/rm' \(revision 'main'\).*refused \(401\).*HF_TOKEN"):
        model.push_to_hub("me/rm")
    assert fake_hub.repos == {}
    with pytest.raises(InputError, match=r"backbone: got 'name' for .*expected 'embed'"):
        model.push_to_hub("me/rm", backbone="name")
    with pytest.raises(InputError, match="backbone: got 'copy'"):
        model.push_to_hub("me/rm", backbone="copy")  # type: ignore[arg-type]


@pytest.mark.usefixtures("token")
def test_a_hub_that_is_down_is_named(fake_hub: FakeHub, model: RewardModel) -> None:
    fake_hub.down = 418
    with pytest.raises(CheckpointError, match=rf"'me/rm'.*{fake_hub.url} answered 418"):
        model.push_to_hub("me/rm")
