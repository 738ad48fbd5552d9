"""A loopback judge that bears thousands of connections on one thread, and does everything wrong on demand.

It reads a question back with ``JudgePrompt.parse``; the response that says it is worth more wins. Faults come in two
ways: spread evenly over the requests, one kind after the other in a shuffled order (``--faults``), and as storms, in
which for a while every request is refused (``--storm AT:SECONDS:KIND``, AT being the number of the request that sets
it off), since overload comes in storms.

    python -m rmcore.bench.judge_server --faults 0.2        # prints the base URL; serves until its input ends
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmcore._base.errors import InputError
from rmcore.judge.question.prompt import JudgePrompt, ParsedPrompt

__all__ = ["FAULTS", "STORMS", "JudgeServer", "Storm", "main", "worth_of"]

_WORTH = re.compile(r"worth (\d+)")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*(\d{1,9})")
_LARGE = b" " * (10 << 20)
_DRIP_S = 0.1

STORMS: dict[str, tuple[int, dict[str, str]]] = {
    "429": (429, {}),
    "429_retry_after": (429, {"Retry-After": "1"}),
    "503_retry_after": (503, {"Retry-After-Ms": "500"}),
}
"""Refusals that come in storms."""

_ENDINGS = ("hang", "stall", "drip", "silent", "close", "half_close", "reset")
_STATUSES = {"http_500": 500, "http_502": 502, "http_401": 401, "http_403": 403}
_BODIES = {
    "truncated_json": b'{"choices": [{"message": {"content": "<verdict>',
    "html": b"<html><body>Please log in.</body></html>",
    "empty_choices": b'{"choices": []}',
    "10_mb_reply": _LARGE,
}
_MESSAGES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "null_content": lambda win, loss: {"content": None},
    "refusal": lambda win, loss: {"content": None, "refusal": "I would rather not."},
    "both_labels": lambda win, loss: {"content": f"<verdict>{win}</verdict> <verdict>{loss}</verdict>"},
    "quoted_in_reasoning": lambda win, loss: {
        "content": "I cannot say.",
        "reasoning_content": f"<verdict>{win}</verdict>",
    },
    "unclosed_think": lambda win, loss: {"content": f"<think>So it is <verdict>{loss}</verdict>"},
}
_FINISHES = {"length": "length", "content_filter": "content_filter"}

FAULTS = (*_ENDINGS, *_STATUSES, "10_mb_error", *_BODIES, *_MESSAGES, *_FINISHES)
"""Faults that are spread evenly."""


def worth_of(text: str) -> int:
    """What a response says it is worth."""
    found = _WORTH.search(text)
    if found is None:
        raise ValueError("no worth")
    return int(found[1])


@dataclass(frozen=True)
class Storm:
    """From request number ``at`` on, for ``seconds``, every request is refused in the way of ``kind``."""

    at: int
    seconds: float
    kind: str

    @classmethod
    def parse(cls, text: str) -> Storm:
        """From ``AT:SECONDS:KIND``; ValueError otherwise."""
        at, seconds, kind = text.split(":")
        if kind not in STORMS:
            raise ValueError(f"kind: got {kind}, expected one of {', '.join(STORMS)}")
        return cls(int(at), float(seconds), kind)


@dataclass
class JudgeServer:
    """The endpoint. ``await start()`` on the loop that is to serve.

    Attributes:
        latency_s: bounds of the time an answer takes, drawn evenly.
        rate: answers a second at most, as of a machine that shares itself among its requests: each takes longer by the
            number in flight divided by ``rate``. 0: any number.
        faults: share of the requests that meet one of :data:`FAULTS`.
        storms: in order of their beginning.
    """

    latency_s: tuple[float, float] = (0.0, 0.0)
    rate: float = 0.0
    faults: float = 0.0
    storms: Sequence[Storm] = ()
    seed: int = 0
    requests: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    connections: int = 0
    peak_connections: int = 0
    answers: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._order: list[str] = []
        self._storms = list(self.storms)
        self._storm_ends = 0.0
        self._storm = ""

    async def start(self) -> str:
        """Bind and serve on the running loop; the base URL."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=8192)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    def stats(self) -> dict[str, Any]:
        """What happened so far, JSON values; every request is in exactly one of ``answers``' counts."""
        return {
            "requests": self.requests,
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "peak_connections": self.peak_connections,
            "answers": dict(sorted(self.answers.items())),
        }

    def fate(self, now: float) -> str:
        """What the next request meets: ``good``, a storm's kind or one of :data:`FAULTS`."""
        number, self.requests = self.requests, self.requests + 1
        if self._storms and number >= self._storms[0].at:
            storm = self._storms.pop(0)
            self._storm, self._storm_ends = storm.kind, now + storm.seconds
        kind = "good"
        if now < self._storm_ends:
            kind = self._storm
        elif self.random.random() < self.faults:
            if not self._order:  # all kinds come equally often
                self._order = list(FAULTS)
                self.random.shuffle(self._order)
            kind = self._order.pop()
        self.answers[kind] += 1
        return kind


