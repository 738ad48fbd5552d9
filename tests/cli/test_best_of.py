"""``rmcore best-of`` and ``rmcore filter`` on a tiny model, in process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rmcore.cli import app
from rmcore.engine import RewardEngine
from rmcore.engine.selection import best_of, member_uncertainty
from rmcore.model import RewardModel

runner = CliRunner()
PROMPT = "red tree house"
RESPONSES = ["bad rude", "good clear kind", "odd vague red", "good clear kind"]


def call(*arguments: object, stdin: str | None = None) -> Result:
    return runner.invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory, backbone_path) -> Path:
    folder = tmp_path_factory.mktemp("selection")
    rows = [
        {"prompt": "red tree", "chosen": f"{good} {word}", "rejected": f"{bad} {word}"}
        for good, bad in (("good", "bad"), ("clear", "vague"), ("kind", "rude"))
        for word in ("red", "blue", "green", "tree")
    ]
    (folder / "prefs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64]
    result = call("train", folder / "prefs.jsonl", *options, "-o", folder / "model")
    assert result.exit_code == 0, result.stderr
    return folder / "model"


@pytest.fixture(scope="module")
def scored(model):
    return RewardEngine(RewardModel.from_pretrained(model)).score([PROMPT], [RESPONSES])


def lines(*groups: object) -> str:
    return "".join((group if isinstance(group, str) else json.dumps(group)) + "\n" for group in groups)


def group(**more: object) -> dict[str, object]:
    return {"prompt": PROMPT, "responses": RESPONSES, **more}


def test_best_of_writes_the_winner_and_every_score(model, scored):
    result = call("best-of", model, "-", stdin=lines(group(id="a"), group(responses=["bad"])))
    assert result.exit_code == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["id"] == "a"
    assert (first["index"], first["response"], first["tied"]) == (1, "good clear kind", 2)
    assert first["scores"] == pytest.approx(scored[0].advantages.tolist())
    assert first["score"] == max(first["scores"])
    assert first["uncertainty"] == pytest.approx(member_uncertainty(scored[0]).tolist())
    assert (second["index"], second["score"], second["uncertainty"]) == (0, 0.0, [1.0])
    assert "2 groups, 6 pairs" in result.stderr


def test_penalty_and_ties_are_those_of_the_function(model, scored, tmp_path):
    out = tmp_path / "best.jsonl"
    stdin = lines(group(responses=["good", "good", "good clear", "bad"]))
    ties = json.loads(call("best-of", model, "-", "--ties", "longest", stdin=stdin).stdout)
    assert ties["response"] in ("good", "good clear")
    result = call("best-of", model, "-", "--penalty", 5, "-o", out, stdin=lines(group()))
    assert result.exit_code == 0, result.stderr
    record = json.loads(out.read_text())
    expected = best_of(scored, [RESPONSES], penalty=5.0)[0]
    assert record["index"] == expected.index
    assert record["scores"] == pytest.approx(expected.scores.tolist())


def test_a_judge_decides_as_in_score(model, tmp_path):
    verdicts = tmp_path / "verdicts.jsonl"
    rows = [
        {"prompt": PROMPT, "first": "bad rude", "second": other, "verdict": "win"}
        for other in ("good clear kind", "odd vague red")
    ]
    verdicts.write_text(lines(*rows))
    result = call("best-of", model, "-", "--budget", 1.0, "--verdicts", verdicts, stdin=lines(group()))
    record = json.loads(result.stdout)
    assert record["response"] == "bad rude"
    assert record["score"] == pytest.approx(1.9924, abs=1e-3)
    assert record["uncertainty"][0] == 1.0


def test_filter_keeps_sure_responses_in_the_inputs_form(model, scored):
    u = member_uncertainty(scored[0]).tolist()
    limit = sorted(u)[2] + 1e-9
    result = call("filter", model, "-", "--max-u", limit, stdin=lines(group(id=7), group(responses=["bad"], id=8)))
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    keep = [k for k in range(4) if u[k] <= limit]
    assert (record["id"], record["prompt"], record["kept"]) == (7, PROMPT, keep)
    assert record["responses"] == [RESPONSES[k] for k in keep]
    assert record["uncertainty"] == pytest.approx([u[k] for k in keep])
    assert f"kept 1 of 2 groups, {len(keep)} of 5 responses" in result.stderr
    again = call("score", model, "-", stdin=result.stdout)
    assert again.exit_code == 0, "what it writes is input for another command"


def test_filter_by_group_and_by_least_number(model, scored):
    mean = float(member_uncertainty(scored[0]).mean())
    for limit, count in ((mean + 0.01, 1), (mean - 0.01, 0)):
        result = call("filter", model, "-", "--by", "group", "--max-u", limit, stdin=lines(group()))
        assert len(result.stdout.splitlines()) == count
    one = call("filter", model, "-", "--max-u", 2, "--min-responses", 1, stdin=lines(group(responses=["bad"])))
    assert json.loads(one.stdout)["kept"] == [0]


@pytest.mark.parametrize("command", [["best-of"], ["filter", "--max-u", "9"]])
def test_a_bad_line_exits_2_and_keeps_everything_before_it_and_a_bad_group_all_others(command, model):
    name, *options = command
    long = {"prompt": "red", "responses": ["good " * 200, "bad"]}
    for bad, says, kept in (("not json", "not JSON", 2), (long, "groups:3", 3)):
        result = call(name, model, "-", *options, stdin=lines(group(), group(), bad, group()))
        assert result.exit_code == 2
        assert len(result.stdout.splitlines()) == kept
        assert says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["best-of", "--penalty", "-1"], "penalty"),
        (["best-of", "--penalty", "nan"], "penalty"),
        (["best-of", "--ties", "random"], "ties"),
        (["best-of", "--batch", "0"], "--batch"),
        (["best-of", "--budget", "0.5"], "judge: got None"),
        (["filter", "--max-u", "0.9"], "--max-u: got"),
        (["filter", "--max-u", "2", "--by", "pair"], "by"),
        (["filter", "--max-u", "2", "--min-responses", "0"], "--min-responses: got"),
        (["filter"], "--max-u"),
    ],
)
def test_usage_errors_exit_2_and_say_what_to_give(arguments, says, model):
    name, *options = arguments
    result = call(name, model, "-", *options, stdin=lines(group()))
    assert result.exit_code == 2
    assert says in result.stderr
    assert not result.stdout


def test_own_options_are_checked_before_the_model_is_loaded(tmp_path):
    result = call("best-of", tmp_path / "none", "-", "--ties", "random", stdin="")
    assert result.exit_code == 2
    assert "ties" in result.stderr
    assert call("best-of", tmp_path / "none", "-", stdin="").exit_code == 1


def test_a_design_compares_some_of_the_pairs(model):
    result = call("score", model, "-", "--design", "circular", stdin=lines(group(responses=[*RESPONSES, "blue tree"])))
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert sum(map(sum, record["compared"])) == 10
    assert sum(record["advantages"]) == pytest.approx(0, abs=1e-9)
    wrong = call("score", model, "-", "--design", "regular:3", stdin=lines(group()))
    assert wrong.exit_code == 2
    assert "an even k" in wrong.stderr
