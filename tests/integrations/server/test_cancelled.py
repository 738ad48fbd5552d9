"""Whoever goes away takes nobody along: the server's shared work cancelled at every step, and by nobody who asked."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest
from prometheus_client import CollectorRegistry, Histogram
from support.cancelling import cancelled_everywhere
from support.clocks import settle
from support.json_numbers import Numbers, numbers

from rmcore.integrations.server import ServeSettings
from rmcore.integrations.server.assembly import BusyError, GroupAssembly
from rmcore.integrations.server.batching import BatchScorer
from rmcore.integrations.server.guard import Guard
from rmcore.integrations.server.replies import ReplyStore


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def named(name):
    """The tasks of that name that are under way."""
    return [task for task in asyncio.all_tasks() if task.get_name() == name]


# -- at every step -----------------------------------------------------------------------------------------------------


def test_a_batch_scorer_forgets_who_left():
    async def scenario(start):
        engine = Numbers()
        scorer = BatchScorer(engine, max_groups=2, max_wait_s=0.0005, max_in_flight=1)
        leaves = start(scorer.submit([("p", ["1", "2"]), ("q", ["3", "5"])]))
        stays = [asyncio.create_task(scorer.score(f"r{k}", ["0", str(k)])) for k in range(3)]
        found = await asyncio.gather(*stays)
        assert [one.preference[0].tolist() for one in found] == [[0, -k] for k in range(3)]
        await asyncio.wait({leaves})
        await scorer.drain()
        assert (scorer.queued, scorer.in_flight, scorer._characters) == (0, 0, 0)
        assert scorer._room._value == scorer._backbone._value == 1

    assert cancelled_everywhere(scenario) >= 1


@pytest.mark.parametrize("by_content", [False, True])
def test_an_assembly_scores_once_and_whoever_comes_again_gets_the_same(by_content):
    async def scenario(start):
        scored = []

        async def score(prompt, responses):
            scored.append(responses)
            await asyncio.sleep(0)
            return numbers(responses, None)

        assembly = GroupAssembly(score)

        def join(slot):
            if by_content:
                return assembly.join_by_content("p", f"{slot}", 3)
            return assembly.join("g", slot, 3, "p", f"{slot}")

        leaves = start(join(0))
        await asyncio.sleep(0)
        stays = [asyncio.create_task(join(slot)) for slot in (1, 2)]
        await settle()
        await asyncio.wait({leaves})
        again = (await join(0)) if leaves.cancelled() else leaves.result()
        parts = [again, *await asyncio.gather(*stays)]
        assert [part.group.preference[part.index].sum() for part in parts] == [-3, 0, 3]
        assert scored == [["0", "1", "2"]]
        assert assembly.waiting == assembly.open_groups == 0

    assert cancelled_everywhere(scenario) >= 1


def test_kept_replies_are_made_once_for_those_who_stay():
    async def scenario(start):
        made = count()

        async def work():
            await asyncio.sleep(0.001)
            return b"%d" % next(made)

        store = ReplyStore(10.0, 1000)
        leaves = start(store.once("k", b"d", work))
        await asyncio.sleep(0)
        assert (await store.once("k", b"d", work))[0] == b"0"
        await asyncio.wait({leaves})
        assert not store._running

    assert cancelled_everywhere(scenario) >= 1


# -- by nobody who asked -----------------------------------------------------------------------------------------------


def test_work_that_somebody_else_cancels_is_told_and_made_anew():
    async def main():
        store, gate = ReplyStore(10.0, 1000), asyncio.Event()

        async def work():
            await gate.wait()
            return b"made"

        both = [asyncio.create_task(store.once("k", b"d", work)) for _ in range(2)]
        await settle()
        for task in named("rmcore reply"):
            task.cancel()
        for one in both:
            with pytest.raises(BusyError, match="cancelled"):
                await one
        gate.set()
        assert await store.once("k", b"d", work) == (b"made", False)

    go(main())


def test_the_work_for_a_reply_belongs_to_none_of_its_callers():
    """Ray Serve cancels with a request what was called in its context."""
    import contextvars

    request = contextvars.ContextVar("request", default="")
    seen = []

    async def main():
        async def work():
            seen.append(request.get())
            return b""

        request.set("a caller's")
        await ReplyStore(10.0, 1000).once("k", b"d", work)

    go(main())
    assert seen == [""]


@pytest.mark.parametrize("begun", [False, True])
def test_a_batch_that_somebody_else_cancels_gives_its_places_back(begun):
    async def main():
        engine = Numbers()
        engine.open.clear()
        scorer = BatchScorer(engine, max_in_flight=1)
        lost = asyncio.create_task(scorer.score("p", ["1", "2"]))
        while not named("rmcore batch"):
            await asyncio.sleep(0)
        if begun:
            await settle()
        named("rmcore batch")[0].cancel()
        with pytest.raises(BusyError, match="cancelled"):
            await lost
        engine.open.set()
        assert (await scorer.score("q", ["1", "2"])).size == 2

    go(main())


def test_without_somebody_to_start_batches_nobody_waits_for_one():
    async def main():
        engine = Numbers()
        engine.open.clear()
        scorer = BatchScorer(engine, max_groups=1, max_in_flight=1)
        first = asyncio.create_task(scorer.score("p", ["1", "2"]))
        await settle()
        waiting = asyncio.create_task(scorer.score("q", ["1", "2"]))
        await settle()
        named("rmcore batches")[0].cancel()
        with pytest.raises(BusyError, match="cancelled"):
            await waiting
        after = asyncio.create_task(scorer.score("r", ["1", "2"]))
        await settle()
        engine.open.set()
        assert [one.size for one in await asyncio.gather(first, after)] == [2, 2]
        await scorer.drain()

    go(main())


@pytest.mark.parametrize("started", [False, True])
def test_an_answer_that_somebody_else_cancels_is_asked_for_again(started):
    async def app(scope, receive, send):
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def main():
        messages, never = [], asyncio.Event()
        body = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if not body:
                await never.wait()
            return body.pop()

        async def send(message):
            messages.append(message)

        seconds = Histogram("s", "s", ["path"], registry=CollectorRegistry())
        guard = Guard(app, ServeSettings(), frozenset({"/x"}), seconds)
        scope = {"type": "http", "path": "/x", "method": "POST", "headers": [(b"host", b"127.0.0.1")]}
        await guard(scope, receive, send)
        return messages, guard

    messages, guard = go(main())
    assert guard.active == 0
    assert [message["status"] for message in messages if "status" in message] == [200 if started else 503]
    if not started:
        assert (b"retry-after", b"1") in messages[0]["headers"]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("by_content", [False, True])
def test_a_group_that_somebody_else_cancels_is_told_and_comes_together_anew(begun, by_content):
    async def score(prompt, responses):
        return numbers(responses, None)

    async def main():
        assembly = GroupAssembly(score)

        def join(slot):
            if by_content:
                return assembly.join_by_content("p", f"{slot}", 2)
            return assembly.join("g", slot, 2, "p", f"{slot}")

        lost = asyncio.create_task(join(0))
        while not named("rmcore group"):
            await asyncio.sleep(0)
        if begun:
            await settle()
        named("rmcore group")[0].cancel()
        with pytest.raises(BusyError, match="cancelled"):
            await lost
        parts = await asyncio.gather(join(0), join(1))
        assert [part.group.preference[part.index].sum() for part in parts] == [-1, 1]
        assert assembly.waiting == assembly.open_groups == 0

    go(main())
