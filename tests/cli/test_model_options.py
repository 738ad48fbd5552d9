"""Which model a command loads, and how: hub names, and the backbone's attention by transformers' name for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.folders import preference_rows
from support.hub import FakeHub
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.model import Backbone
from rmcore.model.reward_model import RewardModel


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.jsonl"
    path.write_text("\n".join(map(json.dumps, preference_rows(8))))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attention of every backbone that is loaded."""
    seen: list[str] = []
    load = Backbone.from_pretrained.__func__

    def watched(cls, *args, **options):
        seen.append(options.get("attn_implementation", "auto"))
        return load(cls, *args, **options)

    monkeypatch.setattr(Backbone, "from_pretrained", classmethod(watched))
    return seen


def test_the_attention_is_passed_on(
    asked: list[str], backbone_path: Path, classifier_path: Path, preferences: Path, tmp_path: Path
) -> None:
    eager, model = ("--attn-implementation", "eager"), tmp_path / "model"
    groups = tmp_path / "groups.jsonl"
    groups.write_text(json.dumps({"prompt": "red", "responses": ["good", "bad"]}))
    for command in (
        ("train", preferences, "--backbone", backbone_path, "--pooling", "mean", "--features", 16, "-o", model),
        ("upgrade", classifier_path, preferences, "-o", tmp_path / "upgraded"),
        ("score", model, groups),
        ("evaluate", model, preferences, "--replicates", 5),
    ):
        result = call(*command, *eager)
        assert result.exit_code == 0, result.output
    assert asked == ["eager"] * 4
    result = call("score", model, groups, "--attn-implementation", "none such")
    assert result.exit_code == 1
    assert "none such" in result.output


def test_a_model_of_the_hub_is_scored_with(
    fake_hub: FakeHub, backbone_path: Path, preferences: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    arguments = ("--backbone", backbone_path, "--pooling", "mean", "--features", 16, "--embed-backbone", "-o", model)
    assert call("train", preferences, *arguments).exit_code == 0
    fake_hub.add("me/rm", model)
    groups = tmp_path / "groups.jsonl"
    groups.write_text(json.dumps({"prompt": "red", "responses": ["good", "bad"]}))
    there, here = call("score", "me/rm", groups), call("score", model, groups)
    assert there.exit_code == 0, there.output
    assert json.loads(there.stdout)["rewards"] == json.loads(here.stdout)["rewards"]
    missing = call("score", "me/none", groups)
    assert missing.exit_code == 1
    assert "me/none" in missing.output


def test_deterministic_scores_have_the_bits_of_scores_alone(
    classifier_path: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    assert call("upgrade", classifier_path, preferences, "-o", model).exit_code == 0
    texts = [["good", "bad and long " * 5], ["a good dog", "b", "the fox"], ["x", "y " * 9]]
    rows = [json.dumps({"prompt": f"red {k}", "responses": group}) for k, group in enumerate(texts)]
    groups = tmp_path / "groups.jsonl"

    def scored(lines: list[str]) -> list[list[float]]:
        groups.write_text("\n".join(lines))
        result = call("score", model, groups, "--deterministic", "batch")
        assert result.exit_code == 0, result.output
        return [json.loads(line)["rewards"] for line in result.stdout.splitlines()]

    together = scored(rows)
    assert [scored([row])[0] for row in rows] == together
    assert scored(rows[::-1]) == together[::-1]
    seen: list[object] = []
    load = RewardModel.from_pretrained.__func__

    def watched(cls, *args, **options):
        seen.append(options.get("deterministic"))
        return load(cls, *args, **options)

    monkeypatch.setattr(RewardModel, "from_pretrained", classmethod(watched))
    for command in (
        ("evaluate", model, preferences, "--replicates", 5),
        ("check", model, preferences),
        ("best-of", model, groups),
    ):
        result = call(*command, "--deterministic", "batch")
        assert result.exit_code == 0, result.output
    assert seen == ["batch"] * 3
    assert "shared prefixes (one text a pass" in call("check", model, preferences, "--deterministic", "batch").output
    assert call("score", model, groups, "--deterministic", "kernels").exit_code == 2
