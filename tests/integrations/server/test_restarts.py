"""A server that begins anew does not know what the one before it has answered: such groups are whole or refused."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import httpx
import pytest

from rmcore._base.errors import InputError
from rmcore.integrations.client import GroupClient, LateError
from rmcore.integrations.server.assembly import GroupAssembly
from rmcore.integrations.server.doubts import AGAIN
from rmcore.integrations.server.placing import group_key, owner

TEXTS = ["1 good", "2 bad", "4 kind"]
KINDS = ["get_reward", "rendezvous", "rendezvous by content", "verify"]


def call(kind: str, slot: int, group: str = "red tree") -> tuple[str, dict[str, Any]]:
    if kind == "get_reward":
        return "/get_reward", {"query": [f"{group} {TEXTS[slot]}"], "prompts": [group]}
    if kind == "verify":
        output = {"type": "message", "role": "assistant", "content": TEXTS[slot]}
        return "/verify", {"responses_create_params": {"input": group}, "response": {"output": [output]}}
    name = {"group_id": group, "slot": slot} if kind == "rendezvous" else {}
    return "/v1/rendezvous", {"k": 3, "prompt": "red tree", "response": TEXTS[slot], **name}


async def post(client: httpx.AsyncClient, kind: str, *slots: int, again: bool = False) -> list[httpx.Response]:
    headers = {AGAIN: "1"} if again else {}
    calls = [call(kind, slot) for slot in slots]
    return await asyncio.gather(*(client.post(path, json=body, headers=headers) for path, body in calls))


def refused(answer: httpx.Response) -> bool:
    if answer.status_code != 410:
        return False
    error = answer.json()["error"]
    assert error["type"] == "late"
    assert "of 3 within" in error["message"]
    assert "a server that has ended may have answered the others" in error["message"]
    return True


def partial(answer: httpx.Response, kind: str) -> bool:
    """Scored without those who did not come."""
    assert answer.status_code == 200, answer.text
    return not kind.startswith("rendezvous") or answer.json()["complete"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_in_its_first_time_limit_a_group_is_whole_or_refused_and_refused_again(make_app, talk, echo_engine, kind):
    async def main(client: httpx.AsyncClient) -> None:
        assert all(map(refused, await post(client, kind, 0, 2)))
        assert not echo_engine.scored
        doubts.first_s = 0.0  # as the time limit has passed since it began
        assert all(map(refused, await post(client, kind, 0, 2))), "they were refused before, and are as few"
        whole = await post(client, kind, 0, 1, 2)
        assert [answer.status_code for answer in whole] == [200] * 3, "all of them came"
        assert [len(texts) for _, texts in echo_engine.scored] == [3]

    app = make_app(echo_engine, time_limit_s=0.2, group_size=3, nemo_gym=True)
    doubts = app.state.service.assembly.doubts
    talk(app, main)


@pytest.mark.parametrize("kind", KINDS)
def test_later_and_in_a_first_server_those_who_came_are_scored_unless_a_call_was_made_again(
    make_app, talk, echo_engine, kind
):
    async def main(client: httpx.AsyncClient) -> None:
        assert all(map(refused, await post(client, kind, 0, 2, again=True)))
        assert not echo_engine.scored

    async def another(client: httpx.AsyncClient) -> None:
        assert all(partial(answer, kind) for answer in await post(client, kind, 0, 2))
        assert [len(texts) for _, texts in echo_engine.scored] == [2]

    for work in (main, another):
        app = make_app(echo_engine, time_limit_s=0.2, group_size=3, nemo_gym=True, first_start=True)
        talk(app, work)


def test_a_refusal_is_remembered_as_long_as_results_and_only_so_many(manual_clock):
    async def score(prompt: Any, responses: Any) -> Any:
        raise AssertionError("none is whole")

    async def refusals(assembly: GroupAssembly, *names: str) -> list[BaseException]:
        calls = [asyncio.create_task(assembly.join(name, 0, 2, "p", "x")) for name in names]
        await manual_clock.advance(10.0)
        return await asyncio.gather(*calls, return_exceptions=True)  # type: ignore[return-value]

    async def main() -> None:
        assembly = GroupAssembly(score, time_limit_s=10.0, keep_s=100.0, max_kept=2, doubt_s=5.0, clock=manual_clock)
        told = await refusals(assembly, "a", "b", "c")
        assert [type(one) for one in told] == [LateError] * 3
        # Of three the latest two are known, and the first is scored as it is.
        told = await refusals(assembly, "a", "b")
        assert [type(one) for one in told] == [AssertionError, LateError]
        await manual_clock.advance(101.0)
        told = await refusals(assembly, "b", "c")
        assert [type(one) for one in told] == [AssertionError] * 2

    asyncio.run(asyncio.wait_for(main(), 60))
    with pytest.raises(InputError, match="doubt_s: got nan"):
        GroupAssembly(score, doubt_s=float("nan"))


class LosesAnswers(httpx.AsyncBaseTransport):
    """The first try is refused a connection, the second loses its answer, the third is told to wait."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request.headers.get(AGAIN))
        if len(self.seen) == 1:
            raise httpx.ConnectError("refused")
        if len(self.seen) == 2:
            raise httpx.ReadError("reset")
        if len(self.seen) == 3:
            return httpx.Response(429, json={"error": {"type": "busy", "message": "later"}})
        return httpx.Response(200, json={"rewards": [1.0], "scores": [0.5]})


