"""Everything an endpoint can do wrong: each has its reason, its number of attempts, and loses nobody else's verdict."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import pytest

from rmcore._base.clock import SystemClock
from rmcore.judge import Fault, Pair, RecordedJudge, ReplayServer, RetryPolicy

PAIR = Pair("p-win", "a", "b")


@pytest.fixture
def replay(ask, recorded):
    """Ask for PAIR in one order, against a server with the given faults; the verdict and the number of requests."""

    def run(make_judge, faults, **kwargs):
        with ReplayServer(recorded, faults=faults) as server:
            verdict = ask(make_judge(server.base_url, **({"orders": "one"} | kwargs)))
        assert verdict.usage.attempts == server.requests
        return verdict, server.requests

    return run


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_passing_trouble_is_waited_out(replay, make_judge, clock, status):
    verdict, requests = replay(make_judge, [Fault(status), Fault(status)])
    assert (verdict.preference, requests) == (1, 3)
    assert 0.375 <= clock.slept[0] <= 0.5
    assert 0.75 <= clock.slept[1] <= 1.0


def test_lasting_trouble_is_given_up(replay, make_judge, clock):
    verdict, requests = replay(make_judge, lambda _: Fault(500), retry=RetryPolicy(max_attempts=7, jitter=0))
    assert (verdict.preference, verdict.reason, requests) == (None, "http_500", 7)
    assert clock.slept == [0.5, 1, 2, 4, 8, 8]


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 403, 404, 413, 422])
def test_lasting_answers_are_not_asked_again(replay, make_judge, clock, status):
    verdict, requests = replay(make_judge, [Fault(status, headers={"Location": "/v1/models"})])
    assert (verdict.reason, requests, clock.slept) == (f"http_{status}", 1, [])


def test_a_used_up_quota_is_not_asked_again(replay, make_judge):
    verdict, requests = replay(make_judge, [Fault(429, code="insufficient_quota")])
    assert (verdict.reason, requests) == ("insufficient_quota", 1)
    body = json.dumps({"error": {"type": "insufficient_quota", "code": "other", "message": "pay"}}).encode()
    assert replay(make_judge, [Fault(429, body=body)])[0].reason == "insufficient_quota"


@pytest.mark.parametrize(
    ("headers", "slept"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After-Ms": "120", "Retry-After": "7"}, 0.12),
        ({"Retry-After": "Tue, 14 Nov 2023 22:30:05 GMT"}, 5),  # the fake clock stands at 22:30:00
    ],
)
def test_a_server_that_says_when_is_obeyed(replay, make_judge, clock, headers, slept):
    assert replay(make_judge, [Fault(429, headers=headers)])[0].preference == 1
    assert clock.slept == [pytest.approx(slept)]


def test_a_server_that_asks_for_too_much_is_left(replay, make_judge, clock):
    verdict, requests = replay(make_judge, [Fault(429, headers={"Retry-After": "3600"})])
    assert (verdict.reason, requests, clock.slept) == ("http_429", 1, [])


def test_a_wait_past_the_deadline_is_not_begun(replay, make_judge, clock):
    verdict, requests = replay(make_judge, [Fault(503, headers={"Retry-After": "20"})], deadline_s=20)
    assert (verdict.reason, requests, clock.slept) == ("http_503", 1, [])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(body=b"<html>gateway</html>", headers={"Content-Type": "text/html"}), "not_json"),
        (Fault(body=b'{"choices": [{"message": {"content": "<verd'), "not_json"),
        (Fault(body=b""), "not_json"),
        (Fault(body=b"[" * 200_000), "not_json"),
        (Fault(body=b"\xff\xfe\x00\x01"), "not_json"),
        (Fault(body=b"[]"), "not_json"),
        (Fault(body=b"null"), "not_json"),
        (Fault(body=b"9" * 10_000), "not_json"),
        (Fault(body=b"{}"), "no_choices"),
        (Fault(body=b'{"choices": []}'), "no_choices"),
        (Fault(body=b'{"choices": {}}'), "no_choices"),
        (Fault(body=b'{"choices": [null]}'), "no_choices"),
        (Fault(body=b'{"error": {"message": "upstream"}}'), "no_choices"),
        (Fault(body=b'{"choices": [{}]}'), "no_content"),
        (Fault(body=b'{"choices": [{"message": "hi"}]}'), "unparsable"),
        (Fault(body=b"\x1f\x8b\x08", headers={"Content-Encoding": "gzip"}), "bad_encoding"),
        (Fault(status=204, body=b""), "http_204"),
        (Fault(message={"content": None}), "no_content"),
        (Fault(message={"content": ""}), "no_content"),
        (Fault(message={"content": "As an AI…"}), "unparsable"),
        (Fault(message={"content": "[[A]]"}), "unparsable"),
        (Fault(message={"content": "<verdict>$win</verdict><verdict>$loss</verdict>"}), "conflicting"),
        (Fault(message={"content": "<think>hm <verdict>$win</verdict>"}), "length"),
        (Fault(message={"content": None, "reasoning_content": "<verdict>$win</verdict>"}), "no_content"),
        (Fault(message={"content": None, "refusal": "I will not."}), "refusal"),
        (Fault(finish_reason="length"), "length"),
        (Fault(finish_reason="content_filter"), "filter"),
    ],
)
def test_bad_replies_have_a_reason_and_are_not_bought_again(replay, make_judge, fault, reason):
    verdict, requests = replay(make_judge, [fault])
    assert (verdict.preference, verdict.reason, requests) == (None, reason, 1)


def test_json_under_a_wrong_content_type_counts(replay, make_judge):
    assert replay(make_judge, [Fault(headers={"Content-Type": "text/plain"})])[0].preference == 1


def test_reasoning_before_the_answer_is_not_read(replay, make_judge):
    fault = Fault(message={"content": "<think><verdict>$loss</verdict></think><verdict>$tie</verdict>"})
    assert replay(make_judge, [fault])[0].preference == 0


def test_ten_megabytes_are_not_taken(replay, make_judge):
    verdict, requests = replay(make_judge, [Fault(body=b" " * (10 << 20))])
    assert (verdict.reason, requests) == ("reply_too_large", 1)
    assert replay(make_judge, [Fault(500, body=b"x" * (10 << 20))])[0].preference == 1


def test_a_connection_dropped_in_mid_reply(replay, make_judge):
    verdict, requests = replay(make_judge, [Fault(ending="close")])
    assert (verdict.preference, requests) == (1, 2)
    verdict, requests = replay(make_judge, lambda _: Fault(ending="close"), retry=RetryPolicy(max_attempts=2))
    assert (verdict.reason, requests) == ("connection", 2)


def test_a_hang_is_a_timeout_and_tried_again(replay, make_judge):
    verdict, requests = replay(make_judge, [Fault(delay_s=30)], timeout_s=0.3)
    assert (verdict.preference, requests) == (1, 2)
    verdict, requests = replay(
        make_judge, lambda _: Fault(delay_s=30), timeout_s=0.5, retry=RetryPolicy(max_attempts=2)
    )
    assert (verdict.reason, requests) == ("timeout", 2)


@pytest.mark.parametrize("ending", ["silent", "half_close", "reset"])
def test_connections_that_break(replay, make_judge, ending):
    verdict, requests = replay(make_judge, [Fault(ending=ending)])
    assert (verdict.preference, requests) == (1, 2)


@pytest.mark.parametrize("ending", ["drip", "stall"])
def test_a_reply_that_never_ends_is_a_timeout(replay, make_judge, ending):
    # Each read of a drip is quick; it is the whole that takes too long.
    once = RetryPolicy(max_attempts=1)
    verdict, _ = replay(make_judge, [Fault(ending=ending)], timeout_s=0.3, retry=once)
    assert verdict.reason == "timeout"


def test_nobody_listens(ask, make_judge, clock):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    verdict = ask(make_judge(f"http://127.0.0.1:{port}/v1", orders="one"))
    assert (verdict.reason, verdict.usage.attempts, len(clock.slept)) == ("connection", 5, 4)


@pytest.mark.parametrize(
    ("error", "reason", "attempts"),
    [
        (httpx.ConnectError("x"), "connection", 5),
        (httpx.RemoteProtocolError("x"), "connection", 5),
        (httpx.ReadTimeout("x"), "timeout", 5),
        (httpx.PoolTimeout("x"), "timeout", 5),
        (ConnectionResetError(), "connection", 5),
        (httpx.UnsupportedProtocol("x"), "error_UnsupportedProtocol", 1),
        (ZeroDivisionError("x"), "error_ZeroDivisionError", 1),
    ],
)
def test_whatever_a_transport_raises(ask, mock_judge, error, reason, attempts):
    def handler(request):
        raise error

    verdict = ask(mock_judge(handler, orders="one"))
    assert (verdict.reason, verdict.usage.attempts) == (reason, attempts)


def test_the_deadline_ends_a_batch(ask, make_judge, recorded):
    # On the machine's clock: 40 calls of 0.2 s, two at a time, take 4 s, and there is 1 s.
    with ReplayServer(recorded, latency_s=0.2) as server:
        started = time.monotonic()
        verdicts = ask(
            make_judge(server.base_url, clock=SystemClock(), deadline_s=1.0, concurrency=2, orders="one"), *[PAIR] * 40
        )
        took = time.monotonic() - started
    reasons = [v.reason for v in verdicts]
    assert took < 3
    assert 1 <= reasons.count("") <= 10
    assert reasons.count("") + reasons.count("deadline") == 40
    assert server.requests <= 12


def test_the_deadline_also_ends_a_wait_for_a_place(mock_judge):
    async def handler(request):
        await asyncio.Event().wait()

    async def run():
        judge = mock_judge(handler, clock=SystemClock(), concurrency=1, orders="one", deadline_s=None)
        hog = asyncio.create_task(judge.judge([PAIR]))
        await asyncio.sleep(0.01)
        judge.deadline_s = 0.05
        verdicts = await judge.judge([PAIR, PAIR])
        hog.cancel()
        return verdicts

    assert [(v.reason, v.usage.attempts) for v in asyncio.run(run())] == [("deadline", 0)] * 2


def test_one_order_failing_leaves_the_other(ask, make_judge, recorded):
    with ReplayServer(recorded, faults=[Fault(400)]) as server:
        verdict = ask(make_judge(server.base_url, concurrency=1))
    assert (verdict.preference, verdict.reason, verdict.flipped) == (1, "one_order:http_400", False)
    assert verdict.usage.attempts == 2


def test_many_faults_lose_no_pair(ask, make_judge, rows):
    kinds = [
        None,
        Fault(500),
        Fault(429, headers={"Retry-After": "1"}),
        Fault(400),
        Fault(ending="close"),
        None,
        Fault(body=b"{"),
    ]
    with ReplayServer(RecordedJudge.from_rows(rows), faults=lambda n: kinds[n % len(kinds)]) as server:
        verdicts = ask(make_judge(server.base_url, concurrency=8), *[PAIR] * 60)
    assert len(verdicts) == 60
    assert sum(v.usage.attempts for v in verdicts) == server.requests
    for verdict in verdicts:
        assert verdict.preference == 1 or verdict.reason
