"""The group server's client against the real application, and against failures of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import pickle
from typing import Any

import httpx
import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.engine import RewardEngine
from rmcore.integrations.client import GroupClient, ServerError
from rmcore.integrations.server.assembly import ConflictError, LateError
from rmcore.integrations.server.settings import ServeSettings

URL = "http://127.0.0.1:8400"
PROMPT = "red tree house"
RESPONSES = ["good clear", "bad rude", "odd right", "red blue"]


@pytest.fixture(scope="module")
def engine(reward_model) -> RewardEngine:
    return RewardEngine(reward_model)


def close(ours: Any, exact: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), exact, rtol=0, atol=1e-9)


def answering(*answers: httpx.Response | Exception) -> httpx.MockTransport:
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        value = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(value, Exception):
            raise value
        return httpx.Response(value.status_code, headers=value.headers, content=value.content)

    return httpx.MockTransport(answer)


@pytest.fixture
def failing(group_client, stepping_clock):
    """A client whose server gives these answers, the last one for ever."""

    def make(*answers: httpx.Response | Exception, **options: Any) -> GroupClient:
        return group_client(answering(*answers), **{"clock": stepping_clock()} | options)

    return make


def error(status: int, message: str = "why", kind: str = "kind", **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, json={"error": {"type": kind, "message": message}})


def test_a_group_comes_back_as_the_engine_scores_it(engine, served, group_client):
    exact = engine.score([PROMPT], [RESPONSES])[0]
    result = asyncio.run(group_client(served(engine)).groups(PROMPT, RESPONSES, id="g1"))
    close(result.advantages, exact.advantages)
    close(result.rewards, exact.rewards)
    close(result.rewards_group_mean, exact.rewards_for("group-mean"))
    close(result.preference, exact.preference)
    close(result.uncertainty, exact.uncertainty)
    assert result.record["id"] == "g1"


def test_members_meet_and_each_gets_its_own_part(engine, served, group_client):
    prompt = [{"role": "user", "content": PROMPT, "name": "somebody"}]
    exact = engine.score([prompt], [RESPONSES])[0]
    client = group_client(served(engine))

    async def all_of() -> list[Any]:
        order = [2, 0, 3, 1]
        parts = await asyncio.gather(*(client.rendezvous("u", k, 4, prompt, RESPONSES[k]) for k in order))
        return [parts[order.index(k)] for k in range(4)]

    parts = asyncio.run(all_of())
    close([part.advantage for part in parts], exact.advantages)
    close([part.reward for part in parts], exact.rewards)
    close([part.reward_group_mean for part in parts], exact.rewards_for("group-mean"))
    assert all(part.complete and part.slots == (0, 1, 2, 3) for part in parts)


def test_refusals_of_the_server_are_the_errors_of_the_assembly(engine, served, group_client):
    client = group_client(served(engine, ServeSettings(time_limit_s=0.05, first_start=True)))

    async def run() -> Any:
        part = await client.rendezvous("u", 0, 2, PROMPT, "good")
        assert part.advantage is None, "alone of two there is no preference, which is not 0"
        assert (part.slots, part.complete) == ((0,), False)
        with pytest.raises(LateError, match="time limit"):
            await client.rendezvous("u", 1, 2, PROMPT, "bad")
        with pytest.raises(ConflictError, match="another text"):
            await client.rendezvous("u", 0, 2, PROMPT, "rude")
        with pytest.raises(InputError, match="slot"):
            await client.rendezvous("u", 2, 2, PROMPT, "good")

    asyncio.run(run())


def test_a_lost_answer_is_asked_for_again_and_scored_once(engine, served, group_client, stepping_clock):
    server = served(engine, lost=1)
    clock = stepping_clock()
    result = asyncio.run(group_client(server, clock=clock).groups(PROMPT, RESPONSES))
    close(result.advantages, engine.score([PROMPT], [RESPONSES])[0].advantages)
    keys = [headers["idempotency-key"] for _, headers, _ in server.requests]
    assert len(keys) == 2
    assert len(set(keys)) == 1
    assert server.service.scorer.stats.groups == 1


def test_retry_after_is_obeyed_within_the_deadline(failing, stepping_clock):
    good = httpx.Response(200, json={"rewards": [0.5], "scores": [0.6], "extra_logs": {}})
    clock = stepping_clock()
    client = failing(error(429, **{"Retry-After": "7"}), httpx.ConnectError("x"), error(503), good, clock=clock)
    assert asyncio.run(client.get_reward(["ab"], ["a"]))["rewards"] == [0.5]
    assert clock.waits[0] == 7
    assert len(clock.waits) == 3
    assert all(0 < wait <= 8 for wait in clock.waits[1:])


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([error(429, "64 members wait", **{"Retry-After": "400"})], "HTTP 429 .64 members wait.*1 try"),
        ([error(503)], r"HTTP 503 .*tries"),
        ([httpx.ConnectError("no route, bearer secret")], "failed connection .ConnectError"),
        ([httpx.ReadTimeout("slow")], "no answer in time"),
        ([httpx.RemoteProtocolError("cut")], "RemoteProtocolError"),
    ],
)
def test_no_answer_before_the_deadline_raises_and_names_the_last_cause(answers, says, failing, stepping_clock):
    clock = stepping_clock()
    client = failing(*answers, clock=clock, timeout_s=300.0)
    with pytest.raises(ServerError, match=says) as caught:
        asyncio.run(client.rendezvous("u", 0, 2, PROMPT, "good"))
    assert "secret" not in str(caught.value)
    assert clock.time < 300


@pytest.mark.parametrize("status", [404, 405, 421, 500])
def test_what_will_not_change_is_not_tried_again(status, failing, stepping_clock):
    clock = stepping_clock()
    with pytest.raises(ServerError, match=f"HTTP {status}") as caught:
        asyncio.run(failing(error(status), clock=clock).groups(PROMPT, RESPONSES))
    assert caught.value.status == status
    assert not clock.waits


def test_a_proxy_whose_server_died_is_asked_again(failing, stepping_clock):
    """Ray Serve's proxy says 500, in plain text, where the process that it had passed the request to has died."""
    clock = stepping_clock()
    answers = httpx.Response(500, text="Internal Server Error"), error(503, kind="no_preference")
    client = failing(*answers, clock=clock)
    with pytest.raises(ServerError, match="HTTP 503"):
        asyncio.run(client.get_reward(["ab"], ["a"]))
    assert len(clock.waits) == 1