def test_the_client_says_that_an_answer_was_lost(stepping_clock):
    transport = LosesAnswers()
    client = GroupClient("http://127.0.0.1:8400", transport=transport, clock=stepping_clock())
    asyncio.run(client.get_reward(["p 1"], ["p"]))
    assert transport.seen == [None, None, "1", "1"], "not where nobody was reached, and on every try from then on"


@pytest.mark.slow
def test_a_server_that_is_killed_behind_several_and_begins_anew(server):
    """SIGKILL: of a group that it has answered, who asks again is refused; what it had under way meets anew."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [one.getsockname()[1] for one in (first, second)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    limits = ["--group-size", "3", "--time-limit", "6", "--peers", ",".join(urls)]
    processes = [server("--port", str(port), *limits)[0] for port in ports]
    mine = {url: [p for k in range(40) if owner(group_key(p := f"red tree {k}"), urls) == url] for url in urls}
    (killed, stays), names = urls, mine[urls[0]]

    def single(name: str, slot: int) -> dict[str, Any]:
        return call("get_reward", slot, name)[1]

    async def main() -> None:
        async with httpx.AsyncClient(timeout=60) as client:

            async def ask(url: str, name: str, *slots: int) -> list[httpx.Response]:
                return await asyncio.gather(
                    *(client.post(f"{url}/get_reward", json=single(name, slot)) for slot in slots)
                )

            before = await ask(stays, names[0], 0, 1, 2)
            assert [answer.status_code for answer in before] == [200] * 3
            waiting = [asyncio.create_task(client.post(f"{stays}/get_reward", json=single(names[1], 0)))]
            while True:  # until it is there: what it holds is told by its page
                if "rmcore_members_waiting 1.0" in (await client.get(f"{killed}/metrics")).text:
                    break
                await asyncio.sleep(0.02)
            processes[0].send_signal(signal.SIGKILL)
            (lost,) = await asyncio.gather(*waiting)
            assert (lost.status_code, lost.json()["error"]["type"]) == (503, "peer_unreachable")
            await asyncio.to_thread(processes[0].wait)
            await asyncio.to_thread(server, "--port", str(ports[0]), *limits)
            rest, anew, named = await asyncio.gather(
                ask(stays, names[0], 0, 2), ask(stays, names[1], 0, 1, 2), ask(killed, names[2], 1)
            )
            assert [refused(answer) for answer in (*rest, *named)] == [True] * 3
            assert [answer.status_code for answer in anew] == [200] * 3

    asyncio.run(asyncio.wait_for(main(), 120))
