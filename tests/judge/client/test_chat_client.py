"""The client's gates together, in virtual time: places, breaker, rate limits and deadlines around one request."""

from __future__ import annotations

import asyncio
import errno
import json
import pickle
import random
import threading
from types import SimpleNamespace

import httpx
import pytest

from rmcore._base.client.breaker import BreakerPolicy
from rmcore._base.client.latency import LatencyEstimate
from rmcore._base.client.limits import RateLimits, Used
from rmcore._base.errors import JudgeError
from rmcore.judge import ChatJudge, ClientOptions, Pair, RetryPolicy
from rmcore.judge.base import JudgeUsage
from rmcore.judge.client.chat_client import ChatClient
from rmcore.judge.client.reply import read_completion

REPLY = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 30, "completion_tokens": 10}}
ONCE = RetryPolicy(max_attempts=1)


class Endpoint:
    """Answers after ``latency_s`` with what ``answer(number, time)`` says, and writes down when it was asked."""

    def __init__(self, clock, answer=None, latency_s=1.0):
        self.clock, self.answer, self.latency_s = clock, answer or (lambda n, t: ok()), latency_s
        self.times: list[float] = []
        self.now = self.most = 0

    async def __call__(self, request):
        number = len(self.times)
        self.times.append(self.clock.now())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.clock.sleep(self.latency_s)
        finally:
            self.now -= 1
        answer = self.answer(number, self.times[number])
        if isinstance(answer, Exception):
            raise answer
        return answer


def ok(**headers):
    return httpx.Response(200, json=REPLY, headers={k.replace("_", "-"): v for k, v in headers.items()})


def status(code, **headers):
    return httpx.Response(code, headers={k.replace("_", "-"): v for k, v in headers.items()})


def client_of(endpoint, **kwargs):
    given = {"clock": endpoint.clock, "random_source": random.Random(0)} | kwargs
    options = ClientOptions(transport=httpx.MockTransport(endpoint), **given)
    return ChatClient.over_http("http://127.0.0.1:9/v1", None, options)


@pytest.fixture
def play(virtual):
    """Run ``work(clock, endpoint, client)`` against an endpoint that answers as told."""

    def run(work, answer=None, latency_s=1.0, **kwargs):
        async def whole(clock):
            endpoint = Endpoint(clock, answer, latency_s)
            return await work(clock, endpoint, client_of(endpoint, **kwargs))

        return virtual(whole)

    return run


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


# -- errors inside a reply of status 200 -----------------------------------------------------------------------------

ERROR = {"message": "Provider returned error", "code": 429}
FINISHED = {"message": {"content": "x"}, "finish_reason": "stop"}
FAILED = {"message": {"content": "par"}, "finish_reason": "error"}


