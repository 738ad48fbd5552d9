"""One thing that can go wrong with a request, as the replay server does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["Again", "Ending", "Fault"]

Ending: TypeAlias = Literal["", "silent", "close", "half_close", "reset", "stall", "drip"]
"""``silent``: closed without a byte; ``close``: closed after half of the body; ``half_close``: half of the body, then
our direction is shut and the other left open; ``reset``: half, then a TCP reset; ``stall``: half, then nothing more, on
an open connection; ``drip``: the whole body, a byte every ``drip_s``."""

Again: TypeAlias = Literal["", "retried", "changed"]
"""What is right to follow a fault: nothing; the same request, as often as the client is told to; or the question in
another form, since the endpoint said what it does not take."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What one request gets instead of the true answer.

    In the texts of ``message``, ``body`` and ``raw`` the words ``$win``, ``$loss`` and ``$tie`` stand for this
    request's labels, so that what must not be read as a verdict would be one if it were read.

    Attributes:
        status: HTTP status.
        headers: further headers, or other values for ``Content-Type`` and the like.
        body: the raw body. ``None``: an error object for a status from 400 on, otherwise a chat completion.
        raw: what goes over the wire in place of head and body; then the connection is closed.
        code: the error object's ``code``.
        message: fields that replace those of the completion's message.
        finish_reason: of the completion.
        delay_s: wait before answering, in seconds; it ends when the server stops. ``inf`` is a hang.
        ending: how the connection ends instead of with the whole body that was announced: see :data:`Ending`.
        drip_s: seconds between two bytes of a ``drip``.
        at_once: without the server's own latency, as an overloaded server refuses.
        kind: a name for :attr:`ReplayServer.answers`; by default "fault".
        reason: what a pair is to fail with that meets nothing else; empty where nobody has said.
        again: what is to follow it.
        answer: whether it is the judge's own answer, which is paid for and kept in a store, though it is no verdict.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    raw: bytes | None = None
    code: str = "injected"
    message: Mapping[str, object] | None = None
    finish_reason: str = "stop"
    delay_s: float = 0.0
    ending: Ending = ""
    drip_s: float = 0.01
    at_once: bool = False
    kind: str = "fault"
    reason: str = ""
    again: Again = ""
    answer: bool = False
