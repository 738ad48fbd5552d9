"""Where a backbone's inputs tell nothing of a pair: two different responses with one input, or a text left unread.

Responses become equal when a policy cuts them, when the tokenizer knows none of their words or not their case, or when
a chat template trims them. Equal inputs have equal states, so a head gives such a pair g = 0 and v = 0, and √(1 + a v)
would call that as sure as can be. It is the opposite: nothing is known of the pair.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.prompt import Response, content_key
from rmcore.model.text import EncodedText

__all__ = ["PairSignal", "fill_unread", "pair_signal", "pair_signals", "training_signal", "without_signal"]

log = logging.getLogger(__name__)


class PairSignal(IntEnum):
    """What a pair's inputs tell."""

    PRESENT = 0
    EQUAL_INPUTS = 1
    """Different responses, one input."""
    UNREAD = 2
    """At least one text was over-long under the policy ``no-reward``."""


def pair_signal(texts: Sequence[EncodedText], mode: str) -> PairSignal:
    """Of one pair: its two responses' texts (difference mode), or its text in one order or both (concat mode)."""
    if any(text.unread for text in texts):
        return PairSignal.UNREAD
    concat = mode == "concat"
    equal = any(text.equal_responses for text in texts) if concat else texts[0].ids == texts[1].ids
    return PairSignal.EQUAL_INPUTS if equal else PairSignal.PRESENT


def pair_signals(texts: Sequence[EncodedText], pair_rows: Tensor, mode: str) -> Tensor:
    """(Q,) uint8, a :class:`PairSignal` for each pair, given the (Q, 1 or 2) rows of its texts; on the CPU."""
    unread = torch.tensor([text.unread for text in texts], dtype=torch.bool)
    if mode == "concat":
        equal = torch.tensor([text.equal_responses for text in texts], dtype=torch.bool)[pair_rows].any(1)
    else:
        known: dict[object, int] = {}
        ids = torch.tensor([known.setdefault(text.ids, len(known)) for text in texts], dtype=torch.int64)
        equal = ids[pair_rows[:, 0]] == ids[pair_rows[:, 1]]
    signals = torch.where(equal, int(PairSignal.EQUAL_INPUTS), int(PairSignal.PRESENT))
    return signals.masked_fill_(unread[pair_rows].any(1), int(PairSignal.UNREAD)).to(torch.uint8)


def fill_unread(hidden: Tensor, groups: Sequence[Sequence[EncodedText]]) -> Tensor:
    """Hidden rows (R, h) of groups of texts with a finite row in place of each unread text's.

    A kernel may share work between a group's rows, so it gets a row like theirs: a sibling's, or zeros where there is
    none. What it says of the pairs of such a row means nothing.
    """
    if not any(text.unread for group in groups for text in group):
        return hidden
    hidden, start = hidden.clone(), 0
    for group in groups:
        read = [k for k, text in enumerate(group) if not text.unread]
        for k, text in enumerate(group):
            if text.unread:
                hidden[start + k] = hidden[start + read[0]] if read else 0.0
        start += len(group)
    return hidden


def without_signal(
    responses: Sequence[tuple[Response, Response]], pairs: Sequence[tuple[EncodedText, EncodedText]], mode: str
) -> dict[int, str]:
    """Why nothing can be learned of a pair, by its number, of those of which that is so."""
    found: dict[int, str] = {}
    for k, (own, texts) in enumerate(zip(responses, pairs, strict=True)):
        signal = pair_signal(texts, mode)
        if signal is PairSignal.UNREAD:
            found[k] = "over-long"
        elif signal is PairSignal.EQUAL_INPUTS and content_key(own[0]) == content_key(own[1]):
            found[k] = "equal responses"
        elif signal is PairSignal.EQUAL_INPUTS:
            cut = any(text.cut_tokens for text in texts)
            found[k] = "equal when cut to the limit" if cut else "equal to the tokenizer"
    return found


def training_signal(
    responses: Sequence[tuple[Response, Response]],
    pairs: Sequence[tuple[EncodedText, EncodedText]],
    mode: str,
    *,
    may_be_empty: bool = False,
    reasons: dict[int, str] | None = None,
) -> list[int]:
    """Numbers of the pairs that a head can learn from; the others are counted in a warning.

    ``reasons`` is filled with why each of the others is left out. Raises InputError where none is left, unless it
    ``may_be_empty``.
    """
    found = without_signal(responses, pairs, mode)
    if reasons is not None:
        reasons.update(found)
    kept = [k for k in range(len(pairs)) if k not in found]
    if not found:
        return kept
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(found.values()).items()))
    if not kept and not may_be_empty:
        reject(
            "preferences", f"{len(pairs)} pairs that carry no signal ({told})", "pairs that the model can tell apart"
        )
    log.warning("%d of %d pairs carry no signal and are left out: %s", len(found), len(pairs), told)
    return kept
