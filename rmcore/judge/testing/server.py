"""The server: recorded verdicts over HTTP/1.1, thousands of connections on one thread, and faults on demand.

It reads the question back with :meth:`JudgePrompt.parse <rmcore.judge.question.prompt.JudgePrompt.parse>`, looks the
texts up in the order shown, and answers with the label that this very request asks for, in the form it asks for (text
or JSON): the whole path of a real judge, except the judge.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from rmcore._base.errors import InputError, reject
from rmcore._base.numbers import COUNT, Within, check_number, shown_number
from rmcore.judge.base import Outcome
from rmcore.judge.question.prompt import JudgePrompt
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.testing.answers import (
    Answer,
    asked_tokens,
    completion,
    error_answer,
    filled,
    logprobs_of,
    with_labels,
)
from rmcore.judge.testing.fault import Fault

__all__ = ["ReplayServer"]

_logger = logging.getLogger(__name__)
_MAX_REQUEST = 64 << 20
_BACKLOG = 8192  # a short one refuses connections as soon as a client is brisk
_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,9})[ \t]*\r?$")
_DEPLOYMENT = re.compile(r"/openai/deployments/[^/]+/chat/completions")
_API_KEY = re.compile(r"(?im)^api-key:[ \t]*(.*?)[ \t]*\r?$")
_AUTHORIZATION = re.compile(r"(?im)^authorization:[ \t]*(.*?)[ \t]*\r?$")


class ReplayServer:
    """An OpenAI-compatible endpoint on 127.0.0.1 that knows recorded verdicts and nothing else.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. A pair recorded in the order shown gets that
    verdict, one recorded in the other order its mirror image; a recorded ``null`` gets a reply without a verdict; a
    request for log-probabilities gets those of the labels, P = (1 + preference)/2 of the verdict recorded; a pair not
    recorded gets status 404 with code ``no_record``; a request that is no rendered question gets 400.

    Args:
        recorded: a :class:`~rmcore.judge.recorded.RecordedJudge` (a subclass may compute its ``lookup``), or the
            mapping that one is made from.
        latency_s: seconds each answer takes, or the bounds between which they are drawn evenly.
        rate: answers a second at most, as of a machine that shares itself among its requests: each takes longer by the
            number in flight divided by ``rate``. 0: any number.
        faults: what goes wrong: a sequence, one entry a request in order of arrival (``None``: nothing), after which
            all goes well; or a function of the request's number, from 0, such as a
            :class:`~rmcore.judge.testing.fault_mix.FaultMix`.
        require_key: answer 401 to requests without this key: a bearer key, or ``api-key`` at an Azure deployment's URL.
        refuses: fields of a request that are answered with 400, naming the field, as endpoints do that lack it;
            ``system`` refuses a message of that role, as chat templates without one do.
        context_tokens: refuse questions that are longer, counted as four characters a token, as vLLM does.
        tells_context: state it in ``/v1/models`` too (``max_model_len``).
        answers_as: the model that replies name, whichever was asked for. Default: that one.
        port: 0 picks a free one.
        seed: of the latencies drawn.

    Attributes:
        requests: chat requests received so far.
        statuses: how many answers had which status; those that are no HTTP are left out.
        answers: how many requests met which kind of fault; those that met none are ``good``.
        peak_in_flight, peak_connections: most at once so far.
    """

    def __init__(
        self,
        recorded: RecordedJudge | Mapping[str, Outcome | None],
        *,
        latency_s: float | tuple[float, float] = 0.0,
        rate: float = 0.0,
        faults: Sequence[Fault | None] | Callable[[int], Fault | None] = (),
        require_key: str | None = None,
        refuses: Collection[str] = (),
        context_tokens: int | None = None,
        tells_context: bool = False,
        answers_as: str | None = None,
        port: int = 0,
        seed: int = 0,
    ) -> None:
        bounds = latency_s if isinstance(latency_s, tuple) else (latency_s, latency_s)
        seconds = Within(least=0)
        if len(bounds) != 2 or not all(bound in seconds for bound in bounds) or bounds[0] > bounds[1]:
            reject("latency_s", shown_number(latency_s), "seconds, at least 0, or their bounds")
        check_number("rate", rate, Within(least=0), "answers a second, at least 0")
        check_number("port", port, Within(whole=True, least=0, most=65_535), "0 to 65535")
        check_number("seed", seed, Within(whole=True))
        if context_tokens is not None:
            check_number("context_tokens", context_tokens, COUNT)
        self.recorded = recorded if isinstance(recorded, RecordedJudge) else RecordedJudge(recorded)
        self.latency_s = bounds
        self.rate = rate
        self.requests = 0
        self.statuses: Counter[int] = Counter()
        self.answers: Counter[str] = Counter()
        self.in_flight = self.peak_in_flight = self.peak_connections = 0
        self._faults = faults
        self._require_key = require_key
        self._refuses = tuple(refuses)
        self._context, self._tells_context, self._answers_as = context_tokens, tells_context, answers_as
        self._port = port
        self._random = random.Random(seed)
        self._serving = threading.Event()
        self._connections: set[_Connection] = set()
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        """What a client is given, such as ``http://127.0.0.1:40123/v1``. Raises RuntimeError unless started."""
        if self._socket is None:
            raise RuntimeError("ReplayServer: not started; use it in a with statement, or call start()")
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    def stats(self) -> dict[str, Any]:
        """What happened so far, JSON values; also served at ``/v1/stats``."""
        names = ("requests", "in_flight", "peak_in_flight", "peak_connections")
        return {name: getattr(self, name) for name in names} | {"answers": dict(sorted(self.answers.items()))}

    def start(self) -> ReplayServer:
        """Bind and serve from a background thread. Once it returns, requests are answered."""
        if self._socket is None:
            # Bound here, so that an error is the caller's and a request that comes at once is queued.
            self._socket = socket.create_server(("127.0.0.1", self._port), backlog=_BACKLOG)
            # asyncio sets this on connections to sockets that it makes itself; without it the body of an answer waits
            # for the acknowledgement of its head, 40 ms.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._serve, args=(self._loop, self._socket), name="rmcore-replay", daemon=True
            )
            self._thread.start()
            self._serving.wait()  # or a stop that comes at once would find no loop to stop
        return self

    def stop(self) -> None:
        """Stop serving, cut open connections, end waiting answers. Does nothing if not started."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._socket = self._loop = self._thread = None

    def __enter__(self) -> ReplayServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- on the server's thread --------------------------------------------------------------------------------------

    def _serve(self, loop: asyncio.AbstractEventLoop, listening: socket.socket) -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(loop.create_server(lambda: _Connection(self, loop), sock=listening))
        loop.call_soon(self._serving.set)
        loop.run_forever()
        self._serving.clear()
        server.close()
        for connection in list(self._connections):
            connection.transport.abort()
        loop.run_until_complete(asyncio.sleep(0))  # aborted connections are closed in the next round
        loop.close()

    def _next_fault(self) -> Fault | None:
        """Count a request and take what is planned for it."""
        number = self.requests
        self.requests += 1
        if callable(self._faults):
            fault = self._faults(number)
        else:
            fault = self._faults[number] if number < len(self._faults) else None
        self.answers["good" if fault is None else fault.kind] += 1
        return fault

    def _delay_s(self, fault: Fault | None) -> float:
        delay = 0.0 if fault is None else fault.delay_s
        if fault is None or not fault.at_once:
            delay += self._random.uniform(*self.latency_s) + (self.in_flight / self.rate if self.rate else 0.0)
        return delay

    def _answer(self, request: bytes, authorization: str, fault: Fault | None) -> Answer:
        """The answer to one chat request."""
        if fault is not None and fault.raw is not None:
            return Answer(filled(fault.raw, request), raw=True)
        if fault is not None and (fault.body is not None or fault.status >= 400):
            answer = error_answer(fault.status, fault.code, "injected fault")
            answer.body = answer.body if fault.body is None else filled(fault.body, request)
        else:
            answer = self._true_answer(request, authorization, fault)
        if fault is not None:
            answer.status = fault.status
            answer.headers |= {name.title(): value for name, value in fault.headers.items()}
            answer.ending, answer.drip_s = fault.ending, fault.drip_s
        self.statuses[answer.status] += 1
        return answer

    def _true_answer(self, request: bytes, authorization: str, fault: Fault | None) -> Answer:
        if self._require_key is not None and authorization != f"Bearer {self._require_key}":
            return error_answer(401, "invalid_api_key", "missing or wrong key")
        try:
            payload = json.loads(request)
            messages = payload["messages"]
            refused = next((name for name in self._refuses if name in payload), None)
            if refused is not None:
                return error_answer(
                    400, "unsupported_parameter", f"Unsupported parameter: '{refused}' is not supported."
                )
            if "system" in self._refuses and any(message["role"] == "system" for message in messages):
                return error_answer(400, "invalid_request_error", "System role not supported")
            too_long = self._too_long(payload)
            if too_long:
                return error_answer(400, "BadRequestError", too_long)
            question = JudgePrompt.parse(messages)
            verdict = self.recorded.lookup(question.prompt, question.first, question.second)
        except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return error_answer(400, "not_a_question", f"not a question of this library ({type(error).__name__})")
        if verdict.reason == "no_record" and (fault is None or fault.message is None):
            return error_answer(404, "no_record", "no verdict is recorded for this pair")
        outcome = verdict.outcome
        text = "I cannot tell which response is better."
        if outcome is not None:
            label, critique = question.labels.label(outcome), "Replaying a recorded verdict."
            text = f"{critique}\n<verdict>{label}</verdict>"
            if question.output == "json_schema":
                text = json.dumps({"critique": critique, "verdict": label})
        logprobs = logprobs_of(text, question, verdict) if payload.get("logprobs") and outcome is not None else None
        message: dict[str, object] = {"role": "assistant", "content": text}
        if fault is not None and fault.message is not None:
            message |= {name: with_labels(value, question) for name, value in fault.message.items()}
        if self._answers_as is not None:
            payload["model"] = self._answers_as
        return Answer(completion(payload, message, fault.finish_reason if fault else "stop", logprobs))

    def _too_long(self, payload: Mapping[str, Any]) -> str:
        """What vLLM says of a question and its answer that the context has no room for."""
        asked, most = asked_tokens(payload), payload.get("max_tokens") or 0
        if self._context is None or asked + most <= self._context:
            return ""
        if asked <= self._context:
            return (
                f"'max_tokens' or 'max_completion_tokens' is too large: {most}. This model's maximum context length is "
                f"{self._context} tokens and your request has {asked} input tokens."
            )
        return (
            f"This model's maximum context length is {self._context} tokens. However, your request has {asked} input "
            "tokens. Please reduce the length of the input messages."
        )

    def _models(self) -> bytes:
        model: dict[str, Any] = {"id": "replay", "object": "model"}
        if self._tells_context:
            model["max_model_len"] = self._context
        return json.dumps({"object": "list", "data": [model]}).encode()


class _Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection; one request at a time, as clients of the judge send them."""

    transport: asyncio.Transport

    def __init__(self, owner: ReplayServer, loop: asyncio.AbstractEventLoop) -> None:
        self._owner, self._loop = owner, loop
        self._buffer = bytearray()
        self._busy = self._bad = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._owner._connections.add(self)
        self._owner.peak_connections = max(self._owner.peak_connections, len(self._owner._connections))

    def connection_lost(self, error: Exception | None) -> None:
        self._owner._connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._ended()

    def eof_received(self) -> bool:
        return False  # the client is done: close

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._busy and not self._bad:
            self._take_request()

    def _take_request(self) -> None:
        head_ends = self._buffer.find(b"\r\n\r\n")
        if head_ends < 0:
            return
        head = bytes(self._buffer[:head_ends])
        method, _, rest = head.decode("latin-1").partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        found = _LENGTH.search(head)
        length = int(found[1]) if found else 0
        if method == "POST" and (found is None or length > _MAX_REQUEST):
            self._bad = True
            self._send(error_answer(411, "length", "a Content-Length of at most 64 MiB is needed"))
            self.transport.close()
            return
        whole = head_ends + 4 + length
        if len(self._buffer) < whole:
            return
        request = bytes(self._buffer[head_ends + 4 : whole])
        del self._buffer[:whole]
        if method == "GET" and path == "/v1/models":
            self._send(Answer(self._owner._models()))
        elif method == "GET" and path == "/v1/stats":
            self._send(Answer(json.dumps(self._owner.stats()).encode()))
        elif method == "POST" and path == "/v1/chat/completions":
            key = _AUTHORIZATION.search(head.decode("latin-1"))
            self._begin(request, key[1] if key else "")
        elif method == "POST" and _DEPLOYMENT.fullmatch(path) and "api-version=" in rest.partition(" ")[0]:
            key = _API_KEY.search(head.decode("latin-1"))
            self._begin(request, f"Bearer {key[1]}" if key else "")
        else:
            self._send(error_answer(404, "no_route", "only /v1/chat/completions is served"))

    def _begin(self, request: bytes, authorization: str) -> None:
        owner = self._owner
        self._busy = True
        owner.in_flight += 1
        owner.peak_in_flight = max(owner.peak_in_flight, owner.in_flight)
        fault = owner._next_fault()
        delay = owner._delay_s(fault)
        if delay == 0:
            self._answer(request, authorization, fault)
        elif math.isfinite(delay):
            self._timer = self._loop.call_later(delay, self._answer, request, authorization, fault)

    def _answer(self, request: bytes, authorization: str, fault: Fault | None) -> None:
        answer = self._owner._answer(request, authorization, fault)
        if answer.raw:
            self.transport.write(answer.body)
            self.transport.close()
        elif answer.ending:
            self._send_badly(answer)
        else:
            self._send(answer)

    def _ended(self) -> None:
        if self._busy:
            self._busy = False
            self._owner.in_flight -= 1

    def _send(self, answer: Answer, *, upto: int | None = None) -> None:
        status = HTTPStatus(answer.status).phrase if answer.status in HTTPStatus._value2member_map_ else "X"
        fields = {"Content-Length": str(len(answer.body))} | answer.headers
        head = f"HTTP/1.1 {answer.status} {status}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())
        self.transport.write(head.encode("latin-1") + b"\r\n")
        self.transport.write(answer.body[:upto])
        if upto is None:
            self._ended()
            if self._buffer and not self._bad:
                self._take_request()

    def _send_badly(self, answer: Answer) -> None:
        if answer.ending == "silent":
            self.transport.close()
            return
        if answer.ending == "drip":
            self._send(answer, upto=0)
            self._drip(answer, 0)
            return
        self._send(answer, upto=len(answer.body) // 2)
        if answer.ending == "close":
            self.transport.close()
        elif answer.ending == "half_close":
            self.transport.write_eof()
        elif answer.ending == "reset":
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self.transport.abort()

    def _drip(self, answer: Answer, position: int) -> None:
        self.transport.write(answer.body[position : position + 1])
        if position + 1 < len(answer.body):
            self._timer = self._loop.call_later(answer.drip_s, self._drip, answer, position + 1)
        else:
            self._ended()
