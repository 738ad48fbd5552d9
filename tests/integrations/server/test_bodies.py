"""Large bodies are read in a thread, and answered as if they had been small."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest

from rmcore._base.large import LARGE, read_json
from rmcore.integrations.server import bodies, schema, service

JSON = {"content-type": "application/json"}
SPACE = " " * LARGE  # between tokens of JSON: what makes the same body large
BODIES = [
    ("/v1/groups", {"prompt": "p", "responses": ["1", "0"], "id": "mine"}),
    ("/v1/groups", [{"prompt": "p", "responses": ["1", "0"]}, {"prompt": "q", "responses": ["2", "1"]}]),
    ("/v1/groups", {"prompt": [{"role": "user", "content": "x"}], "responses": ["3", {"role": "assistant"}]}),
    ("/v1/groups", {"prompt": "p", "responses": ["a", 1]}),
    ("/v1/groups", [{"prompt": "p"}, {"responses": ["a"], "mood": 1}]),
    ("/v1/groups", {"prompt": "\ud800", "responses": ["a"]}),
    ("/v1/groups", None),
    ("/v1/rendezvous", {"group_id": "g", "slot": 0, "k": 1, "prompt": "p", "response": "1"}),
    ("/v1/rendezvous", {"group_id": "g", "slot": "0"}),
    ("/get_reward", {"query": ["p1", "p0"], "prompts": ["p", "p"], "labels": None}),
    ("/get_reward", {"query": "p1"}),
]


def test_large_and_small_bodies_are_answered_alike(make_app, talk, echo_engine):
    async def main(client):
        pairs = []
        for path, value in BODIES:
            body = json.dumps(value)
            pairs.append([await client.post(path, content=one, headers=JSON) for one in (body, SPACE + body)])
        for body in (b"{", b"[" * 100_000, b'"' + b"x" * LARGE, b"{}{}"):
            both = (body, body + SPACE.encode())
            pairs.append([await client.post("/v1/groups", content=one, headers=JSON) for one in both])
        return pairs

    for small, large in talk(make_app(echo_engine), main):
        told, same = (json.loads(reply.content) for reply in (small, large))
        for one in (*(told if isinstance(told, list) else [told]), *(same if isinstance(same, list) else [same])):
            one.pop("seconds", None)
        if small.status_code == 400:
            assert (large.status_code, told["error"]["type"]) == (400, same["error"]["type"])
        else:
            assert (large.status_code, same) == (small.status_code, told)


@pytest.mark.parametrize("headers", [{}, {"content-type": "text/plain"}])
def test_another_content_type_is_refused_whatever_the_size(make_app, talk, echo_engine, headers):
    """A page in a browser may send those without asking."""

    async def main(client):
        body = json.dumps(BODIES[0][1])
        return [await client.post("/v1/groups", content=one, headers=headers) for one in (body, SPACE + body)]

    assert [reply.status_code for reply in talk(make_app(echo_engine), main)] == [422, 422]


def test_large_bodies_are_read_in_threads(make_app, talk, echo_engine, monkeypatch):
    where = {}

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args, **more):
            where.setdefault(name, set()).add(threading.get_ident())
            return real(*args, **more)

        monkeypatch.setattr(owner, name, watched)

    watch(bodies, "read_json")
    watch(schema, "_encodable")
    watch(json, "loads")
    app = make_app(echo_engine, max_body=1 << 20)

    async def main(client):
        body = json.dumps({"prompt": "p" * LARGE, "responses": ["1", "0"]}).encode()
        where.clear()
        reply = await client.post("/v1/groups", content=body, headers=JSON)
        return threading.get_ident(), reply, dict(where)

    loop, reply, seen = talk(app, main)
    assert reply.status_code in (200, 422)
    assert seen["read_json"]
    assert not [name for name, threads in seen.items() if loop in threads]


def test_a_conversation_has_a_number_of_messages_at_most(make_app, talk, echo_engine):
    many = {"prompt": [{"role": "user", "content": "x"}] * (schema.MAX_MESSAGES + 1), "responses": ["1"]}

    async def main(client):
        return await client.post("/v1/groups", json=many)

    reply = talk(make_app(echo_engine), main)
    assert reply.status_code == 422
    assert f"at most {schema.MAX_MESSAGES}" in reply.text


def test_a_large_body_has_a_number_of_values_at_most(make_app, talk, echo_engine, monkeypatch):
    monkeypatch.setattr(bodies, "read_json", partial(read_json, most_values=500))

    async def main(client):
        value = {"prompt": "p", "responses": ["x" * 1000] * 600}
        return await client.post("/v1/groups", json=value)

    reply = talk(make_app(echo_engine), main)
    assert reply.status_code in (400, 422)
    assert "more than 500 lists and objects; send several requests" in reply.text


@pytest.mark.parametrize(("groups", "beside"), [(4, False), (5, True)])
def test_the_answers_of_many_groups_are_made_beside_the_event_loop(
    make_app, talk, echo_engine, monkeypatch, groups, beside
):
    """Each takes a millisecond, its advantages' variance for the most part: 64 would hold up everybody for 60."""
    where = set()
    for name in ("group_reply", "RewardService._rewards_of"):
        owner = service if "." not in name else service.RewardService
        real = getattr(owner, name.rpartition(".")[2])
        watched = lambda *a, real=real: (where.add(threading.get_ident()), real(*a))[1]  # noqa: E731
        monkeypatch.setattr(owner, name.rpartition(".")[2], watched)
    app = make_app(echo_engine, group_size=2)

    async def main(client):
        whole = [{"prompt": f"p{k}", "responses": ["1", "0"]} for k in range(groups)]
        answers = (await client.post("/v1/groups", json=whole)).json()
        seen = set(where)
        where.clear()
        prompts = [f"p{k}" for k in range(groups) for _ in range(2)]
        query = {"query": [f"{p}{1 - k % 2}" for k, p in enumerate(prompts)], "prompts": prompts}
        rewards = (await client.post("/get_reward", json=query)).json()["rewards"]
        return threading.get_ident(), seen, set(where), answers, rewards

    loop, whole, query, answers, rewards = talk(app, main)
    assert [one["advantages"] for one in answers] == [answers[0]["advantages"]] * groups
    assert rewards == pytest.approx(answers[0]["rewards"] * groups)
    assert ((loop in whole), (loop in query)) == (not beside, not beside)
