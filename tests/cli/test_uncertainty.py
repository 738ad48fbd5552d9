"""``--uncertainty`` and ``--variance``: fitted and saved by train, taken by every command that uses a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from rmcore import RewardModel
from rmcore.cli import app


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "500", "TERM": "dumb"})


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_model, tokenizer_for) -> Path:
    root = tmp_path_factory.mktemp("uncertainty")
    make_model("bert", tokenizer_for("bert")).save_pretrained(root / "bert")
    tokenizer_for("bert").save_pretrained(root / "bert")
    nouns = ["dog", "fox", "answer", "model", "capital", "number", "home", "user", "cat", "sun", "sea", "tree"]
    pairs = [{"prompt": f"about {n}", "chosen": f"a good {n}", "rejected": f"a bad {n}"} for n in nouns]
    (root / "prefs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    groups = [{"prompt": p["prompt"], "responses": [p["chosen"], p["rejected"], "neither"]} for p in pairs[:3]]
    (root / "groups.jsonl").write_text("\n".join(map(json.dumps, groups)))
    common = ("train", root / "prefs.jsonl", "--backbone", root / "bert", "--pooling", "mean", "--features", 32)
    made = call(*common, "--uncertainty", "laplace,ensemble", "--no-error-prior", "--no-cache", "-o", root / "m")
    assert made.exit_code == 0, made.stderr
    return root


def test_train_fits_them_and_the_first_is_served(files):
    model = RewardModel.from_pretrained(files / "m", device="cpu")
    assert (list(model.estimators), model.uncertainty) == (["laplace", "ensemble"], "laplace")
    served, named, head, ensemble = (
        json.loads(call("score", files / "m", files / "groups.jsonl", *more).stdout.splitlines()[0])["variance"][0]
        for more in ((), ("--uncertainty", "laplace"), ("--uncertainty", "sngp"), ("--uncertainty", "ensemble"))
    )
    assert served == named
    assert len({tuple(served), tuple(head), tuple(ensemble)}) == 3
    for bad, says in (
        ("sngp", "sngp is the head itself"),
        ("laplace,laplace", "each once"),
        ("laplce", "laplace-kron"),
    ):
        refused = call("train", "none", "--backbone", "none", "-o", files / "n", "--uncertainty", bad)
        assert refused.exit_code == 2
        assert says in refused.stderr


def test_other_commands_go_by_it(files):
    report = {}
    for name in ("head", "ensemble"):
        out = files / name
        done = call("evaluate", files / "m", files / "prefs.jsonl", "--uncertainty", name, "--replicates", 5, "-o", out)
        assert done.exit_code == 0, done.stderr
        report[name] = json.loads((out / "report.json").read_text())["log_loss"]
    assert report["head"] != report["ensemble"]
    worth = {}
    for name in ("head", "laplace", "ensemble"):
        common = ("select", files / "m", files / "groups.jsonl", "--count", 3, "--no-cache")
        done = call(*common, "--uncertainty", name)
        assert done.exit_code == 0, done.stderr
        worth[name] = [json.loads(line)["worth"] for line in done.stdout.splitlines()]
        assert all(value > 0 for value in worth[name])
    assert worth["head"] != worth["laplace"] != worth["ensemble"]
    kept = call("filter", files / "m", files / "groups.jsonl", "--max-u", 1, "--uncertainty", "ensemble")
    assert "kept 0 of 3 groups" in kept.stderr
    best = call("best-of", files / "m", files / "groups.jsonl", "--penalty", 0.5, "--uncertainty", "ensemble")
    assert best.exit_code == 0, best.stderr


def test_what_a_model_has_not_is_refused_by_name(files):
    for command, more, says in (
        ("score", ("--uncertainty", "dropout"), "head, laplace, ensemble"),
        ("select", ("--uncertainty", "urm", "--count", 2), "head, laplace, ensemble"),
        ("score", ("--variance", "aleatoric"), "'aleatoric' of 'laplace', expected what it tells: epistemic"),
        ("score", ("--uncertainty", "head", "--variance", "total"), "the head alone tells no other part"),
    ):
        refused = call(command, files / "m", files / "groups.jsonl", *more)
        assert refused.exit_code == 2, (command, more)
        assert says in refused.stderr
