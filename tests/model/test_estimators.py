"""Uncertainties kept with a model: fitted on its states, saved and loaded with it, asked for by benchmarks."""

from __future__ import annotations

import json

import pytest
import torch

from rmcore import RewardModel
from rmcore._base.errors import CheckpointError, InputError
from rmcore.evaluation.benchmarks.estimators import make_estimator
from rmcore.model.backbone import Backbone
from rmcore.model.training_pairs import encode_preferences


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model, tokenizer_for, preferences) -> RewardModel:
    path = tmp_path_factory.mktemp("bert")
    make_model("bert", tokenizer_for("bert")).save_pretrained(path)
    tokenizer_for("bert").save_pretrained(path)
    backbone = Backbone.from_pretrained(str(path), device="cpu", pooling="mean")
    model = RewardModel.fit(backbone, preferences, num_features=32, ridge=0.1, dtype=torch.float32)[0]
    model.add_estimator("laplace", preferences)
    model.add_estimator("ensemble", preferences, members=2, layers=(4,), epochs=1)
    return model


def test_they_are_saved_and_loaded_with_the_model_and_an_altered_one_is_refused(model, preferences, tmp_path):
    model.save_pretrained(tmp_path / "m", backbone="embed")
    again = RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    assert list(again.estimators) == ["laplace", "ensemble"]
    hidden, _, pairs = encode_preferences(again.backbone, preferences, "difference")
    sizes = torch.full((len(pairs),), 2)
    for name, estimator in model.estimators.items():
        both = [e.pairs(hidden, sizes)[:3] for e in (estimator, again.estimators[name])]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*both, strict=True))
    file = tmp_path / "m/estimators/laplace/estimator.json"
    text = file.read_text()
    file.write_text(text.replace('"ridge": ', '"ridge": 1'))
    with pytest.raises(CheckpointError, match="laplace"):
        RewardModel.from_pretrained(tmp_path / "m", device="cpu")
    file.write_text(text)
    config = tmp_path / "m/rmcore.json"
    values = json.loads(config.read_text())
    for bad, says in (({"nothing": "x"}, "nothing"), (["laplace"], "estimators"), ({}, "digest")):
        config.write_text(json.dumps(values | {"estimators": bad}))
        with pytest.raises(CheckpointError, match=says):
            RewardModel.from_pretrained(tmp_path / "m", device="cpu")


def test_a_benchmark_asks_for_one_by_name(model, preferences):
    hidden, _, pairs = encode_preferences(model.backbone, preferences, "difference")
    sizes = torch.full((len(pairs),), 2)
    g, v = make_estimator(model, "ensemble")(hidden, sizes)
    found = model.estimators["ensemble"].pairs(hidden, sizes)
    assert torch.equal(g, found.logit)
    assert torch.equal(v, found.variance)
    assert torch.equal(make_estimator(model, "head")(hidden, sizes)[0], model.head_pairs(hidden, sizes)[0])
    with pytest.raises(InputError, match="head, laplace, ensemble"):
        make_estimator(model, "dropout")
    for what in (lambda: make_estimator(model, "dropuot"), lambda: model.add_estimator("dropuot", preferences)):
        with pytest.raises(InputError, match="laplace-kron"):
            what()
    with pytest.raises(InputError, match="empty"):
        model.add_estimator("laplace", [])
