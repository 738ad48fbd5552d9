"""``rmcore score --ray``: what is refused before a cluster is asked for, and what is said of an actor's error."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.cli.on_ray import _last_words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0.1", "--verdicts", "v.jsonl"], "--rank-by: got learned with --ray"),
        (["--judge-fraction", "0.1", "--verdicts", "v.jsonl"], "--judge-fraction: got 0.1 with --ray"),
        (["--budget", "0.1", "--rank-by", "u"], "expected --judge-url or --verdicts"),
        (["--verdicts", "v.jsonl"], "so that the judge is never asked"),
        (["--critiques"], "--critiques: got with --ray"),
        (["--ray-actors", "0"], "ray-actors"),
    ],
)
def test_what_cannot_be_is_refused_first(tmp_path: Path, monkeypatch, options: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.jsonl").write_text("")
    done = CliRunner().invoke(app, ["score", "no-model", "groups.jsonl", "-o", "out", "--ray", "local", *options])
    assert done.exit_code == 2
    assert said in done.output.replace("│", " ")


def test_an_actors_error_is_told_by_its_last_line() -> None:
    error = RuntimeError("\n")
    error.__cause__ = ValueError("ray::Worker.__init__()\n  File x, line 3\nCheckpointError: name: got 'no'\n")
    assert _last_words(error) == "CheckpointError: name: got 'no'"
    assert _last_words(RuntimeError()) == "RuntimeError"
