"""``rmcore benchmark`` on a tiny model, end to end, in process."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import ROWS, rewardbench2, written
from support.warm import MODEL, WarmPython
from torch import Tensor
from typer.testing import CliRunner, Result

from rmcore.cli import app
from rmcore.evaluation.benchmarks.estimators import ESTIMATORS, Estimator
from rmcore.judge import Fault, RecordedJudge, ReplayServer, Verdict, pair_key
from rmcore.model.reward_model import RewardModel

runner = CliRunner()


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, backbone_path: Path) -> dict[str, Path]:
    """A model in each mode."""
    from support.folders import preference_rows

    folder = tmp_path_factory.mktemp("benchmark")
    preferences = folder / "prefs.jsonl"
    preferences.write_text("\n".join(json.dumps(row) for row in preference_rows(60)) + "\n")
    found = {}
    for mode in ("difference", "concat"):
        found[mode] = folder / mode
        options = ("--backbone", backbone_path, "--pooling", "mean", "--features", 64, "--mode", mode)
        result = call("train", preferences, *options, "-o", found[mode])
        assert result.exit_code == 0, result.stderr
    return found


def test_every_benchmark_in_both_modes(models: dict[str, Path], tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        data = written(tmp_path, rows(), "jsonl", name)
        for mode, model in models.items():
            out = tmp_path / f"{name} {mode}"
            result = call("benchmark", model, name, "--data", data, "-o", out, "--replicates", 20)
            assert result.exit_code == 0, result.stderr
            report = json.loads((out / "report.json").read_text())
            assert (report["benchmark"], report["mode"], report["sources"]) == (name, mode, [str(data)])
            assert report["lines"][0]["level"] == "overall"
            assert 0 <= report["diagnostics"]["brier"] <= 1
            assert (out / "report.md").read_text().strip() == result.stdout.strip()
            if mode == "difference":
                assert report["lines"][0]["score"] > 0.8, f"praise beats blame in {name}"


def test_the_list_names_all(tmp_path: Path) -> None:
    result = call("benchmark", "--list")
    assert result.exit_code == 0
    assert all(f"| {name} |" in result.stdout for name in ROWS)


def test_what_is_wrong_is_told_before_the_model_loads(tmp_path: Path) -> None:
    rows = rewardbench2()
    del rows[1]["chosen"]
    data = written(tmp_path, rows, "jsonl")
    for arguments, told in (
        (("no model", "rewardbench2", "--data", data), "data.jsonl:2: chosen: missing"),
        (("no model", "mtbench"), "expected one of rewardbench"),
        (("no model",), "expected models, then one of rewardbench"),
        (("no model", "rmb"), "--data: got none"),
        (("no model", "rmb", "--replicates", -1), "--replicates: got -1"),
    ):
        result = call("benchmark", *arguments)
        assert result.exit_code == 2
        assert told in result.stderr


def test_a_report_is_not_overwritten_unasked(models: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path, rewardbench2(), "jsonl")
    (tmp_path / "report.json").write_text("dear")
    arguments = ("benchmark", models["difference"], "rewardbench2", "--data", data, "-o", tmp_path, "--replicates", 0)
    assert call(*arguments).exit_code == 2
    assert (tmp_path / "report.json").read_text() == "dear"
    assert call(*arguments, "--overwrite").exit_code == 0


def test_a_response_that_cannot_be_read_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    rows = rewardbench2()
    rows[0]["rejected"][1] = "bad " * 100
    arguments = ("benchmark", models["difference"], "rewardbench2", "--data", written(tmp_path, rows, "jsonl"))
    result = call(*arguments)
    assert result.exit_code == 2
    assert "item 12 (Precise IF)" in result.stderr
    result = call(*arguments, "--overlong", "no-reward")
    assert result.exit_code == 2
    assert "item 12: got a response too long to be read" in result.stderr
    assert call(*arguments, "--overlong", "truncate-right").exit_code == 0


def test_a_routing_table_with_the_label_and_with_recorded_verdicts(models: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path, ROWS["judgebench"](), "jsonl")
    verdicts = tmp_path / "verdicts.jsonl"
    good, bad = "good clear right", "bad vague wrong"
    verdicts.write_text(json.dumps({"prompt": "red", "first": good, "second": bad, "verdict": "loss"}) + "\n")
    common = ("benchmark", models["difference"], "judgebench", "--data", data, "--replicates", 0)
    result = call(*common, "--budgets", "0.5", "--thresholds", "1.0", "-o", tmp_path / "label")
    assert result.exit_code == 0, result.stderr
    assert "an upper bound" in result.stdout
    assert {p.name for p in (tmp_path / "label").iterdir()} == {
        "report.json",
        "report.md",
        *(f"routing.{kind}" for kind in ("md", "tex", "csv", "json", "png")),
    }
    result = call(*common, "--verdicts", verdicts, "-o", tmp_path / "recorded")
    assert result.exit_code == 0, result.stderr
    table = json.loads((tmp_path / "recorded" / "routing.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["no judge", "2%", "10%", "25%", "45%", "every pair"]
    assert table["rows"][-1]["scores"][0]["routed"] == 0.0, "the recorded judge is wrong on both"
    assert "verdicts.jsonl" in table["judge"]
    refused = call("benchmark", "no model", "judgebench", "--data", data, "--budgets", "a,b")
    assert refused.exit_code == 2
    assert "--budgets: got 'a,b'" in refused.stderr
    verdicts.write_text(json.dumps({"prompt": "other", "first": good, "second": bad, "verdict": "loss"}) + "\n")
    for option, told in (("--budgets=1.5", "budgets: got 1.5"), (f"--verdicts={verdicts}", "no verdict on any pair")):
        refused = call("benchmark", "no model", "judgebench", "--data", data, option)
        assert refused.exit_code == 2
        assert told in refused.stderr, "before the model is loaded"


def test_several_models_in_one_table(models: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path, ROWS["judgebench"](), "jsonl")
    arguments = ("benchmark", *models.values(), "judgebench", "--data", data, "--replicates", 20)
    result = call(*arguments, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["models"] == [str(model) for model in models.values()]
    assert [report["mode"] for report in content["reports"]] == list(models)
    overall = content["lines"][0]["scores"]
    assert overall == [report["lines"][0]["score"] for report in content["reports"]]
    assert "− " in (tmp_path / "out" / "report.md").read_text().splitlines()[2]
    for more, told in ((("--budgets", 0.1), "one, for a routing table"), ((), "each model once")):
        twice = models["concat"] if more else models["difference"]
        refused = call("benchmark", models["difference"], twice, "judgebench", "--data", data, *more)
        assert refused.exit_code == 2
        assert told in refused.stderr


def test_estimators_beside_the_heads_own(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wide(model: RewardModel) -> Estimator:
        """The head's g, and much less sure of it."""

        def pairs(hidden: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
            g, v = model.head_pairs(hidden, sizes)
            return g, 9 * v + 80

        return pairs

    monkeypatch.setitem(ESTIMATORS, "wide", wide)
    data = written(tmp_path, ROWS["judgebench"](), "jsonl")
    common = ("benchmark", models["difference"], "judgebench", "--data", data, "--replicates", 0)
    result = call(*common, "--estimator", "head,wide", "-o", tmp_path / "both")
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "both" / "report.json").read_text())
    assert content["models"] == [f"{models['difference']}, {name}" for name in ("head", "wide")]
    own, other = (report["diagnostics"] for report in content["reports"])
    assert content["lines"][0]["scores"][0] == content["lines"][0]["scores"][1], "the same g"
    assert other["brier"] > own["brier"] + 0.01, "another v: it is right, and does not know it"
    result = call(*common, "--estimator", "wide", "--beside", "margin", "--keep", "0.5", "-o", tmp_path / "one")
    assert result.exit_code == 0, result.stderr
    assert "| wide | u |" in (tmp_path / "one" / "detection.md").read_text()
    for more, told in (
        (
            ("--uncertainty", "oracle"),
            f"--uncertainty: got 'oracle', expected each once, of {', '.join(ESTIMATORS)}",
        ),
        (("--estimator", "wide,wide"), "--uncertainty: got 'wide,wide'"),
        (("--estimator", "head,wide", "--budgets", 0.1), "got 2 estimators, expected one, for a routing table"),
    ):
        refused = call("benchmark", "no model", "judgebench", "--data", data, *more)
        assert refused.exit_code == 2
        assert told in refused.stderr


