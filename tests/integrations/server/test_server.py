"""The HTTP interface, in process: answers, refusals, limits, retries; on real sockets where the socket matters."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
import torch
from support.server_calls import GROUP, member, until

JSON = {"content-type": "application/json"}


# -- /v1/groups ------------------------------------------------------------------------------------------------------


def test_a_group_is_scored_as_by_the_engine(make_app, talk, engine):
    async def main(client):
        return (await client.post("/v1/groups", json={**GROUP, "id": "mine"})).json()

    got = talk(make_app(), main)
    expected = engine.score([GROUP["prompt"]], [GROUP["responses"]])[0]
    assert got["id"] == "mine"
    assert got["advantages"] == pytest.approx(expected.advantages.tolist(), abs=1e-5)
    assert got["rewards"] == pytest.approx(expected.rewards.tolist(), abs=1e-5)
    assert got["rewards_group_mean"] == pytest.approx(expected.rewards_for("group-mean").tolist(), abs=1e-5)
    assert torch.allclose(torch.tensor(got["preference"]).double(), expected.preference, atol=1e-5)
    assert torch.allclose(torch.tensor(got["uncertainty"]).double(), expected.uncertainty, atol=1e-5)
    assert got["routed"] == [[False] * 3] * 3
    assert got["decisions"]["head"] == 3
    assert got["cost"]["calls"] == 0


def test_judged_pairs_tell_who_decided_and_what_it_cost(make_app, talk, judged_engine):
    body = {"prompt": [{"role": "user", "content": "red"}], "responses": ["stone wall", "good", "bad", "good"]}

    async def main(client):
        return (await client.post("/v1/groups", json=body)).json()

    got = talk(make_app(judged_engine), main)
    assert got["decisions"] == {
        "head": 0, "judge": 2, "judge_failed": 3, "identical": 1, "nobody": 0, "flips": 0, "failures": {"refusal": 3},
    }  # fmt: skip
    assert (got["cost"]["calls"], got["cost"]["cost"], got["cost"]["unpriced_calls"]) == (2, 4.0, 0)
    assert got["preference"][1][2] == pytest.approx(1.9924, abs=1e-4)
    assert got["preference"][1][3] == 0.0
    assert got["routed"] == [
        [False, True, True, True],
        [True, False, True, False],
        [True] * 2 + [False, True],
        [True, False, True, False],
    ]


def test_a_list_is_answered_in_order_and_scored_together(make_app, talk, echo_engine):
    groups = [{"prompt": f"p{k}", "responses": [str(k), "0"], "id": k} for k in range(10)]

    async def main(client):
        return (await client.post("/v1/groups", json=groups)).json()

    app = make_app(echo_engine)
    got = talk(app, main)
    assert [(one["id"], one["preference"][0][1]) for one in got] == [(k, float(k)) for k in range(10)]
    assert app.state.service.scorer.stats.batches == 1


def test_what_has_no_preference_is_null(make_app, talk, echo_engine):
    async def main(client):
        return (await client.post("/v1/groups", json={"prompt": "p", "responses": ["3", "1", "nan"]})).json()

    got = talk(make_app(echo_engine), main)
    assert got["advantages"] == [2.0, -2.0, None]
    assert got["rewards"] == [1.0, -1.0, None]
    assert got["preference"][0] == [0.0, 2.0, None]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/groups", b"{", 400, "no JSON"),
        ("/v1/groups", b"[" * 100_000, 400, "no JSON"),
        ("/v1/groups", b'{"a":' * 50_000, 400, "no JSON"),
        ("/v1/groups", b"9" * 10_000, 400, "no JSON"),
        ("/v1/groups", b"\xff\xfe\x00", 400, "no JSON"),
        ("/v1/groups", b"", 422, "body"),
        ("/v1/groups", b"null", 422, "body"),
        ("/v1/groups", b"[]", 422, "at least 1"),
        ("/v1/groups", b'{"prompt": NaN, "responses": ["a"]}', 422, "prompt"),
        ("/v1/groups", b'{"prompt": "\\ud800", "responses": ["a"]}', 422, "surrogate"),
        ("/v1/groups", {"prompt": "p", "responses": []}, 422, "responses"),
        ("/v1/groups", {"prompt": "p", "responses": "ab"}, 422, "responses"),
        ("/v1/groups", {"prompt": "p", "responses": ["a", 1]}, 422, r"responses\[1\]"),
        ("/v1/groups", {"prompt": "p", "responses": ["a"], "tempreature": 1}, 422, "tempreature"),
        ("/v1/groups", {"prompt": [], "responses": ["a"]}, 422, "prompt"),
        ("/v1/groups", {"prompt": [{"role": "user"}], "responses": ["a"]}, 422, "content"),
        ("/v1/groups", {"prompt": [{"role": "u", "content": "x", "mood": 1}], "responses": ["a"]}, 422, "mood"),
        ("/v1/groups", {"prompt": "p", "responses": ["a"] * 9}, 422, "responses: got 9, expected at most 8"),
        (
            "/v1/groups",
            [GROUP, {"prompt": "p", "responses": ["x" * 501]}],
            422,
            r"groups\[1\]\.responses\[0\]: got 501",
        ),
        ("/v1/groups", {"prompt": "x" * 501, "responses": ["a"]}, 422, "prompt: got 501 characters"),
        ("/v1/groups", [GROUP] * 5, 422, "groups: got 5, expected at most 4"),
        ("/v1/groups", [GROUP, {"prompt": "p", "responses": ["red " * 80]}], 422, r"groups\[1\]: .*at most 64"),
        ("/v1/rendezvous", member(2, "a"), 422, "slot: got 2, expected below k = 2"),
        ("/v1/rendezvous", member(0, "a", k=9), 422, "k: got 9, expected at most 8"),
        ("/v1/rendezvous", member(-1, "a"), 422, "slot"),
        ("/v1/rendezvous", member(True, "a"), 422, "slot"),
        ("/v1/rendezvous", member(0, "red " * 80, k=1), 422, "at most 64"),
        ("/get_reward", {"query": ["ab"], "prompts": []}, 422, "prompts: got 0, expected 1"),
        ("/get_reward", {"query": ["xy"], "prompts": ["ab"]}, 422, r"query\[0\]: got 'xy'.*the prompt 'ab'"),
        ("/get_reward", {"query": ["ab"] * 3, "prompts": ["a"] * 3}, 422, "3 times, expected a multiple of"),
        ("/get_reward", {"query": "ab", "prompts": "a"}, 422, "query"),
    ],
)
def test_bad_input_is_named_and_never_a_500(make_app, talk, path, body, status, message):
    app = make_app(group_size=2, max_responses=8, max_chars=500, max_groups=4)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def main(client):
        return await client.post(path, content=content, headers=JSON)

    answer = talk(app, main)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert re.search(message, error["message"])
    assert set(error) == {"type", "message"}


def test_other_paths_and_methods(make_app, talk):
    async def main(client):
        missing, wrong = await client.get("/nope"), await client.delete("/v1/groups")
        plain = await client.post("/v1/groups", content=json.dumps(GROUP), headers={"content-type": "text/plain"})
        return missing, wrong, plain

    missing, wrong, plain = talk(make_app(), main)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert plain.status_code == 422  # what a web page may send without asking the browser's leave


def test_a_crash_of_the_engine_hits_its_group_alone_and_tells_nothing(make_app, talk, echo_engine, caplog):
    async def main(client):
        bodies = [{"prompt": "p", "responses": ["1", "crash" if k == 3 else "0"]} for k in range(6)]
        return await asyncio.gather(*(client.post("/v1/groups", json=body) for body in bodies))

    answers = talk(make_app(echo_engine), main)
    assert [a.status_code for a in answers] == [200, 200, 200, 500, 200, 200]
    assert answers[3].json() == {"error": {"type": "internal", "message": "internal error"}}
    assert any("ZeroDivisionError" in (record.exc_text or "") for record in caplog.records)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_long_bodies_are_refused_with_and_without_their_length(make_app, talk, echo_engine):
    seen = 0

    async def chunks():
        nonlocal seen
        for _ in range(1000):
            seen += 1
            yield b" " * 100

    async def main(client):
        told = await client.post("/v1/groups", content=b" " * 1001, headers=JSON)
        untold = await client.post("/v1/groups", content=chunks(), headers=JSON)
        fits = await client.post("/v1/groups", content=json.dumps(GROUP).encode().ljust(1000), headers=JSON)
        return told, untold, fits

    told, untold, fits = talk(make_app(echo_engine, max_body=1000), main)
    assert told.status_code == untold.status_code == 413
    assert told.json()["error"]["type"] == "too_large"
    assert seen <= 11
    assert fits.status_code == 200


def test_a_body_that_does_not_come_is_given_up(make_app):
    sent = []

    async def never():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/groups", "headers": [(b"host", b"localhost")]}
    asyncio.run(asyncio.wait_for(make_app(read_s=0.01)(scope, never, send), 20))
    assert sent[0]["status"] == 408


def test_too_much_waiting_is_429_with_a_time_to_come_back(make_app, talk, echo_engine):
    async def main(client):
        echo_engine.open = False
        calls = [asyncio.create_task(client.post("/v1/groups", json=GROUP)) for _ in range(2)]
        await until(lambda: app.state.service.scorer.in_flight == 1)
        calls += [asyncio.create_task(client.post("/v1/groups", json=GROUP)) for _ in range(4)]
        await until(lambda: app.state.service.scorer.queued == 4)
        refused = await client.post("/v1/groups", json=GROUP)
        echo_engine.open = True
        return refused, [(await call).status_code for call in calls]

    app = make_app(echo_engine, batch_groups=2, max_queue=4, max_groups=4)
    refused, others = talk(app, main)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "busy"
    assert others == [200] * 6


# -- the same request again ------------------------------------------------------------------------------------------


def test_a_key_gets_the_same_answer_and_one_scoring(make_app, talk, echo_engine):
    async def main(client):
        echo_engine.open = False
        headers = {"idempotency-key": "k1"}
        calls = [asyncio.create_task(client.post("/v1/groups", json=GROUP, headers=headers)) for _ in range(3)]
        await until(lambda: app.state.service.guard.active == 3)
        calls[0].cancel()  # goes away: the others still get it
        echo_engine.open = True
        first, second = [await call for call in calls[1:]]
        third = await client.post("/v1/groups", json=GROUP, headers=headers)
        other = await client.post("/v1/groups", json={**GROUP, "prompt": "q"}, headers=headers)
        bad = await client.post("/v1/groups", json=GROUP, headers={"idempotency-key": "a b"})
        return first, second, third, other, bad

    app = make_app(echo_engine)
    first, second, third, other, bad = talk(app, main)
    assert first.content == second.content == third.content
    assert third.headers["idempotent-replayed"] == "true"
    assert len(echo_engine.scored) == 1
    assert (other.status_code, other.json()["error"]["type"]) == (409, "conflict")
    assert bad.status_code == 422


def test_an_id_marks_a_retry_only_with_equal_content(make_app, talk, echo_engine):
    async def main(client):
        bodies = [{**GROUP, "id": 7}, {**GROUP, "id": 7}, {**GROUP, "id": 7, "prompt": "q"}, GROUP, GROUP]
        return [await client.post("/v1/groups", json=body) for body in bodies]

    answers = talk(make_app(echo_engine), main)
    assert [a.headers.get("idempotent-replayed") for a in answers] == [None, "true", None, None, None]
    assert len(echo_engine.scored) == 4


def test_a_failure_is_not_remembered(make_app, talk, echo_engine):
    async def main(client):
        headers = {"idempotency-key": "k"}
        body = {"prompt": "p", "responses": ["1", "2"]}
        real, echo_engine.score_async = echo_engine.score_async, None
        failed = await client.post("/v1/groups", json=body, headers=headers)
        echo_engine.score_async = real
        return failed, await client.post("/v1/groups", json=body, headers=headers)

    failed, again = talk(make_app(echo_engine), main)
    assert (failed.status_code, again.status_code) == (500, 200)


# -- metrics ---------------------------------------------------------------------------------------------------------

_SAMPLE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)')


def test_metrics_are_prometheus_text_that_adds_up(make_app, talk, judged_engine):
    async def main(client):
        await client.post("/v1/groups", json={"prompt": "p", "responses": ["good", "bad"]})
        await client.post("/v1/groups", json={"prompt": "p"})
        await client.get("/some/path?x=1")
        return await client.get("/metrics")

    page = talk(make_app(judged_engine), main)
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    values, types = {}, {}
    for line in page.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in types
            types[name] = kind
        elif not line.startswith("#"):
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert any(match[1] in (name, f"{name}_bucket", f"{name}_sum", f"{name}_count") for name in types)
            values[match[1], match[2] or ""] = float(match[3])
    assert all(name.endswith("_total") for name, kind in types.items() if kind == "counter")
    assert values["rmcore_http_requests_total", 'path="/v1/groups",status="200"'] == 1
    assert values["rmcore_http_requests_total", 'path="/v1/groups",status="422"'] == 1
    assert values["rmcore_http_requests_total", 'path="other",status="404"'] == 1
    assert values["rmcore_pairs_total", 'by="judge"'] == 1
    assert values["rmcore_judge_cost_total", ""] == 2
    assert values["rmcore_batch_groups_bucket", 'le="1.0"'] == values["rmcore_batch_groups_count", ""] == 1
    assert values["rmcore_http_request_seconds_bucket", 'le="+Inf",path="/v1/groups"'] == 2
