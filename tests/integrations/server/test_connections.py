"""Connections on real sockets: an early refusal reaches its client, and none may take for ever to say what it wants."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn

from rmcore.integrations.server.connections import bounded

GROUP = json.dumps({"prompt": "red", "responses": ["good tree", "bad tree"]}).encode()
JSON = {"Content-Type": "application/json"}
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextmanager
def serving(app: Any, head_s: float) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=bounded(head_s), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def chunks() -> Iterator[bytes]:
    for _ in range(100):
        yield b" " * 80_000


@pytest.mark.parametrize("body", [b" " * 8_000_000, "chunks"])
def test_a_client_that_writes_before_it_reads_learns_that_its_body_is_too_long(make_app, echo_engine, body):
    with serving(make_app(echo_engine, max_body=100_000), 60) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(3):
            connection.request("POST", "/v1/groups", chunks() if body == "chunks" else body, JSON)
            refused = connection.getresponse()
            assert (refused.status, json.loads(refused.read())["error"]["type"]) == (413, "too_large")
            # The rest was thrown away, and the connection goes on.
            connection.request("POST", "/v1/groups", GROUP, JSON)
            assert connection.getresponse().read().startswith(b'{"id":null,"advantages":')
        connection.close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_refusal_comes_before_the_end_of_a_connection_that_is_to_be_closed(make_app, echo_engine, version):
    """As urllib asks for it, and nginx, which speaks HTTP/1.0 to what is behind it."""
    head = f"POST /v1/groups HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 8000000\r\n\r\n"
    with serving(make_app(echo_engine, max_body=100_000), 60) as port:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), 60) as client:
                client.sendall(head.encode())
                for _ in range(100):
                    client.sendall(b" " * 80_000)
                answer = b""
                while got := client.recv(65_536):
                    answer += got
            assert answer.startswith(b"HTTP/1.1 413")
            assert b"too_large" in answer


def test_what_lingers_does_not_keep_the_server(make_app, echo_engine):
    head = b"POST /v1/groups HTTP/1.0\r\nHost: localhost\r\nContent-Length: 8000000\r\n\r\n"
    begun = time.monotonic()
    with serving(make_app(echo_engine, max_body=1000), 60) as port:
        client = socket.create_connection(("127.0.0.1", port), 60)
        client.sendall(head + b" " * 5000)
        answer = b""
        while got := client.recv(65_536):
            answer += got
        assert b"too_large" in answer
    assert time.monotonic() - begun < 30  # it would linger for a minute
    client.close()


def test_a_head_that_does_not_come_is_given_up(make_app, echo_engine):
    with serving(make_app(echo_engine), 0.2) as port:
        for before in (b"", HEAD):
            for begun in (b"", HEAD[:20], b"POST /v1/groups HTTP/1.1\r\nHost: x\r\nContent-Le")[len(before) > 0 :]:
                with socket.create_connection(("127.0.0.1", port), 60) as client:
                    client.sendall(before)
                    answer = client.recv(65_536) if before else b"}"
                    while not answer.endswith(b"}"):
                        answer += client.recv(65_536)
                    client.sendall(begun)
                    assert client.recv(65_536) == b""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_refused_body_does_not_come_for_ever(make_app, echo_engine, version):
    head = f"POST /v1/groups HTTP/{version}\r\nHost: localhost\r\nContent-Length: 1000000000000\r\n\r\n"
    with serving(make_app(echo_engine, max_body=1000), 0.2) as port:
        client = socket.create_connection(("127.0.0.1", port), 60)
        client.sendall(head.encode())
        assert client.recv(65_536).startswith(b"HTTP/1.1 413")
        begun = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < begun + 60:
                client.sendall(b" " * 10_000)
                time.sleep(0.01)
        assert time.monotonic() < begun + 60
        client.close()


def test_what_takes_long_to_answer_is_not_given_up(make_app, echo_engine):
    body = json.dumps({"group_id": 1, "slot": 0, "k": 2, "prompt": "red", "response": "good"}).encode()
    with serving(make_app(echo_engine, time_limit_s=1.0, first_start=True), 0.2) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for _ in range(2):
            connection.request("POST", "/v1/rendezvous", body, JSON)
            reply = connection.getresponse()
            assert (reply.status, json.loads(reply.read())["complete"]) == (200, False)
        connection.close()