RUN = "import sys\nfrom rmcore.cli import app\napp(sys.argv[1:])\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_with_a_live_judge_goes_on_and_buys_nothing_twice(
    models: dict[str, Path], tmp_path: Path, warm_python: WarmPython
) -> None:
    base = ROWS["judgebench"]()[0]
    rows = [base | {"question": f"red tree {k}", "pair_id": str(k)} for k in range(12)]
    data = written(tmp_path, rows, "jsonl")
    asked: list[str] = []

    class Judge(RecordedJudge):
        def lookup(self, prompt: Any, first: Any, second: Any) -> Verdict:
            asked.append(pair_key(prompt, first, second))
            return Verdict.of("win" if str(first).startswith("good") else "loss")

    with ReplayServer(Judge({}), latency_s=0.02) as server:
        arguments = [
            *("benchmark", models["difference"], "judgebench", "--data", data, "--replicates", 0),
            *("--budgets", "0.3", "--every-pair", "--store", tmp_path / "v.db", "-o", tmp_path / "out"),
            *("--judge-url", server.base_url, "--judge-model", "m", "--judge-key-env", "", "--judge-concurrency", 4),
        ]
        child = warm_python.start(RUN, *map(str, arguments), modules=MODEL)
        while len(asked) < 8:
            assert child.poll() is None, child.stderr.read() if child.stderr else ""
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        time.sleep(0.1)  # what was on its way is answered
        result = call(*arguments)
        assert result.exit_code == 0, result.stderr
    again = Counter(asked)
    assert len(again) == 24
    assert sum(again.values()) - 24 <= 4, "only what was on its way when it was killed"
    assert "answers from the store" in result.stderr
    table = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert [row["spent"]["calls"] for row in table["rows"]] == [0, 8, 24], "what was bought before the kill counts"
    assert table["rows"][-1]["scores"][0]["routed"] == 1.0


