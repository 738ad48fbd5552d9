"""Reading what a server of models says of an error, of unknown make, without letting a key through. Total functions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rmcore._base.client.secrets import without_secret
from rmcore._base.large import TooManyValuesError, read_json

__all__ = ["embedded_status", "error_code", "error_detail", "error_words", "load_json", "read_reply", "scrub"]

_MAX_DETAIL = 300
_MAX_WORDS = 4_096
_MOST_VALUES = 20_000  # log-probabilities aside, a reply has a few dozen
_BEARER = re.compile(r"(?i)\b(bearer\s+)\S+|\b((?:sk|pk|rk)-)[\w-]{6,}")


def embedded_status(body: bytes) -> int | None:
    """The HTTP status that an error object inside a body of status 200 names; ``None`` if there is none.

    Gateways answer 200 before they know what their upstream says, and then put its error into the body: at the top,
    beside choices or instead of them, or into the choice. Its ``code`` (or ``status``) is the status that counts.
    """
    if b"error" not in body:  # a large reply is not parsed twice
        return None
    reply = load_json(body)
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
    text = message if isinstance(message, str) else body[: _MAX_DETAIL * 32].decode("utf-8", "replace")
    clean = scrub(text, key)
    return clean if len(clean) <= _MAX_DETAIL else clean[: _MAX_DETAIL - 1] + "…"


def error_words(body: bytes) -> str:
    """All that an error's own fields say, numbers included; of a body without an error object, its beginning."""
    error = _error(body)
    if isinstance(error, Mapping):
        own = [(name, value) for name, value in error.items() if isinstance(value, (str, int, float))]
        return "; ".join(f"{name} {value}" if not isinstance(value, str) else value for name, value in own)[:_MAX_WORDS]
    return error[:_MAX_WORDS] if isinstance(error, str) else body[:_MAX_WORDS].decode("utf-8", "replace")


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


def read_reply(body: bytes) -> object:
    """The JSON value of ``body``, ``None`` if it is none (or one so deep that the parser gives up).

    Log-probabilities of many tokens are left as JSON in ``bytes`` (:func:`~rmcore._base.large.read_json`).

    Raises:
        TooManyValuesError: it holds more lists and objects than any reply needs.
    """
    try:
        value: object = read_json(body, unread="logprob", most_values=_MOST_VALUES)
    except TooManyValuesError:
        raise
    except (ValueError, RecursionError):
        return None
    return value


def load_json(body: bytes) -> object:
    """:func:`read_reply`, and ``None`` for too many values too."""
    try:
        return read_reply(body)
    except TooManyValuesError:
        return None


def _error(body: bytes) -> object:
    reply = load_json(body)
    if not isinstance(reply, Mapping):
        return None
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    error = reply.get("error") or (choice.get("error") if isinstance(choice, Mapping) else None)
    return error or reply.get("message")
