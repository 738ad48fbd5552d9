"""A reward model learns, survives the disk bit for bit, and keeps an old reward model's scores when it upgrades one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import own_inputs

from rmcore import RewardEngine, RewardModel
from rmcore._base.errors import CheckpointError, InputError
from rmcore.model import Preference
from rmcore.model.backbone import Backbone
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.training_pairs import encode_preferences

PROMPTS = ["tell me about the dog", [{"role": "user", "content": "what is the capital of France?"}]]
RESPONSES = [["a good dog", "a bad dog", "the quick fox"], ["Paris is the capital.", "numbers 0 1 2"]]


def logits(model: RewardModel, preferences: list[Preference]) -> torch.Tensor:
    """One p̃ a preference, chosen against rejected."""
    scores = RewardEngine(model).score([p.prompt for p in preferences], [[p.chosen, p.rejected] for p in preferences])
    return torch.stack([group.preference[0, 1] for group in scores])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tokenizer_for) -> str:
    """A saved BERT."""
    path = tmp_path_factory.mktemp("bert")
    make_model("bert", tokenizer_for("bert")).save_pretrained(path)
    tokenizer_for("bert").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def fitted(folder, preferences) -> RewardModel:
    backbone = Backbone.from_pretrained(folder, device="cpu", pooling="mean", length_feature=0.1)
    return RewardModel.fit(backbone, preferences, num_features=64, ridge=0.1, dtype=torch.float32)[0]


# -- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Preference("hi", None, "no"), r"preferences\[1\]\.chosen: got NoneType"),
        (Preference("hi", "yes", None), r"preferences\[1\]\.rejected: got NoneType"),
        (Preference(None, "yes", "no"), r"preferences\[1\]\.prompt"),
        (Preference("hi", [], "no"), r"preferences\[1\]\.chosen: got an empty list"),
        (Preference("hi", [{"role": "user", "content": "x"}], "no"), r"preferences\[1\]\.chosen: got messages"),
        (Preference("hi", "yes", "no", float("nan")), r"preferences\[1\]\.label: got nan"),
        (Preference("hi", "yes", "no", 2), r"preferences\[1\]\.label: got 2"),
        (Preference("hi", "yes", "no", "0.3"), r"preferences\[1\]\.label: got '0.3'"),
        (Preference("hi", "yes", "no", True), r"preferences\[1\]\.label: got True"),
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, r"preferences\[1\]: got dict.*read_preferences makes"),
        (("hi", "yes", "no"), r"preferences\[1\]: got tuple, expected a Preference"),
    ],
)
def test_what_is_no_preference_is_named_not_trained_on(fitted, preferences, bad, says):
    for mode in ("difference", "concat"):
        with pytest.raises(InputError, match=says):
            RewardModel.fit(fitted.backbone, [preferences[0], bad], mode=mode, num_features=8)


def test_messages_are_the_responses_they_hold(fitted):
    text, message = Preference("hi", "yes", "no"), {"role": "assistant", "content": "yes"}
    for chosen in (message, [message]):
        for one, other in zip(
            encode_preferences(fitted.backbone, [text], "difference"),
            encode_preferences(fitted.backbone, [replace(text, chosen=chosen)], "difference"),
            strict=True,
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["difference", "concat"])
@pytest.mark.parametrize(("base", "pooling"), [("bert", "mean"), ("llama", "mean"), ("qwen3", "last")])
def test_learns_a_keyword(make_backbone, preferences, mode, base, pooling):
    # In concat mode, weights large enough that a mean over the tokens of a pair tells which response stood where.
    backbone = make_backbone(base, pooling=pooling, model={"initializer_range": 0.3} if mode == "concat" else {})
    model, report = RewardModel.fit(backbone, preferences, mode=mode, num_features=512, ridge=1e-3, seed=3)
    assert model.mode == mode
    assert report.converged
    right = (logits(model, preferences) > 0).float().mean()
    assert right > 0.9
    if mode == "difference":
        held_out = [Preference("tell me", f"a good {n}", f"a bad {n}") for n in ("fox", "day", "brown one")]
        assert bool((logits(model, held_out) > 0).all())


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_rows_and_labels_of_a_mode(make_backbone, mode):
    backbone = make_backbone("llama", pooling="mean")
    items = [Preference("p", "a", "b"), Preference("q", "c", "d", label=0.75)]
    hidden, labels, pairs = encode_preferences(backbone, items, mode)
    encode = backbone.encoder.encode
    if mode == "difference":
        assert labels.tolist() == [1.0, 0.75]
        assert pairs.tolist() == [[0, 1], [2, 3]]
        texts = [encode("p", "a"), encode("p", "b"), encode("q", "c"), encode("q", "d")]
    else:
        assert labels.tolist() == [1.0, 0.0, 0.75, 0.25]
        assert pairs is None
        texts = [encode("p", "a", "b"), encode("p", "b", "a"), encode("q", "c", "d"), encode("q", "d", "c")]
    assert torch.equal(hidden, backbone.hidden(texts))


def test_soft_labels_pull_less(make_backbone):
    backbone = make_backbone("bert", pooling="mean")
    hard, soft = (
        RewardModel.fit(backbone, [Preference("p", "good", "bad", label)], num_features=64, seed=0)[0]
        for label in (1.0, 0.6)
    )
    one = [Preference("p", "good", "bad")]
    assert logits(hard, one) > logits(soft, one) > 0


def test_fitting_leaves_the_backbone_alone(make_backbone, preferences):
    backbone = make_backbone("bert", pooling="mean")
    before = {name: t.clone() for name, t in backbone.model.state_dict().items()}
    RewardModel.fit(backbone, preferences, num_features=32)
    assert all(torch.equal(before[name], t) for name, t in backbone.model.state_dict().items())
    assert not backbone.model.training


def test_fit_reports_progress(make_backbone, preferences):
    seen: list[tuple[str, int, int]] = []
    RewardModel.fit(
        make_backbone("bert", pooling="mean"), preferences, num_features=32, progress=lambda *a: seen.append(a)
    )
    encoding = [entry for entry in seen if entry[0] == "encoding"]
    assert encoding[-1][1] == encoding[-1][2] > 0
    assert any(entry[0] == "fitting" for entry in seen)


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_an_over_long_preference_is_named(make_backbone, mode):
    backbone = make_backbone("llama", pooling="mean", max_length=30)
    items = [Preference("p", "good", "bad"), Preference("p", "good", "bad " * 40)]
    with pytest.raises(InputError, match=r"preferences\[1\].*at most 30"):
        RewardModel.fit(backbone, items, mode=mode, num_features=8)


def test_bad_preferences(make_backbone):
    backbone = make_backbone("bert", pooling="mean")
    with pytest.raises(InputError, match="preferences"):
        RewardModel.fit(backbone, [])
    with pytest.raises(InputError, match=r"preferences\[0\]\.prompt"):
        RewardModel.fit(backbone, [Preference([], "a", "b")])
    with pytest.raises(InputError, match="label"):
        RewardModel.fit(backbone, [Preference("p", "good", "bad", 1.5)], num_features=8)


def test_head_and_backbone_must_be_of_one_width(make_backbone, fitted):
    with pytest.raises(InputError, match="hidden_size: got 33, expected the backbone's 32"):
        RewardModel(make_backbone("bert"), fitted.head)


@pytest.mark.parametrize("texts", [("good " * 60, "bad"), ("good", "bad " * 60)])
def test_an_over_long_response_names_its_group(make_backbone, preferences, texts):
    backbone = make_backbone("llama", pooling="mean", max_length=40)
    model, _ = RewardModel.fit(backbone, preferences, num_features=16)
    with pytest.raises(InputError, match=r"group 1: .*at most 40"):
        RewardEngine(model).score(["p", "q"], [["a", "b"], list(texts)])


@pytest.mark.parametrize("orders", ["both", "one"])
@pytest.mark.parametrize("mode", ["difference", "concat"])
@pytest.mark.parametrize("overlong", ["error", "truncate-prompt-left", "truncate-right"])
def test_packed_groups_have_the_states_of_padded_rows(make_backbone, preferences, mode, orders, overlong):
    """Whatever a policy cuts: a prompt cut for one pair is not that of another, and is not shared with it."""
    limit = {} if overlong == "error" else {"max_length": 50 if mode == "concat" else 28, "overlong": overlong}
    prompts = ["tell me about the quick brown fox that jumps over the lazy dog", "the capital of France " * 4]
    responses = [
        ["a good dog", "a bad dog " * 3, "the fox runs home", "Paris"],
        ["the quick fox", "Paris is the capital"],
    ]
    rows = {}
    for packing in ("padded", "sdpa"):
        backbone = make_backbone("qwen2", pooling="mean", packing=packing, chat="never", **limit)
        head = RewardModel.fit(backbone, preferences[:2], mode=mode, num_features=8)[0].head
        model, backbone.stats = RewardModel(backbone, head), EncodingStats()
        rows[packing] = model.hidden_states(prompts, responses, orders=orders)
        stats = backbone.stats
        if packing == "sdpa":
            assert stats.padded_tokens == 0
            assert stats.packed_tokens < stats.tokens or overlong == "truncate-prompt-left"
        if overlong != "error":
            assert stats.truncated_texts > 0
    torch.testing.assert_close(rows["sdpa"], rows["padded"], rtol=1e-4, atol=1e-5)


def test_a_group_is_encoded_as_one_tree_by_default(make_backbone, hand_head):
    backbone = make_backbone("qwen2", pooling="mean", pair_template="{prompt} {first} {second}")
    model = RewardModel(backbone, hand_head([0.0] * 32, mode="concat"))
    prompt, group = "tell me about the quick brown fox", ["good " * 5, "bad " * 6, "Paris " * 7, "fox " * 8]
    model.hidden_states([prompt], [group])
    segments = {s for text in model.encode_group(prompt, group) for s in text.segments}
    size = {name: sum(len(s.ids) for s in segments if s.name == name) for name in ("prompt", "first", "second")}
    # The template's space before a response is one token of its segment, and begins all of them alike.
    k, space = len(group), 1
    closed = size["prompt"] + size["first"] + (k - 1) * size["second"]
    assert backbone.stats.padded_tokens == 0
    assert backbone.stats.packed_tokens == closed - (k - 1) * space - k * (k - 2) * space


# -- the disk --------------------------------------------------------------------------------------------------------


def assert_same_scores(one: RewardModel, two: RewardModel) -> None:
    a, b = (RewardEngine(m).score(PROMPTS, RESPONSES) for m in (one, two))
    for x, y in zip(a, b, strict=True):
        for name in ("preference", "uncertainty", "logit", "variance"):
            assert torch.equal(getattr(x, name), getattr(y, name))


@pytest.mark.parametrize("backbone", ["name", "embed"])
@pytest.mark.parametrize("posterior", [True, False])
def test_save_and_load_is_bit_equal(fitted, tmp_path, backbone, posterior):
    fitted.save_pretrained(tmp_path / "model", backbone=backbone, include_posterior=posterior)
    assert (tmp_path / "model" / "backbone").exists() == (backbone == "embed")
    loaded = RewardModel.from_pretrained(tmp_path / "model", device="cpu")
    assert_same_scores(fitted, loaded)
    assert (loaded.head.posterior is not None) == posterior
    assert replace(loaded.backbone.config, name="") == replace(fitted.backbone.config, name="")
    # And once more, over the first: a folder that rmcore wrote may be replaced.
    loaded.save_pretrained(tmp_path / "model", backbone="embed")
    assert_same_scores(fitted, RewardModel.from_pretrained(tmp_path / "model", device="cpu"))


def test_an_embedded_model_can_be_moved(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "here", backbone="embed")
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same_scores(fitted, RewardModel.from_pretrained(tmp_path / "there", device="cpu"))


def test_a_backbone_at_hand_is_used(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "model")
    loaded = RewardModel.from_pretrained(tmp_path / "model", backbone=fitted.backbone)
    assert loaded.backbone is fitted.backbone
    assert_same_scores(fitted, loaded)


def test_a_backbone_without_a_name_must_be_embedded(make_backbone, preferences, tmp_path):
    model, _ = RewardModel.fit(make_backbone("bert", pooling="mean"), preferences, num_features=16)
    with pytest.raises(InputError, match="embed"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(InputError, match="'copy'"):
        model.save_pretrained(tmp_path / "model", backbone="copy")


def test_nothing_of_somebody_else_is_replaced(fitted, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="path"):
        fitted.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_model(fitted, tmp_path, monkeypatch):
    fitted.save_pretrained(tmp_path / "model")

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(fitted.backbone.tokenizer, "save_pretrained", fail, raising=False)
    with pytest.raises(OSError, match="disk full"):
        fitted.save_pretrained(tmp_path / "model", backbone="embed")
    monkeypatch.undo()
    assert_same_scores(fitted, RewardModel.from_pretrained(tmp_path / "model", device="cpu"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def edit(path: Path, **values) -> None:
    document = json.loads((path / "rmcore.json").read_text())
    document |= values
    (path / "rmcore.json").write_text(json.dumps(document))


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def backbone_section(path: Path, **values) -> dict:
    return {"backbone": json.loads((path / "rmcore.json").read_text())["backbone"] | values}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda p: (p / "rmcore.json").unlink(), "rmcore.json"),
        (lambda p: truncate(p / "rmcore.json"), "JSON"),
        (lambda p: (p / "rmcore.json").write_text("[]"), "format"),
        (lambda p: edit(p, format="other"), "another program"),
        (lambda p: edit(p, format_version=99), "99"),
        (lambda p: edit(p, kind="head"), "head"),
        (lambda p: edit(p, head=None), "head"),
        (lambda p: edit(p, backbone=None), "backbone"),
        (lambda p: edit(p, **backbone_section(p, pooling="max")), "max"),
        (lambda p: edit(p, **backbone_section(p, flavour=1)), "flavour"),
        (lambda p: edit(p, **backbone_section(p, length_feature=0)), "hidden_size"),
        (lambda p: edit(p, **backbone_section(p, max_length=100000)), "max_length"),
        (lambda p: truncate(p / "head.safetensors"), "truncated"),
        (lambda p: (p / "head.safetensors").unlink(), "missing"),
        (lambda p: truncate(p / "backbone" / "model.safetensors"), "backbone"),
        (lambda p: (p / "backbone" / "config.json").unlink(), "backbone"),
    ],
)
def test_damaged_folders(fitted, tmp_path, damage, named):
    path = tmp_path / "model"
    fitted.save_pretrained(path, backbone="embed")
    damage(path)
    with pytest.raises(CheckpointError, match=named):
        RewardModel.from_pretrained(path, device="cpu")


@pytest.mark.parametrize("section", ["head", "backbone", "error_prior"])
def test_values_that_fit_and_are_not_those_saved_are_found(fitted, preferences, tmp_path, section):
    """Each number and text of rmcore.json, and a byte of the error prior: never a score that differs silently."""
    path = tmp_path / "model"
    many = [replace(item, prompt=f"{item.prompt} {k}") for item in preferences for k in range(4)]
    model, _ = RewardModel.fit(fitted.backbone, many, num_features=16, error_prior=True)
    assert model.error_prior is not None
    model.save_pretrained(path, backbone="embed")
    whole = (path / "rmcore.json").read_text()
    for name, value in json.loads(whole)[section].items():
        if isinstance(value, (dict, list)) or name in ("name", "revision", "max_length", "overlong"):
            continue
        changed = not value if isinstance(value, bool) else value * 2 + 1 if isinstance(value, (int, float)) else "x"
        edit(path, **{section: json.loads(whole)[section] | {name: changed}})
        with pytest.raises(CheckpointError):
            RewardModel.from_pretrained(path, device="cpu")
    (path / "rmcore.json").write_text(whole)
    edit(path, **backbone_section(path, overlong="truncate-right", max_length=20))
    assert RewardModel.from_pretrained(path, device="cpu").backbone.encoder.limit.max_length == 20
    file = path / "error_prior.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"error_prior\.safetensors.*sha256"):
        RewardModel.from_pretrained(path, device="cpu")


def test_no_folder_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"rmcore\.json"):
        RewardModel.from_pretrained(tmp_path / "nothing")


def test_a_backbone_of_another_width_is_refused(fitted, make_backbone, tmp_path):
    fitted.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="hidden_size"):
        RewardModel.from_pretrained(tmp_path / "model", backbone=make_backbone("llama"))


# -- upgrading an existing reward model ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-classifier", "bert-classifier", "roberta-classifier"])
def test_upgrade_keeps_every_score(make_backbone, preferences, kind):
    backbone = make_backbone(kind)
    model = RewardModel.upgrade(backbone, preferences, dtype=torch.float32)
    texts = ["a good dog", "a bad fox", "Paris", "the capital of France is Paris"]
    group = RewardEngine(model).score(["what is it?"], [texts])[0]
    with torch.no_grad():
        own = torch.stack(
            [
                backbone.model(**own_inputs(backbone, backbone.encoder.encode("what is it?", t))).logits[0, 0]
                for t in texts
            ]
        ).double()
    expected = own[:, None] - own[None, :]
    assert expected.abs().max() > 0.05
    # Relative to the scores: their differences are formed from float32 states of that size.
    torch.testing.assert_close(group.logit, expected, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    off = ~torch.eye(4, dtype=torch.bool)
    assert bool((group.variance[off] > 0).all())
    assert bool((group.uncertainty[off] > 1).all())


def test_upgrade_ranks_as_before(make_backbone, preferences):
    """p̃ = g/u shrinks, never reverses: who wins each pair is what the reward model said."""
    model = RewardModel.upgrade(make_backbone("llama-classifier"), preferences)
    group = RewardEngine(model).score(["p"], [["good", "bad", "the fox", "Paris"]])[0]
    assert torch.equal(group.preference.sign(), group.logit.sign())
    assert bool((group.preference.abs() <= group.logit.abs()).all())


def test_more_data_never_raises_an_upgraded_variance(make_backbone, preferences):
    backbone = make_backbone("bert-classifier")
    few, more = (RewardModel.upgrade(backbone, preferences[:n], dtype=torch.float32) for n in (4, 24))
    scores = [RewardEngine(m).score(["p"], [["good", "bad", "the fox", "Paris is"]])[0] for m in (few, more)]
    assert bool((scores[1].variance <= scores[0].variance * (1 + 1e-6)).all())
    assert torch.allclose(scores[0].logit, scores[1].logit, rtol=1e-6)


def test_an_upgraded_model_survives_the_disk(make_backbone, preferences, tmp_path):
    model = RewardModel.upgrade(make_backbone("bert-classifier"), preferences)
    model.save_pretrained(tmp_path / "model", backbone="embed")
    loaded = RewardModel.from_pretrained(tmp_path / "model", device="cpu", backbone=model.backbone)
    assert_same_scores(model, loaded)
    again = RewardModel.from_pretrained(tmp_path / "model", device="cpu")
    assert again.backbone.config.kind == "classifier"
    texts = [model.backbone.encoder.encode("p", "a good dog")]
    torch.testing.assert_close(again.backbone.hidden(texts), model.backbone.hidden(texts))


def test_upgrade_wants_a_reward_model(make_backbone, preferences):
    with pytest.raises(InputError, match="classifier"):
        RewardModel.upgrade(make_backbone("bert"), preferences)
    with pytest.raises(InputError, match="2 labels"):
        RewardModel.upgrade(make_backbone("bert-classifier", model={"num_labels": 2}), preferences)
    with pytest.raises(InputError, match="preferences"):
        RewardModel.upgrade(make_backbone("bert-classifier"), [])
