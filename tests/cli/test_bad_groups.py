"""A group that cannot be scored changes nothing for the other lines of ``rmcore score``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from support.folders import BLAME, NEUTRAL, PRAISE, preference_rows
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.judge.testing import ReplayServer
from rmcore.model import RewardModel

GROUPS = 20
BAD = {"over-long": ["good " * 200, "bad", "odd", "kind"], "not finite": ["good", "river river river", "bad", "odd"]}
ROUTERS = {
    "fraction": ["--budget", 0.1],
    "calls a run": ["--judge-fraction", 1.0, "--max-calls", 24],
}


def call(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory, backbone_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("bad groups")
    rows = folder / "preferences.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in preference_rows(40)) + "\n")
    options = ["--backbone", backbone_path, "--pooling", "mean", "--features", 64, "-o", folder / "model"]
    assert call("train", rows, *options).exit_code == 0
    return folder / "model"


@pytest.fixture
def one_group_is_not_finite(monkeypatch) -> None:
    encode, rows_of, spoilt = RewardModel.encode_group, RewardModel.hidden_rows, []

    def encode_group(self, prompt, responses, **options):
        encoded = encode(self, prompt, responses, **options)
        if "river river river" in responses:
            spoilt.append(encoded)
        return encoded

    def hidden_rows(self, groups, **options):
        rows, first = rows_of(self, groups, **options), 0
        for group in groups:
            if any(group is bad for bad in spoilt):
                rows[first + 1] = torch.nan
            first += len(group)
        return rows

    monkeypatch.setattr(RewardModel, "encode_group", encode_group)
    monkeypatch.setattr(RewardModel, "hidden_rows", hidden_rows)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_others_are_routed_and_judged_as_if_it_were_not_there(model, one_group_is_not_finite, kind, router):
    rng = random.Random(5)
    groups = [
        {
            "id": k,
            "prompt": f"red {k}",
            "responses": [" ".join(rng.sample(PRAISE + BLAME + NEUTRAL, 5)) for _ in "1234"],
        }
        for k in range(GROUPS)
    ]
    bad = {"id": "bad", "prompt": "red", "responses": BAD[kind]}
    results = []
    with ReplayServer({}) as server:
        judge = ["--judge-url", server.base_url, "--judge-model", "m", "--judge-key-env", ""]
        for at in (None, 0, 7, GROUPS):
            lines = groups if at is None else [*groups[:at], bad, *groups[at:]]
            before = server.requests
            stdin = "".join(json.dumps(line) + "\n" for line in lines)
            result = call("score", model, "-", *ROUTERS[router], *judge, stdin=stdin)
            # The judge knows none of the pairs, which ends a run with 1; a bad group ends it with 2.
            assert result.exit_code == (1 if at is None else 2), result.stderr
            if at is not None:
                assert f"groups:{at + 1}: " in result.stderr
                assert f"1 of {GROUPS + 1} groups could not be scored" in result.stderr
            records = [json.loads(line) for line in result.stdout.splitlines()]
            assert [record["id"] for record in records] == list(range(GROUPS))
            assert sum(sum(map(sum, record["routed"])) for record in records) == 2 * 12
            decided = [(record["routed"], record["decisions"]) for record in records]
            results.append((decided, server.requests - before))
    assert all(result == results[0] for result in results)


def test_groups_of_one_are_counted_aloud(model, tmp_path):
    groups, out = tmp_path / "groups.jsonl", tmp_path / "out.jsonl"
    rows = [["good"], ["good", "bad"], ["odd"]]
    groups.write_text("".join(json.dumps({"prompt": "p", "responses": r}) + "\n" for r in rows))
    result = call("score", model, groups, "-o", out)
    assert result.exit_code == 0
    assert "2 of 3 groups have one response" in result.stderr
    assert [json.loads(line)["rewards"] for line in out.read_text().splitlines()][::2] == [[0.0], [0.0]]
    groups.write_text(json.dumps({"prompt": "p", "responses": rows[1]}) + "\n")
    assert "one response" not in call("score", model, groups, "-o", out, "--overwrite").stderr
