"""Batches, and the replicas that score them: dead, silent, slow, or of another version."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.clocks import settle
from support.json_numbers import Numbers
from support.ray_calls import go, member, reward, rollout

from rmcore._base.errors import RmcoreError
from rmcore.integrations.ray.serve import replica, server
from rmcore.integrations.ray.serve.replica import RemoteEngine, Replica
from rmcore.integrations.server import create_app

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
