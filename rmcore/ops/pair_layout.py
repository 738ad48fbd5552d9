"""Where the pairs, responses and hidden rows of groups are: the one place that knows.

Groups come one after the other, and the pairs of each in the order (0, 1), (0, 2), ..., (1, 2), ..., as
:func:`rmcore.ops.pair_variance` gives them. Squares (K, K) are made for all groups of equal K at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Block", "PairLayout", "PairMode", "squares"]

PairMode: TypeAlias = Literal["difference", "concat"]
"""``difference``: one hidden row a response. ``concat``: one hidden row an ordered pair of responses (design 2.6)."""


class Block(NamedTuple):
    """All n groups of one size K.

    Attributes:
        size: K.
        groups: (n,) which they are.
        pairs: (n, K(K−1)/2) numbers of their pairs; None where these are all groups there are.
        responses: (n, K) numbers of their responses; None likewise.
    """

    size: int
    groups: Tensor
    pairs: Tensor | None
    responses: Tensor | None


class PairLayout:
    """Numbers of the pairs, responses and hidden rows of groups. All tensors int64 on the CPU, made when needed.

    Args:
        sizes: K ≥ 0 of each group.
    """

    def __init__(self, sizes: Sequence[int] | Tensor) -> None:
        self.sizes = torch.as_tensor(sizes, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def pair_counts(self) -> Tensor:
        """(G,) pairs of each group."""
        return self.sizes * (self.sizes - 1) // 2

    @cached_property
    def pairs(self) -> int:
        """Q, the number of pairs."""
        return int(self.pair_counts.sum())

    @cached_property
    def responses(self) -> int:
        """ΣK."""
        return int(self.sizes.sum())

    @cached_property
    def starts(self) -> Tensor:
        """(G,) number of each group's first response."""
        return _starts(self.sizes)

    @cached_property
    def first(self) -> Tensor:
        """(Q,) number of each pair's first response, counted over all groups."""
        return torch.repeat_interleave(self._later)

    @cached_property
    def second(self) -> Tensor:
        """(Q,) number of its second response."""
        starts = _starts(self._later)
        return self.first + 1 + torch.arange(self.pairs) - starts[self.first]

    @cached_property
    def group(self) -> Tensor:
        """(Q,) number of its group."""
        return torch.repeat_interleave(self.pair_counts)

    @cached_property
    def i(self) -> Tensor:
        """(Q,) its first response, counted within the group."""
        return self.first - self.starts[self.group]

    @cached_property
    def j(self) -> Tensor:
        """(Q,) its second response, j > i."""
        return self.second - self.starts[self.group]

    @cached_property
    def _later(self) -> Tensor:
        """(ΣK,) for each response, how many of its group come after it: the pairs in which it is first."""
        k = torch.repeat_interleave(self.sizes, self.sizes)
        position = torch.arange(self.responses) - torch.repeat_interleave(self.starts, self.sizes)
        return k - 1 - position

    def row(self, group: int, i: int, j: int) -> int:
        """The number of one pair i < j of a group."""
        k = int(self.sizes[group])
        return int(self._pair_starts[group]) + i * k - i * (i + 1) // 2 + j - i - 1

    @cached_property
    def _pair_starts(self) -> Tensor:
        return _starts(self.pair_counts)

    # -- hidden rows -------------------------------------------------------------------------------------------------

    def row_counts(self, mode: PairMode, *, one_order: bool = False) -> Tensor:
        """(G,) hidden rows of each group: one a response, or in concat mode one an ordered pair (or pair i < j)."""
        if mode == "difference":
            return self.sizes
        return self.pair_counts if one_order else 2 * self.pair_counts

    def pair_rows(self, mode: PairMode, *, one_order: bool = False) -> Tensor:
        """(Q, 2) the two hidden rows of each pair: its responses', or those of (i, j) and (j, i); (Q, 1) if one_order.

        Concat mode has its ordered pairs i ≠ j row-major: (0, 1), (0, 2), ..., (1, 0), (1, 2), ...
        """
        if mode == "difference":
            return torch.stack((self.first, self.second), 1)
        if one_order:
            return torch.arange(self.pairs)[:, None]
        start, k = _starts(2 * self.pair_counts)[self.group], self.sizes[self.group]
        forward = start + self.i * (k - 1) + self.j - 1
        return torch.stack((forward, start + self.j * (k - 1) + self.i), 1)

    # -- squares -----------------------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The groups by size."""
        sizes = self.sizes.unique().tolist()
        if len(sizes) == 1:
            return (Block(sizes[0], torch.arange(len(self)), None, None),)
        blocks = []
        for k in sizes:
            groups = (self.sizes == k).nonzero()[:, 0]
            pairs = self._pair_starts[groups, None] + torch.arange(k * (k - 1) // 2)
            blocks.append(Block(k, groups, pairs, self.starts[groups, None] + torch.arange(k)))
        return tuple(blocks)

    def flat(self, squares: Sequence[Tensor]) -> Tensor:
        """(Q,) what stands above the diagonal of each group's square (K, K); the way back from :func:`squares`."""
        upper = [square[tuple(torch.triu_indices(len(square), len(square), 1))] for square in squares]
        return torch.cat(upper) if upper else torch.empty(0)


def squares(column: Tensor, block: Block, *, sign: int, diagonal: float = 0.0) -> Tensor:
    """The squares (n, K, K) of a block's groups.

    Args:
        column: (Q,) a value a pair, on any device.
        block: of the column's layout.
        sign: of what stands below the diagonal: 1 for the same value, -1 for its negative.
        diagonal: what stands on it.
    """
    k, device = block.size, column.device
    upper = column if block.pairs is None else column[block.pairs.to(device)]
    upper = upper.view(len(block.groups), k * (k - 1) // 2)
    i, j = torch.triu_indices(k, k, 1, device=device)
    square = column.new_full((len(block.groups), k, k), diagonal)
    square[:, i, j] = upper
    square[:, j, i] = upper if sign > 0 else 0.0 - upper  # so that no preference is 0.0 both ways, not -0.0
    return square


def _starts(counts: Tensor) -> Tensor:
    """Where each of consecutive runs begins."""
    return counts.cumsum(0) - counts
