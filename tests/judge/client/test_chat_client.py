"""The client's gates together, in virtual time: places, breaker, rate limits and deadlines around one request."""

from __future__ import annotations

import asyncio
import random
import threading

import httpx
import pytest
from support.chat_client import ok, status

from rmcore._base.client.breaker import BreakerPolicy
from rmcore._base.client.latency import LatencyEstimate
from rmcore._base.errors import JudgeError
from rmcore.judge import ChatJudge, ClientOptions, Pair, RetryPolicy

ONCE = RetryPolicy(max_attempts=1)


# -- places ----------------------------------------------------------------------------------------------------------


def test_two_thousand_requests_in_flight_without_a_thread_each(play):
    async def work(clock, endpoint, client):
        before = threading.active_count()
        done = await asyncio.gather(*(client.complete({"k": k}) for k in range(6000)))
        assert all(completion.choice is not None for completion in done)
        assert threading.active_count() == before
        assert endpoint.most == client.state.concurrency.peak_in_flight == 2000
        assert len(endpoint.times) == client.state.attempts == client.state.calls == 6000
        # 4 at first, doubled each second: 4 + 8 + ... + 1024 are 2044 calls in 9 s, and then 2000 a second.
        assert clock.now() == 11

    play(work, concurrency=2000)


def test_a_server_of_known_capacity_is_used_at_once(play):
    async def work(clock, endpoint, client):
        await asyncio.gather(*(client.complete({"k": k}) for k in range(90)))
        assert endpoint.most == 30  # 4 at first would have taken 4 + 8 + 16 calls in three seconds to come there
        assert clock.now() == 3

    play(work, concurrency=30, first_concurrency=1000)
    with pytest.raises(JudgeError, match="first_concurrency: got 0, expected a positive number of requests"):
        ClientOptions(first_concurrency=0)


def test_a_call_that_waits_to_try_again_leaves_its_place_to_others(play):
    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}) for _ in range(2)))
        assert [c.usage.attempts for c in done] == [2, 1]
        assert endpoint.times == [0, 1, 2]  # the second call did not wait for the first one's second try

    play(work, lambda n, t: status(500) if n == 0 else ok(), concurrency=1)


def test_a_429_halves_what_is_in_flight(play):
    async def work(clock, endpoint, client):
        await asyncio.gather(*(client.complete({}) for _ in range(200)))
        assert client.state.concurrency.cuts == 1
        assert client.state.breaker.state == "closed"

    play(work, lambda n, t: status(429) if n == 20 else ok(), concurrency=64)


# -- deadlines -------------------------------------------------------------------------------------------------------


def test_a_reply_that_would_come_too_late_is_not_bought(play):
    async def work(clock, endpoint, client):
        for _ in range(8):
            assert (await client.complete({}, deadline=clock.now() + 2.5)).choice is not None
        asked = len(endpoint.times)
        late = await client.complete({}, deadline=clock.now() + 1.5)
        assert (late.reason, late.usage.attempts, late.usage.calls) == ("deadline", 0, 0)
        assert len(endpoint.times) == asked
        assert (await client.complete({}, deadline=clock.now() + 2.5)).choice is not None

    play(work, latency_s=2.0)


def test_at_the_start_nothing_is_known_and_calls_are_made(play):
    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}, deadline=1.0) for _ in range(4)))
        assert {c.reason for c in done} == {"deadline"}
        assert len(endpoint.times) == 4

    play(work, latency_s=2.0)


def test_a_slow_spell_is_forgotten(play):
    async def work(clock, endpoint, client):
        endpoint.latency_s = 5.0
        await asyncio.gather(*(client.complete({}) for _ in range(8)))
        endpoint.latency_s = 1.0
        assert (await client.complete({}, deadline=clock.now() + 3)).reason == "deadline"
        await clock.sleep(61)
        assert (await client.complete({}, deadline=clock.now() + 3)).choice is not None

    play(work)


def test_no_wait_in_any_line_passes_the_deadline(play):
    async def work(clock, endpoint, client):
        hogs = [asyncio.create_task(client.complete({})) for _ in range(3)]
        await clock.sleep(0.5)
        done = await asyncio.gather(*(client.complete({}, deadline=1.5 + k / 10) for k in range(5)))
        assert {c.reason for c in done} == {"deadline"}
        assert clock.now() <= 1.9
        await asyncio.gather(*hogs)

    play(work, latency_s=10, concurrency=1)


def test_cut_attempts_count_with_the_time_they_had():
    estimate = LatencyEstimate(needed=3)
    for seconds in (1.0, 2.0):
        estimate.add(seconds, 0.0)
    estimate.add(9.0, 0.0, complete=False)  # nothing is known yet: neither is this
    assert estimate.expected_s(0.0) == 0
    estimate.add(3.0, 0.0)
    assert estimate.expected_s(0.0) == 2
    estimate.add(1.0, 0.0, complete=False)  # cut before the median: says nothing
    estimate.add(5.0, 0.0, complete=False)
    estimate.add(5.0, 0.0, complete=False)
    assert estimate.expected_s(0.0) == 3
    assert estimate.expected_s(61.0) == 0


def test_only_the_latest_samples_count():
    estimate = LatencyEstimate(size=10)
    for k in range(1000):
        estimate.add(float(k), 0.0)
    assert 990 <= estimate.expected_s(0.0) < 1000


