"""Where the pairs, responses and hidden rows of groups are: the one place that knows.

Groups come one after the other, and the pairs of each in the order (0, 1), (0, 2), ..., (1, 2), ..., as
:func:`rmcore.ops.pair_variance` gives them. Squares (K, K) are made for all groups of equal K at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Block", "PairLayout", "PairMode", "PartialLayout", "squares"]

PairMode: TypeAlias = Literal["difference", "concat"]
"""``difference``: one hidden row a response. ``concat``: one hidden row an ordered pair of responses (design 2.6)."""


class Block(NamedTuple):
    """All n groups of one size K.

    Attributes:
        size: K.
        groups: (n,) which they are.
        pairs: (n, K(K−1)/2) numbers of their pairs; None where these are all groups there are.
        responses: (n, K) numbers of their responses; None likewise.
        edges: (P, 2) the pairs i < j that are there; None where all are.
    """

    size: int
    groups: Tensor
    pairs: Tensor | None
    responses: Tensor | None
    edges: Tensor | None = None


class PairLayout:
    """Numbers of the pairs, responses and hidden rows of groups. All tensors int64 on the CPU, made when needed.

    Args:
        sizes: K ≥ 0 of each group.

    Attributes:
        sizes: the same, (G,).
        common: K where all groups have the same, as in training they nearly always do: then what depends on sizes alone
            is arithmetic, not a tensor operation. None where they differ or there are none.
    """

    def __init__(self, sizes: Sequence[int] | Tensor) -> None:
        self.sizes = torch.as_tensor(sizes, dtype=torch.int64)
        counts: list[int] = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
        self._count = len(counts)
        self.common = counts[0] if counts and counts.count(counts[0]) == len(counts) else None

    def __len__(self) -> int:
        return self._count

    @cached_property
    def pair_counts(self) -> Tensor:
        """(G,) pairs of each group."""
        return self.sizes * (self.sizes - 1) // 2

    @cached_property
    def pairs(self) -> int:
        """Q, the number of pairs."""
        if self.common is not None:
            return len(self) * (self.common * (self.common - 1) // 2)
        return int(self.pair_counts.sum())

    @cached_property
    def responses(self) -> int:
        """ΣK."""
        return int(self.sizes.sum()) if self.common is None else len(self) * self.common

    @cached_property
    def all_paired(self) -> bool:
        """Whether every response is in a pair: no group is of one."""
        return self.common != 1 if self.common is not None else not bool((self.sizes == 1).any())

    @cached_property
    def starts(self) -> Tensor:
        """(G,) number of each group's first response."""
        return _starts(self.sizes)

    @cached_property
    def owner(self) -> Tensor:
        """(ΣK,) number of each response's group."""
        return torch.repeat_interleave(self.sizes)

    @cached_property
    def place(self) -> Tensor:
        """(ΣK,) each response's number within its group."""
        return torch.arange(self.responses) - torch.repeat_interleave(self.starts, self.sizes)

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
        return torch.repeat_interleave(self.sizes, self.sizes) - 1 - self.place

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

    def rows(self, mode: PairMode, *, one_order: bool = False) -> int:
        """Hidden rows of all groups together."""
        if mode == "difference":
            return self.responses
        return self.pairs if one_order else 2 * self.pairs

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
        if self.common is not None:
            return (Block(self.common, torch.arange(len(self)), None, None),)
        blocks = []
        for k in self.sizes.unique().tolist():
            groups = (self.sizes == k).nonzero()[:, 0]
            pairs = self._pair_starts[groups, None] + torch.arange(k * (k - 1) // 2)
            blocks.append(Block(k, groups, pairs, self.starts[groups, None] + torch.arange(k)))
        return tuple(blocks)

    def flat(self, squares: Sequence[Tensor]) -> Tensor:
        """(Q,) what stands above the diagonal of each group's square (K, K); the way back from :func:`squares`."""
        upper = [square[tuple(torch.triu_indices(len(square), len(square), 1))] for square in squares]
        return torch.cat(upper) if upper else torch.empty(0)


class PartialLayout(PairLayout):
    """Groups of which some pairs are compared only.

    Args:
        sizes: K ≥ 0 of each group.
        edges: of each group its pairs, (P, 2) int64 with i < j, in order.
    """

    def __init__(self, sizes: Sequence[int] | Tensor, edges: Sequence[Tensor]) -> None:
        super().__init__(sizes)
        self.edges = tuple(edges)

    @cached_property
    def pair_counts(self) -> Tensor:
        """(G,) pairs of each group that are there."""
        return torch.tensor([len(own) for own in self.edges], dtype=torch.int64)

    @cached_property
    def pairs(self) -> int:
        """Q, their number."""
        return sum(len(own) for own in self.edges)

    @cached_property
    def _all(self) -> Tensor:
        """(Q, 2)"""
        return torch.cat([torch.empty(0, 2, dtype=torch.int64), *self.edges])

    @cached_property
    def first(self) -> Tensor:
        """As in all layouts."""
        return self.starts[self.group] + self._all[:, 0]

    @cached_property
    def second(self) -> Tensor:
        """As in all layouts."""
        return self.starts[self.group] + self._all[:, 1]

    def row(self, group: int, i: int, j: int) -> int:
        """The number of one pair i < j of a group; raises ValueError where it is not compared."""
        return int(self._pair_starts[group]) + self.edges[group].tolist().index([i, j])

    def pair_rows(self, mode: PairMode, *, one_order: bool = False) -> Tensor:
        """As in all layouts; in concat mode the ordered pairs that are there are row-major."""
        if mode == "difference" or one_order:
            return super().pair_rows(mode, one_order=one_order)
        rows = [torch.empty(0, 2, dtype=torch.int64)]
        for start, size, own in zip(
            _starts(2 * self.pair_counts).tolist(), self.sizes.tolist(), self.edges, strict=True
        ):
            place = torch.cat([own, own.flip(1)]) @ torch.tensor([size, 1])
            rank = torch.empty_like(place)
            rank[place.argsort()] = torch.arange(len(place))
            rows.append(start + rank.view(2, -1).mT)
        return torch.cat(rows)

    def among_all(self) -> Tensor:
        """(Q,) the number that each pair has in the layout of all pairs."""
        i, j, size = self.i, self.j, self.sizes[self.group]
        return _starts(self.sizes * (self.sizes - 1) // 2)[self.group] + i * size - i * (i + 1) // 2 + j - i - 1

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The groups by size and pairs."""
        alike: dict[tuple[int, bytes], list[int]] = {}
        for number, (size, own) in enumerate(zip(self.sizes.tolist(), self.edges, strict=True)):
            alike.setdefault((size, own.numpy().tobytes()), []).append(number)
        blocks = []
        for (size, _), numbers in alike.items():
            groups, own = torch.tensor(numbers), self.edges[numbers[0]]
            pairs = self._pair_starts[groups, None] + torch.arange(len(own))
            blocks.append(Block(size, groups, pairs, self.starts[groups, None] + torch.arange(size), own))
        return tuple(blocks)

    def flat(self, squares: Sequence[Tensor]) -> Tensor:
        """As in all layouts."""
        there = [square[own[:, 0], own[:, 1]] for square, own in zip(squares, self.edges, strict=True)]
        return torch.cat(there) if there else torch.empty(0)


def squares(column: Tensor, block: Block, *, sign: int, diagonal: float = 0.0) -> Tensor:
    """The squares (n, K, K) of a block's groups.

    Args:
        column: (Q,) a value a pair, on any device.
        block: of the column's layout.
        sign: of what stands below the diagonal: 1 for the same value, -1 for its negative.
        diagonal: what stands on it. Where a pair is not compared: NaN, False of booleans.
    """
    k, device = block.size, column.device
    if block.edges is not None and block.pairs is not None:
        there, (i, j) = column[block.pairs.to(device)], block.edges.to(device).unbind(1)
        square = column.new_full((len(there), k, k), float("nan") if column.is_floating_point() else 0)
        square[:, i, j], square[:, j, i] = there, there if sign > 0 else 0.0 - there
        square.diagonal(dim1=1, dim2=2).fill_(diagonal)
        return square
    upper = column if block.pairs is None else column[block.pairs.to(device)]
    upper = upper.view(len(block.groups), k * (k - 1) // 2)
    lower = upper if sign > 0 else 0.0 - upper  # so that no preference is 0.0 both ways, not -0.0
    own = upper.new_full((len(block.groups), 1), diagonal)
    places = (_places if k <= _OFTEN else _places.__wrapped__)(k, device)
    return torch.cat((upper, lower, own), 1)[:, places].view(len(own), k, k)


_OFTEN = 64
"""Sizes of groups up to which the places are kept: 32 KB at most."""


@lru_cache(maxsize=128)
def _places(k: int, device: torch.device) -> Tensor:
    """(K²,) for each entry of a square where it stands among what is above the diagonal, below, and on it."""
    with torch.inference_mode(False):  # kept, so it must serve calls outside inference mode too
        pairs = k * (k - 1) // 2
        i, j = torch.triu_indices(k, k, 1)
        places = torch.full((k, k), 2 * pairs)
        places[i, j] = torch.arange(pairs)
        places[j, i] = torch.arange(pairs, 2 * pairs)
        return places.flatten().to(device)


def _starts(counts: Tensor) -> Tensor:
    """Where each of consecutive runs begins."""
    return counts.cumsum(0) - counts
