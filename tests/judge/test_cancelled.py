"""Whoever goes away takes nobody along: judges, clients and stores cancelled at every step, beside others who stay."""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
from contextlib import closing
from itertools import count

import httpx
import pytest
from support.cancelling import cancelled_everywhere
from support.clocks import LoopClock, VirtualLoop

from rmcore._base.client.breaker import BreakerPolicy
from rmcore._base.client.limits import RateLimits
from rmcore.engine.routing import Budget
from rmcore.integrations.ray import SharedJudge
from rmcore.judge import ChatJudge, ClientOptions, JudgePrompt, Pair, RetryPolicy, VerdictStore
from rmcore.judge.base import JudgeUsage, Verdict, isolated_verdicts
from rmcore.judge.wrappers.canary import CanaryJudge
from rmcore.judge.wrappers.tier import Tier
from rmcore.judge.wrappers.tiers import TieredJudge

PAIRS = [Pair("p", "a", "b"), Pair("q", "c", "d")]
LONG = "word " * 20


def said(messages):
    """A tie, in the question's own labels."""
    return f"<verdict>{JudgePrompt.parse(messages).labels.tie}</verdict>"


async def ended(task):
    """A task that was cancelled or has come to something; never left over."""
    done, _ = await asyncio.wait({task}, timeout=600)
    assert done
    if not task.cancelled():
        task.result()


class Endpoint:
    """Refuses the first request, then answers after a second; counts what is under way and what it answered."""

    def __init__(self, chat_reply, clock, seconds=1.0):
        self.chat_reply, self.clock, self.seconds = chat_reply, clock, seconds
        self.asked = self.answered = self.now = 0

    async def __call__(self, request):
        self.asked += 1
        number, self.now = self.asked, self.now + 1
        try:
            await self.clock.sleep(self.seconds)
        finally:
            self.now -= 1
        if number == 1:
            return httpx.Response(503)
        self.answered += 1
        return self.chat_reply(request, "<verdict>$win</verdict>")


def judge_of(endpoint, **how):
    options = {"clock": endpoint.clock, "random_source": random.Random(0), "retry": RetryPolicy(jitter=0)} | how
    store = options.pop("store", None)
    client = ClientOptions(transport=httpx.MockTransport(endpoint), **options)
    return ChatJudge("http://127.0.0.1:9/v1", "m", None, client=client, store=store)


def test_a_judge_gives_back_what_it_held(chat_reply):
    async def scenario(start):
        endpoint = Endpoint(chat_reply, LoopClock())
        limits = RateLimits(requests_per_minute=3, clock=endpoint.clock)
        judge = judge_of(endpoint, concurrency=2, limits=limits, breaker=BreakerPolicy(failures=1))
        leaves = start(judge.judge(PAIRS))
        stays = asyncio.create_task(judge.judge(PAIRS))
        await ended(leaves)
        assert [verdict.preference for verdict in await stays] == [0, 0]  # in both orders the one shown first
        state = judge.client.state
        assert endpoint.now == state.concurrency.in_flight == state.concurrency.queued == state.limits.queued == 0
        assert state.breaker.state == "closed"
        assert state.attempts == endpoint.asked

    assert cancelled_everywhere(scenario, loop=VirtualLoop) > 10


@pytest.fixture
def new_store(tmp_path):
    """Paths of new stores: copies of one, which is quicker than making each."""
    VerdictStore(tmp_path / "0.db").close()
    numbers = count(1)

    def new():
        return shutil.copy(tmp_path / "0.db", tmp_path / f"{next(numbers)}.db")

    return new


def test_a_store_asks_once_for_those_who_stay(chat_reply, new_store):
    """No reply that came is paid for again, no claim is left, and nobody gets another's trouble for an answer."""

    async def scenario(start):
        path = new_store()
        endpoint = Endpoint(chat_reply, LoopClock(), 0.0)
        with VerdictStore(path) as store:
            judge = judge_of(endpoint, store=store, retry=RetryPolicy(base_s=0.0001))
            leaves = start(judge.judge(PAIRS[:1]))
            await asyncio.sleep(0)
            stays = asyncio.create_task(judge.judge(PAIRS[:1]))
            await ended(leaves)
            assert [verdict.preference for verdict in await stays] == [0]
            assert not store._flights
        with closing(sqlite3.connect(path)) as database:
            ((kept, keys),) = database.execute("SELECT count(*), count(DISTINCT key) FROM calls WHERE replied")
            assert keys == 2
            # What the one who left had in the wire may have been answered as it was cut.
            assert kept == keys <= endpoint.answered <= keys + 2
            assert database.execute("SELECT count(*) FROM claims").fetchall() == [(0,)]

    assert cancelled_everywhere(scenario) > 6


