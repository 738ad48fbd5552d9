"""Members of groups that come one at a time, over HTTP."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.server_calls import member, single, until

from rmcore.integrations.server import ServeSettings, create_app

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


# -- no group mixed or lost ------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_interleaving_mixes_and_loses_nothing(new_echo_engine, echoed, virtual, seed):
    """Rendezvous, OpenRLHF and whole groups at random; some calls are made twice, some hang up and come back."""
    rng = random.Random(seed)
    engine = new_echo_engine()
    settings = ServeSettings(group_size=3, time_limit_s=2.0, batch_wait_s=0.0, batch_groups=4)
    kinds, hung_up = [], Counter()

    async def main(clock):
        app = create_app(engine, settings, clock=clock)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
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
        return app.state.service.assembly

    assembly = virtual(main)
    assert assembly.waiting == assembly.open_groups == 0
    assert assembly.stats.partial_groups == assembly.stats.late_members == 0
    # Assembled groups are scored once, however often their members call; but where nothing names a member, and all of a
    # group's callers hung up once it was scored, their second calls are a group again.
    known = kinds.count("joined") + kinds.count("by_content")
    again = sum(calls == 3 for prompt, calls in hung_up.items() if prompt != "None")
    assert known <= assembly.stats.groups <= known + again
    assert len(engine.scored) - assembly.stats.groups >= kinds.count("whole")
