"""What of a score call is encoded and scored together, so that the judge can answer for one part during the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rmcore.model.text import EncodedText

__all__ = ["MicroBatch", "micro_batches"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Consecutive groups that are encoded and scored together.

    Attributes:
        first: number of the first group.
        first_row: of its hidden rows among those of the whole call.
        sizes: K of each group.
        tokens: of all its texts together.
        tokens_before: of the groups before it.
    """

    first: int
    first_row: int
    sizes: list[int]
    tokens: int = 0
    tokens_before: int = 0

    @property
    def stop(self) -> int:
        """One past the number of the last group."""
        return self.first + len(self.sizes)


def micro_batches(sizes: Sequence[int], encoded: Sequence[Sequence[EncodedText]], tokens: float) -> list[MicroBatch]:
    """Cut the groups, in their order, into as few parts as have about ``tokens`` tokens each, all of about equal size.

    In their order, not sorted by length: a router that works part by part must not see the long groups first, or its
    budget would go to them. Of equal size, so that no small rest runs at the price of a full batch.
    """
    counts = [sum(len(text) for text in group) for group in encoded]
    total = sum(counts)
    parts = max(1, math.ceil(total / tokens))
    result: list[MicroBatch] = []
    first = first_row = row = before = done = 0
    mark = 1  # the next of the parts - 1 marks that cut the tokens into equal shares
    for group, count in enumerate(counts):
        done += count
        row += len(encoded[group])
        if group + 1 == len(counts) or (mark < parts and done * parts >= total * mark):
            result.append(MicroBatch(first, first_row, list(sizes[first : group + 1]), done - before, before))
            first, first_row, before = group + 1, row, done
            mark = done * parts // max(total, 1) + 1
    return result
