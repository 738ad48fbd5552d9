"""What can go wrong with one request, by name, and how faults are mixed into a run.

A new kind of fault is one more entry of :data:`FAULTS`: tests parametrize over it and the endurance run meets it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from rmcore._base.errors import reject

__all__ = ["FAULTS", "STORM_FAULTS", "Ending", "Fault", "FaultMix", "Storm"]

Ending: TypeAlias = Literal["", "silent", "close", "half_close", "reset", "stall", "drip"]
"""``silent``: closed without a byte; ``close``: closed after half of the body; ``half_close``: half of the body, then
our direction is shut and the other left open; ``reset``: half, then a TCP reset; ``stall``: half, then nothing more, on
an open connection; ``drip``: the whole body, a byte every ``drip_s``."""


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
        delay_s: wait before answering, in seconds; it ends when the server stops. ``inf`` is a hang.
        ending: how the connection ends instead of with the whole body that was announced: see :data:`Ending`.
        drip_s: seconds between two bytes of a ``drip``.
        at_once: without the server's own latency, as an overloaded server refuses.
        kind: a name for :attr:`ReplayServer.answers`; by default "fault".
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    code: str = "injected"
    message: Mapping[str, object] | None = None
    finish_reason: str = "stop"
    delay_s: float = 0.0
    ending: Ending = ""
    drip_s: float = 0.01
    at_once: bool = False
    kind: str = "fault"


_LARGE = b" " * (10 << 20)


_CONTEXT = {  # how servers say that a request is too long: status, code or type, and words
    "openai": (
        400,
        "context_length_exceeded",
        "This model's maximum context length is 300 tokens. However, your messages resulted in 900 tokens. "
        "Please reduce the length of the messages.",
    ),
    "vllm": (
        400,
        "BadRequestError",
        "This model's maximum context length is 300 tokens. However, your request has 900 input tokens. "
        "Please reduce the length of the input messages.",
    ),
    "llama_cpp": (
        400,
        "exceed_context_size_error",
        "request (900 tokens) exceeds the available context size (300 tokens), try increasing it",
    ),
    "llama_cpp_500": (
        500,
        "server_error",
        "the request exceeds the available context size. try increasing the context size or enable context shift",
    ),
    "sglang": (
        400,
        "BadRequestError",
        "The input (900 tokens) is longer than the model's context length (300 tokens).",
    ),
    "litellm": (
        400,
        "400",
        "litellm.ContextWindowExceededError: litellm.BadRequestError: ContextWindowExceededError: OpenAIException - "
        "This model's maximum context length is 300 tokens. However, your messages resulted in 900 tokens.",
    ),
    "tokens_a_minute": (
        429,
        "rate_limit_exceeded",
        "Request too large for judge on tokens per min (TPM): Limit 300, Requested 900. "
        "The input or output tokens must be reduced in order to run successfully.",
    ),
    "no_number": (
        400,
        "context_length_exceeded",
        "Your input exceeds the context window of this model. Please adjust your input and try again.",
    ),
}


def _said(status: int, code: str, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": code, "code": code, "status": status}}).encode()


def _named(**faults: Fault) -> dict[str, Fault]:
    return {name.lstrip("_"): replace(fault, kind=name.lstrip("_")) for name, fault in faults.items()}


FAULTS: Mapping[str, Fault] = _named(
    hang=Fault(delay_s=math.inf),
    stall=Fault(ending="stall"),
    drip=Fault(ending="drip", drip_s=0.1),
    silent=Fault(ending="silent"),
    close=Fault(ending="close"),
    half_close=Fault(ending="half_close"),
    reset=Fault(ending="reset"),
    http_500=Fault(500),
    http_502=Fault(502),
    http_401=Fault(401),
    http_403=Fault(403),
    http_404=Fault(404),
    http_413=Fault(413, body=b"<html><head><title>413 Request Entity Too Large</title></head></html>"),
    redirect=Fault(308, headers={"Location": "/v2/chat/completions"}),
    sse=Fault(
        body=b'data: {"choices": [{"delta": {"content": "<verdict>"}}]}\n\ndata: [DONE]\n\n',
        headers={"Content-Type": "text/event-stream"},
    ),
    _10_mb_error=Fault(500, body=_LARGE),
    truncated_json=Fault(body=b'{"choices": [{"message": {"content": "<verdict>'),
    html=Fault(body=b"<html><body>Please log in.</body></html>", headers={"Content-Type": "text/html"}),
    empty_choices=Fault(body=b'{"choices": []}'),
    _10_mb_reply=Fault(body=_LARGE),
    null_content=Fault(message={"content": None}),
    refusal=Fault(message={"content": None, "refusal": "I would rather not."}),
    both_labels=Fault(message={"content": "<verdict>$win</verdict> <verdict>$loss</verdict>"}),
    quoted_in_reasoning=Fault(
        message={"content": "I cannot say.", "reasoning_content": "<verdict>$win</verdict>"},
    ),
    unclosed_think=Fault(message={"content": "<think>So it is <verdict>$loss</verdict>"}),
    upstream_429=Fault(body=b'{"error": {"message": "Provider returned error", "code": 429}}'),
    upstream_502=Fault(body=b'{"error": {"message": "Bad gateway", "code": "502"}, "choices": []}'),
    finish_error=Fault(finish_reason="error"),
    finish_abort=Fault(finish_reason="abort"),
    unknown_reasoning=Fault(message={"content": "<|channel>thought\nPerhaps <verdict>$loss</verdict>"}),
    verdict_amid_text=Fault(message={"content": "<verdict>$loss</verdict> would be wrong, since"}),
    length=Fault(finish_reason="length"),
    content_filter=Fault(finish_reason="content_filter"),
    bad_encoding=Fault(body=b"\x1f\x8b\x08", headers={"Content-Encoding": "gzip"}),
    error_beside_choices=Fault(
        body=b'{"error": {"message": "upstream"}, "choices": [{"message": {"content": "<verdict>"}}]}'
    ),
    context_error_in_200=Fault(body=b'{"error": {"message": "prompt is too long: 900 tokens > 300 maximum"}}'),
    no_system_role=Fault(400, body=_said(400, "invalid_request_error", "System role not supported by this model")),
    **{f"context_{name}": Fault(said[0], body=_said(*said)) for name, said in _CONTEXT.items()},
)
"""Kinds of fault by name. None of them is a verdict, so none may ever be taken for one."""

STORM_FAULTS: Mapping[str, Fault] = _named(
    _429=Fault(429, at_once=True),
    _429_retry_after=Fault(429, headers={"Retry-After": "1"}, at_once=True),
    _503_retry_after=Fault(503, headers={"Retry-After-Ms": "500"}, at_once=True),
)
"""Refusals that come in storms, since overload does."""


@dataclass(frozen=True, slots=True)
class Storm:
    """From request number ``at`` on, for ``seconds``, every request is refused in the way of ``kind``.

    Raises:
        InputError: ``kind`` is none of :data:`STORM_FAULTS`.
    """

    at: int
    seconds: float
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in STORM_FAULTS:
            reject("kind", repr(self.kind)[:40], f"one of {', '.join(STORM_FAULTS)}")


class FaultMix:
    """Faults spread over the requests, all kinds equally often in a shuffled order, and storms; a server's ``faults``.

    Args:
        share: of the requests that meet a fault, in [0, 1].
        kinds: which; all of :data:`FAULTS` by default.
        storms: in order of their beginning.
        seed: of the choice.
        clock: seconds, for the length of storms.
    """

    def __init__(
        self,
        share: float,
        *,
        kinds: Sequence[Fault] | None = None,
        storms: Sequence[Storm] = (),
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= share <= 1:
            reject("share", share, "a fraction in [0, 1]")
        self._share, self._storms, self._clock = share, list(storms), clock
        self._kinds = list(FAULTS.values() if kinds is None else kinds)
        self._random = random.Random(seed)
        self._order: list[Fault] = []
        self._storm: Fault | None = None
        self._storm_ends = -math.inf

    def __call__(self, number: int) -> Fault | None:
        """What request ``number`` meets; to be asked once a request, in order."""
        now = self._clock()
        if self._storms and number >= self._storms[0].at:
            storm = self._storms.pop(0)
            self._storm, self._storm_ends = STORM_FAULTS[storm.kind], now + storm.seconds
        if now < self._storm_ends:
            return self._storm
        if not self._kinds or self._random.random() >= self._share:
            return None
        if not self._order:
            self._order = list(self._kinds)
            self._random.shuffle(self._order)
        return self._order.pop()
