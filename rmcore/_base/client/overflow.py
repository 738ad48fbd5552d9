"""Reading that a request was too long for the model, in the many ways that servers say it, and for how long it may be.

Every server has words of its own: OpenAI's ``context_length_exceeded``, and the texts of vLLM, SGLang, llama.cpp,
LM Studio, Ollama, TGI, TensorRT-LLM, LiteLLM, OpenRouter, Groq, Mistral, Anthropic, Gemini, Bedrock, Cohere and xAI.
Total functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["LEAST_CONTEXT", "Overflow", "model_context", "read_overflow"]

LEAST_CONTEXT = 256
"""Tokens; what claims to be a smaller context is none that a judge could have."""

_MOST = 1 << 40
_STATUSES = frozenset({200, 400, 413, 422, 429, 500, 503})
_CODES = re.compile(
    r"context_length_exceeded|context_window_exceeded|contextwindowexceeded|exceed_context_size|string_above_max_length"
    r"|model_context_window|request_too_large|prompt_too_long|input_too_long",
    re.IGNORECASE,
)
_WORDS = re.compile(
    r"(?:maximum|max|available|model'?s?|context|sequence|allowed|prompt|input) "
    r"(?:context|model|prompt|input|sequence|allowed)? ?(?:length|size|window)s?\b.{0,24}?\b(?:is|of|\(|exceed|than)"
    r"|exceed\w*.{0,60}?\b(?:context|maximum (?:length|number of tokens|allowed)|max_seq_len|max_model_len|token limit"
    r"|max_num_tokens|limit of \d+ tokens)"
    r"|(?:context|sequence|prompt|input)(?: length| size| window| tokens)?.{0,24}?\b(?:exceed|overflow|is too long\b)"
    r"|(?:prompt|input|request|messages?|conversation)s? (?:\w+ )?(?:is|are) too (?:long|large)|request too large"
    r"|too many (?:input |prompt )?tokens|tokens?,? too large for model|longer than the (?:model|maximum)"
    r"|reduce the length of|string too long|must (?:be <=|have less than) \d+.{0,20}?(?:given|tokens)"
    r"|(?:inputs?|prompt)\W* (?:must|cannot|can not|should not).{0,40}?\btokens"
    r"|default_max_tokens \(-",
    re.IGNORECASE | re.DOTALL,
)
_N = r"(\d[\d,_]{0,15})(?:\.0)?\b"
# Where the limit stands; the first that is found counts.
_LIMITS = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        rf"\bn_ctx\W{{1,4}}{_N}",
        rf"\d \+ \d+ > {_N}",
        rf"(?:max_seq_len|max_model_len|max_num_tokens)[^\d]{{0,24}}?{_N}",
        rf"maximum context[^\d<>]{{0,32}}?{_N}",
        rf"(?:context|prompt|model|sequence) (?:length|size|window)[^\d<>]{{0,32}}?{_N}",
        rf"(?:maximum number of (?:input )?tokens|maximum allowed length|configured limit|token limit)\D{{0,24}}?{_N}",
        rf"{_N} (?:tokens? )?(?:maximum|max)\b",
        rf"(?:cannot|can not|should not|must not) exceed {_N}",
        rf"(?:<=|less than|at most|limit of|limit:?|>) {_N}",
    )
]
_NUMBER = re.compile(_N)
_NAMES = (
    *("max_model_len", "max_seq_len", "n_ctx", "context_length", "loaded_context_length", "max_context_length"),
    *("context_window", "max_input_tokens", "max_prompt_length"),
)


@dataclass(frozen=True, slots=True)
class Overflow:
    """A request was longer than the model's context.

    Attributes:
        limit: tokens of the context, if it was said.
        asked: tokens of the request by the server's own count, if it was said.
        stated: the server said so; false for a bare status that may mean other things too.
        paid: a reply was generated and paid for, and the context ended before it did.
    """

    limit: int | None = None
    asked: int | None = None
    stated: bool = True
    paid: bool = False


def read_overflow(status: int, code: str, text: str) -> Overflow | None:
    """What an error says of the request's length; ``None`` if it is another error.

    Args:
        status: its HTTP status.
        code: its code or type.
        text: its message, or the body around it.
    """
    if status not in _STATUSES:
        return None
    if status == 429 and not re.search(r"too (?:large|long)", text, re.IGNORECASE):
        return None  # too many, not too much at once
    if not _CODES.search(code) and not _CODES.search(text) and not _WORDS.search(text):
        return Overflow(stated=False) if status == 413 else None
    if "string_above_max_length" in code or re.search(r"string too long", text, re.IGNORECASE):
        return Overflow()  # its numbers are of characters
    limit = next((_value(found[1]) for one in _LIMITS if (found := one.search(text))), None)
    if limit is not None and not LEAST_CONTEXT <= limit < _MOST:
        limit = None
    asked = max((n for n in map(_value, _NUMBER.findall(text)) if n < _MOST), default=0)
    return Overflow(limit, asked if limit is not None and asked > limit else None)


def model_context(reply: object, model: str) -> int | None:
    """Tokens of the context of ``model`` by what a server's ``/models`` says; ``None`` if it does not.

    Its own entry counts, or the only one that there is. Of several numbers the smallest does. The length that a model
    was trained on (``n_ctx_train``) is none of them: it is not what the server has room for.
    """
    listed = reply.get("data") if isinstance(reply, Mapping) else reply
    entries = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    own = [one for one in entries if one.get("id") == model] or (entries if len(entries) == 1 else [])
    return min((value for one in own[:1] for value in _stated(one)), default=None)


def _stated(entry: Mapping[str, object]) -> Iterator[int]:
    for part in (entry, entry.get("meta"), entry.get("top_provider"), entry.get("limits")):
        for name in _NAMES if isinstance(part, Mapping) else ():
            value = part.get(name) if isinstance(part, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and LEAST_CONTEXT <= value < _MOST:
                yield value


def _value(digits: str) -> int:
    return int(digits.replace(",", "").replace("_", ""))
