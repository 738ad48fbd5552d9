"""Reading what a server of models says of an error, of unknown make, without letting a key through. Total functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rmcore._base.client.secrets import without_secret
from rmcore._base.large import LARGE, TooManyValuesError, read_json

__all__ = [
    "embedded_status",
    "error_code",
    "error_detail",
    "error_words",
    "has_error",
    "load_json",
    "read_reply",
    "scrub",
]

_MAX_DETAIL = 300
_MAX_WORDS = 4_096
_MOST_VALUES = 20_000  # log-probabilities aside, a reply has a few dozen
_BEARER = re.compile(r"(?i)\b(bearer\s+)\S+|\b((?:sk|pk|rk)-)[\w-]{6,}")

# Names of fields, without the case and the underscores in which servers differ: statusCode, status_code, StatusCode.
_CODES = ("code", "status", "statuscode", "httpstatus", "httpcode", "errorcode")
_WORDS = ("code", "type", "status", "errorcode", "errortype", "_type")
_MESSAGES = (
    *("message", "msg", "statusmsg", "errormessage", "errormsg", "faultstring"),
    *("detail", "title", "errordescription", "reason", "exception", "error"),
)
_HOLDERS = ("error", "errors", "fault")
_NOTHING: tuple[object, ...] = (None, "", 0, False, 200, "200", "0", [], {})
_NUMBERED = re.compile(
    r"(?i)(?:^\W{0,3}|\b(?:http|status(?: code)?|error(?: code)?|code)\W{1,3})([45]\d\d)\b|\b([45]\d\d) status code\b"
    r"|\| (5\d\d): "  # Cloudflare's titles
)
_TITLE = re.compile(rb"(?is)<title[^<>]{0,80}>([^<>]{1,200})(?:<|\Z)")
_TAG = re.compile(rb"<[^<>]{1,200}>")
_PASSING = frozenset({429, 500, 502, 503, 504})
# What APIs call a status in words: OpenAI's and Anthropic's types, Google's codes, the standard's phrases.
_NAMED = tuple(
    (re.compile(f"(?i){pattern}"), status)
    for pattern, status in (
        (r"rate.?limit|too.?many.?requests|throttl|resource.?exhausted|insufficient_quota", 429),
        (r"(?:requests?|qps|concurrency)[ _]?limit|rate exceeded|slow.?down|并发数?过高|请求过多|请求频率|限流", 429),
        (r"bad.?gateway", 502),
        (r"gateway.?time.?out|deadline.?exceeded|timed.?out|^time.?out|timeout.?error", 504),
        (r"(?:upstream|request|stream).{0,20} time.?out", 504),
        (r"overloaded|service.{0,13}unavailable|temporarily unavailable|^unavailable$", 503),
        (r"currently loading|too busy|no healthy upstream|upstream connect error|繁忙|过载|混み合", 503),
        (r"請求過多|リクエストが多すぎ|요청이 너무 많|demasiadas (?:solicitudes|peticiones)|trop de requêtes", 429),
        (r"zu viele anfragen|слишком много запросов|troppe richieste|muitas (?:solicitações|requisições)", 429),
        (r"(?:try again|retry) later|^try again|稍[后後候]再?重?[试試]|請稍|请稍|しばらく|잠시 후|나중에 다시", 503),
        (r"(?:inténtelo|intente|tente).{0,20}(?:más tarde|mais tarde)|réessayer|réessayez|später erneut", 503),
        (r"попробуйте позже|повторите.{0,20}позже|riprova.{0,20}più tardi", 503),
        (r"internal.?(?:server.?)?error|server.?error|api_error|^internal$", 500),
        (r"authentication|unauthenticated|unauthorized|invalid.?api.?key", 401),
        (r"permission|forbidden", 403),
        (r"not.?found", 404),
        (r"invalid.?request|bad.?request|invalid.?argument|context.?length.?exceeded", 400),
    )
)


def embedded_status(body: bytes) -> int | None:
    """The HTTP status that an error inside a body of status 200 names; ``None`` if there is none.

    Gateways answer 200 before they know what their upstream says, and then put its error into the body: at the top,
    beside choices or instead of them, into the choice or its message, into a list, or as an event of a stream. Its
    ``code`` (or ``status``) is the status that counts; where it has no number, the status that its words stand for.
    """
    if len(body) > LARGE and b"error" not in body and b'"choices"' in body:  # a large reply is not parsed twice
        return None
    return next((status for said in _errors(_document(body)) if (status := _status(said)) is not None), None)


def has_error(reply: Mapping[str, object]) -> bool:
    """Whether a reply of status 200 says that it is an error, whatever else it holds."""
    if reply.get("object") == "error" or reply.get("type") == "error":
        return True
    return any(said is not reply and _says_something(said) for said in _errors(reply))


def _document(body: bytes) -> object:
    """The JSON value of a body; of what is no JSON the error that it may be, as it would be said in JSON: the first of
    server-sent events or of lines that is one, the words of a page or of a plain text.
    """
    value = load_json(body)
    if isinstance(value, str) and value.lstrip().startswith("{"):  # JSON, as JSON
        value = load_json(value[: _MAX_WORDS * 4].encode("utf-8", "replace"))
    if value is not None:
        return value
    start = body[: _MAX_WORDS * 4].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"data:", b"event:", b":")):
        lines = [line[5:].strip() for line in start.splitlines() if line.startswith(b"data:")]
        found = next((one for one in map(load_json, lines) if next(_errors(one), None) is not None), None)
        if found is None and b"event: error" in start and lines:
            return {"error": lines[0].decode("utf-8", "replace")}
        return found
    if start.startswith(b"{"):
        return load_json(start.splitlines()[0])
    if start.startswith(b"<"):
        title = _TITLE.search(start)
        page = b"<html" in start[:300].lower() or b"<!doctype html" in start[:300].lower()
        words = title[1] if title is not None else b"" if page else _TAG.sub(b" ", start)
        return {"error": words.decode("utf-8", "replace")} if words.strip() else None
    return {"error": start.decode("utf-8", "replace")} if len(body) < _MAX_WORDS and start[:1].isalnum() else None


def _errors(reply: object) -> Iterator[Mapping[str, object] | str]:
    """What in a reply is an error or may be one, the surest first: objects with a code or a message, or texts."""
    if isinstance(reply, list):
        reply = reply[0] if reply else None
    if not isinstance(reply, Mapping):
        return
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    inner = reply.get("Response")  # Tencent's
    for holder in (reply, choice, choice.get("message") if isinstance(choice, Mapping) else None, inner):
        if isinstance(holder, Mapping):
            for name in holder:
                if isinstance(name, str) and name.lower() in _HOLDERS:
                    yield from _said(holder[name])
    base = reply.get("base_resp")  # MiniMax's, beside every answer
    if isinstance(base, Mapping) and base.get("status_code") not in _NOTHING:
        yield base
    if reply.get("object") == "error" or reply.get("type") == "error" or not isinstance(choice, Mapping):
        yield reply
        for name in ("detail", "message", "msg"):
            yield from _said(reply.get(name))


def _said(value: object) -> Iterator[Mapping[str, object] | str]:
    for one in value[:4] if isinstance(value, list) else [value]:
        if isinstance(one, Mapping) and one:
            inner = _folded(one).get("error")
            if isinstance(inner, Mapping) and inner:
                yield inner
            yield one
        elif isinstance(one, str) and one.strip():
            yield one


def _says_something(said: Mapping[str, object] | str) -> bool:
    """Whether an error is one: some gateways send its fields with nothing in them beside every answer."""
    if isinstance(said, str):
        return True
    fields = _folded(said)
    codes = [fields[name] for name in _CODES if name in fields]
    if codes and all(type(code) is not bool and code in (0, 200, "0", "200") for code in codes):
        return False  # "success", by whatever words
    return any(value not in _NOTHING for value in said.values())


def _status(said: Mapping[str, object] | str) -> int | None:
    if isinstance(said, str):
        return _status_of_words(said)
    fields = _folded(said)
    for name in _CODES:
        value = fields.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == 3:
            value = int(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 400 <= value < 600:
            return int(value)
    words = [value for name in _WORDS if isinstance(value := fields.get(name), str)]
    named = (status for word in words for pattern, status in _NAMED if pattern.search(word))
    messages = (value for name in _MESSAGES if isinstance(value := fields.get(name), str))
    told = (status for text in messages if (status := _status_of_words(text)) is not None)
    return next(named, None) or next(told, None)


def _folded(said: Mapping[str, object]) -> dict[str, object]:
    """An error's fields by their names without case and underscores; the first of a name counts."""
    fields: dict[str, object] = {}
    for name, value in said.items():
        if isinstance(name, str):
            fields.setdefault(name[:1].lower() + name[1:].replace("_", "").lower(), value)
    return fields


def _status_of_words(text: str) -> int | None:
    """The status that a message names or describes, if it is one that passes; a refusal has words of many kinds."""
    text = text[:_MAX_WORDS]
    if (found := _NUMBERED.search(text)) is not None:
        return int(found[1] or found[2] or found[3])
    return next((status for pattern, status in _NAMED if status in _PASSING and pattern.search(text)), None)


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
    reply = _document(body)
    return next((_worded(said) for said in _errors(reply) if said is not reply), None) or (
        _worded(reply) if isinstance(reply, Mapping) else None
    )


def _worded(said: Mapping[str, object] | str) -> object:
    """An error whose message stands under whatever name."""
    if isinstance(said, str) or "message" in said:
        return said
    fields = _folded(said)
    message = next((value for name in _MESSAGES if isinstance(value := fields.get(name), str)), None)
    return said if message is None else {**said, "message": message}
