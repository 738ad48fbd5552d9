"""Responses of messages by every route that takes responses: scored and judged as what they say, or refused by name."""

from __future__ import annotations

import asyncio
import math
from itertools import permutations

import pytest
from support.messages import DONE, as_response, assistant, call, each_refused, each_taken, tool

from rmcore.engine import RewardEngine
from rmcore.engine.routing import AlwaysRoute
from rmcore.judge.recorded import RecordedJudge

PAY_5 = [assistant(tool_calls=[call({"amount": 5}, id="x")]), tool("good", tool_call_id="x"), DONE]
PAY_9 = [assistant(tool_calls=[call({"amount": 10**9}, id="x")]), tool("good", tool_call_id="x"), DONE]
AGAIN = [assistant("", tool_calls=[call('{"amount":5}', id="y")]), tool("good", tool_call_id="y"), DONE]


@pytest.fixture
def recorded_engine(reward_model):
    """Its judge knows that 5 is better than 10⁹, and nothing else."""
    row = {"prompt": "red", "first": PAY_5, "second": PAY_9, "verdict": "win"}
    judge = RecordedJudge.from_rows([row, {**row, "order": "ba"}])
    return RewardEngine(reward_model, judge, AlwaysRoute())


def members(responses):
    return [
        {"group_id": "g", "slot": k, "k": len(responses), "prompt": "red", "response": response}
        for k, response in enumerate(responses)
    ]


async def by_rendezvous(client, responses):
    answers = await asyncio.gather(*(client.post("/v1/rendezvous", json=body) for body in members(responses)))
    assert [answer.status_code for answer in answers] == [200] * len(responses), answers[0].text
    return [answer.json() for answer in answers]


def test_a_group_of_messages_is_judged_by_what_they_say(make_app, talk, recorded_engine):
    async def main(client):
        answer = await client.post("/v1/groups", json={"prompt": "red", "responses": [PAY_5, PAY_9, AGAIN]})
        assert answer.status_code == 200, answer.text
        return answer.json()

    body = talk(make_app(recorded_engine), main)
    decisions = body["decisions"]
    assert (decisions["judge"], decisions["identical"], decisions["failures"]) == (2, 1, {})
    assert body["preference"][0][1] > 1.9
    assert body["preference"][0][2] == 0
    assert body["preference"][1][2] < -1.9


def test_members_of_messages_meet_and_get_what_the_group_gets(make_app, talk, recorded_engine):
    responses = [PAY_5, PAY_9, AGAIN]

    async def main(client):
        parts = await by_rendezvous(client, responses)
        whole = await client.post("/v1/groups", json={"prompt": "red", "responses": responses})
        return parts, whole.json()

    parts, whole = talk(make_app(recorded_engine, group_size=3), main)
    assert all(part["complete"] for part in parts)
    assert [part["advantage"] for part in parts] == whole["advantages"]
    assert parts[0]["advantage"] == parts[2]["advantage"] > 0 > parts[1]["advantage"]


@each_taken
def test_every_kind_of_message_can_be_a_member(make_app, talk, engine, twins):
    pair = [as_response(messages) for messages in twins]

    async def main(client):
        return await by_rendezvous(client, pair)

    one, other = talk(make_app(engine), main)
    assert one["complete"]
    assert other["complete"]
    expected = engine.score(["red"], [pair])[0]
    # They differ, so no rule decides; to this small vocabulary some say the same, and then nobody does.
    assert all(decision.by == "nobody" for decision in expected.decisions)
    wanted = [None if math.isnan(a) else pytest.approx(a, abs=1e-6) for a in expected.advantages.tolist()]
    assert [one["advantage"], other["advantage"]] == wanted


@each_refused
def test_a_member_that_is_no_message_is_refused_and_its_siblings_wait_for_a_better_one(
    make_app, talk, engine, message, says
):
    good, bad = members(["good", [message, DONE]])

    async def main(client):
        waiting = asyncio.create_task(client.post("/v1/rendezvous", json=good))
        refused = await client.post("/v1/rendezvous", json=bad)
        mended = await client.post("/v1/rendezvous", json={**bad, "response": PAY_5})
        return refused, mended, await waiting

    refused, mended, first = talk(make_app(engine), main)
    assert refused.status_code == 422
    assert "response" in refused.json()["error"]["message"]
    assert (mended.status_code, first.status_code) == (200, 200)
    assert first.json()["complete"]


def test_the_order_of_members_does_not_matter(make_app, talk, recorded_engine):
    async def main(client):
        found = []
        for n, order in enumerate(permutations(range(3))):
            bodies = [{**body, "group_id": f"g{n}"} for body in members([PAY_5, PAY_9, AGAIN])]
            tasks = [asyncio.create_task(client.post("/v1/rendezvous", json=bodies[k])) for k in order]
            answers = await asyncio.gather(*tasks)
            found.append([answers[order.index(k)].json()["advantage"] for k in range(3)])
        return found

    found = talk(make_app(recorded_engine, group_size=3), main)
    assert all(advantages == found[0] for advantages in found)
