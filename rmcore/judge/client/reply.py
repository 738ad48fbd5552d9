"""Reading what an endpoint sent: JSON of unknown make into a choice, token counts, or a reason. Total functions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rmcore.judge.base import JudgeUsage
from rmcore.judge.client.causes import not_a_completion
from rmcore.judge.client.overflow import Overflow, read_overflow
from rmcore.judge.client.secrets import without_secret

__all__ = ["Completion", "embedded_status", "error_code", "error_detail", "error_words", "read_completion", "scrub"]

_MAX_DETAIL = 300
_MAX_NAME = 200
_MAX_WORDS = 4_096
_FINGERPRINT = "system_fingerprint"
_BEARER = re.compile(r"(?i)\b(bearer\s+)\S+|\b((?:sk|pk|rk)-)[\w-]{6,}")


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
    reply = _load(body)
    if not isinstance(reply, Mapping):
        detail = "a JSON value that is no object" if reply is not None else scrub(not_a_completion(body), key)
        return Completion(None, "not_json", detail, usage)
    usage = _with_tokens(usage, reply.get("usage"))
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        return Completion(None, "no_choices", error_detail(body, key), usage, overflow=_overflow(body))
    if reply.get("error") or choice.get("error"):  # the text beside an error is not an answer, finished as it may look
        return Completion(None, "error_in_reply", error_detail(body, key), usage, overflow=_overflow(body))
    model, fingerprint = (_name(reply.get(word), key) for word in ("model", _FINGERPRINT))
    return Completion(choice, usage=usage, model=model, fingerprint=fingerprint)


def embedded_status(body: bytes) -> int | None:
    """The HTTP status that an error object inside a body of status 200 names; ``None`` if there is none.

    Gateways answer 200 before they know what their upstream says, and then put its error into the body: at the top,
    beside choices or instead of them, or into the choice. Its ``code`` (or ``status``) is the status that counts.
    """
    reply = _load(body)
    if not isinstance(reply, Mapping):
        return None
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    for error in (reply.get("error"), choice.get("error") if isinstance(choice, Mapping) else None):
        if isinstance(error, Mapping):
            for name in ("code", "status", "status_code"):
                value = error.get(name)
                if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
                    value = int(value)
                if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600:
                    return value
    return None


def error_code(body: bytes) -> str:
    """The error's ``code``, or else its ``type``, in lower case; empty if there is none. A used-up quota wins."""
    error = _error(body)
    if not isinstance(error, Mapping):
        return ""
    words = [value.lower() for name in ("code", "type") if isinstance(value := error.get(name), str)]
    if "insufficient_quota" in words:
        return "insufficient_quota"
    return words[0][:80] if words else ""


def error_detail(body: bytes, key: str) -> str:
    """The error's message, or the body's beginning, in one line of at most 300 characters and without secrets."""
    error = _error(body)
    message = error.get("message") if isinstance(error, Mapping) else error
    text = message if isinstance(message, str) else body.decode("utf-8", "replace")
    clean = scrub(text, key)
    return clean if len(clean) <= _MAX_DETAIL else clean[: _MAX_DETAIL - 1] + "…"


def error_words(body: bytes) -> str:
    """All that an error's own fields say, numbers included; of a body without an error object, its beginning."""
    error = _error(body)
    if isinstance(error, Mapping):
        own = [(name, value) for name, value in error.items() if isinstance(value, (str, int, float))]
        return "; ".join(f"{name} {value}" if not isinstance(value, str) else value for name, value in own)[:_MAX_WORDS]
    return error[:_MAX_WORDS] if isinstance(error, str) else body[:_MAX_WORDS].decode("utf-8", "replace")


def _overflow(body: bytes) -> Overflow | None:
    return read_overflow(200, error_code(body), error_words(body))


def scrub(text: str, key: str) -> str:
    """``text`` on one line, without control characters, ``key`` (however it is written) or what looks like a key."""
    if len(key) >= 4:
        # A cut-off text may end in the first half of the key; a half is a secret too.
        text = text[: _MAX_DETAIL * 8]
        text = without_secret(text, key)
        for length in range(min(len(key), len(text)), 3, -1):
            if text.endswith(key[:length]):
                text = text[:-length] + "***"
                break
    text = _BEARER.sub(lambda found: (found[1] or found[2]) + "***", text[: _MAX_DETAIL * 8])
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _load(body: bytes) -> object:
    """The JSON value of ``body``, ``None`` if it is none (or one so deep that the parser gives up)."""
    try:
        value: object = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value


def _error(body: bytes) -> object:
    reply = _load(body)
    if not isinstance(reply, Mapping):
        return None
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    error = reply.get("error") or (choice.get("error") if isinstance(choice, Mapping) else None)
    return error or reply.get("message")


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
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else 0
