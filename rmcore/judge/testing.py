"""Recorded verdicts served over real HTTP on this machine: for tests, for the demo, and for load without a bill.

The server answers the requests that :class:`~rmcore.judge.chat.ChatJudge` makes. It reads the question back with
:meth:`JudgePrompt.parse <rmcore.judge.question.prompt.JudgePrompt.parse>`, looks the texts up in the order shown, and
answers with the label that this very request asks for, in the form it asks for (text or JSON): the whole path of a real
judge, except the judge.

    python -m rmcore.judge.testing VERDICTS.jsonl      # prints the base URL, serves until Ctrl-C or SIGTERM
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import string
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TypeAlias

from rmcore._base.errors import InputError, reject
from rmcore.judge.base import Outcome
from rmcore.judge.question.prompt import JudgePrompt, ParsedPrompt
from rmcore.judge.recorded import RecordedJudge

__all__ = ["Ending", "Fault", "ReplayServer", "main"]

_logger = logging.getLogger(__name__)
_MAX_REQUEST = 64 << 20


Ending: TypeAlias = Literal["", "silent", "close", "half_close", "reset", "stall", "drip"]
"""``silent``: closed without a byte; ``close``: closed after half of the body; ``half_close``: half of the body, then
our direction is shut and the other left open; ``reset``: half, then a TCP reset; ``stall``: half, then nothing more, on
an open connection; ``drip``: the whole body, a byte every 10 ms."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What one request gets instead of the true answer.

    Attributes:
        status: HTTP status.
        headers: further headers, or other values for ``Content-Type`` and the like.
        body: the raw body. ``None``: an error object for a status from 400 on, otherwise a chat completion.
        code: the error object's ``code``.
        message: fields that replace those of the completion's message. In texts ``$win``, ``$loss`` and ``$tie``
            stand for this request's labels.
        finish_reason: of the completion.
        delay_s: wait before answering, in seconds; it ends early when the server stops. A long one is a hang.
        ending: how the connection ends instead of with the whole body that was announced: see :data:`Ending`.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    code: str = "injected"
    message: Mapping[str, object] | None = None
    finish_reason: str = "stop"
    delay_s: float = 0.0
    ending: Ending = ""


class ReplayServer:
    """An OpenAI-compatible endpoint on 127.0.0.1 that knows recorded verdicts and nothing else.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. A pair recorded in the order shown gets that
    verdict, one recorded in the other order its mirror image; a recorded ``null`` gets a reply without a verdict; a
    pair not recorded gets status 404 with code ``no_record``; a request that is no rendered question gets 400.

    Args:
        recorded: a :class:`~rmcore.judge.recorded.RecordedJudge`, or the mapping that one is made from.
        latency_s: seconds each answer takes.
        faults: what goes wrong: a sequence, one entry a request in order of arrival (``None``: nothing), after which
            all goes well; or a function of the request's number, from 0.
        require_key: answer 401 to requests without this bearer key.
        refuses: fields of a request that are answered with 400, naming the field, as endpoints do that lack it.
        port: 0 picks a free one.

    Attributes:
        requests: chat requests received so far.
        statuses: how many answers had which status.
    """

    def __init__(
        self,
        recorded: RecordedJudge | Mapping[str, Outcome | None],
        *,
        latency_s: float = 0.0,
        faults: Sequence[Fault | None] | Callable[[int], Fault | None] = (),
        require_key: str | None = None,
        refuses: Collection[str] = (),
        port: int = 0,
    ) -> None:
        if not latency_s >= 0:
            reject("latency_s", latency_s, "seconds, at least 0")
        self.recorded = recorded if isinstance(recorded, RecordedJudge) else RecordedJudge(recorded)
        self.latency_s = latency_s
        self.requests = 0
        self.statuses: Counter[int] = Counter()
        self._faults = faults
        self._require_key = require_key
        self._refuses = tuple(refuses)
        self._port = port
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """What a client is given, such as ``http://127.0.0.1:40123/v1``. Raises RuntimeError unless started."""
        if self._server is None:
            raise RuntimeError("ReplayServer: not started; use it in a with statement, or call start()")
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def start(self) -> ReplayServer:
        """Bind and serve from a background thread. Once it returns, requests are answered."""
        if self._server is None:
            self._stopping.clear()
            self._server = _Server(("127.0.0.1", self._port), self)
            self._thread = threading.Thread(
                target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="rmcore-replay", daemon=True
            )
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop serving, cut open connections, end waiting answers. Does nothing if not started."""
        server, self._server = self._server, None
        if server is not None and self._thread is not None:
            self._stopping.set()
            server.shutdown()
            server.server_close()
            server.cut_connections()
            self._thread.join()

    def __enter__(self) -> ReplayServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _next_fault(self) -> Fault | None:
        """Count a request and take what is planned for it."""
        with self._lock:
            number = self.requests
            self.requests += 1
        if callable(self._faults):
            return self._faults(number)
        return self._faults[number] if number < len(self._faults) else None

    def _answer(self, request: bytes, authorization: str) -> _Answer:
        """The answer to one chat request, delays included."""
        fault = self._next_fault()
        delay = self.latency_s + (fault.delay_s if fault else 0.0)
        if delay:
            self._stopping.wait(delay)
        answer = self._true_answer(request, authorization, fault)
        if fault is not None:
            if fault.status >= 400:
                answer = _error(fault.status, fault.code, "injected fault")
            answer.status = fault.status
            answer.body = answer.body if fault.body is None else fault.body
            answer.headers |= {name.title(): value for name, value in fault.headers.items()}
            answer.ending = fault.ending
        with self._lock:
            self.statuses[answer.status] += 1
        return answer

    def _true_answer(self, request: bytes, authorization: str, fault: Fault | None) -> _Answer:
        if self._require_key is not None and authorization != f"Bearer {self._require_key}":
            return _error(401, "invalid_api_key", "missing or wrong key")
        try:
            payload = json.loads(request)
            messages = payload["messages"]
            refused = next((name for name in self._refuses if name in payload), None)
            if refused is not None:
                return _error(400, "unsupported_parameter", f"Unsupported parameter: '{refused}' is not supported.")
            question = JudgePrompt.parse(messages)
            verdict = self.recorded.lookup(question.prompt, question.first, question.second)
        except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return _error(400, "not_a_question", f"not a question of this library ({type(error).__name__})")
        if verdict.reason == "no_record" and (fault is None or fault.message is None):
            return _error(404, "no_record", "no verdict is recorded for this pair")
        outcome = verdict.outcome
        text = "I cannot tell which response is better."
        if outcome is not None:
            label, critique = question.labels.label(outcome), "Replaying a recorded verdict."
            text = f"{critique}\n<verdict>{label}</verdict>"
            if question.output == "json_schema":
                text = json.dumps({"critique": critique, "verdict": label})
        message: dict[str, object] = {"role": "assistant", "content": text}
        if fault is not None and fault.message is not None:
            message |= {name: _with_labels(value, question) for name, value in fault.message.items()}
        return _Answer(_completion(payload, message, fault.finish_reason if fault else "stop"))


@dataclass(slots=True)
class _Answer:
    """What goes over the wire."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    ending: Ending = ""


