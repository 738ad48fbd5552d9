"""Clients that go away, and a server that does."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
from support.server_calls import GROUP, member, single, until

# -- going away and going down ---------------------------------------------------------------------------------------


def test_a_client_that_hangs_up_leaves_the_group_and_may_come_back(make_app, serve_app, echo_engine):
    app = make_app(echo_engine)
    service = app.state.service
    with serve_app(app) as url:
        content = json.dumps(member(0, "3")).encode()
        head = f"POST /v1/rendezvous HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as raw:
            raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            _wait(lambda: service.assembly.waiting == 1)
        _wait(lambda: service.assembly.waiting == 0)
        assert service.assembly.open_groups == 1

        async def main():
            async with httpx.AsyncClient(base_url=url) as client:
                calls = (client.post("/v1/rendezvous", json=member(k, text)) for k, text in ((1, "1"), (0, "3")))
                return [a.json() for a in await asyncio.gather(*calls)]

        second, first = asyncio.run(main())
    assert (first["advantage"], second["advantage"]) == (2.0, -2.0)
    assert echo_engine.scored == [("p", ["3", "1"])]
    assert service.guard.requests["/v1/rendezvous", "disconnected"] == 1


def test_a_client_that_hangs_up_while_queued_is_not_scored(make_app, serve_app, echo_engine):
    echo_engine.open = False
    app = make_app(echo_engine, batch_groups=1, batches_in_flight=1)
    service = app.state.service
    with serve_app(app) as url:

        async def main():
            async with httpx.AsyncClient(base_url=url) as client:
                first = asyncio.create_task(client.post("/v1/groups", json=GROUP))
                await until(lambda: service.scorer.in_flight == 1)
                second = asyncio.create_task(client.post("/v1/groups", json={**GROUP, "prompt": "unwanted"}))
                await until(lambda: service.scorer.queued == 1)
                second.cancel()
                await until(lambda: service.scorer.queued == 0)
                echo_engine.open = True
                return (await first).status_code

        assert asyncio.run(main()) == 200
    assert [prompt for prompt, _ in echo_engine.scored] == ["red tree"]


def _wait(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_drain_says_what_it_waits_for(make_app, talk, echo_engine, monkeypatch, caplog):
    async def main(client):
        echo_engine.open = False
        call = asyncio.create_task(client.post("/v1/groups", json=GROUP))
        await until(lambda: service.scorer.in_flight == 1)
        drained = asyncio.create_task(service.drain())
        await until(lambda: caplog.messages)
        echo_engine.open = True
        await drained
        return (await call).status_code

    monkeypatch.setattr("rmcore.integrations.server.service._TOLD_S", 0.01)
    app = make_app(echo_engine)
    service = app.state.service
    assert talk(app, main) == 200
    told = "draining: 0 groups open, 0 members waiting, 0 groups in the queue, 1 batches under way"
    assert caplog.messages[0] == told


def test_draining_takes_nothing_new_and_finishes_what_is_open(make_app, talk, echo_engine):
    async def main(client):
        half = asyncio.create_task(client.post("/v1/rendezvous", json=member(0, "3")))
        lone = asyncio.create_task(client.post("/v1/rendezvous", json=member(0, "3", group="lone")))
        await until(lambda: service.assembly.waiting == 2)
        before = (await client.get("/ready")).status_code
        drained = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        refused = [
            await client.post("/v1/rendezvous", json=member(0, "1", group="new")),
            await client.post("/get_reward", json=single("1")),
            await client.post("/v1/groups", json=GROUP),
        ]
        ready, health = await client.get("/ready"), await client.get("/health")
        other = await client.post("/v1/rendezvous", json=member(1, "1"))
        await drained
        refused.append(await client.post("/v1/groups", json=GROUP))
        return before, refused, ready, health, (await half).json(), other.json(), (await lone).json()

    app = make_app(echo_engine, group_size=2, drain_s=0.3, first_start=True)
    service = app.state.service
    before, refused, ready, health, half, other, lone = talk(app, main)
    assert before == 200
    assert [(r.status_code, "retry-after" in r.headers) for r in refused] == [(429, True)] * 4
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    assert (health.status_code, health.json()["status"]) == (200, "draining")
    assert half["complete"]
    assert other["complete"]
    assert not lone["complete"]
