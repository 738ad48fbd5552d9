"""Errors inside replies of status 200, and what gateways and this machine put between."""

from __future__ import annotations

import asyncio
import errno
import json

import httpx
import pytest
from support.chat_client import REPLY, Endpoint, client_of, ok, status

from rmcore.judge import ChatJudge, ClientOptions, Pair, RetryPolicy
from rmcore.judge.base import JudgeUsage
from rmcore.judge.client.reply import read_completion

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
