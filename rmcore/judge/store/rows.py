"""A call as the columns that both databases keep, and the reply that is made of them again.

Texts are kept as JSON strings, so that every ``str`` comes back as it was, lone surrogates and NULs included (two
halves of a pair come back as the character they spell, which is what a judge is sent). There is no pickle in a store,
and no endpoint's key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from rmcore._base.large import PIECE, ascii_json, pieces
from rmcore.judge.base import JudgeUsage, Verdict
from rmcore.judge.store.protocol import StoreError
from rmcore.judge.store.records import MAX_REPLY, Question, Reply

__all__ = ["REPLY_COLUMNS", "call_row", "digest", "dump_text", "judge_row", "load_text", "reply_of", "standing"]

REPLY_COLUMNS: Final = "preference, reason, critique, reply, labels, neutralised, currency, answered, fingerprint"
"""What :func:`reply_of` reads."""


def call_row(question: Question, reply: Reply, at: float, version: str) -> dict[str, Any]:
    """The columns of a call, without its texts and its judge. ``at`` is in seconds since the Unix epoch."""
    usage, verdict = reply.verdict.usage, reply.verdict
    return {
        "key": question.key,
        "pair": question.pair,
        "shown": question.shown,
        "preference": verdict.preference,
        "reason": verdict.reason,
        "replied": int(reply.replied),
        "critique": dump_text(verdict.critique),
        "reply": dump_text(reply.text[:MAX_REPLY]),
        "reply_cut": max(0, len(reply.text) - MAX_REPLY),
        "labels": dump_text(None if reply.labels is None else dict(reply.labels)),
        "neutralised": reply.sanitised,
        "attempts": usage.attempts,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cached_tokens": usage.cached_tokens,
        "seconds": usage.seconds,
        "cost": None if usage.unpriced_calls else usage.cost,
        "currency": reply.currency,
        "canary": int(question.canary),
        "at": datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds"),
        "version": version,
        "answered": reply.model,
        "fingerprint": reply.fingerprint,
        "cut": json.dumps(list(question.cut)),
    }


def judge_row(question: Question) -> dict[str, str]:
    """The columns of who is asked, and how."""
    parameters = json.dumps(dict(question.parameters), sort_keys=True, separators=(",", ":"))
    return {"judge": question.judge, "model": question.model, "parameters": parameters, "template": question.template}


def reply_of(row: Sequence[Any]) -> Reply:
    """The reply of a row of :data:`REPLY_COLUMNS`, as a hit.

    Raises:
        StoreError: it was not written by this library.
    """
    preference, reason, critique, text, labels, sanitised, currency, model, fingerprint = row
    verdict = Verdict(preference, reason, critique=load_text(critique), usage=JudgeUsage(cache_hits=1))
    said, words = load_text(text), load_text(labels)
    return Reply(verdict, True, said, words, sanitised, currency=currency, model=model, fingerprint=fingerprint)


def standing(logged: Reply, found: Reply | None) -> Reply:
    """What answers a question once ``logged`` is: that, unless ``found`` (which now answers it) was there before."""
    if logged.verdict.failed and not logged.replied:
        return logged
    if found is None or found.verdict.preference == logged.verdict.preference:
        return logged
    return replace(found, verdict=replace(found.verdict, usage=logged.verdict.usage))


def load_text(stored: str) -> Any:
    """The value of a stored JSON text.

    Raises:
        StoreError: it is none, so the store was not written by this library.
    """
    try:
        if not isinstance(stored, str):
            raise TypeError
        return json.loads(stored)
    except (ValueError, TypeError, RecursionError):
        raise StoreError("verdict store: got a text that is no JSON, expected what this library writes") from None


def dump_text(value: object) -> str:
    """``value`` as JSON: readable where it can be, escaped where it holds what UTF-8 cannot encode."""
    if isinstance(value, str) and len(value) > PIECE:  # the judges' threads go on meanwhile
        text = '"' + "".join(json.dumps(piece, ensure_ascii=False)[1:-1] for piece in pieces(value)) + '"'
    else:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if _encodable(text) else ascii_json(value, compact=True)


def digest(content: str) -> bytes:
    """By which a text or a judge is found: SHA-256."""
    hashed = hashlib.sha256()
    for piece in pieces(content):
        hashed.update(piece.encode())
    return hashed.digest()


def _encodable(text: str) -> bool:
    try:
        for piece in pieces(text):
            piece.encode()
    except UnicodeEncodeError:
        return False
    return True
