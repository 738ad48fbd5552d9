"""Parity as a report: who scores as the model's own code does passes, and every way to be wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.chat_templates import CHAT_MODELS
from support.models import TOKENIZERS, _model
from typer.testing import CliRunner

from rmcore._base.errors import InputError
from rmcore.cli import app
from rmcore.model.check import check_model, sample_preferences
from rmcore.model.reward_model import RewardModel
from rmcore.model.text_states import TextStates
from rmcore.model.training_pairs import Preference


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three reward models as their authors save them: a chat model, one of BERT's kind, one without a template."""
    made = {}
    chat = CHAT_MODELS["qwen3"]()
    for name, kind, tokenizer in (
        ("chat", "llama-classifier", chat),
        ("bert", "bert-classifier", TOKENIZERS["bert"]()),
        ("plain", "llama-classifier", TOKENIZERS["llama"]()),
    ):
        folder = tmp_path_factory.mktemp(name)
        _model(kind, tokenizer, max_position_embeddings=512).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = folder
    return made


@pytest.mark.parametrize("name", ["chat", "bert", "plain"])
def test_a_model_as_published_passes(folders, name):
    report = check_model(RewardModel.from_pretrained(folders[name], device="cpu"))
    assert report.passed, report.to_markdown()
    assert report.texts == 2 * len(sample_preferences())
    assert report.largest > 0.1  # scores that are all alike would agree about anything
    assert report.compared == (0 if name == "plain" else report.texts)
    asked = {row.name: row.worst for row in report.rows}
    assert asked["rmcore, one text a batch"] is not None
    assert asked["rmcore, padded batches"] is not None
    assert (asked["rmcore, shared prefixes"] is None) == (name == "bert")
    assert "**PASS**" in report.to_markdown()


def test_what_the_template_does_is_told(folders):
    facts = check_model(RewardModel.from_pretrained(folders["chat"], device="cpu")).facts
    assert facts["texts"] == "the tokenizer's chat template"
    assert facts["template"].startswith("0 bos, keeps spaces")
    assert facts["special tokens in texts"] == "ordinary text"


def test_a_fitted_model_is_held_against_its_backbone(make_backbone, preferences):
    for mode in ("difference", "concat"):
        model, _ = RewardModel.fit(make_backbone("llama", pooling="mean"), preferences, mode=mode, num_features=32)
        report = check_model(model, preferences[:4])
        assert report.passed, report.to_markdown()
        assert (report.texts, report.compared) == (8, 0)


def test_states_that_are_off_fail_and_the_text_is_named(folders, monkeypatch):
    model = RewardModel.from_pretrained(folders["chat"], device="cpu")
    forward = TextStates.padded

    def off(self, ids):
        states, tokens = forward(self, ids)
        longest = max(range(len(ids)), key=lambda k: len(ids[k]))
        states[longest] *= 1.1
        return states, tokens

    monkeypatch.setattr(TextStates, "padded", off)
    items = [Preference("what?", "short", "a response that is longer than the other one by far")]
    report = check_model(model, items)
    assert not report.passed
    padded = next(row for row in report.rows if row.name == "rmcore, padded batches")
    assert padded.text == 1
    assert padded.worst is not None
    assert padded.worst > report.tolerance
    assert "**FAIL**" in report.to_markdown()


def test_other_tokens_fail_and_the_first_is_named(folders, monkeypatch):
    model = RewardModel.from_pretrained(folders["chat"], device="cpu")
    encoder = model.backbone.encoder
    own = encoder.template_ids
    monkeypatch.setattr(encoder, "template_ids", lambda prompt, response: [7, *own(prompt, response)])
    report = check_model(model, [Preference("a", "b", "c")])
    assert not report.passed
    assert report.tokens is not None
    assert (report.tokens[0], report.tokens[1].at) == (0, 0)
    assert "First token that differs (2 of 2 texts compared): text 0, token 0 on: " in report.to_markdown()


def test_no_preferences(folders):
    with pytest.raises(InputError, match="preferences"):
        check_model(RewardModel.from_pretrained(folders["chat"], device="cpu"), [])


def test_the_command_says_so_by_its_exit_code(folders, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "what is it?", "chosen": " a good dog\\n", "rejected": "bad"}\n', encoding="utf-8")
    run = CliRunner().invoke
    good = run(app, ["check", str(folders["chat"]), str(pairs), "--device", "cpu", "-o", str(tmp_path / "report.md")])
    assert (good.exit_code, "**PASS**" in good.stdout) == (0, True), good.output
    assert (tmp_path / "report.md").read_text(encoding="utf-8") in good.stdout
    forward = TextStates.padded
    monkeypatch.setattr(TextStates, "padded", lambda self, ids: (forward(self, ids)[0] + torch.ones(32), 1))
    bad = run(app, ["check", str(folders["chat"]), str(pairs), "--device", "cpu"])
    assert (bad.exit_code, "**FAIL**" in bad.stdout) == (1, True), bad.output
    assert run(app, ["check", str(tmp_path / "nothing"), "--device", "cpu"]).exit_code in (1, 2)
