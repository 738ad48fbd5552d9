"""Soft verdicts: how sure a judge is of its verdict, read from the log-probabilities of the label it wrote.

Labels are drawn with different first letters (:mod:`rmcore.judge.question.prompt`), so the judge commits itself at one
token: the one that holds the label's first letter, however the tokenizer cuts the rest. At that token the alternatives
are added up by the label they begin, and

    preference = (P(first) − P(second)) / (P(first) + P(second) + P(tie)),

which is 2P − 1 with P = P(first) / (P(first) + P(second)) where ties have no mass. The probabilities are those *after*
the critique, so a judge that has argued for its verdict is mostly near ±1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rmcore.judge.base import Outcome
from rmcore.judge.question.verdict import Labels, statements

__all__ = ["MIN_MASS", "Soft", "soft_preference"]

MIN_MASS = 0.5
"""Below this probability of all three labels together, unless another is given, the judge was about to write something
else: the verdict then counts for less, in proportion."""

_OUTCOMES: tuple[Outcome, ...] = ("win", "loss", "tie")
_DECORATION = b" \t\r\n*_`\"'"
_MAX_TOKENS = 1 << 20
_ALONE = 0.99
"""From which probability on the written token needs no alternatives beside it."""


@dataclass(frozen=True, slots=True)
class Soft:
    """A soft verdict: ``preference`` in [-1, 1] from the side of the response shown first, ``mass`` of all labels.

    Where there is none ``preference`` is ``None`` and ``reason`` says why: ``no_logprobs`` (the endpoint sent none that
    can be used), ``labels`` (their first letters do not differ), ``position`` (the label was not found among the
    tokens), ``mass`` (no label has a probability). ``reason`` is ``mass`` too beside a preference that counts for less,
    because the labels have less than ``least`` together.
    """

    preference: float | None
    mass: float = 0.0
    reason: str = ""


def soft_preference(choice: object, labels: Labels, outcome: Outcome, least: float = MIN_MASS) -> Soft:
    """Read the probabilities of the verdict that was read as ``outcome`` from a chat-completions choice.

    Total: any object whatever gives a :class:`Soft`, never an exception.

    Args:
        choice: with ``logprobs.content``: one ``{token, logprob, bytes, top_logprobs}`` a token.
        labels: the call's own.
        outcome: what :func:`~rmcore.judge.question.verdict.parse_verdict` read.
        least: probability of all labels together below which the verdict counts for less; 0 for never.
    """
    initials = {labels.label(o)[:1].upper() for o in _OUTCOMES}
    if len(initials) != 3 or "" in initials:
        return Soft(None, reason="labels")
    entries = _entries(choice)
    if not entries:
        return Soft(None, reason="no_logprobs")
    pieces = [_bytes(_read(entry)) for entry in entries]
    stream = b"".join(pieces)
    # Latin-1 gives one character a byte, so places in the text are places in the stream; labels are ASCII.
    places = [s.start for s in statements(stream.decode("latin-1"), labels) if s.outcome == outcome]
    if not places:
        return Soft(None, reason="position")
    at = places[-1]
    at += len(stream[at:]) - len(stream[at:].lstrip(_DECORATION))
    start = index = 0
    while start + len(pieces[index]) <= at:
        start += len(pieces[index])
        index += 1
    lead = pieces[index][: at - start].rstrip(_DECORATION)
    mass = dict.fromkeys(_OUTCOMES, 0.0)
    found, own = _alternatives(_read(entries[index])), pieces[index]
    if found and (own not in found or (len(found) == 1 and found[own] < _ALONE)):
        # Of the token that was written nothing is known, or of no other: what the rest says, or hides, is no measure.
        return Soft(None, reason="no_logprobs")
    for token, probability in found.items():
        if token.startswith(lead):
            begun = token[len(lead) :].lstrip(_DECORATION).upper()
            for word in _OUTCOMES:
                label = labels.label(word).upper().encode()
                if begun and (label.startswith(begun) or begun.startswith(label)):
                    mass[word] += probability
    total = math.fsum(mass.values())
    if not total <= 1.001:  # no probabilities; a little above 1 is rounding
        return Soft(None, reason="no_logprobs")
    if total == 0:
        return Soft(None, reason="mass")
    if total < least:
        # Divided by what it should have been, not by what it was: weak evidence must not become a loud vote.
        return Soft((mass["win"] - mass["loss"]) / least, total, "mass")
    return Soft((mass["win"] - mass["loss"]) / total, min(total, 1.0))


def _entries(choice: object) -> Sequence[Mapping[str, object] | bytes]:
    """The tokens of a choice, empty if they are not all of the form they should be."""
    logprobs = choice.get("logprobs") if isinstance(choice, Mapping) else None
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list) or len(content) > _MAX_TOKENS:
        return []
    return content if all(isinstance(entry, (Mapping, bytes)) for entry in content) else []


def _read(entry: Mapping[str, object] | bytes) -> Mapping[str, object]:
    """An entry; of a long answer they are left as JSON, and read one at a time."""
    found: Mapping[str, object] = json.loads(entry) if isinstance(entry, bytes) else entry
    return found


def _bytes(entry: Mapping[str, object]) -> bytes:
    """A token's bytes: those reported, since a token may be half a character, or else its text's."""
    reported = entry.get("bytes")
    if isinstance(reported, list) and reported and all(type(b) is int and 0 <= b < 256 for b in reported):
        return bytes(reported)
    token = entry.get("token")
    return token.encode("utf-8", "surrogatepass") if isinstance(token, str) else b""


def _alternatives(entry: Mapping[str, object]) -> dict[bytes, float]:
    """The token and its alternatives with their probabilities; what has none that makes sense is left out."""
    listed = entry.get("top_logprobs")
    found: dict[bytes, float] = {}
    for one in [entry, *(listed if isinstance(listed, list) else [])]:
        if isinstance(one, Mapping):
            logprob = one.get("logprob")
            # The lower bound is far below any that counts, and keeps out whole numbers that no float can hold.
            if isinstance(logprob, (int, float)) and not isinstance(logprob, bool) and -1e6 <= logprob <= 1e-3:
                token = _bytes(one)
                found[token] = max(found.get(token, 0.0), math.exp(min(logprob, 0.0)))
    return found
