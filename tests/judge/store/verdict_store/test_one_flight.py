"""Equal questions at once are asked once: by tasks, threads, and stores of one file."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.judge_calls import HIT, PAID, never, question, reply

from rmcore._base.clock import SystemClock
from rmcore.judge import VerdictStore
from rmcore.judge.store.records import Reply

# -- one flight ------------------------------------------------------------------------------------------------------


class Endpoint:
    """Counts what it is asked and answers when it is let."""

    def __init__(self, answer: Reply | None = None) -> None:
        self.answer = answer or reply()
        self.calls = 0
        self.asked = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self) -> Reply:
        self.calls += 1
        self.asked.set()
        await self.open.wait()
        return self.answer


def test_tasks_share_a_call(store):
    async def run():
        endpoint = Endpoint()
        tasks = [asyncio.create_task(store.once(question(), endpoint)) for _ in range(8)]
        await endpoint.asked.wait()
        endpoint.open.set()
        return endpoint.calls, [found.verdict.usage for found in await asyncio.gather(*tasks)]

    calls, usages = asyncio.run(run())
    assert calls == 1
    assert Counter(usage == PAID for usage in usages) == {True: 1, False: 7}
    assert usages.count(HIT) == 7


def test_a_cancelled_asker_takes_nobody_along(rows, store, place):
    async def run():
        first, second = Endpoint(), Endpoint()
        leader = asyncio.create_task(store.once(question(), first))
        await first.asked.wait()
        followers = [asyncio.create_task(store.once(question(), second)) for _ in range(3)]
        await asyncio.sleep(0.01)
        leader.cancel()
        followers[0].cancel()
        await second.asked.wait()
        second.open.set()
        results = await asyncio.gather(leader, *followers, return_exceptions=True)
        return first.calls, second.calls, results

    first, second, results = asyncio.run(run())
    assert (first, second) == (1, 1)
    assert [type(result).__name__ for result in results] == ["CancelledError", "CancelledError", "Reply", "Reply"]
    assert rows(place, "key", "claims") == []


def test_a_reply_that_came_is_kept_though_its_asker_is_cancelled(store):
    async def run():
        task: asyncio.Task[object]

        async def ask():
            task.cancel()  # arrives at the next await, which is that for the commit
            return reply()

        task = asyncio.create_task(store.once(question(), ask))
        with pytest.raises(asyncio.CancelledError):
            await task
        return await store.once(question(), never)

    assert asyncio.run(run()).verdict.preference == 1.0


@pytest.mark.parametrize(("reason", "calls"), [("timeout", 1), ("http_500", 1), ("deadline", 3)])
def test_a_failure_is_shared_unless_it_was_only_the_askers_own_deadline(store, reason, calls):
    async def run():
        endpoint = Endpoint(reply(None, reason, replied=False))
        tasks = [asyncio.create_task(store.once(question(), endpoint)) for _ in range(3)]
        await endpoint.asked.wait()
        endpoint.open.set()
        return endpoint.calls, {found.verdict.reason for found in await asyncio.gather(*tasks)}, endpoint

    _, reasons, endpoint = asyncio.run(run())
    assert reasons == {reason}
    assert endpoint.calls == calls


def test_an_asker_that_raises_is_replaced(store):
    async def run():
        begun = asyncio.Event()

        async def broken():
            begun.set()
            await asyncio.sleep(0.005)
            raise ZeroDivisionError

        async def works():
            return reply()

        leader = asyncio.create_task(store.once(question(), broken))
        await begun.wait()
        follower = asyncio.create_task(store.once(question(), works))
        return await asyncio.gather(leader, follower, return_exceptions=True)

    error, found = asyncio.run(run())
    assert isinstance(error, ZeroDivisionError)
    assert found.verdict.preference == 1.0


def test_waiting_for_others_has_an_end(store):
    async def run():
        endpoint = Endpoint()
        leader = asyncio.create_task(store.once(question(), endpoint))
        await endpoint.asked.wait()
        late = await store.once(question(), never, timeout_s=0.01)
        endpoint.open.set()
        return late, await leader

    late, found = asyncio.run(run())
    assert late is None
    assert found.verdict.preference == 1.0


def test_threads_and_their_loops_share_calls(rows, store, place):
    asked: Counter[int] = Counter()
    lock = threading.Lock()

    def ask(k):
        async def call():
            with lock:
                asked[k] += 1
            await asyncio.sleep(0.001)
            return reply(1.0 if k % 2 else -1.0)

        return call

    async def everything():
        found = await asyncio.gather(*(store.once(question(f"p{k}"), ask(k)) for k in range(60)))
        return [one.verdict.preference for one in found]

    with ThreadPoolExecutor(4) as pool:
        results = [job.result() for job in [pool.submit(asyncio.run, everything()) for _ in range(4)]]
    assert results == [[-1.0, 1.0] * 30] * 4
    assert asked == Counter(range(60))
    assert len(rows(place)) == 60


# -- several stores of one file --------------------------------------------------------------------------------------


def test_another_store_waits_for_a_claim(place):
    async def run():
        with VerdictStore(place) as one, VerdictStore(place) as other:
            endpoint = Endpoint()
            leader = asyncio.create_task(one.once(question(), endpoint))
            await endpoint.asked.wait()
            assert await other.once(question(), never, timeout_s=0.05) is None
            waiting = asyncio.create_task(other.once(question(), never))
            await asyncio.sleep(0.03)
            endpoint.open.set()
            return [found.verdict.usage for found in await asyncio.gather(leader, waiting)]

    assert asyncio.run(run()) == [PAID, HIT]


def test_a_claim_that_is_given_up_is_free_at_once(place):
    async def run():
        with VerdictStore(place) as one, VerdictStore(place) as other:
            first, second = Endpoint(), Endpoint()
            second.open.set()
            leader = asyncio.create_task(one.once(question(), first))
            await first.asked.wait()
            waiting = asyncio.create_task(other.once(question(), second))
            await asyncio.sleep(0.03)
            leader.cancel()
            return await waiting, second.calls

    found, calls = asyncio.run(run())
    assert (found.verdict.usage, calls) == (PAID, 1)


class Later(SystemClock):
    """A wall clock that is ahead: what others wrote looks old."""

    def wall(self) -> float:
        return super().wall() + 100


def test_the_claim_of_one_who_gives_no_sign_of_life_ends(rows, place):
    # A server has leases by its own clock, which nobody can set here.
    late = {"lease_s": 99, "clock": Later()} if isinstance(place, Path) else {"lease_s": 0.05}

    async def run():
        with VerdictStore(place) as asleep, VerdictStore(place, **late) as other:
            stuck, works = Endpoint(), Endpoint(reply(-1.0))
            works.open.set()
            leader = asyncio.create_task(asleep.once(question(), stuck))
            await stuck.asked.wait()
            await asyncio.sleep(0 if isinstance(place, Path) else 0.1)
            taken = await other.once(question(), works)
            # The sleeper wakes up with an answer of its own: it is logged, and the first one stands.
            stuck.open.set()
            return taken, await leader

    taken, woken = asyncio.run(run())
    assert (taken.verdict.preference, taken.verdict.usage) == (-1.0, PAID)
    assert (woken.verdict.preference, woken.verdict.usage) == (-1.0, PAID)
    assert sorted(rows(place, "preference")) == [(-1.0,), (1.0,)]


def test_a_living_owner_renews_its_lease_while_it_asks(rows, place):
    async def run():
        with VerdictStore(place, lease_s=0.04) as store:
            endpoint = Endpoint()
            leader = asyncio.create_task(store.once(question(), endpoint))
            await endpoint.asked.wait()
            ((begun,),) = rows(place, "beat", "owners")
            while rows(place, "beat", "owners") == [(begun,)]:
                await asyncio.sleep(0.005)
            endpoint.open.set()
            await leader

    asyncio.run(run())


CLAIMER = """
import asyncio, sys
from tests_store import question
from rmcore.judge import VerdictStore

