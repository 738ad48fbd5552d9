"""Models on the hub: names, commits, pushes and what goes wrong, against a hub on the loopback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from support.families import LAYOUTS
from support.hub import FakeHub
from support.hub_models import PROMPTS, RESPONSES, TOKEN, load, scores

from rmcore import Backbone, Preference, RewardModel
from rmcore._base.errors import CheckpointError, InputError
from rmcore.model.hub import folder_of

# -- down ------------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_by_its_name(fake_hub: FakeHub, model: RewardModel, embedded: Path) -> None:
    fake_hub.add("me/rm", embedded)
    assert torch.equal(scores(load("me/rm")), scores(model))


def test_neither_code_nor_pickles_are_fetched(fake_hub: FakeHub, embedded: Path) -> None:
    for name in ("backbone/modeling.py", "backbone/pytorch_model.bin", "head.pkl", "train.py"):
        (embedded / name).write_bytes(b"raise SystemExit")
    fake_hub.add("me/rm", embedded)
    load("me/rm")
    fetched = {path.rpartition("/")[2] for _, path in fake_hub.requests if "/resolve/" in path}
    assert "head.safetensors" in fetched
    assert not fetched & {"modeling.py", "pytorch_model.bin", "head.pkl", "train.py"}


def test_a_revision_is_taken_and_the_next_one_is_not(fake_hub: FakeHub, model: RewardModel, embedded: Path) -> None:
    first = fake_hub.add("me/rm", embedded)
    fake_hub.repos["me/rm"].commit({"rmcore.json": b"{}"})
    assert torch.equal(scores(load("me/rm", revision=first)), scores(model))
    with pytest.raises(CheckpointError, match="another program"):
        load("me/rm")


def test_what_is_in_the_cache_needs_no_hub(
    fake_hub: FakeHub, model: RewardModel, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.add("me/rm", embedded)
    load("me/rm", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
    fake_hub.requests.clear()
    loaded = load("me/rm", cache_dir=tmp_path / "mine", local_files_only=True)
    assert fake_hub.requests == []
    assert torch.equal(scores(loaded), scores(model))
    with pytest.raises(CheckpointError, match=r"'me/rm' \(revision 'main'\).*not asked"):
        load("me/rm", local_files_only=True)  # the other cache is empty
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load("me/rm", cache_dir=tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"'me/rm' \(revision 'v2'\).*HF_HUB_OFFLINE"):
        load("me/rm", revision="v2")
    assert fake_hub.requests == []


def test_a_private_repository_takes_the_token_of_the_environment(
    fake_hub: FakeHub, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.add("me/rm", embedded, token=TOKEN)
    with pytest.raises(CheckpointError, match=r"'me/rm' \(revision 'main'\).*no such repository, or it is private"):
        load("me/rm")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load("me/rm")
    with pytest.raises(TypeError, match="token"):
        load("me/rm", token=TOKEN)
    with pytest.raises(InputError, match="HF_TOKEN"):
        Backbone.from_pretrained("me/bert", token=TOKEN)


def both(fake_hub: FakeHub, name: str, match: str, **options: object) -> None:
    """A model and a backbone of that name fail with the same words."""
    for loader in (load, lambda n, **o: Backbone.from_pretrained(n, device="cpu", **o)):
        with pytest.raises(CheckpointError, match=match) as caught:
            loader(name, **options)
        assert caught.value.__cause__ is not None


def test_no_such_repository(fake_hub: FakeHub) -> None:
    both(fake_hub, "me/nothing", r"'me/nothing' \(revision 'main'\).*no such repository")


def test_no_such_revision(fake_hub: FakeHub, embedded: Path) -> None:
    fake_hub.add("me/rm", embedded)
    both(fake_hub, "me/rm", r"'me/rm' \(revision 'v9'\).*no such revision", revision="v9")


def test_a_gated_repository(fake_hub: FakeHub, embedded: Path) -> None:
    fake_hub.add("me/rm", embedded, gated=True, token=TOKEN)
    both(fake_hub, "me/rm", r"'me/rm' \(revision 'main'\).*gated.*HF_TOKEN")


def test_a_hub_that_cannot_be_reached(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}"
    )
    both(fake_hub, "me/rm", r"'me/rm' \(revision 'main'\).*127\.0\.0\.1:9 .*cannot be reached")


@pytest.mark.parametrize("name", ["a b", "--x", "me/x..y"])
def test_no_name_for_the_hub(fake_hub: FakeHub, name: str) -> None:
    both(fake_hub, name, "neither a folder nor a name the hub can have")
    assert fake_hub.requests == []


def test_a_repository_without_a_model(fake_hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a data set")
    (tmp_path / "model.safetensors").write_bytes(b"")
    fake_hub.add("they/data", tmp_path)
    with pytest.raises(CheckpointError, match=r"'they/data'.*without rmcore\.json.*rmcore upgrade"):
        load("they/data")
    assert not any(path.endswith("model.safetensors") for _, path in fake_hub.requests)


def test_a_reward_model_of_another_library(fake_hub: FakeHub, classifier_path: Path) -> None:
    commit = fake_hub.add("they/rm", classifier_path)
    here, there = load(str(classifier_path)), load("they/rm")
    assert torch.equal(there.score(PROMPTS, RESPONSES)[0].scores, here.score(PROMPTS, RESPONSES)[0].scores)
    assert there.backbone.config.revision == commit


def test_a_published_reward_model_with_a_file_of_its_own(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("they/llama-factory", LAYOUTS["llama-factory"].make().write(tmp_path / "rm"))
    here, there = load(str(tmp_path / "rm")), load("they/llama-factory")
    assert there.backbone.config.family == "llama-factory"
    assert torch.equal(there.score(PROMPTS, RESPONSES)[0].scores, here.score(PROMPTS, RESPONSES)[0].scores)
    asked = {path.rpartition("/")[2] for _, path in fake_hub.requests}
    assert not any(name.endswith((".py", ".bin")) for name in asked)


# -- folders and names -----------------------------------------------------------------------------------------------


def test_a_path_is_never_asked_for_on_the_hub(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "x"), "./x", "../x", "~/no such", "~nobody-of-that-name/rm", "a/b/c", Path("me/rm")):
        with pytest.raises(CheckpointError, match="no such folder"):
            RewardModel.from_pretrained(path)
        with pytest.raises(CheckpointError, match="no such folder"):
            Backbone.from_pretrained(str(path) if isinstance(path, str) else str(tmp_path / path))
    assert fake_hub.requests == []


def test_a_folder_comes_before_a_name_and_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "rm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folder_of("me/rm") == tmp_path / "me" / "rm"
    assert folder_of("me/other") is None
    assert folder_of("other") is None
    with pytest.raises(InputError, match=r"revision: got 'main' beside the folder 'me/rm'"):
        folder_of("me/rm", "main")
    with pytest.raises(InputError, match="name: got an empty one"):
        folder_of("")


def test_a_relative_backbone_is_stored_by_its_absolute_path(
    fake_hub: FakeHub, backbone_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder it is neither missing nor looked for on the hub, where somebody may own that name."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(backbone_path, here / "org" / "bert")
    there.mkdir()
    monkeypatch.chdir(here)
    backbone = Backbone.from_pretrained("org/bert", device="cpu", pooling="mean")
    model, _ = RewardModel.fit(backbone, [Preference("red", "good", "bad")], num_features=8, dtype=torch.float32)
    model.save_pretrained("rm")
    assert json.loads(Path("rm/rmcore.json").read_text())["backbone"]["name"] == str(here / "org" / "bert")
    monkeypatch.chdir(there)
    assert torch.equal(scores(load(str(here / "rm"))), scores(model))
    shutil.rmtree(here / "org")
    with pytest.raises(CheckpointError, match="no such folder"):
        load(str(here / "rm"))
    assert fake_hub.requests == []