# -- the breaker -----------------------------------------------------------------------------------------------------


def test_a_restart_of_the_endpoint_loses_nobody(play):
    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}) for _ in range(300)))
        assert all(c.choice is not None for c in done)
        assert client.state.breaker.opened == 1
        down = [t for t in endpoint.times if t < 8]
        assert len(down) <= 40  # not 300 calls, five times each

    play(work, lambda n, t: httpx.ConnectError("refused") if t < 8 else ok(), latency_s=0.1)


def test_an_endpoint_that_stays_away_costs_a_minute_and_few_requests(play):
    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}) for _ in range(2000)))
        reasons = {c.reason for c in done}
        assert reasons == {"connection", "breaker_open"}
        assert sum(c.usage.attempts for c in done) == len(endpoint.times) <= 40
        assert all(c.usage.calls == (c.usage.attempts > 0) for c in done)
        assert clock.now() < 60
        assert next(c.detail for c in done if c.reason == "breaker_open") == "connection"

    play(work, lambda n, t: httpx.ConnectError("refused"), latency_s=0.1)


def test_a_storm_of_429_does_not_open_it(play):
    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}) for _ in range(100)))
        assert all(c.choice is not None for c in done)
        assert client.state.breaker.opened == 0
        assert client.state.concurrency.cuts >= 3

    play(work, lambda n, t: status(429) if t < 6 else ok(), latency_s=0.1, retry=RetryPolicy(max_attempts=50))


def test_an_expired_key_is_not_shown_two_thousand_times(play):
    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}) for _ in range(2000)))
        assert {(c.reason, c.detail) for c in done} == {("http_401", "no key was sent"), ("breaker_open", "http_401")}
        assert len(endpoint.times) <= 20
        assert clock.now() < 2

    play(work, lambda n, t: status(401), latency_s=0.1)


def test_one_question_that_upsets_the_server_shuts_nobody_out(play):
    async def work(clock, endpoint, client):
        poison = await client.complete({})
        assert (poison.reason, poison.usage.attempts) == ("http_500", 5)
        assert (await client.complete({})).choice is not None
        assert client.state.breaker.opened == 0

    play(work, lambda n, t: status(500) if n < 5 else ok())


def test_a_breaker_that_opened_in_the_line_for_the_limits_is_heeded(play):
    """Two calls a minute are allowed; those in line behind two failures are not sent into the outage."""

    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}) for _ in range(4)))
        assert [c.reason for c in done] == ["connection", "connection", "breaker_open", "breaker_open"]
        assert endpoint.times == [0, 0]
        assert client.state.limits.requests <= 2

    policy = BreakerPolicy(failures=2, patience_s=0, cooldown_s=1000, max_cooldown_s=1000)
    play(work, lambda n, t: httpx.ConnectError("x"), requests_per_minute=2, breaker=policy, retry=ONCE)


def test_without_a_breaker_every_call_is_tried(play):
    async def work(clock, endpoint, client):
        await asyncio.gather(*(client.complete({}) for _ in range(30)))
        assert len(endpoint.times) == 30

    play(work, lambda n, t: httpx.ConnectError("x"), breaker=None, retry=ONCE)


# -- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_cancelling_leaves_nothing_behind(play, seed):
    rng = random.Random(seed)
    answers = [ok, ok, lambda: status(500), lambda: status(429, retry_after="2"), lambda: httpx.ConnectError("x")]

    async def work(clock, endpoint, client):
        async def one():
            await clock.sleep(rng.randrange(40) / 4)
            return await client.complete({}, deadline=rng.choice([None, clock.now() + 30]))

        tasks = [asyncio.create_task(one()) for _ in range(60)]

        async def cancel(task):
            await clock.sleep(rng.randrange(80) / 4)
            task.cancel()

        await asyncio.gather(*tasks, *(cancel(t) for t in tasks if rng.random() < 0.6), return_exceptions=True)
        assert all(t.cancelled() or t.exception() is None for t in tasks)
        state = client.state
        assert endpoint.now == 0
        assert (state.concurrency.in_flight, state.concurrency.queued, state.limits.queued) == (0, 0, 0)
        endpoint.answer = lambda n, t: ok()
        await clock.sleep(100)
        assert (await client.complete({})).choice is not None  # whatever state the breaker was left in
        assert client.state.breaker.state == "closed"

    policy = BreakerPolicy(failures=3)
    play(work, lambda n, t: rng.choice(answers)(), concurrency=4, requests_per_minute=40, breaker=policy)


# -- the judge -------------------------------------------------------------------------------------------------------


def test_a_pairs_own_deadline_counts_where_it_is_earlier(virtual, chat_reply):
    async def work(clock):
        async def handler(request):
            await clock.sleep(2)
            return chat_reply(request, "<verdict>$win</verdict>")

        options = ClientOptions(transport=httpx.MockTransport(handler), clock=clock)
        judge = ChatJudge("http://127.0.0.1:9/v1", "m", None, client=options, orders="one")
        pairs = [Pair("p", "a", "b"), Pair("p", "a", "c", deadline=1.0), Pair("p", "a", "d", deadline=5000.0)]
        verdicts = await judge.judge(pairs)
        assert [v.reason for v in verdicts] == ["", "deadline", ""]
        assert clock.now() == 2

    virtual(work)


def test_bad_breaker():
    with pytest.raises(JudgeError, match="breaker"):
        ClientOptions(breaker=True)
