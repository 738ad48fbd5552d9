"""``--uncertainty`` and ``--variance``: fitted and saved by train, taken by every command that uses a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from rmcore import RewardModel
from rmcore._base.errors import CheckpointError
from rmcore.cli import app
from rmcore.model import Backbone
from rmcore.model.described import Described, describe


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


@pytest.fixture(scope="module")
def further(files) -> Path:
    """The trained model with others fitted beside it afterwards."""
    common = ("fit-uncertainty", files / "m", files / "prefs.jsonl", "--no-cache", "-o", files / "more")
    made = call(*common, "--uncertainty", "urme,sngp-urm", "--serve", "urme")
    assert made.exit_code == 0, made.stderr
    assert "fitted urme, sngp-urm; served with urme" in made.stderr
    return files / "more"


def test_uncertainties_can_be_fitted_beside_an_existing_model(files, further):
    before, model = (RewardModel.from_pretrained(path, device="cpu") for path in (files / "m", further))
    assert (list(model.estimators), model.uncertainty) == (["laplace", "ensemble", "urme", "sngp-urm"], "urme")
    assert list(before.estimators) == ["laplace", "ensemble"], "the model it was made from stays"
    rows = torch.randn(4, before.head.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for name in ("laplace", "ensemble"):
        one, other = (m.estimators[name].pairs(rows, torch.tensor([4])) for m in (before, model))
        assert torch.equal(one.variance, other.variance)
    assert torch.equal(before.head.beta, model.head.beta)
    combined = model.estimators["sngp-urm"]
    assert combined.sngp.head.config.num_features == 32, "as the head's own"
    both = [
        json.loads(
            call("score", further, files / "groups.jsonl", "--uncertainty", "sngp-urm", *more).stdout.splitlines()[0]
        )
        for more in ((), ("--variance", "epistemic"), ("--variance", "aleatoric"))
    ]
    total, epistemic, aleatoric = (torch.tensor(line["variance"]) for line in both)
    torch.testing.assert_close(total, epistemic + aleatoric)
    assert float(aleatoric[0, 1]) > 0
    assert float(epistemic[0, 1]) > 0


def test_fit_uncertainty_refuses_what_does_not_fit(files, further):
    common = ("fit-uncertainty", files / "m", files / "prefs.jsonl", "--no-cache", "--uncertainty")
    for name, more, says in (
        ("sngp", ("-o", files / "x"), "sngp is the head itself"),
        ("laplace", ("-o", files / "m"), "another place than"),
        ("laplace", ("-o", further), "--overwrite"),
        ("laplace", ("-o", files / "x", "--serve", "urm"), "one that the model has then: head, laplace, ensemble"),
        ("laplace", ("-o", files / "x", "--serve", "nobody"), "one of head"),
    ):
        refused = call(*common, name, *more)
        assert refused.exit_code == 2, (name, more, refused.stderr)
        assert says in refused.stderr
    assert not (files / "x").exists()


def test_filter_and_best_of_go_by_urmes_measures(files, further):
    groups = [json.loads(line) for line in (files / "groups.jsonl").read_text().splitlines()]
    model = RewardModel.from_pretrained(further, device="cpu")
    urme = model.estimators["urme"]
    for name in ("gap", "covariance"):
        u = [
            urme.ensemble.scores(model.hidden_states([g["prompt"]], [g["responses"]])).uncertainty(name) for g in groups
        ]
        limit = float(torch.cat(u).quantile(0.6))
        done = call("filter", further, files / "groups.jsonl", f"--max-{name}", limit)
        assert done.exit_code == 0, done.stderr
        kept = {row["line"]: row for row in map(json.loads, done.stdout.splitlines())}
        for number, own in enumerate(u, start=1):
            stays = (own <= limit).nonzero()[:, 0].tolist()
            assert kept.get(number, {"kept": []})["kept"] == (stays if len(stays) > 1 else [])
            if number in kept:
                assert kept[number][name] == pytest.approx(own[own <= limit].tolist(), rel=1e-5)
        best = call("best-of", further, files / "groups.jsonl", "--penalty", 3, "--penalty-by", name)
        assert best.exit_code == 0, best.stderr
        row = json.loads(best.stdout.splitlines()[0])
        plain = json.loads(call("best-of", further, files / "groups.jsonl").stdout.splitlines()[0])
        assert row["scores"] == pytest.approx(
            [a - 3 * b for a, b in zip(plain["scores"], u[0].tolist(), strict=True)], rel=1e-4, abs=1e-6
        )


def test_filter_wants_one_measure_that_the_model_tells(files, further):
    for more, says in (
        ((), "got none, expected one of them"),
        (("--max-u", 2, "--max-gap", 1), "got --max-u, --max-gap, expected one of them"),
        (
            ("--max-gap", 1, "--uncertainty", "ensemble"),
            "measure: got 'gap', expected what the engine's uncertainty tells: u",
        ),
        (("--max-covariance", -1), "--max-covariance: got -1"),
    ):
        refused = call("filter", further, files / "groups.jsonl", *more)
        assert refused.exit_code == 2, (more, refused.stderr)
        assert says in refused.stderr
        assert not refused.stdout


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr(Backbone, "from_pretrained", load)


COMMANDS = {
    "score": ("groups.jsonl",),
    "best-of": ("groups.jsonl",),
    "filter": ("groups.jsonl", "--max-u", 2),
    "evaluate": ("prefs.jsonl",),
    "select": ("groups.jsonl", "--count", 1),
    "serve": ("--port", 0),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_folder_tells_is_checked_before_anything_is_loaded(files, command, nothing_loads):
    given = [files / word if str(word).endswith(".jsonl") else word for word in COMMANDS[command]]
    cases = [
        (("--uncertainty", "dropout"), "--uncertainty: got 'dropout', expected one that the model has: head, laplace"),
        (("--max-length", 100_000), "--max-length: got 100000, expected at most the model's"),
        (("--max-length", 0), "--max-length: got 0, expected a positive number"),
    ]
    if command != "select":
        cases += [
            (
                ("--variance", "aleatoric"),
                "--variance: got 'aleatoric' of 'laplace', expected what it tells: epistemic",
            ),
            (("--variance", "total", "--uncertainty", "head"), "the head alone tells no other part"),
        ]
    if command not in ("select", "evaluate"):
        cases.append((("--deterministic", "batch"), "--uncertainty: got 'laplace' with --deterministic batch"))
    if command == "best-of":
        cases.append((("--penalty-by", "gap"), "measure: got 'gap', expected what the engine's uncertainty tells: u"))
    for more, says in cases:
        refused = call(command, files / "m", *given, *more)
        assert (refused.exit_code, more) == (2, more), refused.output
        assert says in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_what_a_folder_says_by_itself(files, further, tmp_path):
    found = describe(str(files / "m"))
    model = RewardModel.from_pretrained(files / "m", device="cpu")
    assert found == Described(
        features="rff",
        mode="difference",
        estimators=("laplace", "ensemble"),
        uncertainty="laplace",
        novelty=True,
        positions=model.backbone.positions,
    )
    assert describe(str(further)).estimators == ("laplace", "ensemble", "urme", "sngp-urm")
    values = json.loads((files / "m/rmcore.json").read_text())
    assert values.pop("positions") == found.positions
    old = tmp_path / "old"
    old.mkdir()
    for change, known in (
        ({}, found.positions),  # of the backbone's own folder
        ({"backbone": {"name": str(tmp_path / "gone")}}, None),
        ({"backbone": {"name": ""}}, None),
        ({"backbone": None, "estimators": None, "uncertainty": 3}, None),
        ({"positions": 7}, 7),
    ):
        (old / "rmcore.json").write_text(json.dumps(values | change))
        assert describe(str(old)).positions == known
    for change in ({"head": None}, {"head": {"config": []}}, {"head": {"config": {"mode": "concat"}}}):
        (old / "rmcore.json").write_text(json.dumps(values | change))
        assert describe(str(old)) is None, "loading it says what is wrong"
    published = tmp_path / "published"
    published.mkdir()
    for config, positions in (
        ({"max_position_embeddings": 9}, 9),
        ({"text_config": {"max_position_embeddings": 8}, "max_position_embeddings": 9}, 8),
        ({"n_positions": 9}, None),
        ({"max_position_embeddings": True}, None),
        ([], None),
    ):
        (published / "config.json").write_text(json.dumps(config))
        assert describe(str(published)) == Described("linear", None, spread=True, positions=positions)
    with pytest.raises(CheckpointError, match="no such folder"):
        describe("./nowhere")


def test_a_head_that_pairs_of_one_kind_only_is_told_apart(tmp_path, nothing_loads):
    """Concat mode, and a head without a row posterior, by the JSON alone."""
    judge = ("--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-key-env", "", "--budget", 0.5)
    (tmp_path / "g.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    for mode, more, says in (
        ("concat", ("score", "--design", "swiss:2"), "--design: got 'swiss:2'"),
        ("concat", ("select", "--count", 1), "model: got one in concat mode"),
        ("difference", ("score", *judge, "--rank-by", "novelty"), "--rank-by: got novelty"),
        ("difference", ("score", "--max-length", 513), "--max-length: got 513, expected at most the model's 512"),
    ):
        values = {"format": "rmcore", "format_version": 1, "positions": 512}
        (tmp_path / "rmcore.json").write_text(
            json.dumps(values | {"head": {"config": {"mode": mode, "features": "rff"}}})
        )
        command, *options = more
        refused = call(command, tmp_path, tmp_path / "g.jsonl", *options)
        assert refused.exit_code == 2
        assert says in refused.stderr
