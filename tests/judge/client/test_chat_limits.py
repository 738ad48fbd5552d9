"""Rate limits of a chat client: shared, told by replies, and settled by what was used."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace

import httpx
import pytest
from support.chat_client import REPLY, Endpoint, client_of, ok, status

from rmcore._base.client.limits import RateLimits, Used
from rmcore._base.errors import JudgeError
from rmcore.judge import ChatJudge, ClientOptions
from rmcore.judge.client.chat_client import ChatClient

# -- rate limits -----------------------------------------------------------------------------------------------------


def test_attempts_that_fail_count_against_requests_per_minute(play):
    async def work(clock, endpoint, client):
        done = await asyncio.gather(*(client.complete({}) for _ in range(20)))
        assert all(c.choice is not None for c in done)
        times = endpoint.times
        assert len(times) == 30
        assert all(sum(t <= other < t + 60 for other in times) <= 7 for t in times)

    play(work, lambda n, t: status(500) if n % 3 == 1 else ok(), requests_per_minute=7)


def test_clients_of_one_key_keep_their_limits_together(virtual):
    async def work(clock):
        limits, endpoint = RateLimits(6, clock=clock), Endpoint(clock)
        clients = [client_of(endpoint, limits=limits) for _ in range(3)]
        done = await asyncio.gather(*(client.complete({}) for client in clients for _ in range(10)))
        assert all(c.choice is not None for c in done)
        times = endpoint.times
        assert len(times) == 30
        assert all(sum(t <= other < t + 60 for other in times) <= 6 for t in times)
        assert times[-1] >= 240
        assert clients[0].state.limits == clients[2].state.limits
        copy = pickle.loads(
            pickle.dumps(ChatClient.over_http("http://127.0.0.1:9/v1", None, ClientOptions(limits=RateLimits(6))))
        )
        assert copy.options.requests_per_minute == 6

    virtual(work)


def test_shared_limits_and_numbers_are_not_both_given():
    with pytest.raises(JudgeError, match=r"^limits: got them and requests_per_minute"):
        ClientOptions(limits=RateLimits(5), tokens_per_minute=100)
    judge = ChatJudge("http://127.0.0.1:9/v1", "m", None, client=ClientOptions(limits=RateLimits(5, 700)))
    assert (judge.client.options.requests_per_minute, judge.client.options.tokens_per_minute) == (5, 700)


class TellingLimits(RateLimits):
    """Admits all, and writes down what becomes of each."""

    def __init__(self, clock):
        super().__init__(clock=clock)
        self.told: list[object] = []

    async def acquire(self, tokens=0, *, until=None):
        reservation = await super().acquire(tokens, until=until)
        told = [tokens]
        self.told.append(told)
        return SimpleNamespace(
            settle=lambda tokens, used=None: told.append(used), unpaid=lambda: told.append("unpaid"),
            withdraw=reservation.withdraw,
        )  # fmt: skip


def test_limits_are_told_the_kinds_of_tokens_and_what_was_refused(virtual):
    """What money is counted by: a refusal costs nothing, and of a broken connection nobody knows."""
    usage = {"prompt_tokens": 30, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 20}}
    usage |= {"completion_tokens_details": {"reasoning_tokens": 4}}
    answers = [status(503), httpx.ReadError("gone"), httpx.Response(200, json=REPLY | {"usage": usage}), status(400)]

    async def work(clock):
        limits = TellingLimits(clock)
        client = client_of(Endpoint(clock, lambda n, t: answers[n]), limits=limits)
        assert (await client.complete({}, tokens_estimate=50)).choice is not None
        assert (await client.complete({}, tokens_estimate=60)).choice is None
        assert limits.told == [[50, "unpaid"], [50], [50, Used(30, 10, 20, 4)], [60, "unpaid"]]
        assert Used(30, 10, 20, 4) != Used(30, 10)

    virtual(work)


def test_tokens_are_reserved_as_estimated_and_settled_as_used(play):
    async def work(clock, endpoint, client):
        await asyncio.gather(*(client.complete({}, tokens_estimate=100) for _ in range(3)))
        # Two fit at first (200 of 250); their replies at 1 s say 40 each, which makes room for the third.
        assert endpoint.times == [0, 0, 1]
        assert client.state.limits.tokens == 120

    play(work, tokens_per_minute=250)


def test_the_estimate_is_the_payload_and_its_limit_on_completion(play):
    async def work(clock, endpoint, client):
        done = await client.complete({"text": "x" * 400, "max_completion_tokens": 200})
        assert (done.reason, done.usage.attempts) == ("over_token_limit", 0)
        assert (await client.complete({"text": "x" * 400, "max_completion_tokens": 190})).choice is not None
        assert endpoint.times == [0]

    play(work, tokens_per_minute=309)


def test_a_retry_after_meant_for_one_call_holds_all(play):
    async def work(clock, endpoint, client):
        first = asyncio.create_task(client.complete({}))
        await clock.sleep(2)
        second = await client.complete({})
        assert (await first).usage.attempts == 2
        assert second.usage.attempts == 1
        assert endpoint.times == [0, 8, 8]

    play(work, lambda n, t: status(429, retry_after="7") if n == 0 else ok())


def test_nothing_remaining_holds_all_until_the_reset(play):
    headers = {"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "6s", "x_ratelimit_limit_tokens": "90"}

    async def work(clock, endpoint, client):
        await client.complete({})
        await client.complete({})
        assert endpoint.times == [0, 7]
        assert client.state.limits.server_tokens == 90

    play(work, lambda n, t: ok(**headers) if n == 0 else ok())
