"""Reading what an endpoint sent: JSON of unknown make into a choice, token counts, or a reason. Total functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rmcore._base.client.causes import not_a_completion
from rmcore._base.client.error_body import error_code, error_detail, error_words, has_error, read_reply, scrub
from rmcore._base.client.overflow import Overflow, read_overflow
from rmcore._base.large import TooManyValuesError
from rmcore.judge.base import JudgeUsage

__all__ = ["Completion", "read_completion"]

_MAX_NAME = 200
_FINGERPRINT = "system_fingerprint"


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished call: the ``choice`` as the endpoint sent it, or ``None`` and a ``reason``.

    Reasons: ``http_<status>``, ``insufficient_quota``, ``timeout``, ``deadline``, ``connection``, ``reply_too_large``,
    ``bad_encoding``, ``not_json``, ``no_choices``, ``error_in_reply``,
    ``no_api_key``, ``bad_api_key``, ``error_<type>``; and for calls of
    which nothing was sent ``deadline``, ``breaker_open`` (the endpoint is down; ``detail`` says how it failed last) and
    ``over_token_limit`` (larger than ``tokens_per_minute`` altogether). A call that was tried and then stopped by one
    of these keeps the reason of its last attempt. ``detail`` is the endpoint's own message, cleaned and cut, for a log
    line. ``model`` and ``fingerprint`` are what the reply says of who answered (``model``, ``system_fingerprint``).
    ``overflow`` is there if the request was too long for the model.
    """

    choice: Mapping[str, object] | None
    reason: str = ""
    detail: str = ""
    usage: JudgeUsage = field(default_factory=JudgeUsage)
    model: str = ""
    fingerprint: str = ""
    overflow: Overflow | None = None


def read_completion(body: bytes, usage: JudgeUsage, key: str) -> Completion:
    """The first choice of a reply with status 200, its token counts added to ``usage``.

    The content type is ignored: what parses counts, and what does not is ``not_json``.
    """
    try:
        reply = read_reply(body)
    except TooManyValuesError as error:
        return Completion(None, "reply_too_large", str(error), usage)
    if not isinstance(reply, Mapping):
        detail = "a JSON value that is no object" if reply is not None else scrub(not_a_completion(body), key)
        return Completion(None, "not_json", detail, usage)
    usage = _with_tokens(usage, reply.get("usage"))
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        return Completion(None, "no_choices", error_detail(body, key), usage, overflow=_overflow(body))
    if has_error(reply):  # the text beside an error is not an answer, finished as it may look
        return Completion(None, "error_in_reply", error_detail(body, key), usage, overflow=_overflow(body))
    if "message" not in choice and ("text" in choice or "delta" in choice):
        other = "of /completions" if "text" in choice else "in pieces, as of a stream"
        return Completion(None, "no_choices", f"an answer {other}, expected one of /chat/completions", usage)
    model, fingerprint = (_name(reply.get(word), key) for word in ("model", _FINGERPRINT))
    return Completion(choice, usage=usage, model=model, fingerprint=fingerprint)


def _overflow(body: bytes) -> Overflow | None:
    return read_overflow(200, error_code(body), error_words(body))


def _with_tokens(usage: JudgeUsage, counts: object) -> JudgeUsage:
    """``usage`` with the token counts an endpoint reported; what is missing or makes no sense counts 0."""
    return replace(
        usage,
        prompt_tokens=_count(counts, "prompt_tokens"),
        completion_tokens=_count(counts, "completion_tokens"),
        reasoning_tokens=_count(counts, "completion_tokens_details", "reasoning_tokens"),
        cached_tokens=_count(counts, "prompt_tokens_details", "cached_tokens")
        or _count(counts, "prompt_cache_hit_tokens"),
    )


def _name(value: object, key: str) -> str:
    """A name that the endpoint gives, as it may stand in a store and a log line; empty if it is none."""
    return scrub(value[:_MAX_NAME], key) if isinstance(value, str) else ""


def _count(value: object, *path: str) -> int:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, str) and len(value) <= 16 and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else 0
