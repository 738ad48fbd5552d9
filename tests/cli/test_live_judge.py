"""Options of a live judge on the command line, and what is said of what it did and cost."""

from __future__ import annotations

import io
import json
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from rmcore._base.errors import InputError
from rmcore.cli import app
from rmcore.cli.build_engine import make_judge
from rmcore.cli.console import judge_progress
from rmcore.cli.options import Judging
from rmcore.judge import Fault, RecordedJudge, ReplayServer, VerdictStore

URL = "http://127.0.0.1:9/v1"
TEXTS = ["good clear", "bad rude", "odd vague"]
LINE = json.dumps({"prompt": "red tree house", "responses": TEXTS})


def call(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


@pytest.fixture
def model(tmp_path: Path, backbone_path: Path, preferences: Path) -> Path:
    out = tmp_path / "model"
    result = call("train", preferences, "--backbone", backbone_path, "--pooling", "mean", "--features", 64, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out


def judging(**given) -> Judging:
    return Judging(judge_url=URL, judge_model="m", judge_key_env="", **given)


def test_options_reach_the_client_and_the_request():
    judge = make_judge(
        judging(judge_timeout=3.0, judge_concurrency=5, judge_retries=0, judge_max_reply=99, judge_max_tokens=7)
    )
    options = judge.client.options
    assert (options.timeout_s, options.concurrency, options.retry.max_attempts) == (3.0, 5, 1)
    assert options.max_reply_bytes == 99
    assert judge._parameters == {"max_tokens": 7}
    assert make_judge(judging(judge_max_tokens=0))._parameters == {}
    assert make_judge(judging(judge_context=4096)).context.limit == 4096
    assert make_judge(judging())._parameters == {"max_tokens": 2048}
    assert make_judge(judging()).prompt.output == "text"
    assert make_judge(judging(judge_output="json_schema")).prompt.output == "json_schema"


def test_a_judge_is_asked_for_json_under_a_schema(model):
    rows = [{"prompt": "red tree house", "first": a, "second": b, "verdict": "win"} for a, b in combinations(TEXTS, 2)]
    for how, refused in (([], False), (["--judge-output", "json_schema"], True)):
        for refuses in ((), ("response_format",)):
            with ReplayServer(RecordedJudge.from_rows(rows), refuses=refuses) as server:
                result = scored(model, server, LINE + "\n", *how)
            assert result.exit_code == 0, result.stderr
            assert server.statuses[200] == 6, "both orders of three pairs"
            assert (server.statuses[400] > 0) == (refused and bool(refuses)), "in text after all"


def test_no_words_and_a_schema_that_has_some_exclude_each_other():
    with pytest.raises(InputError, match="the schema has a critique"):
        make_judge(judging(judge_output="json_schema"), rationale=False)


def test_reuse_reaches_the_store(tmp_path):
    path = tmp_path / "v.db"
    assert make_judge(judging(store=path)).store.reuse == "replies"
    assert make_judge(judging(store=path, reuse="verdicts")).store.reuse == "verdicts"
    again = make_judge(judging(store=path, ask_again=["length", "unparsable"])).store
    assert again.reuse == {"length", "unparsable"}
    for given, says in (
        ({"ask_again": ["length"]}, "--store"),
        ({"reuse": "verdicts", "ask_again": ["length"], "store": path}, "--ask-again"),
    ):
        with pytest.raises(InputError, match=says):
            make_judge(judging(**given))


def test_a_price_table_without_the_model_is_noticed_before_the_run(tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"models": {"other": {"prompt": 1, "completion": 1}}}))
    with pytest.raises(InputError, match=r"no price for .m..*it has other"):
        make_judge(judging(prices=prices))


def scored(model, server, stdin, *more):
    judge = ["--judge-url", server.base_url, "--judge-model", "m", "--judge-key-env", "", "--judge-retries", 0]
    return call("score", model, "-", "--budget", 1.0, *judge, *more, stdin=stdin)


def test_when_every_judged_pair_failed_it_says_so_and_does_not_end_with_0(model):
    with ReplayServer({}, faults=lambda _: Fault(500)) as server:
        result = scored(model, server, LINE + "\n")
    assert result.exit_code == 1
    assert "no verdict for any of the 3 pairs" in result.stderr
    assert len(result.stdout.splitlines()) == 1, "what the model alone says is written all the same"


def test_what_was_spent_is_told_when_a_bad_line_ends_the_run(model):
    rows = [{"prompt": "red tree house", "first": a, "second": b, "verdict": "win"} for a, b in combinations(TEXTS, 2)]
    with ReplayServer(RecordedJudge.from_rows(rows)) as server:
        result = scored(model, server, f"{LINE}\nno json\n", "--batch", 1)
    assert result.exit_code == 2
    assert "1 groups, 3 pairs" in result.stderr
    assert "not JSON" in result.stderr


def test_a_bar_moves_while_the_judge_works():
    bar = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    client = SimpleNamespace(state=SimpleNamespace(calls=0))
    with judge_progress(bar, SimpleNamespace(client=client)):
        client.state.calls = 3
        until = time.monotonic() + 10
        while bar.tasks[0].completed != 3 and time.monotonic() < until:
            time.sleep(0.02)
    assert bar.tasks[0].completed == 3
    with judge_progress(bar, None):
        assert len(bar.tasks) == 1


def test_show_in_a_pipe_cuts_nothing(tmp_path):
    from rmcore.judge import JudgeUsage, Verdict
    from rmcore.judge.store.records import Question, Reply

    path, prompt, model_name, reason = tmp_path / "v.db", "p" * 5000, "m" * 100, "http_" + "9" * 90
    question = Question.of("j", model_name, {}, "t", prompt, "a", "b")
    usage = JudgeUsage(calls=1, attempts=1)
    with VerdictStore(path) as store:
        store.put(question, Reply(Verdict.none(reason, usage)))
    out = call("verdicts", "show", path).stdout
    for said in (question.key, prompt, model_name, reason):
        assert said in out
