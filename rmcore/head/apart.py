"""A head's scores with the same bits whatever rows are scored beside them: a kernel call of its own for each.

A matrix product may add in another order when it has more rows. ``pairs_apart`` calls the head once a group,
``rows_apart`` once a row, so nothing outside a group or row can change its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError
from rmcore.head.frozen import FrozenHead, PairScores
from rmcore.ops.functional import Scores

__all__ = ["pairs_apart", "rows_apart"]


def pairs_apart(head: FrozenHead, hidden: Tensor, group_sizes: Tensor, **kwargs: Any) -> PairScores:
    """As :meth:`FrozenHead.score_pairs`, group by group."""
    stops = group_sizes.cumsum(0).tolist()
    bounds = list(zip([0, *stops[:-1]], stops, strict=True))
    parts: list[PairScores] = []

    def score(start: int, stop: int) -> PairScores:
        parts.append(head.score_pairs(hidden[start:stop], torch.tensor([stop - start]).to(group_sizes), **kwargs))
        return parts[-1]

    scores = PairScores(*_each(bounds, score))
    known = [(part.novelty, part.row_novelty) for part in parts]
    scores.novelty, scores.row_novelty = (
        torch.cat([column for column in columns if column is not None]) if columns[0] is not None else None
        for columns in zip(*known, strict=True)
    )
    return scores


def rows_apart(head: FrozenHead, hidden: Tensor, **kwargs: Any) -> Scores:
    """As :meth:`FrozenHead.score`, row by row."""
    bounds = [(k, k + 1) for k in range(len(hidden))]
    return Scores(*_each(bounds, lambda a, b: head.score(hidden[a:b], **kwargs)))


def _each(bounds: list[tuple[int, int]], score: Callable[[int, int], tuple[Tensor, ...]]) -> list[Tensor]:
    parts = []
    for start, stop in bounds:
        try:
            parts.append(score(start, stop))
        except NonFiniteError as error:
            rows = tuple(start + row for row in error.rows)
            raise NonFiniteError(f"rows {start} to {stop - 1}: {error}", rows) from None
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]
