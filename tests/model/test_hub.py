"""Models on the hub: names, commits, pushes and what goes wrong, against a hub on the loopback."""

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
from support.families import LAYOUTS
from support.folders import preference_rows
from support.hub import FakeHub, read_folder

from rmcore import Backbone, Preference, RewardEngine, RewardModel
from rmcore._base.errors import CheckpointError, InputError
from rmcore.head import checkpoint
from rmcore.integrations.training.prepare import with_adapters
from rmcore.model.hub import folder_of

PROMPTS, RESPONSES = ["red tree"], [["good clear house", "bad vague river", "blue"]]
TOKEN = "hf_" + "made" * 4


@pytest.fixture(scope="module")
def model(backbone_path: Path) -> RewardModel:
    backbone = Backbone.from_pretrained(str(backbone_path), device="cpu", pooling="mean")
    pairs = [Preference(**row) for row in preference_rows(12)]
    return RewardModel.fit(backbone, pairs, num_features=32, dtype=torch.float32)[0]


@pytest.fixture
def embedded(model: RewardModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "embedded", backbone="embed")
    return tmp_path / "embedded"


def scores(model: RewardModel) -> torch.Tensor:
    return RewardEngine(model).score(PROMPTS, RESPONSES)[0].preference


def load(name: str, **options: object) -> RewardModel:
    return RewardModel.from_pretrained(name, device="cpu", **options)  # type: ignore[arg-type]


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


def with_lora(name: str) -> Backbone:
    """A backbone with an adapter that changes something."""
    peft = pytest.importorskip("peft")
    backbone = Backbone.from_pretrained(name, device="cpu", pooling="mean")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    backbone.model = with_adapters(backbone, lora)
    backbone.model.eval()
    return backbone


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
