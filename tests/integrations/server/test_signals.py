"""A real server process: SIGTERM under load loses nothing it accepted, and it does not open doors it should not."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter

import httpx
import pytest
from typer.testing import CliRunner

from rmcore.cli import app as cli
from rmcore.judge import ReplayServer

WORDS = ["good", "clear", "right", "bad", "vague", "wrong", "red", "blue", "green", "tree"]


@pytest.mark.slow
def test_sigterm_under_load_loses_no_accepted_group(server, reward_model):
    process, url, log = server("--group-size", "3", "--drain", "4", "--batch", "8", "--first-start")
    rng = random.Random(0)
    told = asyncio.Event()  # the signal was sent
    outcomes: Counter[str] = Counter()

    def texts(count):
        return [" ".join(rng.choices(WORDS, k=5)) + f" {rng.random()}" for _ in range(count)]

    async def post(client, path, body):
        """The answer; None where none was to be expected, since the signal had been sent before the call."""
        late = told.is_set()
        try:
            answer = await client.post(path, json=body)
        except httpx.TransportError:
            assert late, "an accepted request got no answer"
            outcomes["refused connection"] += 1
            return None
        if answer.status_code == 429:
            assert answer.json()["error"]["type"] == "busy"
            outcomes["refused"] += 1
            return None
        assert answer.status_code == 200, answer.text
        outcomes[path] += 1
        return answer.json()

    async def groups(client):
        while not (late := told.is_set()):
            responses = texts(3)
            got = await post(client, "/v1/groups", {"prompt": "red", "responses": responses})
            if got is not None and rng.random() < 0.1:
                checks.append((responses, got["advantages"]))
        assert late

    async def members(client, number):
        while not told.is_set():
            responses, name = texts(3), f"{number} {rng.random()}"
            bodies = [
                {"group_id": name, "slot": k, "k": 3, "prompt": "red", "response": text}
                for k, text in enumerate(responses)
            ]
            parts = await asyncio.gather(*(post(client, "/v1/rendezvous", body) for body in bodies))
            if all(parts):
                assert all(part["complete"] for part in parts)
            else:
                assert not any(parts)  # a group is taken or refused as a whole
            if all(parts) and rng.random() < 0.1:
                checks.append((responses, [part["advantage"] for part in parts]))

    async def half_a_group(client):
        """Taken before the signal; its last member comes after it."""
        bodies = [{"group_id": "half", "slot": k, "k": 3, "prompt": "red", "response": f"good {k}"} for k in range(3)]
        early = [asyncio.create_task(client.post("/v1/rendezvous", json=body)) for body in bodies[:2]]
        await told.wait()
        await asyncio.sleep(0.3)
        late = await client.post("/v1/rendezvous", json=bodies[2])
        return [answer.json()["complete"] for answer in (*(await asyncio.gather(*early)), late)]

    async def lone(client):
        """Its siblings never come: answered when the drain's time is up."""
        body = {"group_id": "lone", "slot": 0, "k": 3, "prompt": "red", "response": "good"}
        return (await client.post("/v1/rendezvous", json=body)).json()

    async def main():
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            load = [asyncio.create_task(groups(client)) for _ in range(8)]
            load += [asyncio.create_task(members(client, k)) for k in range(4)]
            open_ = [asyncio.create_task(half_a_group(client)), asyncio.create_task(lone(client))]
            while outcomes["/v1/groups"] < 20 or outcomes["/v1/rendezvous"] < 12:
                await asyncio.sleep(0.01)
            told.set()
            process.send_signal(signal.SIGTERM)
            await asyncio.gather(*load)
            while (ready := await client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/groups", json={"prompt": "red", "responses": ["good", "bad"]})
            return ready.json(), refused.status_code, await open_[0], await open_[1]

    checks: list[tuple[list[str], list[float]]] = []
    ready, refused, half, alone = asyncio.run(asyncio.wait_for(main(), 100))
    assert process.wait(60) == 0, log.read_text()
    assert (ready["status"], refused) == ("draining", 429)
    assert half == [True, True, True]
    assert (alone["complete"], alone["advantage"]) == (False, None)
    assert "Traceback" not in log.read_text()
    from rmcore.engine import RewardEngine

    engine = RewardEngine(reward_model)
    for responses, advantages in checks:
        assert advantages == pytest.approx(engine.score(["red"], [responses])[0].advantages.tolist(), abs=1e-4)


@pytest.mark.slow
def test_an_idle_server_ends_at_once_and_a_token_is_asked_for(server):
    process, url, log = server("--host", "0.0.0.0", RMCORE_SERVE_TOKEN="a-token-for-the-test")
    url = url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/health").json()["model"] == "tiny-rm"
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.get(f"{url}/metrics", headers={"authorization": "Bearer a-token-for-the-test"}).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "a-token" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--host", "0.0.0.0"], {}, "host: got '0.0.0.0', expected a loopback address, since there is no token"),
        ([], {"RMCORE_SERVE_TOKEN": ""}, "the variable RMCORE_SERVE_TOKEN: got an empty value"),
        (["--time-limit", "0"], {}, "--time-limit: got 0"),
        (["--threshold", "1", "--budget", "0.5"], {}, "at most one"),
        (["--group-size", "1"], {}, "--group-size: got 1"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_loaded(arguments, environment, message, monkeypatch):
    monkeypatch.delenv("RMCORE_SERVE_TOKEN", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(cli, ["serve", "no-such-model", *arguments])
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.slow
def test_a_killed_server_has_not_forgotten_what_it_spent(server, tmp_path):
    state = tmp_path / "router.json"
    with ReplayServer({}) as judge:
        arguments = ["--judge-fraction", "1.0", "--max-calls", "10", "--router-state", str(state)]
        arguments += ["--judge-url", judge.base_url, "--judge-model", "m", "--judge-key-env", ""]
        asked = []
        for turn in range(2):
            process, url, _ = server(*arguments)
            for k in range(3):  # three pairs each, two calls a pair
                body = {"prompt": f"red {turn} {k}", "responses": ["good", "bad", "tree"]}
                httpx.post(f"{url}/v1/groups", json=body, timeout=60).raise_for_status()
            asked.append(json.loads(state.read_text())["budgets"][0]["spent"])
            process.kill()  # no farewell
            process.wait()
    assert asked == [10, 10]
    assert judge.requests == 10
