"""``rmcore label``: soft labels of a judge as preferences, killed and gone on with, and trained on."""

from __future__ import annotations

import json
import signal
import time

import pytest
from support.folders import preference_rows
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.judge import Fault, RecordedJudge, ReplayServer
from rmcore.judge.question.constitution import Constitution


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs():
    """90 pairs of people with a judge's soft verdicts in both orders: it likes the first place a little."""
    rows = preference_rows(90)
    seen = {json.dumps([row["prompt"], *sorted((row["chosen"], row["rejected"]))]): row for row in rows}
    rows = [row | {"prompt": f"{row['prompt']} {k}"} for k, row in enumerate([*seen.values(), *rows][:90])]
    recorded = []
    for k, row in enumerate(rows):
        p = 0.6 + 0.3 * ((k * 7) % 10) / 10 if k % 9 else 0.3
        texts = {"prompt": row["prompt"], "first": row["chosen"], "second": row["rejected"]}
        recorded += [
            texts | {"verdict": 2 * (p + lean) - 1, "order": order} for order, lean in (("ab", 0.05), ("ba", -0.05))
        ]
    return [{"prompt": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"]} for r in rows], recorded


def asking(server):
    return ["--judge-url", server.base_url, "--judge-model", "m", "--judge-key-env", ""]


def test_killed_and_resumed_it_writes_the_same_and_buys_nothing_twice(tmp_path, pairs, warm_python):
    rows, recorded = pairs
    prompts = write(tmp_path / "prompts.jsonl", rows)
    with ReplayServer(RecordedJudge.from_rows(recorded)) as server:
        whole = call("label", prompts, *asking(server), "-o", tmp_path / "whole.jsonl", "--report", tmp_path / "r")
        assert whole.exit_code == 0, whole.stderr
        assert server.requests == 180
    with ReplayServer(RecordedJudge.from_rows(recorded), latency_s=0.01) as server:
        out = tmp_path / "killed.jsonl"
        arguments = ["label", prompts, *asking(server), "-o", out]
        child = warm_python.start("", *arguments, module="rmcore.cli")
        partial = out.with_name(out.name + ".partial")
        until = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size):
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not out.exists()
        bought = server.requests
        server.latency_s = (0.0, 0.0)
        resumed = call("label", prompts, *asking(server), "-o", out, "--resume", "--report", tmp_path / "r2")
        assert resumed.exit_code == 0, resumed.stderr
        # What was on its way when it was killed is all that is asked again.
        assert bought <= server.requests <= 180 + 16
        assert server.requests < bought + 180
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    one, two = (json.loads((tmp_path / name / "labels.json").read_text()) for name in ("r", "r2"))
    assert one["labels"] == two["labels"]
    assert one["labels"]["position"]["first_shown"]["point"] == pytest.approx(0.05)
    assert one["labels"]["agreement"]["accuracy"]["point"] == pytest.approx(1 - 10 / 90)
    assert one["usage"]["calls"] == 180
    assert (tmp_path / "r" / "labels.png").exists()
    found = lines(out)
    assert len(found) == 90
    assert all(0.5 <= row["label"] <= 1 for row in found)
    first = found[0]
    assert (first["chosen"], first["label"]) == (rows[0]["rejected"], pytest.approx(0.7))
    assert first["by_order"] == {"chosen_first": pytest.approx(0.75), "rejected_first": pytest.approx(0.65)}
    assert first["human"] == 0.0


def test_groups_principles_and_a_budget(tmp_path):
    texts = ["one", "two", "three"]
    recorded = [
        {"prompt": p, "first": a, "second": b, "verdict": 0.6}
        for p in ("p", "q")
        for a, b in (("one", "two"), ("one", "three"), ("two", "three"))
    ]
    prompts = write(tmp_path / "g.jsonl", [{"prompt": p, "responses": texts, "id": p} for p in ("p", "q")])
    rules = tmp_path / "rules.txt"
    rules.write_text("Be kind.\nBe brief.\n# not this\nBe right.\n")
    human = write(tmp_path / "h.jsonl", [{"prompt": "q", "chosen": "three", "rejected": "one"}])
    out = tmp_path / "o.jsonl"
    given = ["label", prompts, "--constitution", rules, "--human", human, "-o", out]
    with ReplayServer(RecordedJudge.from_rows(recorded)) as server:
        stopped = call(*given, *asking(server), "--max-calls", 5)
        assert stopped.exit_code == 1
        assert "4 pairs to go" in stopped.stderr
        assert server.requests == 4
        done = call(*given, *asking(server), "--resume")
        assert done.exit_code == 0, done.stderr
        assert server.requests == 12
    found = lines(out)
    assert [(row["id"], row["responses"]) for row in found] == [
        (p, pair) for p in "pq" for pair in ([0, 1], [0, 2], [1, 2])
    ]
    constitution = Constitution.from_file(rules)
    assert all(
        row["principles"] == list(constitution.drawn(row["prompt"], row["chosen"], row["rejected"])) for row in found
    )
    assert [row.get("human") for row in found] == [None] * 4 + [0.0, None]
    assert all(row["label"] == pytest.approx(0.8) for row in found)


def test_two_labels_of_people_for_a_pair(tmp_path):
    """The same label again is counted; another one, or the other way round, is refused by line."""
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "q", "responses": ["one", "two"]}])
    recorded = write(tmp_path / "v.jsonl", [{"prompt": "q", "first": "one", "second": "two", "verdict": "win"}])
    row, turned = ({"prompt": "q", "chosen": a, "rejected": b} for a, b in (("one", "two"), ("two", "one")))
    given = ["label", prompts, "--verdicts", recorded, "--no-judge-soft", "--one-order", "keep"]
    human = write(tmp_path / "h.jsonl", [row, row, turned | {"label": 0.5, "prompt": "even"}, row | {"label": 1.0}])
    done = call(*given, "--human", human, "-o", tmp_path / "o.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "2 pairs come again with the same label" in done.stderr
    assert lines(tmp_path / "o.jsonl")[0]["human"] == 1.0
    for last, said in (
        (turned, "the label 1 for a pair that has 0 in line 1"),
        (row | {"label": 0.8}, "the label 0.8"),
    ):
        human = write(tmp_path / "h.jsonl", [row, row, last])
        refused = call(*given, "--human", human, "-o", tmp_path / "x.jsonl")
        assert refused.exit_code == 2
        assert f"h.jsonl:3: {said}" in " ".join(refused.stderr.split())
        assert not (tmp_path / "x.jsonl").exists()


def test_what_is_no_label_is_counted_and_not_written(tmp_path):
    rows = [{"prompt": p, "chosen": "one", "rejected": "two"} for p in ("good", "none", "half")]
    recorded = [{"prompt": "good", "first": "one", "second": "two", "verdict": 0.5}]
    recorded += [{"prompt": p, "first": "one", "second": "two", "verdict": None} for p in ("none", "half")]
    prompts, out = write(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl"
    verdicts = write(tmp_path / "v.jsonl", recorded)
    result = call("label", prompts, "--verdicts", verdicts, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "1 of 3 pairs have a label" in result.stderr
    assert "2 no_verdict" in result.stderr
    assert [row["prompt"] for row in lines(out)] == ["good"]
    write(verdicts, recorded[1:])
    failed = call("label", prompts, "--verdicts", verdicts, "-o", tmp_path / "none.jsonl")
    assert failed.exit_code == 1
    assert "no label for any of 3 pairs" in failed.stderr
    faults = [Fault(status=500)] * 4
    with ReplayServer(RecordedJudge.from_rows(recorded[:1]), faults=faults) as server:
        down = call("label", prompts, *asking(server), "--judge-retries", 0, "-o", tmp_path / "down.jsonl")
    assert down.exit_code in (0, 1)
    assert "http_500" in down.stderr


def test_what_is_wrong_is_found_before_a_call(tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    url = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-key-env", ""]
    template = tmp_path / "t.txt"
    template.write_text("$contract $prompt $first $second")
    cases = [
        (["label", prompts], "--judge-url, or --verdicts"),
        (["label", prompts, *url, "--design", "swiss:3", "-o", tmp_path / "o"], "rounds of swiss"),
        (["label", prompts, *url, "--resume"], "--store"),
        (["label", prompts, *url, "--no-rationale", "--judge-template", template], "at most one"),
        (["label", prompts, *url, "--constitution", template, "--principles", 2, "-o", tmp_path / "o"], "per_question"),
        (["label", prompts, *url, "-o", prompts], "another place"),
        (["label", prompts, *url, "--store", prompts, "-o", tmp_path / "o"], "--store"),
    ]
    for arguments, says in cases:
        result = call(*arguments)
        assert result.exit_code == 2, (arguments, result.stderr)
        assert says in result.stderr
    empty = write(tmp_path / "e.jsonl", [{"prompt": "p", "responses": ["a"]}])
    assert (
        "no pairs"
        in call(
            "label",
            empty,
            "--verdicts",
            write(tmp_path / "v.jsonl", [{"prompt": "p", "first": "a", "second": "b", "verdict": "win"}]),
            "-o",
            tmp_path / "o",
        ).stderr
    )


def test_soft_labels_train_a_model_and_evaluation_tells_how_near_it_comes(tmp_path, pairs, backbone_path):
    rows, recorded = pairs
    prompts, verdicts = write(tmp_path / "p.jsonl", rows[:80]), write(tmp_path / "v.jsonl", recorded)
    assert call("label", prompts, "--verdicts", verdicts, "-o", tmp_path / "ai.jsonl").exit_code == 0
    given = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64, "--no-error-prior", "--no-cache"]
    trained = call("train", tmp_path / "ai.jsonl", *given, "-o", tmp_path / "model")
    assert trained.exit_code == 0, trained.stderr
    result = call(
        "evaluate", tmp_path / "model", tmp_path / "ai.jsonl", "-o", tmp_path / "e", "--replicates", 20, "--no-cache"
    )
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "e" / "report.json").read_text())
    assert content["soft_labels"]["soft"] == 80
    assert 0 < content["soft_labels"]["divergence"] < content["soft_labels"]["cross_entropy"]


def test_a_judges_labels_beside_peoples(tmp_path, backbone_path):
    given = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64, "--no-error-prior", "--no-cache"]
    people = write(tmp_path / "p.jsonl", preference_rows(40))
    ai = write(tmp_path / "ai.jsonl", [row | {"label": 0.8} for row in preference_rows(40, seed=5)])
    auto = call("train", people, "--ai-labels", ai, *given, "-o", tmp_path / "auto")
    assert auto.exit_code == 0, auto.stderr
    assert "weight of a judge's pair" in auto.stderr
    assert "of a judge at weight" in auto.stderr
    fixed = call("train", people, "--ai-labels", ai, "--ai-weight", 0.5, *given, "-o", tmp_path / "fixed")
    assert "40 of a judge at weight 0.5" in fixed.stderr, fixed.stderr
    for arguments, says in (
        (["--ai-labels", ai, "--ai-weight", "-1"], "a number above 0"),
        (["--ai-weight", "2"], "together with it"),
        (["--ai-labels", ai, "--layer-size", 8, "--epochs", 1], "it alone"),
        (["--ai-labels", write(tmp_path / "empty.jsonl", [])], "no lines"),
    ):
        wrong = call("train", people, *arguments, *given, "-o", tmp_path / "no")
        assert wrong.exit_code == 2
        assert says in wrong.stderr