def test_a_live_judge_that_says_nothing_ends_the_command(models: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path, ROWS["judgebench"](), "jsonl")
    common = ("benchmark", models["difference"], "judgebench", "--data", data, "--replicates", 0)
    with ReplayServer({}, faults=lambda _: Fault(500)) as server:
        judge = ("--judge-url", server.base_url, "--judge-model", "m", "--judge-key-env", "", "--judge-retries", 0)
        result = call(*common, *judge, "--every-pair")
    assert result.exit_code == 1
    assert "no verdict on any of the 2 pairs" in result.stderr
    for more, told in (
        (("--max-calls", 3), "--max-calls, --max-tokens, --max-cost: got without --judge-url"),
        (("--store", tmp_path / "v.db"), "--store: got without --judge-url"),
        (("--judge-url", "http://127.0.0.1:9/v1"), "--judge-model: got nothing"),
    ):
        refused = call("benchmark", "no model", "judgebench", "--data", data, *more)
        assert refused.exit_code == 2
        assert told in refused.stderr


def test_further_tables_are_written_in_all_forms(models: dict[str, Path], tmp_path: Path) -> None:
    data = written(tmp_path, rewardbench2(), "jsonl")
    common = ("benchmark", models["difference"], "rewardbench2", "--data", data, "--replicates", 0)
    tables = ("--beside", "margin,novelty,learned", "--keep", "0.5", "--penalties", "0,1", "--judge-params", "1e9")
    result = call(*common, *tables, "--judge-price", "2.5,10", "--budgets", "0.5", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = {path.name for path in (tmp_path / "out").iterdir()}
    costs = [f"{table}-{unit}" for table in ("cost", "filter", "best_of") for unit in ("flop", "money")]
    for name in ("routing", "beside", *costs, "filter", "best_of", "best_of-routing", "detection"):
        assert {f"{name}.{form}" for form in ("md", "tex", "csv", "json")} <= found
        assert (tmp_path / "out" / f"{name}.md").read_text().strip() in result.stdout
    for option, told in (
        ("--beside=u", "--beside: got 'u', expected another score than u"),
        ("--beside=length", "--beside: got 'length'"),
        ("--keep=2", "--keep: got 2.0"),
        ("--penalties=-1", "--penalties: got -1.0"),
        ("--judge-price=3", "--judge-price: got '3', expected two prices"),
        ("--judge-price=nan,1", "--judge-price: got nan, expected a finite number"),
        ("--judge-params=-1", "--judge-params: got -1.0, expected a finite number"),
        ("--model-params=inf", "--model-params: got inf"),
        ("--model-price=-1", "--model-price: got -1.0"),
    ):
        refused = call("benchmark", "no model", "rewardbench2", "--data", data, option)
        assert refused.exit_code == 2
        assert told in refused.stderr
