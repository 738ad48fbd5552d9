"""The HTTP interface, in process: answers, refusals, limits, retries; on real sockets where the socket matters."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import socket
import time
from collections import Counter

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmcore._base.errors import InputError
from rmcore.integrations.server import ServeSettings, create_app

JSON = {"content-type": "application/json"}
GROUP = {"prompt": "red tree", "responses": ["good right", "bad vague", "kind odd"]}


def member(slot, response, *, k=2, group="g", **more):
    return {"group_id": group, "slot": slot, "k": k, "prompt": "p", "response": response, **more}


def single(response, prompt="<s>ask</s>", end="<|im_end|>"):
    """One of OpenRLHF's calls."""
    return {"query": [prompt + response + end], "prompts": [prompt], "labels": [None]}


async def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        await asyncio.sleep(0.001)


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


# -- who may come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401), ("Bearer wrong", 401), ("Bearer ", 401), ("Basic s3cret-token", 401), ("s3cret-token", 401),
        ("Bearer s3cret-tokenx", 401), ("Bearer s3cret-toke", 401), ("Bearer s3cret-token", 200),
        ("bearer s3cret-token", 200),
    ],
)  # fmt: skip
def test_a_token_guards_everything_but_health(make_app, talk, echo_engine, caplog, header, status):
    caplog.set_level(logging.DEBUG)

    async def main(client):
        headers = {} if header is None else {"authorization": header}
        guarded = [await client.post("/v1/groups", json=GROUP, headers=headers)]
        guarded += [await client.get(path, headers=headers) for path in ("/metrics", "/docs", "/openapi.json")]
        return guarded, [await client.get(path) for path in ("/health", "/ready")]

    app = make_app(echo_engine, token="s3cret-token", host="0.0.0.0")
    guarded, open_ = talk(app, main)
    assert [answer.status_code for answer in guarded] == [status] * 4
    assert all(answer.headers["www-authenticate"] == "Bearer" for answer in guarded if status == 401)
    assert [answer.status_code for answer in open_] == [200] * 2
    assert "s3cret" not in caplog.text
    assert "s3cret" not in repr(app.state.service.settings)
    page = app.openapi()
    assert page["paths"]["/v1/groups"]["post"]["security"] == [{"token": []}]
    assert page["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8400", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("LOCALHOST.", 200), ("evil.example:8400", 421)],
)
def test_without_a_token_only_this_machines_names_are_answered(make_app, talk, host, status):
    """A web page can point a name of its own at 127.0.0.1."""

    async def main(client):
        return await client.get("/health", headers={"host": host})

    assert talk(make_app(), main).status_code == status


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "host: got '0.0.0.0', expected a loopback address"),
        ({"host": "example.org"}, "host"),
        ({"host": "::"}, "host"),
        ({"token": ""}, "token"),
        ({"token": "a b"}, "token: got other characters"),
        ({"port": 70_000}, "port"),
        ({"group_size": 1}, "group_size"),
        ({"group_size": 65}, "group_size"),
        ({"baseline": "mean"}, "baseline"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"time_limit_s": 170}, "below answer_within_s"),
        ({"keep_s": float("nan")}, "keep_s"),
        ({"max_body": 0}, "max_body"),
        ({"max_groups": 2000}, "max_groups"),
        ({"end_tokens": ("",)}, "end_tokens"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        ServeSettings(**options)


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


# -- members ---------------------------------------------------------------------------------------------------------


def test_members_get_their_own_parts(make_app, talk, judged_engine):
    responses = ["good right", "bad vague", "kind odd"]

    async def main(client):
        bodies = [member(k, responses[k], k=3, attempt="a") for k in (2, 0, 1)]
        return await asyncio.gather(*(client.post("/v1/rendezvous", json=body) for body in bodies))

    answers = {a.json()["slot"]: a.json() for a in talk(make_app(judged_engine), main)}
    expected = judged_engine.score(["p"], [responses])[0]
    for k in range(3):
        got = answers[k]
        assert (got["group_id"], got["attempt"], got["slots"], got["complete"]) == ("g", "a", [0, 1, 2], True)
        assert got["advantage"] == pytest.approx(float(expected.advantages[k]), abs=1e-6)
        assert got["reward"]["leave_one_out"] == pytest.approx(float(expected.rewards[k]), abs=1e-6)
        assert got["reward"]["group_mean"] == pytest.approx(float(expected.rewards_for("group-mean")[k]), abs=1e-6)
        assert got["preference"] == pytest.approx(expected.preference[k].tolist(), abs=1e-6)
        assert got["routed"] == [k != j for j in range(3)]


def test_late_contradicting_and_repeated_members(make_app, talk, echo_engine, manual_clock):
    async def main(client):
        async def post(body):
            return await client.post("/v1/rendezvous", json=body)

        waiting = [asyncio.create_task(post(member(k, f"{k + 5}", k=3))) for k in (0, 2)]
        await until(lambda: app.state.service.assembly.waiting == 2)
        conflicts = [
            await post(member(0, "other", k=3)), await post(member(1, "1", k=4)),
            await post({**member(1, "1", k=3), "prompt": "q"}),
        ]  # fmt: skip
        await manual_clock.advance(20)
        first, third = [await task for task in waiting]
        late, again = await post(member(1, "6", k=3)), await post(member(0, "5", k=3))
        lone = asyncio.create_task(post(member(0, "1", group="alone")))
        await until(lambda: app.state.service.assembly.waiting == 1)
        await manual_clock.advance(20)
        single_group = await post(member(0, "1", k=1, group="of one"))
        return conflicts, first.json(), third.json(), late, again.json(), (await lone).json(), single_group.json()

    app = make_app(echo_engine, clock=manual_clock, first_start=True)
    conflicts, first, third, late, again, lone, of_one = talk(app, main)
    assert [c.status_code for c in conflicts] == [409] * 3
    assert first["slots"] == third["slots"] == [0, 2]
    assert not first["complete"]
    assert third["preference"] == [2.0, 0.0]
    assert (late.status_code, late.json()["error"]["type"]) == (410, "late")
    assert again == first
    # Left alone of two, nothing is known of it: null, not 0. A group of one is what the caller asked for.
    assert lone["advantage"] is lone["reward"]["leave_one_out"] is lone["reward"]["group_mean"] is None
    assert (of_one["advantage"], of_one["complete"]) == (0.0, True)


def test_verls_calls(make_app, talk, echo_engine, manual_clock):
    """Recorded from the contract: 2 prompts × 4 samples on random workers, twice; one sample lost, calls repeated."""
    samples = [(step, uid, slot) for step in (0, 1) for uid in ("u1", "u2") for slot in range(4)]
    lost = (1, "u2", 3)

    async def main(client):
        async def worker(step, uid, slot):
            body = member(slot, f"{10 * step + slot} by {uid}", k=4, group=uid, attempt=step)
            body["prompt"] = [{"role": "user", "content": uid}]
            answer = await client.post("/v1/rendezvous", json=body)
            if slot == 1:  # the worker was restarted
                assert (await client.post("/v1/rendezvous", json=body)).content == answer.content
            return answer.json()

        order = [sample for sample in samples if sample != lost]
        random.Random(0).shuffle(order)
        calls = [asyncio.create_task(worker(*sample)) for sample in order]
        await until(lambda: app.state.service.assembly.waiting == 3 and len(echo_engine.scored) == 3)
        await manual_clock.advance(20)
        return dict(zip(order, await asyncio.gather(*calls), strict=True))

    app = make_app(echo_engine, clock=manual_clock, first_start=True)
    answers = talk(app, main)
    for (step, uid, slot), got in answers.items():
        present = [0, 1, 2] if (step, uid) == (1, "u2") else [0, 1, 2, 3]
        assert got["slots"] == present
        assert got["preference"] == [float(slot - other) for other in present]
        assert got["complete"] is (len(present) == 4)
    assert len(echo_engine.scored) == 4


# -- OpenRLHF --------------------------------------------------------------------------------------------------------


def test_openrlhfs_whole_batches(make_app, talk, echo_engine):
    prompts = ["a>", "b>", "a>", "b>", "a>", "a>"]
    answers = ["1", "5", "2", "9", "3", "7"]
    body = {"query": [p + a + "</s><pad>" for p, a in zip(prompts, answers, strict=True)], "prompts": prompts}

    async def main(client):
        return (await client.post("/get_reward", json={**body, "labels": ["", None, 3, {}, [], "x"]})).json()

    got = talk(make_app(echo_engine, group_size=2), main)
    assert echo_engine.scored == [("a>", ["1", "2"]), ("a>", ["3", "7"]), ("b>", ["5", "9"])]
    assert got["rewards"] == [-0.5, -2.0, 0.5, 2.0, -2.0, 2.0]
    assert got["extra_logs"] == {}
    for first, second in ((0, 2), (4, 5), (1, 3)):
        assert 0 < got["scores"][first] < 0.5 < got["scores"][second] < 1
        assert got["scores"][first] + got["scores"][second] == pytest.approx(1)
    other = talk(make_app(echo_engine, group_size=2, baseline="group-mean"), main)
    assert other["rewards"] == [-1.0, -4.0, 1.0, 4.0, -4.0, 4.0]


def test_openrlhfs_single_calls_find_their_siblings_equal_ones_too(make_app, talk, echo_engine):
    texts = ["4", "1", "1", "2"]

    async def main(client):
        calls = [client.post("/get_reward", json=single(text, prompt=p)) for p in ("p>", "q>") for text in texts]
        second_server = await client.post("/get_reward", json={"query": [], "prompts": [], "labels": []})
        return [a.json() for a in await asyncio.gather(*calls)], second_server.json()

    app = make_app(echo_engine, group_size=4)
    answers, second_server = talk(app, main)
    expected = [2.0, -1.0, -1.0, 0.0]  # S_i / 4
    assert [a["rewards"] for a in answers] == [[value] for value in expected * 2]
    assert sorted(prompt for prompt, _ in echo_engine.scored) == ["p>", "q>"]
    assert second_server == {"rewards": [], "scores": [], "extra_logs": {}}


def test_openrlhfs_curves_are_the_prometheus_figures(make_app, talk, judged_engine):
    """It averages each log over a step's samples, as tensors: the same names in all, and ratios of sums."""
    texts = ["good clear", "bad vague", "odd tree", "good good right", "stone kind"]

    async def main(client):
        calls = [client.post("/get_reward", json=single(text, prompt=p)) for p in ("red ", "blue ") for text in texts]
        answers = [answer.json()["extra_logs"] for answer in await asyncio.gather(*calls)]
        return answers, (await client.get("/metrics")).text

    logs, page = talk(make_app(judged_engine, group_size=5), main)
    assert len({tuple(one) for one in logs}) == 1
    mean = {name: float(torch.cat([torch.tensor([one[name]]) for one in logs]).mean()) for name in logs[0]}
    counted = {name: float(value) for name, value in re.findall(r"^(rmcore_\w+)(?:{[^}]*})? (\S+)$", page, re.M)}
    for name in ("judge_disagreement", "judge_disagreement_expected"):
        seen = counted[f"rmcore_{name}_total"] / counted["rmcore_judged_weight_total"]
        assert mean[f"rmcore_{name}"] / mean["rmcore_judged"] == pytest.approx(seen, rel=1e-5)
    assert counted["rmcore_judged_weight_total"] > 0
    assert mean["rmcore_judge_rate"] == counted["rmcore_routed_pairs_total"] / 20 == 1.0
    assert mean["rmcore_uncertainty"] == pytest.approx(counted["rmcore_pair_uncertainty_sum"] / 20, rel=1e-5)


def test_openrlhfs_retry_after_180_seconds_gets_the_result_of_its_first_call(make_app, serve_app, echo_engine):
    """The client's timeout closes the socket; a second later it asks again, from a new one."""
    echo_engine.open = False
    app = make_app(echo_engine, group_size=3)
    texts = ["4", "4", "1"]
    with serve_app(app) as url:

        async def main():
            assembly = app.state.service.assembly
            async with httpx.AsyncClient(base_url=url) as client:

                async def call(text):
                    return await client.post("/get_reward", json=single(text), timeout=20)

                first = [asyncio.create_task(call(text)) for text in texts]
                await until(lambda: assembly.waiting == 3)
                for task in first:
                    task.cancel()
                await until(lambda: assembly.waiting == 0)
                again = [asyncio.create_task(call(text)) for text in texts]
                await until(lambda: assembly.waiting == 3)
                echo_engine.open = True
                return [(await task).json()["rewards"] for task in again], assembly.stats

        rewards, stats = asyncio.run(asyncio.wait_for(main(), 60))
    assert rewards == [[1.0], [1.0], [-2.0]]
    assert len(echo_engine.scored) == 1
    assert (stats.members, stats.retries, stats.groups) == (3, 3, 1)


def test_openrlhf_is_told_503_before_it_gives_up_and_asks_again(make_app, talk, echo_engine, manual_clock):
    async def main(client):
        echo_engine.open = False
        calls = [client.post("/get_reward", json=single(text)) for text in ("3", "1")]
        early = await asyncio.gather(*calls)
        echo_engine.open = True
        again = await asyncio.gather(*(client.post("/get_reward", json=single(text)) for text in ("3", "1")))
        return early, again

    app = make_app(echo_engine, clock=manual_clock, group_size=2, time_limit_s=0.05, answer_within_s=0.1)
    early, again = talk(app, main)
    assert [(a.status_code, a.json()["error"]["type"]) for a in early] == [(503, "timeout")] * 2
    assert [a.json()["rewards"] for a in again] == [[1.0], [-1.0]]
    assert len(echo_engine.scored) == 1


def test_a_missing_preference_is_503_again_and_again_never_0(make_app, talk, echo_engine):
    async def main(client):
        first = await asyncio.gather(*(client.post("/get_reward", json=single(text)) for text in ("3", "1", "nan")))
        return first, await client.post("/get_reward", json=single("nan"))

    first, retry = talk(make_app(echo_engine, group_size=3), main)
    assert [a.status_code for a in first] == [200, 200, 503]
    assert first[2].json()["error"]["type"] == retry.json()["error"]["type"] == "no_preference"


def test_openrlhfs_chat_template_can_be_taken_off(make_app, talk, echo_engine):
    prefix, suffix = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    prompt = f"{prefix}What?{suffix}"

    async def main(client):
        good = {"query": [f"<s>{prompt}{k}<|im_end|>" for k in (1, 2)], "prompts": [prompt] * 2}
        bad = {"query": ["What?1", "What?2"], "prompts": ["What?"] * 2}
        return await client.post("/get_reward", json=good), await client.post("/get_reward", json=bad)

    good, bad = talk(make_app(echo_engine, prompt_prefix=prefix, prompt_suffix=suffix), main)
    assert echo_engine.scored == [("What?", ["1", "2"])]
    assert good.status_code == 200
    assert (bad.status_code, "expected a text between" in bad.json()["error"]["message"]) == (422, True)


def test_single_calls_need_a_group_size(make_app, talk, echo_engine):
    async def main(client):
        return await client.post("/get_reward", json=single("1"))

    answer = talk(make_app(echo_engine), main)
    assert answer.status_code == 422
    assert "--group-size" in answer.json()["error"]["message"]


# -- going away and going down ---------------------------------------------------------------------------------------


def test_a_client_that_hangs_up_leaves_the_group_and_may_come_back(make_app, serve_app, echo_engine):
    app = make_app(echo_engine)
    service = app.state.service
    with serve_app(app) as url:
        content = json.dumps(member(0, "3")).encode()
        head = f"POST /v1/rendezvous HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as raw:
            raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            _wait(lambda: service.assembly.waiting == 1)
        _wait(lambda: service.assembly.waiting == 0)
        assert service.assembly.open_groups == 1

        async def main():
            async with httpx.AsyncClient(base_url=url) as client:
                calls = (client.post("/v1/rendezvous", json=member(k, text)) for k, text in ((1, "1"), (0, "3")))
                return [a.json() for a in await asyncio.gather(*calls)]

        second, first = asyncio.run(main())
    assert (first["advantage"], second["advantage"]) == (2.0, -2.0)
    assert echo_engine.scored == [("p", ["3", "1"])]
    assert service.guard.requests["/v1/rendezvous", "disconnected"] == 1


def test_a_client_that_hangs_up_while_queued_is_not_scored(make_app, serve_app, echo_engine):
    echo_engine.open = False
    app = make_app(echo_engine, batch_groups=1, batches_in_flight=1)
    service = app.state.service
    with serve_app(app) as url:

        async def main():
            async with httpx.AsyncClient(base_url=url) as client:
                first = asyncio.create_task(client.post("/v1/groups", json=GROUP))
                await until(lambda: service.scorer.in_flight == 1)
                second = asyncio.create_task(client.post("/v1/groups", json={**GROUP, "prompt": "unwanted"}))
                await until(lambda: service.scorer.queued == 1)
                second.cancel()
                await until(lambda: service.scorer.queued == 0)
                echo_engine.open = True
                return (await first).status_code

        assert asyncio.run(main()) == 200
    assert [prompt for prompt, _ in echo_engine.scored] == ["red tree"]


def _wait(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_drain_says_what_it_waits_for(make_app, talk, echo_engine, monkeypatch, caplog):
    async def main(client):
        echo_engine.open = False
        call = asyncio.create_task(client.post("/v1/groups", json=GROUP))
        await until(lambda: service.scorer.in_flight == 1)
        drained = asyncio.create_task(service.drain())
        await until(lambda: caplog.messages)
        echo_engine.open = True
        await drained
        return (await call).status_code

    monkeypatch.setattr("rmcore.integrations.server.service._TOLD_S", 0.01)
    app = make_app(echo_engine)
    service = app.state.service
    assert talk(app, main) == 200
    told = "draining: 0 groups open, 0 members waiting, 0 groups in the queue, 1 batches under way"
    assert caplog.messages[0] == told


def test_draining_takes_nothing_new_and_finishes_what_is_open(make_app, talk, echo_engine):
    async def main(client):
        half = asyncio.create_task(client.post("/v1/rendezvous", json=member(0, "3")))
        lone = asyncio.create_task(client.post("/v1/rendezvous", json=member(0, "3", group="lone")))
        await until(lambda: service.assembly.waiting == 2)
        before = (await client.get("/ready")).status_code
        drained = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        refused = [
            await client.post("/v1/rendezvous", json=member(0, "1", group="new")),
            await client.post("/get_reward", json=single("1")),
            await client.post("/v1/groups", json=GROUP),
        ]
        ready, health = await client.get("/ready"), await client.get("/health")
        other = await client.post("/v1/rendezvous", json=member(1, "1"))
        await drained
        refused.append(await client.post("/v1/groups", json=GROUP))
        return before, refused, ready, health, (await half).json(), other.json(), (await lone).json()

    app = make_app(echo_engine, group_size=2, drain_s=0.3, first_start=True)
    service = app.state.service
    before, refused, ready, health, half, other, lone = talk(app, main)
    assert before == 200
    assert [(r.status_code, "retry-after" in r.headers) for r in refused] == [(429, True)] * 4
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    assert (health.status_code, health.json()["status"]) == (200, "draining")
    assert half["complete"]
    assert other["complete"]
    assert not lone["complete"]


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


# -- no group mixed or lost ------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_interleaving_mixes_and_loses_nothing(new_echo_engine, echoed, seed):
    """Rendezvous, OpenRLHF and whole groups at random; some calls are made twice, some hang up and come back."""
    rng = random.Random(seed)
    engine = new_echo_engine()
    app = create_app(engine, ServeSettings(group_size=3, time_limit_s=2.0, batch_wait_s=0.0, batch_groups=4))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    kinds, hung_up = [], Counter()

    async def main():
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def call(path, body):
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
                if rng.random() < 0.2:
                    lost = asyncio.create_task(client.post(path, json=body))
                    for _ in range(rng.randrange(60)):
                        await asyncio.sleep(0)
                    lost.cancel()
                    await asyncio.wait({lost})
                    hung_up[str(body.get("prompts"))] += 1
                return (await client.post(path, json=body)).json()

            async def whole(name, texts):
                got = await call("/v1/groups", {"prompt": name, "responses": texts})
                assert got["preference"] == echoed(texts).preference.tolist()

            async def joined(name, texts):
                members = [member(k, text, k=len(texts), group=name) for k, text in enumerate(texts)]
                members += rng.sample(members, rng.randrange(2))
                rng.shuffle(members)
                for got in await asyncio.gather(*(call("/v1/rendezvous", body) for body in members)):
                    assert got["complete"]
                    assert got["preference"] == echoed(texts).preference[got["slot"]].tolist()

            async def by_content(name, texts):
                calls = [call("/get_reward", single(text, prompt=name)) for text in texts]
                expected = [[value] for value in echoed(texts).rewards.tolist()]
                assert [got["rewards"] for got in await asyncio.gather(*calls)] == expected

            def group(number):
                kind = rng.choice((whole, joined, by_content))
                kinds.append(kind.__name__)
                size = 3 if kind is by_content else rng.randrange(1, 5)
                return kind(f"group {number}>", [f"{rng.randrange(4)} of {number}" for _ in range(size)])

            await asyncio.gather(*(group(number) for number in range(rng.randrange(1, 9))))

    asyncio.run(asyncio.wait_for(main(), 60))
    assembly = app.state.service.assembly
    assert assembly.waiting == assembly.open_groups == 0
    assert assembly.stats.partial_groups == assembly.stats.late_members == 0
    # Assembled groups are scored once, however often their members call; but where nothing names a member, and all of a
    # group's callers hung up once it was scored, their second calls are a group again.
    known = kinds.count("joined") + kinds.count("by_content")
    again = sum(calls == 3 for prompt, calls in hung_up.items() if prompt != "None")
    assert known <= assembly.stats.groups <= known + again
    assert len(engine.scored) - assembly.stats.groups >= kinds.count("whole")