class _Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection; one request at a time, as httpx sends them."""

    def __init__(self, owner: JudgeServer) -> None:
        self.owner = owner
        self.buffer = bytearray()
        self.busy = False
        self.timer: asyncio.TimerHandle | None = None
        self.loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.owner.connections += 1
        self.owner.peak_connections = max(self.owner.peak_connections, self.owner.connections)

    def connection_lost(self, error: Exception | None) -> None:
        self.owner.connections -= 1
        if self.timer is not None:
            self.timer.cancel()
        self.ended()

    def eof_received(self) -> bool:
        return False  # the client is done: close

    def ended(self) -> None:
        if self.busy:
            self.busy = False
            self.owner.in_flight -= 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head_ends = self.buffer.find(b"\r\n\r\n")
        if head_ends < 0:
            return
        head = bytes(self.buffer[:head_ends])
        found = _LENGTH.search(head)
        whole = head_ends + 4 + (int(found[1]) if found else 0)
        if len(self.buffer) < whole:
            return
        body = bytes(self.buffer[head_ends + 4 : whole])
        del self.buffer[:whole]
        if head.startswith(b"GET"):
            self.send(200, json.dumps(self.owner.stats()).encode())
            return
        owner = self.owner
        self.busy = True
        owner.in_flight += 1
        owner.peak_in_flight = max(owner.peak_in_flight, owner.in_flight)
        kind = owner.fate(self.loop.time())
        if kind == "hang":
            return
        delay = 0.0
        if kind not in STORMS:
            delay = owner.random.uniform(*owner.latency_s) + (owner.in_flight / owner.rate if owner.rate else 0.0)
        self.timer = self.loop.call_later(delay, self.answer, body, kind)

    def answer(self, request: bytes, kind: str) -> None:
        if kind in STORMS:
            status, headers = STORMS[kind]
            self.send(status, _error("overloaded"), headers)
        elif kind in _STATUSES:
            self.send(_STATUSES[kind], _error(kind))
        elif kind == "10_mb_error":
            self.send(500, _LARGE)
        elif kind in _BODIES:
            headers = {"Content-Type": "text/html"} if kind == "html" else {}
            self.send(200, _BODIES[kind], headers)
        else:
            try:
                question = JudgePrompt.parse(json.loads(request)["messages"])
                body = _completion(question, kind)
            except (InputError, ValueError, KeyError, TypeError) as error:
                self.send(400, _error(f"no question: {type(error).__name__}"))
                return
            if kind in _ENDINGS:
                self.send_badly(body, kind)
            else:
                self.send(200, body)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, upto: int | None = None) -> None:
        told = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in told.items())
        self.transport.write(head.encode() + b"\r\n" + body[:upto])
        if upto is None:
            self.ended()

    def send_badly(self, body: bytes, kind: str) -> None:
        if kind == "silent":
            self.transport.close()
            return
        self.send(200, body, upto=1 if kind == "drip" else len(body) // 2)
        if kind == "drip":
            self.timer = self.loop.call_later(_DRIP_S, self.drip, body, 1)
        elif kind == "close":
            self.transport.close()
        elif kind == "half_close":
            self.transport.write_eof()
        elif kind == "reset":
            self.transport.abort()

    def drip(self, body: bytes, position: int) -> None:
        self.transport.write(body[position : position + 1])
        if position + 1 < len(body):
            self.timer = self.loop.call_later(_DRIP_S, self.drip, body, position + 1)
        else:
            self.ended()


def _completion(question: ParsedPrompt, kind: str) -> bytes:
    first, second = worth_of(question.first), worth_of(question.second)
    outcome = "win" if first > second else "loss" if first < second else "tie"
    labels = question.labels
    message: dict[str, Any] = {
        "role": "assistant",
        "content": f"One is worth {first}, the other {second}.\n<verdict>{getattr(labels, outcome)}</verdict>",
    }
    if kind in _MESSAGES:
        message |= _MESSAGES[kind](labels.win, labels.loss)
    choice = {"index": 0, "message": message, "finish_reason": _FINISHES.get(kind, "stop")}
    usage = {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "injected", "code": "injected"}}).encode()


async def _serve(server: JudgeServer) -> None:
    print(await server.start(), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until whoever started us is done


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; serves until its standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that meet a fault")
    parser.add_argument("--storm", type=Storm.parse, action="append", default=[], metavar="AT:SECONDS:KIND")
    parser.add_argument("--latency", type=float, nargs=2, default=(0.0, 0.0), metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=0.0, help="answers a second, shared by all in flight; 0: any")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    low, high = arguments.latency
    server = JudgeServer((low, high), arguments.rate, arguments.faults, arguments.storm, arguments.seed)
    asyncio.run(_serve(server))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
