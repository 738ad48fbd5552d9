"""``--critiques``: training, evaluation and scoring of responses behind their critiques."""

from __future__ import annotations

import json

import pytest
from support.folders import preference_rows
from typer.testing import CliRunner

from rmcore.cli import app


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone_path):
    """Only the critiques tell the responses apart."""
    folder = tmp_path_factory.mktemp("critiques")
    rows = [
        {
            "prompt": row["prompt"],
            "chosen": f"tree {k}",
            "rejected": f"house {k}",
            "critiques": {"chosen": ["good clear", "kind"][: 1 + k % 2], "rejected": ["bad rude"]},
        }
        for k, row in enumerate(preference_rows(40))
    ]
    for row in rows[::2]:  # the words of the response say nothing
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    prefs = write(folder / "prefs.jsonl", rows)
    given = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64, "--no-cache"]
    result = call("train", prefs, "--critiques", *given, "-o", folder / "model")
    assert result.exit_code == 0, result.stderr
    assert "40 pairs" in result.stderr
    return folder, prefs, given


def test_a_head_that_reads_critiques_is_evaluated_and_scores_behind_them(trained, tmp_path):
    folder, prefs, _ = trained
    common = ["--replicates", 10, "--no-cache"]
    with_, without = tmp_path / "with", tmp_path / "without"
    assert call("evaluate", folder / "model", prefs, "--critiques", "-o", with_, *common).exit_code == 0
    assert call("evaluate", folder / "model", prefs, "-o", without, *common).exit_code == 0
    accuracy = [json.loads((d / "report.json").read_text())["accuracy"]["point"] for d in (with_, without)]
    assert accuracy[0] > 0.95 > accuracy[1]
    groups = [
        {"prompt": "red", "responses": ["tree 1", "house 1"], "critiques": [["good clear"], ["bad rude", "good"]]},
        {"prompt": "red", "responses": ["tree 1", "house 1"]},
        {"prompt": "red", "responses": ["tree 1", "house 1"], "critiques": [["good clear"], "bad rude"]},
    ]
    out = tmp_path / "scores.jsonl"
    result = call("score", folder / "model", write(tmp_path / "g.jsonl", groups), "--critiques", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "1 of 3 groups have no critiques" in result.stderr
    mixed, _, sure = (json.loads(line) for line in out.read_text().splitlines())
    assert sure["rewards"][0] > mixed["rewards"][0] > 0, "a critic of two minds is believed less"


def test_what_cannot_go_with_critiques_is_refused_before_a_model_is_loaded(trained, tmp_path):
    folder, prefs, given = trained
    for more in (["--mode", "concat"], ["--tune"], ["--layer-size", 8, "--epochs", 1], ["--ai-labels", prefs]):
        result = call("train", prefs, "--critiques", *more, *given, "-o", tmp_path / "m")
        assert result.exit_code == 2
        assert "it alone" in result.stderr
    plain = write(tmp_path / "plain.jsonl", preference_rows(10))
    assert "a column critiques" in call("train", plain, "--critiques", *given, "-o", tmp_path / "m").stderr
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "p", "responses": ["a", "b"], "critiques": [["x"]]}])
    assert "one a response" in call("score", folder / "model", bad, "--critiques").stderr