@pytest.mark.parametrize(
    ("body", "reason", "attempts"),
    [
        ({"error": ERROR}, "http_429", 3),
        ({"error": ERROR | {"code": "502"}}, "http_502", 3),
        ({"error": {"message": "x", "status": 503}, "choices": []}, "http_503", 3),
        ({"error": ERROR, "choices": [FINISHED]}, "http_429", 3),
        ({"choices": [FINISHED | {"finish_reason": "error", "error": ERROR}]}, "http_429", 3),
        ({"error": ERROR | {"code": 400}}, "http_400", 1),
        ({"error": {"message": "x", "code": 429, "type": "insufficient_quota"}}, "insufficient_quota", 1),
        ({"error": {"message": "x", "code": "weird"}, "choices": [FINISHED]}, "error_in_reply", 1),
        ({"error": {"message": "x", "code": True}}, "no_choices", 1),
        ({"error": None, "choices": [FINISHED]}, "", 1),
        # Other shapes: texts, lists, other names, events, numbers as texts, words for a status.
        ({"error": "Rate limit exceeded"}, "http_429", 3),
        ({"error": "Error code: 503 - busy"}, "http_503", 3),
        ({"error": "no such field"}, "no_choices", 1),
        ({"error": [ERROR]}, "http_429", 3),
        ({"errors": [{"message": "x", "code": "502"}], "choices": [FINISHED]}, "http_502", 3),
        ({"errors": [{"message": "x"}], "choices": [FINISHED]}, "error_in_reply", 1),
        ({"success": False, "errors": [{"code": 10013, "message": "internal error"}]}, "http_500", 3),
        ({"detail": "Too Many Requests"}, "http_429", 3),
        ({"detail": {"status": 503}}, "http_503", 3),
        ({"detail": [{"msg": "field required"}]}, "no_choices", 1),
        ({"object": "error", "message": "x", "type": "BadRequestError", "code": 400}, "http_400", 1),
        ({"object": "error", "message": "x", "choices": [FINISHED]}, "error_in_reply", 1),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "http_503", 3),
        ({"type": "error", "error": {"type": "invalid_request_error", "message": "timed out"}}, "http_400", 1),
        ({"message": "x", "statusCode": 504}, "http_504", 3),
        ({"code": 429.0, "msg": "x"}, "http_429", 3),
        ({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, "http_429", 3),
        ([{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}], "http_429", 3),
        ({"error": {"error": {"code": 502}}}, "http_502", 3),
        ({"error": {"type": "insufficient_quota", "message": "x"}}, "insufficient_quota", 1),
        ({"choices": [{"message": {"content": "x", "error": ERROR}, "finish_reason": "stop"}]}, "http_429", 3),
        (b'event: error\ndata: {"error": {"code": 503}}\n\n', "http_503", 3),
        (b': busy\n\ndata: {"error": "429 Too Many Requests"}\n\ndata: [DONE]\n\n', "http_429", 3),
        (b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n', "not_json", 1),
        # Names in other cases, further holders, loading models, other languages, a JSON text, lines, pages, words.
        ({"errorCode": "ThrottlingException", "errorMessage": "Rate exceeded"}, "http_429", 3),
        ({"__type": "com.amazon#ServiceUnavailableException", "Message": "x"}, "http_503", 3),
        ({"fault": {"faultstring": "Rate limit quota violation", "detail": {"errorcode": "x"}}}, "http_429", 3),
        ({"Response": {"Error": {"Code": "RequestLimitExceeded", "Message": "slow"}}}, "http_429", 3),
        ({"error_code": 18, "error_msg": "Open api qps request limit reached"}, "http_429", 3),
        ({"error": "Model x is currently loading", "estimated_time": 20.0}, "http_503", 3),
        ({"error": ["Model too busy, unable to get response"]}, "http_503", 3),
        ({"error": {"code": "1302", "message": "您当前使用该API的并发数过高"}}, "http_429", 3),
        ({"error": {"message": "Upstream error: 524 status code (no body)"}}, "http_524", 3),
        ({"success": False, "errors": [{"code": 7505, "message": "upstream timeout"}]}, "http_504", 3),
        ({"choices": [FINISHED], "base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, "http_429", 3),
        ({"choices": [FINISHED], "base_resp": {"status_code": 0, "status_msg": "success"}}, "", 1),
        ({"error": "Input validation error", "error_type": "validation"}, "no_choices", 1),
        (json.dumps(json.dumps({"error": ERROR})).encode(), "http_429", 3),
        (b'{"error": {"code": 429}}\n{"done": true}\n', "http_429", 3),
        (b"event: error\ndata: upstream request timeout\n\n", "http_504", 3),
        (b"<html><title>502 Bad Gateway</title><body>nginx</body></html>", "http_502", 3),
        (b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>", "http_429", 3),
        (b"upstream connect error or disconnect/reset before headers", "http_503", 3),
        (b"429 Too Many Requests", "http_429", 3),
        (b"<html><title>Please log in</title></html>", "not_json", 1),
        (b"<html><body>503</body></html>", "not_json", 1),
        (b"503", "not_json", 1),
        (b"data: [DONE]\n\n", "not_json", 1),
        # An error's fields with nothing in them, and words within an answer.
        ({"error": {"code": 0, "message": ""}, "errors": [], "detail": None, "choices": [FINISHED]}, "", 1),
        ({"choices": [{"message": {"content": "error 429: rate limit"}, "finish_reason": "stop"}], "code": 500}, "", 1),
        ({"error": {"code": 0, "message": "success"}, "choices": [FINISHED]}, "", 1),
        ({"error": {"code": "200", "msg": "ok"}, "choices": [FINISHED]}, "", 1),
        # "Busy, later" in other languages, pages that break off, keep-alives before an answer.
        ({"error": {"code": "1234", "message": "网络错误，请稍后重试"}}, "http_503", 3),
        ({"error": "サーバーが混み合っています"}, "http_503", 3),
        ({"error": "요청이 너무 많습니다"}, "http_429", 3),
        ({"detail": "Demasiadas solicitudes"}, "http_429", 3),
        ({"message": "Trop de requêtes, réessayez"}, "http_429", 3),
        ({"error": {"message": "Bitte später erneut versuchen"}}, "http_503", 3),
        ({"error": {"message": "Сервис занят, попробуйте позже"}}, "http_503", 3),
        ({"error": {"message": "Prompt is not valid"}}, "no_choices", 1),
        ({"exception": "java.net.SocketTimeoutException: Read timed out"}, "http_504", 3),
        (b"<html><head><title>api.example.com | 524: A timeout occurred", "http_524", 3),
        (b"stream timeout", "http_504", 3),
        (b": keep-alive\n\n: keep-alive\n\n" + json.dumps({"choices": [FINISHED]}).encode(), "", 1),
        (b": keep-alive\n\n" + json.dumps({"error": ERROR}).encode(), "http_429", 3),
    ],
    ids=str,
)
def test_an_error_inside_a_reply_of_status_200(play, body, reason, attempts):
    async def work(clock, endpoint, client):
        done = await client.complete({})
        assert (done.reason, done.usage.attempts) == (reason, attempts)
        assert (done.choice is None) == bool(reason)

    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    play(work, lambda n, t: httpx.Response(200, content=content), retry=RetryPolicy(max_attempts=3, base_s=0.01))


def test_token_counts_in_other_spellings():
    counts = {"prompt_tokens": "12", "completion_tokens": 3.0, "completion_tokens_details": {"reasoning_tokens": "x"}}
    body = json.dumps({"choices": [FINISHED], "usage": counts}).encode()
    usage = read_completion(body, JudgeUsage(calls=1), "").usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens) == (12, 3, 0)
    for wrong in ("-1", "1.5", 2.5, "9" * 30, True, [3], float("1e300")):
        body = json.dumps({"choices": [FINISHED], "usage": {"prompt_tokens": wrong}}).encode()
        assert read_completion(body, JudgeUsage(calls=1), "").usage.prompt_tokens == 0


def test_an_upstream_error_is_never_stored_as_the_judges_answer(tmp_path, chat_reply):
    """The rerun of a healthy endpoint buys what the first run could not."""
    pair = Pair("2+2?", "4", "5")
    bodies = [{"error": ERROR}, {"error": ERROR, "choices": [FINISHED]}, {"choices": [FAILED]}]
    for k, body in enumerate(bodies):
        for handler, preference in (
            (lambda request, body=body: httpx.Response(200, json=body), None),
            (lambda request: chat_reply(request, "<verdict>$win</verdict>"), 1.0),
        ):
            options = ClientOptions(transport=httpx.MockTransport(handler), retry=RetryPolicy(2, base_s=0.001))
            judge = ChatJudge(
                "http://127.0.0.1:9/v1", "m", None, orders="one", client=options, store=tmp_path / f"{k}.db"
            )
            verdict = judge.judge_sync([pair])[0]
            judge.close()
            assert verdict.failed is (preference is None)
            assert verdict.reason == (("http_429", "http_429", "unfinished")[k] if preference is None else "")


# -- what stands between -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"), [(201, ""), (203, ""), (202, "http_202"), (204, "http_204"), (206, "http_206")]
)
def test_a_completion_of_a_gateway_that_says_created_is_one(play, code, reason):
    async def work(clock, endpoint, client):
        return await client.complete({})

    reply = play(work, lambda n, t: httpx.Response(code, json=REPLY))
    assert (reply.choice is not None, reply.reason) == (not reason, reason)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "Please try again in 7s.", "code": "rate_limit_exceeded"}},
        [{"error": {"code": 429, "details": [{"@type": "x/google.rpc.RetryInfo", "retryDelay": "7s"}]}}],
        {"error": {"message": "Please retry after 7 seconds."}},
    ],
)
def test_a_wait_that_the_body_asks_for_holds_all(play, body):
    async def work(clock, endpoint, client):
        first = asyncio.create_task(client.complete({}))
        await clock.sleep(2)
        assert (await client.complete({})).choice is not None
        assert (await first).choice is not None
        return endpoint.times

    times = play(work, lambda n, t: httpx.Response(429, json=body) if n == 0 else ok())
    assert times == pytest.approx([0, 8, 8], abs=0.1)


