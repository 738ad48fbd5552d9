"""A reply that comes while its request is still being sent is read, though its connection is reset then."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from rmcore._base.client.address import Address
from rmcore._base.client.exchange import Attempt, HttpExchange
from rmcore._base.client.options import ClientOptions
from rmcore._base.early_reply import _Stream, read_while_sending
from rmcore._base.http import Connections

LARGE = b"x" * 8_000_000
"""More than the sockets between hold, so that some of it is not out when the reply comes."""
REFUSAL = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo large"


def head_of(connection: socket.socket) -> int:
    """Read a request's headers, and return how much of its body is still to come."""
    read = b""
    while b"\r\n\r\n" not in read:
        if not (more := connection.recv(65_536)):
            raise ConnectionError
        read += more
    head, _, body = read.partition(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return int(length.split(b":")[1]) - len(body)


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that hands every connection to ``answer``, one after the other; its URL."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, suppress(OSError):
                    answer(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(30)


@contextmanager
def clients() -> Iterator[Callable[[], httpx.AsyncClient]]:
    connections = Connections(timeout_s=30, trust_env=False)

    def client() -> httpx.AsyncClient:
        with connections.here().client() as made:
            return made

    yield client


def test_a_refusal_while_the_body_is_sent_is_what_the_caller_gets():
    def refuse(connection: socket.socket) -> None:
        head_of(connection)
        connection.recv(65_536)  # the body is on its way
        connection.sendall(REFUSAL)
        # To close with unread bytes resets the connection.

    async def main(url: str) -> list[tuple[int, str]]:
        client = make()
        replies = [await client.post(url, content=LARGE) for _ in range(10)]
        await client.aclose()
        return [(reply.status_code, reply.text) for reply in replies]

    async def asked(url: str) -> Attempt:
        exchange = HttpExchange(Address.of(url), None, ClientOptions())
        with exchange.session() as send:
            attempt = await send({}, LARGE, "")
        await exchange.aclose()
        return attempt

    with serving(refuse) as url, clients() as make:
        assert asyncio.run(main(url)) == [(413, "too large")] * 10
        attempt = asyncio.run(asked(url))
    # As a broken connection it would be tried again, and count against the endpoint.
    assert (attempt.reason, attempt.status, attempt.retry, attempt.alive) == ("http_413", 413, False, True)
    assert "too large" in attempt.detail


def test_ordinary_replies_come_as_before_over_one_connection():
    taken = []

    def answer(connection: socket.socket) -> None:
        taken.append(connection)
        for number in range(4):
            left = head_of(connection)
            while left and (read := connection.recv(min(left, 1 << 20))):
                left -= len(read)
            text = str(number).encode() * 200_000
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)

    async def main(url: str) -> None:
        client = make()
        for number, body in enumerate((LARGE, b"small", LARGE, b"")):
            reply = await client.post(url, content=body)
            assert reply.text == str(number) * 200_000
        await client.aclose()

    with serving(answer) as url, clients() as make:
        asyncio.run(main(url))
    assert len(taken) == 1


@pytest.mark.parametrize("reads", [True, False])
def test_a_limit_and_a_caller_that_leaves_end_it_and_leave_nothing_behind(reads):
    hold = threading.Event()

    def silent(connection: socket.socket) -> None:
        left = head_of(connection)
        while reads and left and (read := connection.recv(1 << 20)):
            left -= len(read)
        hold.wait(30)

    async def main(url: str) -> None:
        client = make()
        expected = httpx.ReadTimeout if reads else httpx.WriteTimeout
        with pytest.raises(expected):
            await client.post(url, content=LARGE, timeout=0.3)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.post(url, content=LARGE)
        hold.set()
        await client.aclose()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with serving(silent) as url, clients() as make:
        asyncio.run(main(url))


def test_closing_tells_whoever_is_cancelled_meanwhile():
    """A stream whose read ends late, as one that says goodbye does."""

    class Slow:
        def __init__(self) -> None:
            self.closed, self.ends, self.waits = False, asyncio.Event(), asyncio.Event()

        async def read(self, size: int, timeout: float | None = None) -> bytes:
            try:
                await asyncio.sleep(60)
            finally:
                self.waits.set()
                await self.ends.wait()
            return b""

        async def write(self, buffer: bytes, timeout: float | None = None) -> None: ...

        async def aclose(self) -> None:
            self.closed = True

    async def main() -> None:
        slow = Slow()
        stream = _Stream(slow)
        await stream.write(LARGE)
        closing = asyncio.create_task(stream.aclose())
        await slow.waits.wait()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert slow.closed
        slow.ends.set()

    asyncio.run(main())


def test_a_client_without_such_a_pool_is_left_as_it_is():
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(200)))
    read_while_sending(client)
    assert asyncio.run(client.get("http://127.0.0.1/")).status_code == 200