async def ask():
    print("asking", flush=True)
    await asyncio.Event().wait()

asyncio.run(VerdictStore(sys.argv[1]).once(question(), ask))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a dead owner's claim ends with its lease")
def test_the_claim_of_a_killed_process_ends_at_once(place, tmp_path):
    (tmp_path / "tests_store.py").write_text(
        "from rmcore.judge.store.records import Question\n"
        "def question():\n"
        "    return Question.of('http://j/v1', 'm', {'temperature': 0}, 't1', 'p', 'a', 'b')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMER, str(place)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout.readline() == "asking\n"

        async def run():
            with VerdictStore(place) as store:
                assert await store.once(question(), never, timeout_s=0.05) is None
                child.send_signal(signal.SIGKILL)
                child.wait()
                endpoint = Endpoint()
                endpoint.open.set()
                return await store.once(question(), endpoint, timeout_s=5)

        assert asyncio.run(run()).verdict.usage == PAID


def test_the_loop_runs_on_while_another_process_holds_the_file(file_store, path):
    async def run():
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        endpoint = Endpoint()
        endpoint.open.set()
        task = asyncio.create_task(file_store.once(question(), endpoint))
        for _ in range(20):  # the loop turns, the answer waits
            await asyncio.sleep(0.001)
        assert not task.done()
        holder.execute("ROLLBACK")
        holder.close()
        return await task

    assert asyncio.run(run()).verdict.preference == 1.0