@pytest.mark.parametrize(
    ("code", "says", "attempts"),
    [(429, "false", 1), (500, "False ", 1), (400, "true", 2), (429, "true", 2), (429, "maybe", 2), (400, "", 1)],
)
def test_a_server_that_knows_whether_trying_again_helps_is_believed(play, code, says, attempts):
    async def work(clock, endpoint, client):
        return (await client.complete({})).usage.attempts

    assert play(work, lambda n, t: ok() if n else status(code, x_should_retry=says)) == attempts


def test_words_about_another_wait_do_not_count_beside_a_header(play):
    async def work(clock, endpoint, client):
        assert (await client.complete({})).choice is not None
        return endpoint.times

    body = {"error": {"message": "Please try again in 50s."}}
    answers = [httpx.Response(429, json=body, headers={"retry-after": "3"}), ok()]
    assert play(work, lambda n, t: answers[n]) == pytest.approx([0, 4])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EADDRNOTAVAIL])
def test_what_this_machine_lacks_is_met_with_fewer_at_once_and_is_no_outage(virtual, number):
    """Only so many connections can be open here: nobody is lost to it, and the endpoint is not shut out."""

    class Narrow(Endpoint):
        async def __call__(self, request):
            if self.now >= 4:
                raise httpx.ConnectError("x") from OSError(number, "x")
            return await super().__call__(request)

    async def work(clock):
        retry = RetryPolicy(max_attempts=8, jitter=0)
        client = client_of(Narrow(clock), concurrency=64, first_concurrency=64, retry=retry)
        return await asyncio.gather(*(client.complete({}) for _ in range(40))), client.state

    replies, state = virtual(work)
    assert [reply.reason for reply in replies] == [""] * 40
    assert state.breaker.opened == 0
    assert state.concurrency.limit < 64


def test_a_connection_that_cannot_even_be_made_is_tried_again_and_counts_nothing(play):
    async def work(clock, endpoint, client):
        session, failed = client.exchange.session, []

        def refused():
            if not failed:
                failed.append(1)
                raise OSError(errno.EMFILE, "Too many open files")
            return session()

        client.exchange.session = refused
        reply = await client.complete({}, deadline=clock.now() + 60)
        return reply.choice is not None, client.state.limits.requests, reply.usage.attempts

    assert play(work, requests_per_minute=10) == (True, 1, 2)
