"""Groups whose members come through any entry: whole, whoever dies; on one loop, without ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random

import pytest
from support.clocks import settle
from support.json_numbers import Numbers
from support.ray_calls import go, member, reward, rollout

from rmcore.integrations.ray.serve import assembler, entry, presence

HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]


def test_members_meet_whatever_entry_and_assembler(cluster_of):
    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, entries=3, assemblers=3)
        rng = random.Random(0)
        calls = [(group, slot) for group in range(40) for slot in range(3)]
        rng.shuffle(calls)
        answers = await asyncio.gather(
            *(cluster.post(rng.randrange(3), "/v1/rendezvous", member(*call)) for call in calls)
        )
        for (group, slot), (status, reply) in zip(calls, answers, strict=True):
            assert (status, reply["group_id"], reply["slots"]) == (200, group, [0, 1, 2])
            assert reply["preference"] == [slot - other for other in range(3)]
        assert len(engine.scored) == 40
        counted = [process.assembler.service.assembly.stats.groups for process in cluster.assemblers]
        assert sum(counted) == 40
        assert min(counted) > 5

    go(main)


def test_the_other_routes_and_pages(cluster_of):
    async def main():
        cluster = cluster_of(Numbers(), assemblers=2)
        group = {"prompt": "p", "responses": ["1", "2"], "id": 5}
        assert (await cluster.post(0, "/v1/groups", group))[1]["preference"] == [[0, -1], [1, 0]]
        first = cluster.send(0, "POST", "/v1/groups", json.dumps(group).encode(), idempotency_key="k")
        again = cluster.send(1, "POST", "/v1/groups", json.dumps(group).encode(), idempotency_key="k")
        assert (await first) == (await again)
        assert (await cluster.post(1, "/v1/groups", {"prompt": "p"}))[0] == 422
        assert (await cluster.send(0, "POST", "/v1/groups", b"{"))[0] == 400
        assert (await cluster.send(0, "GET", "/health"))[0] == 200
        assert (await cluster.send(0, "GET", "/nothing"))[0] == 404
        assert (await cluster.send(0, "GET", "/health", host="elsewhere"))[0] == 421
        page = (await cluster.send(0, "GET", "/metrics"))[1].decode()
        scored = [line for line in page.splitlines() if line.startswith("rmcore_groups_total{") and "scored" in line]
        assert len(scored) == 2
        assert sum(float(line.split()[-1]) for line in scored) == 2
        assert page.count("# TYPE rmcore_groups_total counter") == 1
        assert 'assembler="Assembler1"' in page
        assert (await cluster.send(1, "GET", "/ready"))[0] == 200
        await cluster.place(1).assembler.drain()
        assert (await cluster.send(1, "GET", "/ready"))[0] == 503

    go(main)


def test_who_has_no_token_gets_no_further_than_the_entry(cluster_of):
    async def main():
        cluster = cluster_of(Numbers(), token="secret", max_body=2000)
        assert (await cluster.post(0, "/v1/rendezvous", member(1, 0)))[0] == 401
        known = {"authorization": "Bearer secret"}
        assert (await cluster.post(0, "/v1/groups", {"prompt": "x" * 3000, "responses": ["1"]}, **known))[0] == 413
        assert not any(process.assembler.service.guard.requests for process in cluster.assemblers)
        assert (await cluster.post(0, "/v1/groups", {"prompt": "x", "responses": ["1", "2"]}, **known))[0] == 200

    go(main)


def test_an_assembler_that_dies_gets_all_its_open_groups_again(cluster_of):
    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=2)
        early, late = [(g, slot) for g in range(8) for slot in (0, 1)], [(g, 2) for g in range(8)]
        sent = [cluster.post(n % 2, "/v1/rendezvous", member(*call)) for n, call in enumerate(early)]
        sent += [cluster.post(n, "/get_reward", reward("q", n + 1)) for n in range(2)]
        waiting = [asyncio.create_task(call) for call in sent]
        await settle()
        for process in cluster.assemblers:
            process.kill()
        rest = [cluster.post(0, "/v1/rendezvous", member(*call)) for call in late]
        answers = await asyncio.gather(*waiting, *rest, cluster.post(0, "/get_reward", reward("q", 6)))
        assert [status for status, _ in answers] == [200] * 27
        members, singles = answers[:16] + answers[18:26], [*answers[16:18], answers[26]]
        for (group, slot), (_, reply) in zip(early + late, members, strict=True):
            assert (reply["group_id"], reply["complete"]) == (group, True)
            assert reply["preference"] == [slot - other for other in range(3)]
        assert [reply["rewards"] for _, reply in singles] == [[-2.0], [-1.0], [3.0]]
        assert sum(one.resent for one in cluster.entries) == 18

    go(main)


def test_of_a_group_that_a_dead_assembler_has_answered_in_part_nobody_gets_half(cluster_of):
    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1, time_limit_s=1.0)
        process = cluster.place(0)
        two = [asyncio.create_task(cluster.post(n, "/v1/rendezvous", member(1, n))) for n in range(2)]
        await settle()
        process.kill()  # the third one's answer had gone out, say
        assert [(status, reply["error"]["type"]) for status, reply in await asyncio.gather(*two)] == [(410, "late")] * 2
        assert not engine.scored
        # Without a death the members present are scored, as ever.
        two = [cluster.post(n, "/v1/rendezvous", member(2, n)) for n in range(2)]
        assert [(status, reply["complete"]) for status, reply in await asyncio.gather(*two)] == [(200, False)] * 2

    go(main)


def test_a_request_that_assemblers_die_of_is_refused(cluster_of):
    async def main():
        cluster = cluster_of(Numbers(), assemblers=1)
        call = asyncio.create_task(cluster.post(0, "/v1/rendezvous", member(1, 0)))
        for _ in range(3):
            await settle()
            cluster.place(0).kill()
            await asyncio.sleep(0.35)
        status, reply = await call
        assert (status, reply["error"]["type"]) == (503, "lost")

    go(main)


@pytest.fixture
def quick(monkeypatch):
    """Signs of life fifty times a second."""
    for module in (assembler, entry, presence):
        monkeypatch.setattr(module, "BEAT_S", 0.02)


@pytest.mark.usefixtures("quick")
def test_a_member_known_by_its_text_whose_entry_died_is_not_two_members(cluster_of):
    """OpenRLHF asks again a second later, through another entry; its first call goes on here, and nobody reads it."""

    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1)
        known = cluster.place(0).assembler
        known.presence = presence.Presence(patience_s=1.0)
        # As the entry's process dies its calls go on: what it had asked is not cancelled.
        orphan = asyncio.create_task(cluster.post(0, "/get_reward", reward("q", 1)))
        await settle()
        for beat in cluster.entries[0]._beats:
            beat.cancel()
        rest = [asyncio.create_task(cluster.post(1, "/get_reward", reward("q", n))) for n in (1, 2, 6)]
        done = await asyncio.gather(*rest)
        assert [reply["rewards"][0] for _, reply in done] == pytest.approx([-2.0, -1.0, 3.0])
        assert engine.scored == [["1 x", "2 x", "6 x"]]  # with the orphan, whose answer nobody read
        assert known.presence.given_up == 1
        await orphan

    go(main)


@pytest.mark.usefixtures("quick")
def test_what_a_dead_entry_had_under_way_is_given_up(cluster_of):
    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1)
        known = cluster.place(0).assembler
        known.presence = presence.Presence(patience_s=1.0)
        request = assembler.RawRequest("POST", "/get_reward", b"", HEADERS, json.dumps(reward("q", 1)).encode())
        orphan = asyncio.create_task(known.request("dead", request))
        await settle()
        again = [asyncio.create_task(cluster.post(1, "/get_reward", reward("q", 1)))]
        assert await orphan is assembler.GIVEN_UP
        again += [asyncio.create_task(cluster.post(1, "/get_reward", reward("q", n))) for n in (2, 6)]
        assert [one["rewards"][0] for _, one in await asyncio.gather(*again)] == pytest.approx([-2.0, -1.0, 3.0])
        assert engine.scored == [["1 x", "2 x", "6 x"]]

    go(main)


@pytest.mark.usefixtures("quick")
def test_what_a_dead_entry_was_answered_is_given_again(cluster_of):
    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1, nemo_gym=True)
        known = cluster.place(0).assembler
        known.presence = presence.Presence(patience_s=1.0)
        for path, bodies in (
            ("/get_reward", [reward("q", n) for n in (1, 2, 6)]),
            ("/verify", [rollout(f"{n} x") for n in (1, 2, 6)]),
            ("/v1/rendezvous", [{"prompt": "p", "k": 3, "response": f"{n} x"} for n in (1, 2, 6)]),
        ):
            before = len(engine.scored)
            rest = [asyncio.create_task(cluster.post(1, path, body)) for body in bodies[1:]]
            request = assembler.RawRequest("POST", path, b"", HEADERS, json.dumps(bodies[0]).encode())
            first = await known.request("dead", request)
            await asyncio.gather(*rest)
            began = asyncio.get_running_loop().time()
            status, again = await cluster.post(1, path, bodies[0])
            assert asyncio.get_running_loop().time() - began < 5
            assert (status, again) == (first.status, json.loads(first.body))
            assert len(engine.scored) == before + 1

    go(main)


@pytest.mark.parametrize("when", ["waiting", "answered"])
def test_a_member_sent_again_to_an_assembler_that_was_only_out_of_reach_is_not_two_members(cluster_of, when):
    """Ray says that it cannot be reached; its calls go on there."""

    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1)
        process = cluster.place(0)
        posts = [asyncio.create_task(cluster.post(n % 2, "/get_reward", reward("q", n))) for n in (1, 1)]
        await settle()
        if when == "answered":  # and the answers are on their way
            known, answer = process.assembler, process.assembler._answer

            async def answered(scope, body):
                reply = await answer(scope, body)
                known._answer = answer
                process.out_of_reach()
                return reply

            known._answer = answered
            posts.append(asyncio.create_task(cluster.post(1, "/get_reward", reward("q", 6))))
        else:
            process.out_of_reach()
            while sum(one.resent for one in cluster.entries) < 2:
                await asyncio.sleep(0.001)
            await settle()
            posts.append(asyncio.create_task(cluster.post(1, "/get_reward", reward("q", 6))))
        done = await asyncio.gather(*posts)
        assert [reply["rewards"][0] for _, reply in done] == pytest.approx([-5 / 3, -5 / 3, 10 / 3])
        assert [sorted(group) for group in engine.scored] == [["1 x", "1 x", "6 x"]]
        assert sum(one.resent for one in cluster.entries) >= 2
        assert len(process.assembler._calls) == 3

    go(main)


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("again", [0, 1])
@pytest.mark.usefixtures("quick")
def test_a_member_known_by_its_text_whose_proxy_died_is_not_two_members(cluster_of, monkeypatch, again, answered):
    """A node takes Serve's proxy along, and the callers' connections; the entry lives, and does not know at once."""

    async def main():
        monkeypatch.setattr(entry, "_SETTLED_S", 0.2)
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1)
        rest = [
            asyncio.create_task(cluster.post(1, "/get_reward", reward("q", n))) for n in ((2, 6) if answered else ())
        ]
        orphan = asyncio.create_task(cluster.post(0, "/get_reward", reward("q", 1)))
        if answered:  # into a connection that is not there any more
            await asyncio.gather(orphan, *rest)
        await settle()
        cluster.proxies = False
        await asyncio.sleep(0.1)  # a client asks again a second later
        second = asyncio.create_task(cluster.post(again, "/get_reward", reward("q", 1)))
        if not answered:
            rest = [asyncio.create_task(cluster.post(1, "/get_reward", reward("q", n))) for n in (2,)]
        await asyncio.sleep(0.1)
        assert not second.done()
        orphan.cancel()  # the entry finds out
        cluster.proxies = True
        if not answered:
            rest.append(asyncio.create_task(cluster.post(1, "/get_reward", reward("q", 6))))
        done = await asyncio.gather(second, *rest)
        assert [reply["rewards"][0] for _, reply in done] == pytest.approx([-2.0, -1.0, 3.0])
        assert [sorted(group) for group in engine.scored] == [["1 x", "2 x", "6 x"]]

    go(main)


@pytest.mark.usefixtures("quick")
def test_a_doubt_that_never_ends_keeps_nobody_waiting(cluster_of, monkeypatch):
    async def main():
        monkeypatch.setattr(entry, "_DOUBT_S", 0.2)
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1)
        cluster.proxies = False
        equal = [cluster.post(n % 2, "/get_reward", reward("q", 1)) for n in range(3)]
        assert [reply["rewards"] for _, reply in await asyncio.gather(*equal)] == [[0.0]] * 3
        assert engine.scored == [["1 x"] * 3]

    go(main)


@pytest.mark.usefixtures("quick")
def test_equal_texts_from_living_entries_are_members_of_their_own(cluster_of):
    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, entries=3, assemblers=1)
        equal = [cluster.post(n, "/get_reward", reward("q", 1)) for n in range(3)]
        assert [reply["rewards"] for _, reply in await asyncio.gather(*equal)] == [[0.0]] * 3
        assert engine.scored == [["1 x"] * 3]

    go(main)


@pytest.mark.usefixtures("quick")
def test_a_slow_entry_that_was_taken_for_dead_asks_again(cluster_of):
    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1)
        process = cluster.place(0)
        process.assembler.presence = presence.Presence(patience_s=0.05)
        process.beats = False
        waiting = asyncio.create_task(cluster.post(0, "/v1/rendezvous", member(1, 0)))
        while not cluster.entries[0].resent:
            process.assembler.presence.give_up_silent()
            await asyncio.sleep(0.02)
        process.beats = True
        rest = [cluster.post(1, "/v1/rendezvous", member(1, slot)) for slot in (1, 2)]
        answers = await asyncio.gather(waiting, *rest)
        assert [(status, reply["complete"]) for status, reply in answers] == [(200, True)] * 3
        assert len(engine.scored) == 1

    go(main)


def test_a_caller_that_goes_away_is_told_through(cluster_of):
    async def main():
        cluster = cluster_of(Numbers(), assemblers=1)
        gone = asyncio.create_task(cluster.post(0, "/get_reward", reward("q", 1)))
        await settle()
        assembly = cluster.place(0).assembler.service.assembly
        assert assembly.waiting == 1
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        assert assembly.waiting == 0

    go(main)