def test_a_response_without_a_preference_is_no_reason_to_ask_again(failing, stepping_clock):
    clock = stepping_clock()
    with pytest.raises(ServerError, match="503"):
        asyncio.run(failing(error(503, kind="no_preference"), clock=clock).get_reward(["ab"], ["a"]))
    assert not clock.waits


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[]", b"{}", b'{"advantages": null}', b'{"advantages": [1, "x"]}', b'{"advantages": [1.0]}', b"\xff"],
)
def test_a_strange_reply_raises_and_is_no_reward(body, failing):
    with pytest.raises(ServerError):
        asyncio.run(failing(httpx.Response(200, content=body)).groups(PROMPT, RESPONSES))
    with pytest.raises(ServerError):
        asyncio.run(failing(httpx.Response(200, content=body)).rendezvous("u", 0, 2, PROMPT, "good"))
    with pytest.raises(ServerError):
        asyncio.run(failing(httpx.Response(200, content=body)).get_reward(["ab"], ["a"]))


def test_hostile_error_text_is_short_and_printable(failing):
    with pytest.raises(InputError) as caught:
        asyncio.run(failing(error(422, "\x1b[31m\n" + "x" * 100_000)).groups(PROMPT, RESPONSES))
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_the_token_is_read_from_the_environment_and_never_shown(engine, monkeypatch, served, group_client):
    server = served(engine, ServeSettings(token="s3cret-token"))
    client = group_client(server)
    monkeypatch.delenv("RMCORE_SERVE_TOKEN", raising=False)
    with pytest.raises(ServerError, match="RMCORE_SERVE_TOKEN; it is not set"):
        asyncio.run(client.groups(PROMPT, RESPONSES))
    monkeypatch.setenv("RMCORE_SERVE_TOKEN", "wrong")
    with pytest.raises(ServerError, match="it was refused"):
        asyncio.run(client.groups(PROMPT, RESPONSES))
    monkeypatch.setenv("RMCORE_SERVE_TOKEN", "s3cret-token")
    assert len(asyncio.run(client.groups(PROMPT, RESPONSES)).advantages) == 4
    assert b"s3cret-token" not in pickle.dumps(GroupClient(URL))
    assert "s3cret-token" not in repr(client) + repr(vars(client))


def test_it_pickles_as_its_settings_and_serves_several_loops(engine, served, group_client):
    copy = pickle.loads(pickle.dumps(GroupClient(URL, timeout_s=5.0, token_env="OTHER")))
    assert (copy.url, copy.timeout_s, copy.token_env) == (URL, 5.0, "OTHER")
    client = group_client(served(engine))
    for _ in range(3):
        asyncio.run(client.groups(PROMPT, RESPONSES))
    gc.collect()
    assert len(client._connections) <= 1


def test_a_cancelled_call_leaves_its_siblings_alone(engine, served, group_client):
    client = group_client(served(engine))

    async def run() -> list[Any]:
        first = asyncio.create_task(client.rendezvous("u", 0, 2, PROMPT, "good"))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(client.rendezvous("u", 1, 2, PROMPT, "bad"))
        again = await client.rendezvous("u", 0, 2, PROMPT, "good")
        return [again, await second]

    parts = asyncio.run(run())
    assert parts[0].advantage == -parts[1].advantage != 0


def test_any_text_reaches_the_server(engine, served, group_client):
    server = served(engine)
    texts = ["\ud800 lone", "null \x00 here", "ünïcode ✓"]
    with contextlib.suppress(InputError):  # the server may refuse half a character, but not for want of encoding
        asyncio.run(group_client(server).groups(PROMPT, texts))
    assert json.loads(server.requests[0][2])["responses"] == texts


def test_copies_in_other_processes_do_not_share_idempotency_keys(engine, served):
    server = served(engine)
    original = GroupClient(URL)
    for client in (original, *(pickle.loads(pickle.dumps(original)) for _ in range(2))):
        client._connect(server)
        for texts in (RESPONSES, RESPONSES[::-1]):
            assert len(asyncio.run(client.groups(PROMPT, texts)).advantages) == 4
    keys = [headers["idempotency-key"] for _, headers, _ in server.requests]
    assert len(set(keys)) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "ftp://host"}, "url"),
        ({"url": "http://user:pw@host"}, "credentials"),
        ({"url": URL, "token_env": "sk-123 not a name"}, "token_env"),
        ({"url": URL, "timeout_s": 0.0}, "timeout_s"),
        ({"url": URL, "attempt_timeout_s": float("nan")}, "attempt_timeout_s"),
    ],
)
def test_unusable_settings_are_refused_without_quoting_secrets(options, says):
    with pytest.raises(InputError, match=says) as caught:
        GroupClient(**options)
    assert "sk-123" not in str(caught.value)
    assert "pw" not in str(caught.value)
