"""The kinds of fault by name, each with what is right: its reason, what follows it, and whether a store keeps it.

A new kind is one more entry of :data:`FAULTS`: tests parametrize over it and the endurance run meets it.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import replace

from rmcore.judge.testing.fault import Again, Fault

__all__ = ["FAULTS", "STORM_FAULTS"]

_LARGE = b" " * (10 << 20)
_VERDICT = "<verdict>$win</verdict>"


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


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


_ANSWER = {"message": {"role": "assistant", "content": _VERDICT}, "finish_reason": "stop"}
_UPSTREAM = {"message": "Provider returned error", "code": 429}
_IN_200: Mapping[str, tuple[str, Again, bytes]] = {  # how gateways put an upstream's error into a reply of status 200
    "upstream_429": ("http_429", "retried", _json({"error": _UPSTREAM})),
    "upstream_502": ("http_502", "retried", _json({"error": {"message": "Bad gateway", "code": "502"}, "choices": []})),
    "error_beside_choices": ("error_in_reply", "", _json({"error": {"message": "upstream"}, "choices": [_ANSWER]})),
    "error_429_beside_choices": ("http_429", "retried", _json({"error": _UPSTREAM, "choices": [_ANSWER]})),
    "error_in_choice": ("http_429", "retried", _json({"choices": [{**_ANSWER, "error": _UPSTREAM}]})),
    "error_in_message": (
        "http_429",
        "retried",
        _json({"choices": [{**_ANSWER, "message": {"content": _VERDICT, "error": _UPSTREAM}}]}),
    ),
    "error_refused": ("http_400", "", _json({"error": {"message": "no such model", "code": 400}, "choices": []})),
    "error_quota": ("insufficient_quota", "", _json({"error": {"type": "insufficient_quota", "message": "pay"}})),
    "error_text": ("http_429", "retried", _json({"error": "Rate limit exceeded"})),
    "error_text_503": ("http_503", "retried", _json({"error": "Error code: 503 - busy", "choices": [_ANSWER]})),
    "error_unknown": ("no_choices", "", _json({"error": "something is amiss"})),
    "error_list": ("http_429", "retried", _json({"error": [_UPSTREAM]})),
    "errors_beside_choices": (
        "http_502",
        "retried",
        _json({"errors": [{"message": "x", "code": "502"}], "choices": [_ANSWER]}),
    ),
    "success_false": (
        "http_500",
        "retried",
        _json({"success": False, "errors": [{"code": 10013, "message": "internal error"}]}),
    ),
    "detail_text": ("http_429", "retried", _json({"detail": "Too Many Requests"})),
    "detail_object": ("http_503", "retried", _json({"detail": {"status": 503}})),
    "detail_fields": ("no_choices", "", _json({"detail": [{"loc": ["body"], "msg": "field required"}]})),
    "object_error": ("http_400", "", _json({"object": "error", "message": "x", "type": "BadRequest", "code": 400})),
    "object_error_beside_choices": ("error_in_reply", "", _json({"object": "error", "choices": [_ANSWER]})),
    "type_error": (
        "http_503",
        "retried",
        _json({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
    ),
    "status_code_504": ("http_504", "retried", _json({"message": "x", "statusCode": 504})),
    "code_msg": ("http_429", "retried", _json({"code": 429.0, "msg": "x"})),
    "base_resp": (
        "http_429",
        "retried",
        _json({"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}}),
    ),
    "error_at_top_of_list": (
        "http_429",
        "retried",
        _json([{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}]),
    ),
    "error_in_error": ("http_502", "retried", _json({"error": {"error": {"code": 502}}})),
    "error_event": ("http_503", "retried", b'event: error\ndata: {"error": {"code": 503}}\n\n'),
    "page_502": ("http_502", "retried", b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"),
    "text_503": ("http_503", "retried", b"no healthy upstream"),
    "error_event_behind_comment": (
        "http_429",
        "retried",
        b': busy\n\ndata: {"error": "429 Too Many Requests"}\n\ndata: [DONE]\n\n',
    ),
}


_OTHER_FORMS: Mapping[str, object] = {  # answers in the form of another interface
    "completions": [{"text": _VERDICT, "index": 0, "finish_reason": "stop"}],
    "stream_piece": [{"delta": {"content": _VERDICT}, "index": 0, "finish_reason": "stop"}],
    "empty_choices": [],
    "choices_object": {"message": {"content": _VERDICT}},
    "choices_null": [None],
}


_CUT_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_HALF = b'{"choices": [{"message": {"content": "' + _VERDICT.encode()
_RAW: Mapping[str, bytes] = {  # what is no whole HTTP reply
    "close_in_head": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "close_in_chunks": _CUT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n10\r\n" + _HALF[:16] + b"\r\n",
    "bad_chunk": _CUT_HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + _HALF,
    "not_http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "tls_alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "http_2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64",
    "no_status_line": _json({"choices": [_ANSWER]}),
    "two_lengths": _CUT_HEAD + b"Content-Length: 2\r\nContent-Length: 300\r\n\r\n{}",
}


def _said(status: int, code: str, message: str) -> bytes:
    return _json({"error": {"message": message, "type": code, "code": code, "status": status}})


def _named(**faults: Fault) -> dict[str, Fault]:
    return {name.lstrip("_"): replace(fault, kind=name.lstrip("_")) for name, fault in faults.items()}


def _broken(**how: object) -> Fault:
    return Fault(reason="connection", again="retried", **how)  # type: ignore[arg-type]


def _status(status: int, again: Again = "", **how: object) -> Fault:
    return Fault(status, reason=f"http_{status}", again=again, **how)  # type: ignore[arg-type]


def _not_json(body: bytes, **headers: str) -> Fault:
    return Fault(
        body=body, headers={name.replace("_", "-"): value for name, value in headers.items()}, reason="not_json"
    )


def _says(content: str | None, reason: str, **fields: object) -> Fault:
    """An answer of the judge that holds no verdict."""
    return Fault(message={"content": content, **fields}, reason=reason, answer=True)


FAULTS: Mapping[str, Fault] = _named(
    hang=Fault(delay_s=math.inf, reason="timeout", again="retried"),
    stall=Fault(ending="stall", reason="timeout", again="retried"),
    drip=Fault(ending="drip", drip_s=0.1, reason="timeout", again="retried"),
    silent=_broken(ending="silent"),
    close=_broken(ending="close"),
    half_close=_broken(ending="half_close"),
    reset=_broken(ending="reset"),
    **{name: _broken(raw=raw) for name, raw in _RAW.items()},
    http_500=_status(500, "retried"),
    http_502=_status(502, "retried"),
    http_401=_status(401),
    http_403=_status(403),
    http_404=_status(404),
    http_413=_status(413, body=b"<html><head><title>413 Request Entity Too Large</title></head></html>"),
    http_202=_status(202, body=_json({"id": "job-1", "status": "queued"})),
    http_204=_status(204, body=b""),
    redirect=_status(308, headers={"Location": "/v2/chat/completions"}),
    _10_mb_error=_status(500, "retried", body=_LARGE),
    compressed_401=_status(401, headers={"Content-Encoding": "br"}, body=b"\x0b\x02\x80garbage"),
    compressed_503=_status(503, "retried", headers={"Content-Encoding": "gzip"}, body=b"\x1f\x8b\x08garbage"),
    empty=_not_json(b""),
    blank=_not_json(b" \r\n\r\n"),
    null=_not_json(b"null"),
    sse=_not_json(
        _json({"choices": [{"delta": {"content": _VERDICT}}]}).join([b"data: ", b"\n\ndata: [DONE]\n\n"]),
        Content_Type="text/event-stream",
    ),
    truncated_json=_not_json(_HALF),
    close_without_length=Fault(raw=_CUT_HEAD + b"Connection: close\r\n\r\n" + _HALF, reason="not_json"),
    short_length=_not_json(_json({"choices": [_ANSWER]}), Content_Length="40", Connection="close"),
    html=_not_json(b"<html><body>Please log in.</body></html>", Content_Type="text/html"),
    not_utf8=_not_json(_json({"choices": [_ANSWER]}).replace(b"<verdict>", b"caf\xe9 <verdict>")),
    gzip_without_a_word=_not_json(gzip.compress(_json({"choices": [_ANSWER]}), mtime=0)),
    bad_encoding=Fault(body=b"\x1f\x8b\x08", headers={"Content-Encoding": "gzip"}, reason="bad_encoding"),
    **{name: Fault(body=_json({"choices": form}), reason="no_choices") for name, form in _OTHER_FORMS.items()},
    anthropic_message=Fault(
        body=_json({"type": "message", "content": [{"type": "text", "text": _VERDICT}]}), reason="no_choices"
    ),
    ollama_message=Fault(
        body=_json({"message": {"role": "assistant", "content": _VERDICT}, "done": True}), reason="no_choices"
    ),
    _10_mb_reply=Fault(body=_LARGE, reason="reply_too_large"),
    **{name: Fault(body=body, reason=reason, again=again) for name, (reason, again, body) in _IN_200.items()},
    null_content=_says(None, "no_content"),
    refusal=_says(None, "refusal", refusal="I would rather not."),
    both_labels=_says("<verdict>$win</verdict> <verdict>$loss</verdict>", "conflicting"),
    quoted_in_reasoning=_says("I cannot say.", "unparsable", reasoning_content=_VERDICT),
    unclosed_think=_says("<think>So it is <verdict>$loss</verdict>", "length"),
    unknown_reasoning=_says("<|channel>thought\nPerhaps <verdict>$loss</verdict>", "length"),
    verdict_amid_text=_says("<verdict>$loss</verdict> would be wrong, since", "unparsable"),
    finish_error=Fault(finish_reason="error", reason="unfinished"),
    finish_error_empty=Fault(finish_reason="error", message={"content": None}, reason="unfinished"),
    finish_abort=Fault(finish_reason="abort", reason="unfinished"),
    length=Fault(finish_reason="length", reason="length", answer=True),
    content_filter=Fault(finish_reason="content_filter", reason="filter", answer=True),
    no_system_role=Fault(
        400,
        body=_said(400, "invalid_request_error", "System role not supported by this model"),
        reason="http_400",
        again="changed",
    ),
    context_error_in_200=Fault(
        body=b'{"error": {"message": "prompt is too long: 900 tokens > 300 maximum"}}',
        reason="too_long",
        again="changed",
    ),
    **{
        f"context_{name}": Fault(said[0], body=_said(*said), reason="too_long", again="changed")
        for name, said in _CONTEXT.items()
    },
)
"""Kinds of fault by name. None of them is a verdict, so none may ever be taken for one."""

STORM_FAULTS: Mapping[str, Fault] = _named(
    _429=_status(429, "retried", at_once=True),
    _429_retry_after=_status(429, "retried", headers={"Retry-After": "1"}, at_once=True),
    _503_retry_after=_status(503, "retried", headers={"Retry-After-Ms": "500"}, at_once=True),
)
"""Refusals that come in storms, since overload does."""
