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
    for more in (["--tune"], ["--layer-size", 8, "--epochs", 1], ["--ai-labels", prefs]):
        result = call("train", prefs, "--critiques", *more, *given, "-o", tmp_path / "m")
        assert result.exit_code == 2
        assert "it alone" in result.stderr
    plain = write(tmp_path / "plain.jsonl", preference_rows(10))
    assert "a column critiques" in call("train", plain, "--critiques", *given, "-o", tmp_path / "m").stderr
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "p", "responses": ["a", "b"], "critiques": [["x"]]}])
    assert "one a response" in call("score", folder / "model", bad, "--critiques").stderr


def test_concat_mode_trains_evaluates_and_scores_behind_one_critique_of_each(trained, tmp_path, caplog):
    _, prefs, given = trained
    rows = [json.loads(line) for line in prefs.read_text().splitlines()]
    one = [{**row, "critiques": {side: said[:1] for side, said in row["critiques"].items()}} for row in rows]
    given = [*given, "--mode", "concat", "--critiques", "--no-error-prior"]
    model, report = tmp_path / "m", tmp_path / "report"
    several = call("train", prefs, *given, "-o", model)
    assert several.exit_code == 2
    assert "preferences[1].critiques: got 2 of one response in concat mode" in several.stderr
    result = call("train", write(tmp_path / "one.jsonl", one), *given, "-o", model)
    assert result.exit_code == 0, result.stderr
    assert json.loads((model / "rmcore.json").read_text())["critiqued"] is True
    told = call(
        "evaluate", model, tmp_path / "one.jsonl", "--critiques", "--replicates", 10, "--no-cache", "-o", report
    )
    assert told.exit_code == 0, told.stderr
    assert json.loads((report / "report.json").read_text())["accuracy"]["point"] > 0.9
    group = {"prompt": one[1]["prompt"], "responses": [one[1]["chosen"], one[1]["rejected"]]}
    group["critiques"] = ["good clear", "bad rude"]
    out = tmp_path / "scores.jsonl"
    scored = call("score", model, write(tmp_path / "g.jsonl", [group]), "--critiques", "-o", out)
    assert scored.exit_code == 0, scored.stderr
    assert "fitted behind" not in caplog.text
    assert json.loads(out.read_text())["rewards"][0] > 0
    assert call("score", model, tmp_path / "g.jsonl", "-o", tmp_path / "without.jsonl").exit_code == 0
    assert "fitted behind critiques" in caplog.text


def test_the_error_prior_is_of_states_behind_critiques_and_can_be_left_out(trained, tmp_path):
    folder, prefs, given = trained
    told = json.loads((folder / "model" / "rmcore.json").read_text())["error_prior"]
    assert told["pairs"] == 40
    assert told["error_rate"] < 0.1, "left-out pairs are asked about behind their critiques, which tell them apart"
    result = call("train", prefs, *given, "-o", tmp_path / "blind")
    assert result.exit_code == 0, result.stderr
    blind = json.loads((tmp_path / "blind" / "rmcore.json").read_text())["error_prior"]
    assert blind["error_rate"] > told["error_rate"] + 0.2
    result = call("train", prefs, "--critiques", "--no-error-prior", *given, "-o", tmp_path / "without")
    assert result.exit_code == 0, result.stderr
    assert "error_prior" not in json.loads((tmp_path / "without" / "rmcore.json").read_text())


def test_filter_and_best_of_score_behind_critiques_and_keep_them(trained, tmp_path):
    folder, _, _ = trained
    said = [["good clear"], ["bad rude", "good"]]
    rows = [{"prompt": "red", "responses": ["tree 1", "house 1"], "critiques": said, "id": "a", "mine": [1]}]
    source = write(tmp_path / "g.jsonl", rows)
    for command, more in (("filter", ["--max-u", 9]), ("best-of", [])):
        out = tmp_path / f"{command}.jsonl"
        result = call(command, folder / "model", source, "--critiques", *more, "-o", out)
        assert result.exit_code == 0, result.stderr
        (line,) = [json.loads(one) for one in out.read_text().splitlines()]
        if command == "filter":
            assert (line["kept"], line["critiques"]) == ([0, 1], said)
        else:
            assert (line["index"], line["response"]) == (0, "tree 1")
            assert line["scores"][0] > 0 > line["scores"][1], "the responses' words say nothing"


def test_held_out_pairs_that_want_no_uncertainty_are_told_of(trained, tmp_path):
    """All of them right: the amplitude would be 0 and u 1 everywhere."""
    _, prefs, given = trained
    result = call("train", prefs, "--critiques", "--calibrate", prefs, "--no-error-prior", *given, "-o", tmp_path / "m")
    assert result.exit_code == 0, result.stderr
    assert "40 pairs want amplitude 0" in result.stderr.replace("\n", " ")
