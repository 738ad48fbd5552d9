"""Ray Data on a cluster of two nodes: the results of one process, whatever dies, and no verdict bought twice."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.groups import groups_of, verdicts_of, write_groups

from rmcore.engine import RewardEngine
from rmcore.engine.routing import Budget, BudgetRouter
from rmcore.integrations.ray import Scorer, start_judge, whole_groups
from rmcore.judge import ChatJudge, RecordedJudge
from rmcore.model import RewardModel

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

MANY = int(os.environ.get("RMCORE_RAY_GROUPS", "10000"))


def test_many_groups_with_an_actor_killed(cluster, replay, reward_model_path, tmp_path):
    """10,000 groups over actors on both nodes; one is killed in the middle."""
    import ray
    from ray._private.state import actors  # the public way needs the dashboard

    groups = groups_of(MANY)
    server = replay(groups)
    judge = start_judge(
        functools.partial(ChatJudge, server.base_url, "judge", None, store=tmp_path / "verdicts.sqlite")
    )
    data = ray.data.from_items(groups, override_num_blocks=20)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    batch = MANY // 100
    scored = data.map_batches(
        Scorer,
        fn_constructor_kwargs={
            "model": str(reward_model_path), "judge": judge, "router": BudgetRouter(fraction=0.1, by="u"),
            "outputs": ["advantages", "rewards", "preference", "uncertainty", "routed"],
        },
        batch_size=batch, compute=ray.data.ActorPoolStrategy(size=4), num_cpus=1.25,
    )  # fmt: skip
    killed: list[int] = []
    nodes: set[str] = set()

    def kill() -> None:
        while server.requests < 0.04 * MANY:
            time.sleep(0.02)
        workers = [a for a in actors().values() if "MapWorker" in a["ActorClassName"] and a["State"] == "ALIVE"]
        nodes.update(a["Address"]["NodeID"] for a in workers)
        killed.append(workers[0]["Pid"])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    started = time.monotonic()
    rows = sorted(scored.take_all(), key=lambda row: row["id"])
    seconds = time.monotonic() - started
    killer.join(10)
    assert killed
    assert len(nodes) == 2
    stats = judge.stats()
    judge.close()

    engine = RewardEngine(
        RewardModel.from_pretrained(reward_model_path), RecordedJudge(verdicts_of(groups)), BudgetRouter(0.1, by="u")
    )
    assert [row["id"] for row in rows] == list(range(MANY))
    assert not [row["error"] for row in rows if row["error"]]
    routed = 0
    for start in range(0, MANY, batch):
        part = groups[start : start + batch]
        for row, group in zip(
            rows[start : start + batch],
            engine.score([g["prompt"] for g in part], [g["responses"] for g in part]),
            strict=True,
        ):
            record = group.to_record()
            for name in ("advantages", "rewards", "preference", "uncertainty", "routed"):
                assert _listed(row[name]) == record[name], (row["id"], name)  # to the bit
            routed += int(group.routed.sum()) // 2
    print(
        f"{MANY} groups in {seconds:.0f} s, {routed} pairs routed, {server.requests} requests, "
        f"{stats['repeated']} pairs asked again by the actor after the killed one and answered from memory"
    )
    assert server.requests == server.statuses[200] == 2 * stats["asked"]  # both orders of each, once
    assert stats["asked"] == routed


def _listed(value):
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_listed(item) for item in value] if isinstance(value, list) else value


def test_the_command_writes_what_one_process_writes(cluster, reward_model_path, tmp_path):
    groups = groups_of(400)
    write_groups(tmp_path / "groups.jsonl", groups)
    with (tmp_path / "verdicts.jsonl").open("w") as file:
        for group in groups:
            for a in group["responses"]:
                for b in group["responses"]:
                    if a < b:
                        row = {"prompt": group["prompt"], "first": a, "second": b, "verdict": "win"}
                        file.write(json.dumps(row) + "\n")

    def score(out: str, *more: str) -> str:
        command = [sys.executable, "-m", "rmcore.cli", "score", str(reward_model_path), "groups.jsonl", "-o", out]
        command += ["--budget", "0.2", "--rank-by", "u", "--verdicts", "verdicts.jsonl", *more]
        env = {**os.environ, "RMCORE_CACHE": "off"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    score("one.jsonl")
    there = ["--ray", cluster.address, "--ray-actors", "3", "--ray-cpus", "1"]
    score("many.jsonl", *there)
    one = (tmp_path / "one.jsonl").read_bytes()
    assert (tmp_path / "many.jsonl").read_bytes() == one
    half = one.splitlines(keepends=True)[:150]
    (tmp_path / "half.jsonl.partial").write_bytes(b"".join(half) + b'{"id": 150, "li')  # killed while it wrote
    score("half.jsonl", *there, "--resume")
    assert (tmp_path / "half.jsonl").read_bytes() == one


def test_rows_of_one_response_become_groups(cluster, reward_model_path):
    import ray

    groups = groups_of(40)
    rows = [
        {"id": g["id"], "n": k, "prompt": g["prompt"], "response": text}
        for g in groups
        for k, text in enumerate(g["responses"])
    ]
    rows.sort(key=lambda row: (row["n"], -row["id"]))
    whole = whole_groups(ray.data.from_items(rows), "id", order="n")
    found = {row["id"]: row for row in whole.take_all()}
    assert len(found) == 40
    for group in groups:
        assert found[group["id"]]["prompt"] == group["prompt"]
        assert _listed(found[group["id"]]["responses"]) == group["responses"]


def test_a_budget_is_one_for_all_actors(cluster, replay, reward_model_path):
    import ray

    groups = groups_of(200)
    server = replay(groups)
    judge = start_judge(functools.partial(ChatJudge, server.base_url, "judge", None), lambda: [Budget(40, "calls")])
    scored = ray.data.from_items(groups, override_num_blocks=8).map_batches(
        Scorer,
        fn_constructor_kwargs={
            "model": str(reward_model_path), "judge": judge, "router": BudgetRouter(fraction=0.5, by="u"),
        },
        batch_size=25, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1,
    )  # fmt: skip
    assert len(scored.take_all()) == 200
    stats = judge.stats()
    judge.close()
    assert server.requests == 40
    assert stats["asked"] == 20
    assert stats["refused"] > 100
