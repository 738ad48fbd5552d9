"""What the replay server says: completions with the labels asked for, and errors as an endpoint words them."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rmcore._base.errors import InputError
from rmcore.judge.base import Verdict
from rmcore.judge.question.prompt import JudgePrompt, ParsedPrompt
from rmcore.judge.testing.fault import Ending

__all__ = ["Answer", "asked_tokens", "completion", "error_answer", "filled", "logprobs_of", "with_labels"]


@dataclass(slots=True)
class Answer:
    """What goes over the wire."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    ending: Ending = ""
    drip_s: float = 0.0
    raw: bool = False


def error_answer(status: int, code: str, message: str) -> Answer:
    """As OpenAI words an error."""
    return Answer(json.dumps({"error": {"message": message, "type": "replay", "code": code}}).encode(), status)


def completion(
    payload: Mapping[str, Any], message: Mapping[str, object], finish_reason: str, logprobs: object = None
) -> bytes:
    """A chat completion; tokens are counted as four characters each, so that accounting has something to add up."""
    asked = asked_tokens(payload)
    said = sum(len(text) for text in message.values() if isinstance(text, str)) // 4 + 1
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    return json.dumps(
        {
            "id": "replay",
            "object": "chat.completion",
            "created": 0,
            "model": payload.get("model", "replay"),
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": logprobs}],
            "usage": usage,
        }
    ).encode()


def logprobs_of(text: str, question: ParsedPrompt, verdict: Verdict) -> dict[str, object]:
    """``logprobs`` of a reply in three tokens: what stands before the label, the label, what stands behind it."""
    labels, preference = question.labels, verdict.preference
    assert preference is not None
    chance = {labels.win: (1 + preference) / 2, labels.loss: (1 - preference) / 2}
    if preference == 0:
        chance = {labels.tie: 1.0}
    said = labels.label(verdict.outcome or "tie")
    before, _, after = text.rpartition(said)
    listed = [{"token": word, "logprob": math.log(p)} for word, p in chance.items() if p > 0]
    certain = [{"token": part, "logprob": 0.0, "top_logprobs": []} for part in (before, after)]
    label = {"token": said, "logprob": math.log(chance[said]), "top_logprobs": listed}
    return {"content": [certain[0], label, certain[1]]}


def asked_tokens(payload: Mapping[str, Any]) -> int:
    """Of a request's messages, four characters each."""
    return sum(len(str(m.get("content", ""))) for m in payload["messages"]) // 4 + 1


def filled(content: bytes, request: bytes) -> bytes:
    """``content`` with the labels of the question that was asked, if it is one and they are asked for."""
    if b"$" not in content:
        return content
    try:
        labels = JudgePrompt.parse(json.loads(request)["messages"]).labels
    except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return content
    for word in ("win", "loss", "tie"):
        content = content.replace(b"$" + word.encode(), getattr(labels, word).encode())
    return content


def with_labels(value: object, question: ParsedPrompt) -> object:
    """A fault's own text with ``$win``, ``$loss`` and ``$tie`` as this question's labels."""
    if not isinstance(value, str):
        return value
    labels = question.labels
    return string.Template(value).safe_substitute(win=labels.win, loss=labels.loss, tie=labels.tie)
