"""What a benchmark is: how its rows are read, which pairs of their responses count, and how credit becomes a score.

Every rule here is a pure function of numbers. An :class:`Item` is a prompt with its responses and the pairs that count,
better one first. A model, or a model with a judge, gives each of these pairs a *margin*: positive where it prefers the
better response, 0 where it has no preference. A benchmark turns margins into credit, one or several numbers an item,
and weighted credit into named scores; a bootstrap is the same function with other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from rmcore._base.prompt import Prompt, Response, content_key

__all__ = [
    "Benchmark",
    "Context",
    "CountedPairs",
    "Item",
    "Level",
    "Matrix",
    "Score",
    "group_mean",
    "half_point",
    "mean_of",
    "strict_point",
]

Matrix: TypeAlias = npt.NDArray[np.float64]
Level: TypeAlias = Literal["overall", "section", "subset"]


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
        id: as the row has it, or its number.
        prompt: the prompt.
        responses: K ≥ 2 of them.
        quality: (K,) what each is worth: 1 right, 0 wrong.
        subset: the part of the benchmark that it counts in.
        pairs: (better, worse) numbers of responses, those that count. Empty: every right one with every wrong one.
        cluster: items of one cluster are drawn together by the bootstrap; by default those of one prompt.
    """

    id: str
    prompt: Prompt
    responses: tuple[Response, ...]
    quality: tuple[float, ...]
    subset: str
    pairs: tuple[tuple[int, int], ...] = ()
    cluster: str = ""

    def __post_init__(self) -> None:
        if not self.pairs:
            numbers = range(len(self.responses))
            found = [(i, j) for i, j in product(numbers, numbers) if self.quality[i] > self.quality[j]]
            object.__setattr__(self, "pairs", tuple(found))
        if not self.cluster:
            object.__setattr__(self, "cluster", str(content_key(self.prompt)))


@dataclass(frozen=True, slots=True)
class Context:
    """What a row does not say of itself: the file or data set that it stands in, and its number there."""

    source: str
    number: int


@dataclass(frozen=True)
class CountedPairs:
    """The pairs of all items that count, one after the other.

    Attributes:
        items: in the benchmark's order.
        item: (P,) which item a pair is of.
    """

    items: tuple[Item, ...]
    item: npt.NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        counts = [len(item.pairs) for item in self.items]
        object.__setattr__(self, "item", np.repeat(np.arange(len(counts)), counts))

    def __len__(self) -> int:
        return len(self.item)

    @cached_property
    def cluster(self) -> npt.NDArray[np.intp]:
        """(N,) the items' clusters, numbered from 0."""
        known: dict[str, int] = {}
        return np.array([known.setdefault(item.cluster, len(known)) for item in self.items], dtype=np.intp)

    def sum(self, value: Matrix) -> Matrix:
        """(P,) values of pairs as (N,) sums by item."""
        return np.bincount(self.item, value, minlength=len(self.items)).astype(np.float64)

    @cached_property
    def count(self) -> Matrix:
        """(N,) pairs of each item."""
        return np.bincount(self.item, minlength=len(self.items)).astype(np.float64)


@dataclass(frozen=True)
class Score:
    """A named number of a benchmark, in each of B weightings: ``value`` is (B,), NaN where nothing of it was drawn."""

    level: Level
    name: str
    value: Matrix
    items: int


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: what the command line calls it.
        title: what people call it.
        about: where it is from and under which licence, in a line.
        data: sources on the hub; none where it is published as files only.
        read: an item of a row, None for a row that does not count (a tie); raises InputError naming the field.
        credit: margins (P,) of counted pairs → (N, C) credit.
        scores: items, credit (N, C), weights (B, N) and each item's (K,) scores of its responses → named scores, from
            coarse to fine. Rules that need more than preferences use the last; where it is None (a judge, who gives
            preferences only, decided some pairs) they are left out.
        own: fields of which each of its rows has one at least: a file of a folder without any is none of its files.
        results: fields that its rows do not have, but somebody's results on them do, or another benchmark's rows: a
            file with one is left out beside files without.
        whole: stems of files that hold what the files beside them hold, and are left out beside them.
    """

    name: str
    title: str
    about: str
    data: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Context], Item | None]
    credit: Callable[[CountedPairs, Matrix], Matrix]
    scores: Callable[[Sequence[Item], Matrix, Matrix, Sequence[Matrix] | None], list[Score]]
    own: tuple[str, ...]
    results: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


# -- rules that several have -----------------------------------------------------------------------------------------


def half_point(margin: Matrix) -> Matrix:
    """1 for a positive margin, 0 for a negative one, ½ for none: a coin would decide."""
    return 0.5 + 0.5 * np.sign(margin)


def strict_point(margin: Matrix) -> Matrix:
    """1 for a positive margin, else 0."""
    return (margin > 0).astype(np.float64)


def group_mean(credit: Matrix, member: npt.NDArray[np.bool_], weight: Matrix, count: Matrix | None = None) -> Matrix:
    """(B,) weighted mean of (N,) credit over the members; NaN where a weighting has none of them.

    Args:
        credit: (N,) credit.
        member: (N,) bool.
        weight: (B, N).
        count: (N,) what each item counts for; ``credit`` is then a sum over as many. Default: 1.
    """
    own = weight[:, member]
    total = own @ (np.ones(int(member.sum())) if count is None else count[member])
    return np.divide(own @ credit[member], total, out=np.full(len(weight), np.nan), where=total > 0)


def mean_of(values: Sequence[Matrix], weights: Sequence[float] | None = None) -> Matrix:
    """(B,) weighted mean of several scores, without those that are NaN; NaN where all are."""
    stacked = np.stack(list(values))
    share = np.ones(len(stacked)) if weights is None else np.asarray(weights, dtype=np.float64)
    known = ~np.isnan(stacked)
    total = share @ known
    return np.divide(
        share @ np.where(known, stacked, 0.0), total, out=np.full(stacked.shape[1], np.nan), where=total > 0
    )
