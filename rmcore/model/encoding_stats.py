"""What encoding costs: its counts, its batches, and the warning of texts that a policy cut."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from rmcore.model.text import EncodedText

__all__ = ["EncodingStats", "length_batches", "warn_of_cuts"]

log = logging.getLogger("rmcore.model.backbone")


@dataclass
class EncodingStats:
    """What encoding did so far.

    Attributes:
        texts: texts seen.
        encoded: distinct ones.
        tokens: of the distinct texts, each in full.
        padded_tokens: tokens of padded forward passes, padding included.
        truncated_texts: texts that a policy cut.
        cut_tokens: what it took.
        unread_texts: texts that the policy ``no-reward`` left unread.
        packed_tokens: tokens of packed forward passes, where shared beginnings count once.
        cached: distinct texts whose states were known from before, so that they cost nothing.
    """

    texts: int = 0
    encoded: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    truncated_texts: int = 0
    cut_tokens: int = 0
    packed_tokens: int = 0
    cached: int = 0
    unread_texts: int = 0

    @property
    def computed_tokens(self) -> int:
        """Tokens the model computed, to hold against ``tokens``."""
        return self.padded_tokens + self.packed_tokens

    def add(self, other: EncodingStats) -> None:
        """Add another's counts to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each at most ``max_tokens`` when padded (or one text)."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    start = 0
    while start < len(order):
        count = max(1, max_tokens // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count


def warn_of_cuts(texts: Sequence[EncodedText], call: EncodingStats) -> None:
    """Log once for a call how many of its texts were longer than the limit, and what was done."""
    limit = next((text.limit for text in texts if text.limit is not None), None)
    if limit is None:
        return
    over = call.truncated_texts + call.unread_texts
    done = f"cut {call.cut_tokens} tokens" if call.truncated_texts else "left them unread"
    log.warning(
        "%d of %d texts were longer than %s tokens; the policy %r %s",
        *(over, call.texts, limit.max_length, limit.overlong, done),
    )
