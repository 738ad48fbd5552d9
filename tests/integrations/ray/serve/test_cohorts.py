"""Groups whose members come through any entry: whole, whoever dies; on one loop, without ray."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import random
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.json_numbers import Numbers

from rmcore._base.errors import RmcoreError
from rmcore.integrations.ray.serve import assembler, entry, presence, replica, server
from rmcore.integrations.ray.serve.replica import RemoteEngine, Replica
from rmcore.integrations.server import create_app


def member(group, slot, size=3):
    return {"group_id": group, "slot": slot, "k": size, "prompt": f"p {group}", "response": f"{slot} of {group}"}


def reward(prompt, number):
    return {"query": [f"{prompt}{number} x"], "prompts": [prompt]}


def rollout(text, **more):
    output = [{"type": "message", "content": [{"type": "output_text", "text": text}]}]
    return {"responses_create_params": {"input": "red"}, "response": {"output": output}, **more}


HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]


async def settle(times=60):
    for _ in range(times):
        await asyncio.sleep(0)


def go(main, seconds=30):
    asyncio.run(asyncio.wait_for(main(), seconds))


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


# -- replicas --------------------------------------------------------------------------------------------------------


def test_a_batch_whose_replica_dies_goes_to_another_as_it_is(lost):
    async def main():
        engine, deaths = Numbers(), Counter()

        async def call(prompts, responses):
            deaths["asked"] += 1
            if deaths["asked"] <= 2:
                raise lost
            return await engine.score_async(prompts, responses, on_error="return")

        remote = RemoteEngine(call, (lost,))
        scores = await remote.score_async(["p"], [["1", "2"]])
        assert scores[0].preference.tolist() == [[0, -1], [1, 0]]
        assert remote.deaths == 2
        deaths["asked"] = -5
        with pytest.raises(Exception, match="3 replicas died"):
            await remote.score_async(["p"], [["1", "2"]])

    go(main)


def test_a_batch_that_nobody_answers_goes_to_a_further_replica():
    async def main():
        engine, asked, taken_back = Numbers(), [], []

        async def call(prompts, responses):
            asked.append(prompts)
            if len(asked) < 3:
                try:
                    await asyncio.Event().wait()
                finally:
                    taken_back.append(len(asked))
            return await engine.score_async(prompts, responses, on_error="return")

        remote = RemoteEngine(call, (), ask_again_s=0.02)
        scores = await remote.score_async(["p"], [["1", "2"]])
        assert scores[0].preference.tolist() == [[0, -1], [1, 0]]
        await settle()
        assert (len(asked), len(taken_back), remote.asked_again, remote.deaths) == (3, 2, 2, 0)
        page = create_app(remote).state.service.metrics.page()[0].decode()
        assert 'rmcore_replica_calls_total{outcome="asked_again"} 2.0' in page
        assert 'rmcore_replica_calls_total{outcome="lost"} 0.0' in page
        assert "rmcore_replica_calls" not in create_app(engine).state.service.metrics.page()[0].decode()

    go(main)


def test_a_replica_that_is_only_slow_is_not_given_up():
    async def main():
        engine, asked = Numbers(), []

        async def call(prompts, responses):
            asked.append(len(asked))
            await asyncio.sleep(0.2 if len(asked) == 1 else 60)
            return await engine.score_async(prompts, responses, on_error="return")

        remote = RemoteEngine(call, (), ask_again_s=0.01)
        scores = await remote.score_async(["p"], [["1", "2"]])
        assert scores[0].preference.tolist() == [[0, -1], [1, 0]]
        assert len(asked) == 3  # at most so many at once

    go(main)


def test_a_call_that_is_cancelled_on_its_way_goes_to_another(lost):
    async def main():
        engine, asked = Numbers(), []

        async def call(prompts, responses):
            asked.append(prompts)
            if len(asked) == 1:
                raise asyncio.CancelledError
            return await engine.score_async(prompts, responses, on_error="return")

        remote = RemoteEngine(call, (lost,))
        assert len(await remote.score_async(["p"], [["1", "2"]])) == 1
        assert remote.deaths == 1

    go(main)


def test_whoever_goes_away_takes_neither_a_batch_nor_a_beat_along(cluster_of):
    """As Serve does it: with a request end the calls that were made in its context."""
    request = contextvars.ContextVar("request", default=None)

    async def main():
        engine, seen = Numbers(), []

        async def call(prompts, responses):
            seen.append(request.get())
            return await engine.score_async(prompts, responses, on_error="return")

        cluster = cluster_of(None, calls=call)
        for process in cluster.assemblers:
            beat = process.assembler.beat

            async def seen_beat(*arguments, beat=beat):
                seen.append(request.get())
                await beat(*arguments)

            process.assembler.beat = seen_beat

        async def post(slot):
            request.set(f"request {slot}")
            return await cluster.post(0, "/v1/rendezvous", member(7, slot))

        answers = await asyncio.gather(*map(post, range(3)))
        assert [status for status, _ in answers] == [200] * 3
        assert len(seen) >= 3
        assert set(seen) == {None}

    go(main)


class Response:
    """Of a call by handle; says what becomes of it."""

    def __init__(self, result=None):
        self.result, self.taken_back = result, 0

    def __await__(self):
        if self.result is None:
            return asyncio.Event().wait().__await__()
        return asyncio.sleep(0, self.result()).__await__()

    def cancel(self):
        self.taken_back += 1


def cancelled():
    raise asyncio.CancelledError


def test_only_who_is_cancelled_here_ends(monkeypatch):
    """A call that Serve cancels looks like a cancellation of the one that waits for it."""

    class TaskCancelledError(Exception):
        pass

    errors = SimpleNamespace(TaskCancelledError=TaskCancelledError)
    monkeypatch.setattr(server, "ray_module", lambda name: errors)

    async def main():
        assert await server._answer(Response(lambda: 5)) == 5
        with pytest.raises(TaskCancelledError):
            await server._answer(Response(cancelled))
        response = Response()
        waiting = asyncio.ensure_future(server._answer(response))
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert response.taken_back == 1

    go(main)


def test_a_proxy_whose_call_somebody_else_cancels_does_not_answer(monkeypatch):
    """And the vouching, which asks, goes on."""

    async def main():
        proxies = server._Proxies()
        check = SimpleNamespace(remote=lambda: Response(cancelled))
        monkeypatch.setattr(proxies, "_found", lambda: [SimpleNamespace(check_health=check)])
        assert not await proxies()

    go(main)


def test_a_ray_that_does_not_answer_is_asked_by_one_thread_at_a_time(monkeypatch):
    monkeypatch.setattr(server, "_PING_S", 0.02)
    asked, answers = [], threading.Event()

    def found():
        asked.append(1)
        answers.wait(20)
        return []

    async def main():
        proxies = server._Proxies()
        monkeypatch.setattr(proxies, "_found", found)
        assert await asyncio.gather(*(proxies() for _ in range(5))) == [False] * 5
        assert not await proxies()
        while not asked:  # its thread may start later than that
            await asyncio.sleep(0.001)
        assert len(asked) == 1
        monkeypatch.setattr(server, "_PING_S", 30.0)
        answers.set()
        looking = proxies._looking
        assert looking is not None
        await asyncio.wait({looking})
        assert await proxies()
        assert len(asked) == 2

    go(main)


def test_a_principle_goes_with_its_group_to_a_replica(cluster_of):
    async def main():
        told = []

        async def call(prompts, responses, *principles):
            told.extend(zip(prompts, *(principles or [[""] * len(prompts)]), strict=True))
            return await Numbers().score_async(prompts, responses, on_error="return")

        cluster = cluster_of(None, calls=call, nemo_gym=True, group_size=2)
        for process in cluster.assemblers:
            process.assembler.engine.judge.takes_principles = True
        posts = [
            cluster.post(k % 2, "/verify", rollout(f"{k} x", **({"principle": "be kind"} if k > 1 else {})))
            for k in range(4)
        ]
        answers = await asyncio.gather(*posts)
        assert [status for status, _ in answers] == [200] * 4
        assert sorted(principle for _, principle in told) == ["", "be kind"]
        for process in cluster.assemblers:
            process.assembler.engine.judge.takes_principles = False
        assert (await cluster.post(0, "/verify", rollout("5 x", principle="be kind")))[0] == 422

    go(main)


def test_every_answer_names_one_version_while_it_changes(cluster_of):
    """Each group lies in one batch, and each batch is scored by one version."""

    async def main():
        engine = Numbers()
        engine.version = 0
        cluster = cluster_of(engine, batch_groups=2, batches_in_flight=2)
        stop = asyncio.Event()

        async def update():
            while not stop.is_set():
                engine.version += 1
                await asyncio.sleep(0.001)

        updating = asyncio.create_task(update())
        calls = [(group, slot) for group in range(60) for slot in range(3)]
        random.Random(1).shuffle(calls)
        posts = (cluster.post(n % 2, "/v1/rendezvous", member(*call)) for n, call in enumerate(calls))
        answers = await asyncio.gather(*posts)
        versions = {}
        for (group, _), (_, reply) in zip(calls, answers, strict=True):
            versions.setdefault(group, set()).add(reply["head_version"])
        stop.set()
        await updating
        assert all(len(found) == 1 for found in versions.values())
        assert len(set.union(*versions.values())) > 1
        status, reply = await cluster.post(0, "/v1/groups", {"prompt": "p", "responses": ["1", "2"]})
        assert (status, reply["head_version"]) == (200, engine.version)
        singles = [cluster.post(0, "/get_reward", reward("q", n)) for n in range(3)]
        assert {one["extra_logs"]["head_version"] for _, one in await asyncio.gather(*singles)} == {engine.version}
        page = (await cluster.send(0, "GET", "/metrics"))[1].decode()
        shown = [line for line in page.splitlines() if line.startswith("rmcore_head_version{")]
        assert float(engine.version) in [float(line.split()[-1]) for line in shown]

    go(main)


def test_a_replica_goes_on_with_the_version_it_has_where_a_later_one_cannot_be_read(monkeypatch, caplog):
    async def main():
        engine = SimpleNamespace(head="base", head_version=None, backend="auto")
        engine.serve_head = lambda head, version: engine.__dict__.update(head=head, head_version=version)
        running = Replica(lambda: engine, Path("journal"))
        await running.reconfigure({"head_version": None})
        await running.reconfigure({"head_version": 1})
        await running.reconfigure({"head_version": 2})
        assert (engine.head, engine.head_version) == ("base of 1", 1)
        assert "version 2 of the head is not served" in caplog.text
        await running.reconfigure({"head_version": 3})
        assert engine.head_version == 3
        with pytest.raises(OSError, match="away"):  # one that starts has no version before
            await Replica(lambda: SimpleNamespace(**vars(engine)), Path("journal")).reconfigure({"head_version": 2})
        with pytest.raises(RmcoreError, match="there is no journal"):
            await Replica(lambda: SimpleNamespace(**vars(engine))).reconfigure({"head_version": 2})

    def read(head, journal, version, backend):
        if version == 2:
            raise OSError("the folder is away")
        return f"{head} of {version}", version

    monkeypatch.setattr(replica, "read_version", read)
    go(main)


def test_a_replica_that_fails_batch_after_batch_says_so():
    async def main():
        failing = Replica(lambda: SimpleNamespace(head=None, score_async=broken))
        for _ in range(3):
            failing.check_health()
            with pytest.raises(ZeroDivisionError):
                await failing.score(["p"], [["a", "b"]])
        with pytest.raises(RuntimeError, match="the last 3 batches failed"):
            failing.check_health()

    async def broken(*_, **__):
        raise ZeroDivisionError

    go(main)
