"""The command line on a tiny model, end to end, in process."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from support.warm import MODEL, WarmPython
from typer.testing import CliRunner, Result

from rmcore.cli import app
from rmcore.judge import RecordedJudge
from rmcore.judge.testing import ReplayServer

runner = CliRunner()


def call(*arguments: object, stdin: str | None = None) -> Result:
    return runner.invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


@pytest.fixture
def model(tmp_path: Path, backbone_path: Path, preferences: Path) -> Path:
    out = tmp_path / "model"
    result = call("train", preferences, "--backbone", backbone_path, "--pooling", "mean", "--features", 64, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out


def group(k: int = 3, **extra: object) -> dict[str, object]:
    return {"prompt": "red tree house", "responses": ["good clear", "bad rude", "odd vague"][:k], **extra}


def test_train_reports_and_writes_a_model(model: Path) -> None:
    assert {p.name for p in model.iterdir()} == {"rmcore.json", "head.safetensors", "error_prior.safetensors"}


def test_score_streams_one_line_a_group(model: Path) -> None:
    lines = [json.dumps(group(k, id=f"g{k}")) for k in (1, 2, 3)]
    result = call("score", model, "-", "--batch", 2, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["id"] for r in records] == ["g1", "g2", "g3"]
    assert [len(r["advantages"]) for r in records] == [1, 2, 3]
    assert records[0]["advantages"] == [0.0]
    assert records[2]["advantages"][0] > records[2]["advantages"][1], "praise must beat its contrary"
    assert "3 groups, 4 pairs" in result.stderr


def test_a_bad_line_exits_2_and_keeps_everything_before_it(model: Path) -> None:
    stdin = json.dumps(group()) + "\n" + json.dumps(group(id=7)) + "\nnot json\n" + json.dumps(group()) + "\n"
    result = call("score", model, "-", stdin=stdin)
    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == 2
    assert "<input>:3" in result.stderr or "-:3" in result.stderr
    assert "not JSON" in result.stderr


def test_an_overlong_group_names_its_line_and_keeps_the_good_ones(model: Path) -> None:
    long = {"prompt": "red", "responses": ["good " * 200, "bad"]}
    stdin = "\n".join(json.dumps(g) for g in (group(id=1), long, group(id=3))) + "\n"
    for size in (1, 2, 64):
        result = call("score", model, "-", "--batch", size, stdin=stdin)
        assert result.exit_code == 2
        assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [1, 3]
        assert "groups:2: prompt and response: got" in result.stderr
        assert "at most 64" in result.stderr
        assert "1 of 3 groups could not be scored" in result.stderr


def test_recorded_verdicts_decide_routed_pairs(model: Path, tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.jsonl"
    rows = [
        {"prompt": "red tree house", "first": "good clear", "second": "bad rude", "verdict": "loss"},
        {"prompt": "red tree house", "first": "good clear", "second": "odd vague", "verdict": None},
    ]
    verdicts.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    result = call("score", model, "-", "--budget", 1.0, "--verdicts", verdicts, stdin=json.dumps(group()) + "\n")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["preference"][0][1] == pytest.approx(-1.9924, abs=1e-3)
    by = {(d["i"], d["j"]): (d["by"], d.get("reason", "")) for d in record["decisions"]}
    assert by[0, 1][0] == "judge"
    assert by[0, 2] == ("judge_failed", "no_verdict")
    assert by[1, 2] == ("judge_failed", "no_record")
    assert record["preference"][0][2] == pytest.approx(record["logit"][0][2] / record["uncertainty"][0][2], rel=1e-6)


def test_an_adaptive_router_keeps_to_its_calls_over_several_runs(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "router.json"
    options = ["--judge-fraction", 1.0, "--max-calls", 10, "--router-state", state, "--batch", 1]
    lines = "\n".join(json.dumps(group()) for _ in range(2)) + "\n"  # 3 pairs a group, 2 calls a pair
    decided = []
    texts = group()["responses"]
    rows = [{"prompt": group()["prompt"], "first": a, "second": b, "verdict": "win"} for a, b in combinations(texts, 2)]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        judge = ["--judge-url", server.base_url, "--judge-model", "m", "--judge-key-env", ""]
        for _ in range(2):
            result = call("score", model, "-", *options, *judge, stdin=lines)
            assert result.exit_code == 0, result.stderr
            decided.append(sum(len(json.loads(line)["decisions"]) for line in result.stdout.splitlines()))
            assert "budget: 10 spent of 10 calls per run; " in result.stderr
            assert "pairs found no room and keep the head's preference" in result.stderr
    assert decided == [5, 0]
    spent = json.loads(state.read_text())["budgets"][0]["spent"]
    assert spent == 10
    state.write_text("{}")
    assert call("score", model, "-", *options, *judge, stdin=lines).exit_code == 1


def test_accounts_are_kept_over_runs_shown_and_drawn(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    verdicts, log, plot = tmp_path / "verdicts.jsonl", tmp_path / "accounts.jsonl", tmp_path / "accounts.png"
    row = {"prompt": "red tree house", "first": "good clear", "second": "bad rude", "verdict": "win"}
    verdicts.write_text(json.dumps(row) + "\n")
    stdin = (json.dumps(group()) + "\n") * 3
    for _ in range(2):
        options = ["--budget", 1.0, "--verdicts", verdicts, "--batch", 2, "--accounts", log]
        result = call("score", model, "-", *options, stdin=stdin)
        assert result.exit_code == 0, result.stderr
    assert "6 groups, 18 pairs" in result.stderr, "the second run goes on counting"
    assert "no_record 12" in result.stderr
    shown = call("accounts", log, "--plot", plot)
    assert shown.exit_code == 0, shown.stderr
    assert "the head 0, the judge 6, by rule 0" in shown.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    missing = call("accounts", tmp_path / "none.jsonl")
    assert missing.exit_code == 2
    assert "none.jsonl" in missing.stderr


def test_evaluate_prints_a_table_and_writes_report_and_plot(model: Path, held_out: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    result = call("evaluate", model, held_out, "-o", out, "--replicates", 50)
    assert result.exit_code == 0, result.stderr
    assert "margin" in result.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["pairs"]["total"] == 30
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_says_what_a_bound_on_the_error_rate_costs(model: Path, held_out: Path, tmp_path: Path) -> None:
    out = tmp_path / "risk"
    result = call("evaluate", model, held_out, "-o", out, "--replicates", 5, "--alpha", 0.3, "--delta", 0.2)
    assert result.exit_code == 0, result.stderr
    assert "at most 0.3 with probability 0.8" in result.stdout
    risk = json.loads((out / "report.json").read_text())["risk"]
    assert set(risk["scores"]) >= {"u", "margin"}
    for row in risk["scores"].values():
        assert row["resampling"]["times"] == 1000
        assert (row["threshold"] is None) == (row["kept"] == 0) == bool(row["reason"])
    refused = call("evaluate", tmp_path / "no model", held_out, "--alpha", 1.5)
    assert refused.exit_code == 2
    assert "alpha: got 1.5" in refused.stderr


def test_a_trained_layer_learns_where_it_errs_from_held_out_pairs(
    backbone_path: Path, preferences: Path, tmp_path: Path
) -> None:
    options = ["--backbone", backbone_path, "--pooling", "mean", "--features", 32, "--layer-size", 8, "--epochs", 1]
    for name, more in (("without", []), ("with", ["--calibrate", preferences])):
        result = call("train", preferences, *options, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / name / "error_prior.safetensors").exists() == bool(more)


def test_tuning_prints_what_it_tried(
    backbone_path: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmcore.model.tune.GRID", {"ridge": (0.1, 1.0), "num_features": (16, 32)})
    given = ["--backbone", backbone_path, "--pooling", "mean", "--features", 32, "--tune", "--no-error-prior"]
    refused = call("train", preferences, *given, "--layer-size", 8, "--epochs", 1, "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "--tune" in refused.stderr
    many = tmp_path / "many.jsonl"
    many.write_text(preferences.read_text() * 3)
    result = call("train", many, *given, "-o", tmp_path / "tuned")
    assert result.exit_code == 0, result.stderr
    assert "as given" in result.stderr
    head = json.loads((tmp_path / "tuned" / "rmcore.json").read_text())["head"]["config"]
    assert f"ridge {head['ridge']:g}" in result.stderr.split("chosen:")[1]


def test_upgrade_keeps_the_scores_of_a_reward_model(classifier_path: Path, preferences: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "upgraded"
    result = call("upgrade", classifier_path, preferences, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert (out / "error_prior.safetensors").exists()
    scored = call("score", out, "-", stdin=json.dumps(group()) + "\n")
    assert scored.exit_code == 0, scored.stderr
    logit = json.loads(scored.stdout)["logit"]
    tokenizer = AutoTokenizer.from_pretrained(classifier_path)
    model = AutoModelForSequenceClassification.from_pretrained(classifier_path).eval()
    with torch.no_grad():
        own = [
            float(model(**tokenizer(f"red tree house\n\n{text}", return_tensors="pt")).logits[0, 0])
            for text in ("good clear", "bad rude", "odd vague")
        ]
    assert logit[0][1] == pytest.approx(own[0] - own[1], abs=2e-6)
    assert logit[1][2] == pytest.approx(own[1] - own[2], abs=2e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--threshold", "1.1", "--budget", "0.5"], "at most one"),
        (["--budget", "0.5"], "judge: got None"),
        (["--judge-fraction", "0.1", "--budget", "0.5"], "at most one"),
        (["--max-calls", "10"], "without --judge-fraction"),
        (["--judge-fraction", "1.5"], "--judge-fraction: got 1.5"),
        (["--budget", "2", "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"], "--budget: got 2.0"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "--judge-model"),
        (["--backend", "abacus"], "backend"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_usage_errors_exit_2_and_say_what_to_give(model: Path, arguments: list[str], says: str) -> None:
    result = call("score", model, "-", *arguments, stdin=json.dumps(group()) + "\n")
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_missing_or_foreign_model_is_reported_without_a_traceback(tmp_path: Path) -> None:
    result = call("score", tmp_path / "nothing", "-", stdin="")
    assert result.exit_code == 1
    assert "rmcore.json" in result.stderr


def test_training_on_nothing_or_on_bad_lines_exits_2(backbone_path: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for source, says in ((empty, "at least one"), (tmp_path / "missing.jsonl", "missing.jsonl")):
        result = call("train", source, "--backbone", backbone_path, "-o", tmp_path / "m")
        assert result.exit_code == 2
        assert says in result.stderr


def test_a_head_in_8_bits_scores_like_one_in_32(backbone_path: Path, preferences: Path, tmp_path: Path) -> None:
    uncertainties = []
    for dtype in ("float32", "int8"):
        out = tmp_path / dtype
        options = ["--backbone", backbone_path, "--pooling", "mean", "--features", 256, "--dtype", dtype, "-o", out]
        assert call("train", preferences, *options).exit_code == 0
        assert json.loads((out / "rmcore.json").read_text())["head"]["dtype"] == dtype
        result = call("score", out, "-", stdin=json.dumps(group(3)) + "\n")
        assert result.exit_code == 0, result.stderr
        uncertainties.append(json.loads(result.stdout)["uncertainty"])
    flat = [[u for row in matrix for u in row if u is not None] for matrix in uncertainties]
    assert flat[1] == pytest.approx(flat[0], rel=0.01)
    assert flat[1] != flat[0]
    refused = call("train", preferences, "--backbone", backbone_path, "--dtype", "int4", "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "int8" in refused.stderr


@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_held_out_preferences_set_the_amplitude(
    backbone_path: Path, preferences: Path, tmp_path: Path, mode: str
) -> None:
    options = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64, "--mode", mode]
    wrong = tmp_path / "wrong.jsonl"  # the same pairs, preferred the other way round: the head knows nothing
    with preferences.open() as lines, wrong.open("w") as out:
        for line in lines:
            item = json.loads(line)
            item["chosen"], item["rejected"] = item["rejected"], item["chosen"]
            out.write(json.dumps(item) + "\n")
    amplitudes = {}
    for name, more in (("plain", []), ("right", ["--calibrate", preferences]), ("wrong", ["--calibrate", wrong])):
        result = call("train", preferences, *options, *more, "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        assert ("amplitude" in result.stderr) == bool(more)
        assert ("want amplitude 0" in result.stderr) == (name == "right")  # what the head was trained on says nothing
        amplitudes[name] = json.loads((tmp_path / name / "rmcore.json").read_text())["head"]["config"]["amplitude"]
    assert amplitudes["plain"] is None
    assert amplitudes["right"] is None
    assert amplitudes["wrong"] > 1
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused = call("train", preferences, *options, "--calibrate", empty, "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "--calibrate" in refused.stderr


def test_training_the_layer_and_the_backbone_stores_both(
    backbone_path: Path, preferences: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    options = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64, "--layer-size", 16, "--epochs", 2]
    result = call("train", preferences, *options, "--finetune-epochs", 1, "--lr-backbone", 1e-3, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert (out / "backbone" / "model.safetensors").is_file()
    own = (out / "backbone" / "model.safetensors").read_bytes()
    assert own != (backbone_path / "model.safetensors").read_bytes()
    assert call("score", out, "-", stdin=json.dumps(group()) + "\n").exit_code == 0


def test_help_teaches_every_command() -> None:
    assert "rmcore demo" in call("--help").stdout
    for command in ("train", "upgrade", "score", "evaluate", "demo"):
        assert call(command, "--help").exit_code == 0


def test_a_reader_that_goes_away_is_survived(model: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    source = tmp_path / "lines"
    source.write_text((json.dumps(group()) + "\n") * 5000)  # more than a pipe holds
    with source.open() as lines:
        process = warm_python.start(
            "", "score", model, "-", "--batch", 1, module="rmcore.cli", modules=MODEL, stdin=lines
        )
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert first, errors
    assert json.loads(first)["advantages"]
    process.wait(60)
    assert "Traceback" not in errors


def test_a_budget_in_money_needs_a_price_for_the_judge(model: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"currency": "USD", "models": {"judge": {"prompt": 1.0, "completion": 4.0}}}))
    base = ["score", model, "-", "--judge-fraction", 0.5, "--max-cost", 1, "--judge-url", "http://127.0.0.1:9/v1"]
    for extra, message in [
        (["--judge-model", "judge"], "without --prices"),
        (["--judge-model", "other", "--prices", prices], "no price for 'other'"),
    ]:
        result = call(*base, *extra, stdin="")
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    result = call(*base, "--judge-model", "judge", "--prices", prices, "--judge-key-env", "", stdin="")
    assert result.exit_code == 0, result.stderr


def test_a_store_keeps_verdicts_between_runs(model: Path, tmp_path: Path) -> None:
    from rmcore.judge import RecordedJudge, ReplayServer

    recorded = RecordedJudge.from_rows(
        {"prompt": "red tree house", "first": a, "second": b, "verdict": "win"}
        for a, b in [("good clear", "bad rude"), ("good clear", "odd vague"), ("bad rude", "odd vague")]
    )
    outputs = []
    with ReplayServer(recorded) as server:
        for _ in range(2):
            result = call(
                "score", model, "-", "--budget", 1.0, "--judge-url", server.base_url, "--judge-model", "replay",
                "--judge-key-env", "", "--store", tmp_path / "verdicts.db", stdin=json.dumps(group()) + "\n",
            )  # fmt: skip
            assert result.exit_code == 0, result.stderr
            outputs.append(json.loads(result.stdout)["advantages"])
        assert server.requests == 6, "three pairs in both orders, bought once"
    assert outputs[0] == outputs[1]


def test_select_chooses_the_pairs_worth_a_label(model: Path, tmp_path: Path) -> None:
    pool, out = tmp_path / "pool.jsonl", tmp_path / "chosen.jsonl"
    rows = [{"prompt": f"question {k}", "responses": ["good clear", "bad rude", f"odd vague {k}"]} for k in range(4)]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call("select", model, pool, "--by", "bald", "--count", 5, "-o", out)
    assert result.exit_code == 0, result.stderr
    chosen = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(chosen) == 5
    assert "chose 5 of 12 pairs of 4 prompts by bald" in result.stderr
    for row in chosen:
        texts = rows[row["group"]]["responses"]
        assert row["responses"] == [texts[row["i"]], texts[row["j"]]]
        assert 0 <= row["worth"] <= 1
    assert [row["worth"] for row in chosen] == sorted((row["worth"] for row in chosen), reverse=True)
    assert call("select", model, pool, "--count", 5, "-o", out).exit_code == 2  # it is there already
    assert call("score", model, out).exit_code == 0  # what was chosen is input again
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "p", "responses": ["good", "good", "bad " * 5000, "bad"]}) + "\n")
    told = call("select", model, long, "--count", 9, "--overlong", "no-reward")
    assert told.exit_code == 0, told.stderr
    # Two equal ones and an unread one: of six pairs only good-bad, twice, has anything to tell.
    assert [(row["i"], row["j"]) for row in map(json.loads, told.stdout.splitlines())] in (
        [(0, 3), (1, 3)],
        [(1, 3), (0, 3)],
    )
    assert "4 pairs were no candidates" in told.stderr
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"prompt": "p", "responses": ["one"]}) + "\n")
    refused = call("select", model, alone, "--count", 1)
    assert refused.exit_code == 2
    assert "none with two responses" in refused.stderr