class _Server(ThreadingHTTPServer):
    """A threading server that knows its connections, so that stopping does not wait for idle clients."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512  # the default of 5 refuses connections as soon as a client is brisk

    def __init__(self, address: tuple[str, int], owner: ReplayServer) -> None:
        super().__init__(address, _Handler)
        self.owner = owner
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        with self._open_lock:
            connections = list(self._open)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # already gone

    def handle_error(self, request: Any, client_address: Any) -> None:
        _logger.debug("replay: a client went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with kept-alive connections; everything else is the owner's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > _MAX_REQUEST:
            self.close_connection = True
            self._send(_error(411, "length", "a Content-Length of at most 64 MiB is needed"))
            return
        request = self.rfile.read(int(length))
        if self.path.partition("?")[0] != "/v1/chat/completions":
            self._send(_error(404, "no_route", "only /v1/chat/completions is served"))
            return
        self._send(self.server.owner._answer(request, self.headers.get("Authorization", "")))

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/v1/models":
            self._send(_Answer(json.dumps({"object": "list", "data": [{"id": "replay", "object": "model"}]}).encode()))
        else:
            self._send(_error(404, "no_route", "only /v1/chat/completions is served"))

    def _send(self, answer: _Answer) -> None:
        if answer.ending == "silent":
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if answer.ending:
            self.close_connection = True
            self._send_badly(answer)
        else:
            self.wfile.write(answer.body)

    def _send_badly(self, answer: _Answer) -> None:
        stopping = self.server.owner._stopping
        if answer.ending == "drip":
            for k in range(len(answer.body)):
                self.wfile.write(answer.body[k : k + 1])
                if stopping.wait(0.01):
                    return
            return
        self.wfile.write(answer.body[: len(answer.body) // 2])
        if answer.ending == "stall":
            stopping.wait()
        elif answer.ending == "half_close":
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.05)
            while not stopping.is_set():  # read on until the client hangs up
                try:
                    if not self.connection.recv(65536):
                        return
                except TimeoutError:
                    continue
        elif answer.ending == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: Any) -> None:
        _logger.debug("replay: " + format, *args)


def _with_labels(value: object, question: ParsedPrompt) -> object:
    if not isinstance(value, str):
        return value
    labels = question.labels
    return string.Template(value).safe_substitute(win=labels.win, loss=labels.loss, tie=labels.tie)


def _completion(payload: Mapping[str, Any], message: Mapping[str, object], finish_reason: str) -> bytes:
    """A chat completion; tokens are counted as four characters each, so that accounting has something to add up."""
    asked = sum(len(str(m.get("content", ""))) for m in payload["messages"]) // 4 + 1
    said = sum(len(text) for text in message.values() if isinstance(text, str)) // 4 + 1
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    return json.dumps(
        {
            "id": "replay",
            "object": "chat.completion",
            "created": 0,
            "model": payload.get("model", "replay"),
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": usage,
        }
    ).encode()


def _error(status: int, code: str, message: str) -> _Answer:
    return _Answer(json.dumps({"error": {"message": message, "type": "replay", "code": code}}).encode(), status)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rmcore.judge.testing``: print the base URL, serve until a signal ends it. Exit code 2: a bad file."""
    parser = argparse.ArgumentParser(
        prog="python -m rmcore.judge.testing",
        description="Serve recorded verdicts as an OpenAI-compatible endpoint on 127.0.0.1.",
    )
    parser.add_argument("verdicts", help="JSON Lines (or .gz): prompt, first, second, verdict, and optionally order")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="time each answer takes")
    options = parser.parse_args(argv)
    try:
        server = ReplayServer(
            RecordedJudge.from_file(options.verdicts), latency_s=options.latency, port=options.port
        ).start()
    except (InputError, OSError) as error:
        parser.error(str(error))
    done = threading.Event()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: done.set())
    with server:
        print(server.base_url, flush=True)
        done.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