def test_a_store_that_another_process_shares_is_left_without_claims(new_store):
    """Two stores on one file stand for two processes: the one who waits gets its turn."""

    async def scenario(start):
        path = new_store()
        calls = 0

        async def complete(messages, **parameters):
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            return said(messages)

        with VerdictStore(path) as one, VerdictStore(path) as other:
            judges = [
                ChatJudge(model="m", complete=complete, store=store, judge_id="j", orders="one")
                for store in (one, other)
            ]
            leaves = start(judges[0].judge(PAIRS[:1]))
            await asyncio.sleep(0)
            await asyncio.wait_for(judges[1].judge(PAIRS[:1]), 20)
            await ended(leaves)
            assert calls <= 2

    assert cancelled_everywhere(scenario) > 2


class Slow:
    """Says "win" after a moment, at the price of a call a pair."""

    takes_principles = True

    def __init__(self):
        self.asked = []
        self.under_way = 0

    async def judge(self, pairs):
        self.under_way += 1
        try:
            self.asked += pairs
            for _ in range(2):
                await asyncio.sleep(0.001)
        finally:
            self.under_way -= 1
        return [Verdict.of("win", usage=JudgeUsage(calls=1)) for _ in pairs]


def test_a_shared_judge_pays_once_and_books_exactly(tmp_path):
    numbers = count()

    async def scenario(start):
        inner, books = Slow(), tmp_path / f"{next(numbers)}.json"
        shared = SharedJudge(lambda: inner, lambda: [Budget(10, "calls", max_per_pair=1)], books)
        leaves = start(shared.judge(PAIRS))
        stays = asyncio.create_task(shared.judge([*PAIRS, Pair("r", "e", "f")]))
        await ended(leaves)
        assert [verdict.preference for verdict in await asyncio.wait_for(stays, 20)] == [1, 1, 1]
        while shared._asking:
            await asyncio.sleep(0)
        assert sorted(pair.prompt for pair in inner.asked) == ["p", "q", "r"]
        budget = shared.budgets[0].stats()
        assert (budget.spent, budget.reserved) == (3, 0)
        assert await shared.judge(PAIRS)  # and nothing waits for ever
        assert len(inner.asked) == 3

    assert cancelled_everywhere(scenario) >= 2


def test_wrappers_leave_nothing_under_way():
    async def scenario(start):
        inner = Slow()
        tiers = TieredJudge(
            [Tier(CanaryJudge(inner, every=1), "canaries"), Tier(inner, "last", accept=lambda v: False)]
        )
        pairs = [Pair("p", LONG, f"{LONG} {k}", uncertainty=2.0) for k in range(2)]
        leaves = start(tiers.judge(pairs))
        stays = asyncio.create_task(tiers.judge(pairs))
        await ended(leaves)
        assert [verdict.preference for verdict in await stays] == [1, 1]
        assert inner.under_way == 0

    assert cancelled_everywhere(scenario) > 2


# -- a cancellation that is nobody's own ------------------------------------------------------------------------------


def cancelling(times):
    """A completion function that waits for what somebody else cancels, the first ``times`` times."""
    asked = 0

    async def complete(messages, **parameters):
        nonlocal asked
        asked += 1
        if asked <= times:
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other
        return said(messages)

    return complete


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_call_that_somebody_else_cancels_costs_its_pair_alone(concurrency):
    options = ClientOptions(concurrency=concurrency)
    judge = ChatJudge(model="m", complete=cancelling(1), client=options, judge_id="j", orders="one")
    verdicts = asyncio.run(judge.judge([*PAIRS, Pair("r", "e", "f")]))
    reasons = [verdict.reason for verdict in verdicts]
    assert reasons[0] == "error_CancelledError"
    assert "raised" not in " ".join(reasons)
    assert len(reasons) == 3
    state = judge.client.state
    assert (state.calls, state.concurrency.in_flight) == (3, 0)


class Cancelled:
    """Is cancelled by somebody else the first time, and answers the second."""

    def __init__(self):
        self.asked = 0

    async def judge(self, pairs):
        self.asked += 1
        if self.asked == 1:
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        return [Verdict.of("win", usage=JudgeUsage(calls=1)) for _ in pairs]


def test_a_shared_question_that_is_cancelled_is_told_and_may_be_asked_again():
    async def main():
        inner = Cancelled()
        shared = SharedJudge(lambda: inner, lambda: [Budget(10, "calls", max_per_pair=1)])
        both = await asyncio.wait_for(asyncio.gather(shared.judge(PAIRS), shared.judge(PAIRS)), 5)
        assert {verdict.reason for verdicts in both for verdict in verdicts} == {"raised_CancelledError"}
        assert shared.budgets[0].stats().reserved == 0
        assert [verdict.preference for verdict in await shared.judge(PAIRS)] == [1, 1]

    asyncio.run(main())


def test_a_judges_own_cancellation_still_gets_out():
    class Waits:
        async def judge(self, pairs):
            await asyncio.sleep(60)

    async def main():
        task = asyncio.create_task(isolated_verdicts(Waits(), PAIRS))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
