"""The group server on a real cluster: processes killed, replicas gone, versions changed, under 200 clients."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

SECONDS = float(os.environ.get("RMCORE_RAY_SECONDS", "60"))


@pytest.fixture(autouse=True)
def ray():
    return pytest.importorskip("ray", reason="ray is not installed (pip install 'rmcore[ray]')")


@pytest.mark.parametrize("which", ["replicas", "processes", "scaling", "nodes"])
def test_nothing_is_lost_or_mixed(which, tmp_path):
    command = [sys.executable, "-m", "rmcore.bench.serve_ray", "--seconds", str(SECONDS), "--runs", which]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    figures = json.loads((tmp_path / "serve_ray.json").read_text())[which]
    assert figures["groups"] > 100
    assert [plot.stat().st_size > 10_000 for plot in tmp_path.glob("*.png")] == [True]


def test_a_caller_that_goes_away_takes_no_groups_of_others_along(reward_model_path, tmp_path):
    """Two callers in one batch, which waits for a replica; the one that started it goes. Serve cancels its request."""
    from rmcore.bench.serve_load import Soak
    from rmcore.bench.serve_ray_cluster import slow_judge, started
    from rmcore.integrations.ray.serve import ServeScale
    from rmcore.integrations.ray.serve.keys import request_key
    from rmcore.integrations.server.placing import owner

    def of(assembler):
        """Bodies that it answers."""
        for number in itertools.count():
            body = json.dumps({"prompt": f"red {number}", "responses": ["good clear tree", "bad vague tree"]}).encode()
            if owner(request_key("/v1/groups", body), ["Assembler0", "Assembler1"]) == assembler:
                yield body

    journal = tmp_path / "journal"
    journal.mkdir()
    scale = ServeScale(replicas=1, assemblers=2, entries=1)
    how = {"share": 1.0, "batch_wait_s": 0.5, "batches_in_flight": 1}
    with (
        slow_judge(6.0) as judge,
        started(reward_model_path, journal, Soak(), scale, judge_url=judge.base_url, **how) as (server, url, _),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):

        def post(body, **options):
            headers = {"content-type": "application/json"}
            return client.post("/v1/groups", content=body, headers=headers, **options).status_code

        first, second = of("Assembler0"), of("Assembler1")
        assert post(next(first)) == post(next(second)) == 200
        busy = _in_thread(post, next(first))
        time.sleep(1.0)  # the only replica has a batch, and takes no other
        gone = _in_thread(post, next(second), timeout=2.0)
        time.sleep(0.2)
        began = time.monotonic()
        assert post(next(second)) == 200
        assert time.monotonic() - began > 6.0  # it had to wait for the batch before
        with pytest.raises(httpx.ReadTimeout):
            gone()
        assert busy() == 200
        server.drain()


def test_a_member_whose_answer_was_lost_with_its_assembler_gets_it_from_the_successor(reward_model_path, tmp_path):
    from rmcore.bench.serve_load import Soak
    from rmcore.bench.serve_ray_cluster import kill_one, started
    from rmcore.integrations.ray.serve import ServeScale

    journal = tmp_path / "journal"
    journal.mkdir()
    texts = ["good clear tree", "bad vague tree", "kind red house", "odd wrong house"]
    calls = [
        (
            "/v1/rendezvous",
            [{"group_id": 1, "slot": k, "k": 4, "prompt": "red", "response": texts[k]} for k in range(4)],
        ),
        ("/get_reward", [{"query": [f"blue {text}"], "prompts": ["blue "]} for text in texts]),
    ]
    three = ServeScale(replicas=1, assemblers=3, entries=1)
    with (
        started(reward_model_path, journal, Soak(), three) as (_, url, _),
        httpx.Client(base_url=url, timeout=120, trust_env=False) as client,
    ):
        answers = []
        for path, bodies in calls:
            sent = [_in_thread(client.post, path, json=body) for body in bodies]
            replies = [answer() for answer in sent]
            assert [reply.status_code for reply in replies] == [200] * 4
            answers.append(replies[1].json())
        whole = r'^rmcore_assembled_groups_total\{assembler="(\w+)",outcome="whole"\} [12]\.0$'
        owners = re.findall(whole, client.get("/metrics").text, re.M)
        assert owners
        for name in owners:
            kill_one(name)
        time.sleep(1.0)
        for (path, bodies), answer in zip(calls, answers, strict=True):
            assert client.post(path, json=bodies[1]).json() == answer
        assert not re.findall(whole, client.get("/metrics").text, re.M)


def test_the_command_serves_drains_and_ends(reward_model, reward_model_path, tmp_path):
    """One group through each way in, a version that comes while it serves, and SIGTERM with a group half there."""
    from rmcore import RewardEngine
    from rmcore.engine.learning import VerdictLearner
    from rmcore.engine.routing import AlwaysRoute
    from rmcore.judge import RecordedJudge
    from rmcore.judge.keys import pair_key
    from rmcore.model import RewardModel

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    journal, texts = tmp_path / "journal", ["good clear tree", "bad vague tree"]
    model = RewardModel.from_pretrained(reward_model_path, device="cpu")
    judge = RecordedJudge({pair_key("red", *texts): "loss"})
    learner = VerdictLearner(model.head, journal)
    learning = RewardEngine(model, judge, AlwaysRoute(), learner=learner)
    command = [sys.executable, "-m", "rmcore.cli", "serve", str(reward_model_path), "--port", str(port), "--ray"]
    command += ["local", "--journal", str(journal), "--time-limit", "60", "--drain", "3", "--group-size", "3"]
    told = (tmp_path / "told").open("w+")
    server = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        url = _url(server, tmp_path / "told")
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            body = {"prompt": "red", "responses": texts}
            first = client.post("/v1/groups", json=body).json()
            assert first["head_version"] == 0
            assert learning.update(learning.score(["red"], [texts])).version == 1
            ends = time.monotonic() + 120
            while (later := client.post("/v1/groups", json=body).json())["head_version"] != 1:
                assert time.monotonic() < ends
                time.sleep(0.5)
            own = RewardEngine(model).score(["red"], [texts])[0].preference.tolist()
            assert later["preference"][0][1] == pytest.approx(own[0][1], abs=1e-3)
            assert later["preference"] != first["preference"]
            assert client.get("/ready").json()["ready"] is True
            assert client.post("/v1/groups", json={"prompt": "red"}).status_code == 422
            started = time.monotonic()
            joining = {"group_id": 1, "slot": 0, "k": 2, "prompt": "red", "response": texts[0]}
            half = _in_thread(client.post, "/v1/rendezvous", json=joining)
            time.sleep(1.0)
            server.send_signal(signal.SIGTERM)
            answer = half()
            assert (answer.status_code, answer.json()["complete"]) == (200, False)
            assert time.monotonic() - started < 50  # drained, not timed out
        assert server.wait(60) == 0, (tmp_path / "told").read_text()
    finally:
        server.kill()
        learner.close()


def _in_thread(call, *arguments, **named):
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1).submit(call, *arguments, **named).result


def _url(server: subprocess.Popen[bytes], told: Path) -> str:
    for _ in range(3000):
        if found := re.search(r"serving (\S+)", told.read_text()):
            return found[1]
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(told.read_text())
