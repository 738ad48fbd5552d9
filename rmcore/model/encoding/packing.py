"""Texts as a prefix tree, and the tree as packed sequences: what many texts begin with is computed once.

A causal decoder's state at a token depends on the tokens before it and on nothing else, so texts that begin alike share
those states. In concat mode a group of K responses is K(K−1) texts (x, y_i, y_j); as a tree it is x once, each y_i
once under it, and each y_j once under each y_i:

    |x| + Σ_i |y_i| + Σ_{i≠j} |y_j|   tokens instead of   Σ_{i≠j} (|x| + |y_i| + |y_j|)

(less where responses begin alike). Any texts will do: both orders or one, the responses of difference mode, groups with
one system prompt. The tree is built from token ids alone, so what it shares is equal by construction.

A packed sequence lists the nodes of a tree in preorder. A token there sees the tokens of its own path and no others:
``kv`` is visible from ``q`` exactly if ``kv <= q < subtree_ends[kv]``. Positions count along the path.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rmcore._base.errors import reject

__all__ = ["Pack", "PrefixTree", "Span"]

Ids: TypeAlias = NDArray[np.int64]

MIN_SHARED = 4
"""Fewest tokens worth a node of their own: each node costs an attention call a layer, so a common <s> stays apart."""


class Span(NamedTuple):
    """A node in a packed sequence: tokens ``start`` to ``stop`` of it, the first at ``position`` of its path."""

    start: int
    stop: int
    position: int
    parent: int
    """Index of the parent's span, which is an earlier one, or -1."""


@dataclass(frozen=True)
class Pack:
    """One packed sequence of T tokens.

    Attributes:
        ids: (T,) token ids.
        positions: (T,) each token's position in its text.
        spans: nodes in preorder.
        texts: the texts this pack completes, by their index in the tree.
        leaves: the span at which each of them ends.
    """

    ids: Ids
    positions: Ids
    spans: tuple[Span, ...]
    texts: tuple[int, ...]
    leaves: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(span.position + span.stop - span.start for span in self.spans)

    @cached_property
    def subtree_ends(self) -> Ids:
        """(T,) one past the last packed token that descends from each token's node."""
        ends = [span.stop for span in self.spans]
        for k in range(len(self.spans) - 1, -1, -1):
            parent = self.spans[k].parent
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[k])
        return np.repeat(np.array(ends, dtype=np.int64), [span.stop - span.start for span in self.spans])

    def index(self, leaf: int, position: int) -> int:
        """Where in the pack the token at ``position`` of the path that ends with span ``leaf`` is."""
        while self.spans[leaf].position > position:
            leaf = self.spans[leaf].parent
        span = self.spans[leaf]
        if not 0 <= position < span.position + span.stop - span.start:
            reject("position", position, "a position of the path")
        return span.start + position - span.position

    def renumbered(self, texts: Sequence[int]) -> Pack:
        """The same pack, its text k called ``texts[k]``."""
        return replace(self, texts=tuple(texts[k] for k in self.texts))


class PrefixTree:
    """The prefix tree (radix tree) of texts.

    Args:
        texts: token ids of each; none empty, no two equal.
        min_shared: fewest tokens that make a node of their own where texts part again.

    Nodes are in preorder; siblings are in the order of their token ids, whatever the order of ``texts``.
    """

    def __init__(self, texts: Sequence[Sequence[int]], *, min_shared: int = MIN_SHARED) -> None:
        if min_shared < 1:
            reject("min_shared", min_shared, "at least 1 token")
        self._ids = [np.asarray(text, dtype=np.int64) for text in texts]
        for k, ids in enumerate(self._ids):
            if not len(ids):
                reject(f"texts[{k}]", "no tokens at all", "at least one token")
        self.order = sorted(range(len(texts)), key=lambda k: tuple(texts[k]))
        self.parent: list[int] = []
        self._begin: list[int] = []
        self._end: list[int] = []
        self._source: list[int] = []
        self._leaf = [0] * len(texts)
        self._build(min_shared)

    def _build(self, min_shared: int) -> None:
        common = [0, *(_common(self._ids[a], self._ids[b]) for a, b in pairwise(self.order))]
        lengths = [len(self._ids[text]) for text in self.order]
        if any(shared == a == b for shared, (a, b) in zip(common[1:], pairwise(lengths), strict=True)):
            reject("texts", "two equal texts", "distinct texts")
        # A range of sorted texts that share `depth` tokens, below node `parent`. An explicit stack: texts may nest as
        # deep as there are texts. Ranges are pushed last to first, so that nodes come out in preorder.
        stack = [(0, len(self.order), 0, -1)]
        while stack:
            low, high, depth, parent = stack.pop()
            if high - low == 1 or depth:
                # One node: the rest of a single text, or what the texts of a run have in common.
                begin = self._end[parent] if parent >= 0 else 0
                self.parent.append(parent)
                self._begin.append(begin)
                self._end.append(depth if high - low > 1 else len(self._ids[self.order[low]]))
                self._source.append(self.order[low])
                parent = len(self.parent) - 1
                if self._end[parent] == len(self._ids[self.order[low]]):
                    self._leaf[self.order[low]] = parent
                    low += 1
                if low == high:
                    continue
            runs: list[tuple[int, int, int, int]] = []
            start = low
            for k in range(low + 1, high + 1):
                if k == high or common[k] < depth + min_shared:
                    runs.append((start, k, min(common[start + 1 : k], default=0), parent))
                    start = k
            stack.extend(reversed(runs))

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def tokens(self) -> int:
        """Tokens of all nodes: what a single packed sequence of the whole tree holds."""
        return sum(self._end) - sum(self._begin)

    @property
    def flat_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self._ids))

    def roots(self) -> Iterator[tuple[list[int], int]]:
        """Each root's texts, in tree order, and the tokens of its subtree."""
        root = [k if parent < 0 else -1 for k, parent in enumerate(self.parent)]
        tokens: dict[int, int] = {}
        for k, parent in enumerate(self.parent):
            root[k] = k if parent < 0 else root[parent]
            tokens[root[k]] = tokens.get(root[k], 0) + self._end[k] - self._begin[k]
        texts: dict[int, list[int]] = {}
        for text in self.order:
            texts.setdefault(root[self._leaf[text]], []).append(text)
        for k, members in texts.items():
            yield members, tokens[k]

    def packs(self, max_tokens: int, texts: Sequence[int] | None = None) -> list[Pack]:
        """Packed sequences that complete every text, each at most ``max_tokens`` long (or one text).

        A tree beyond the budget is cut between texts; each part computes the path to its first text again. Among all
        ways to cut, one with the fewest tokens in all is taken (a further pack counts as 1/64 of the budget).

        Args:
            max_tokens: the budget.
            texts: only these, in tree order (as :meth:`roots` gives them); None for all.
        """
        if max_tokens < 1:
            reject("max_tokens", max_tokens, "at least 1")
        chosen = self.order if texts is None else list(texts)
        lengths = [len(self._ids[text]) for text in chosen]
        shared = [0, *(self._shared(a, b) for a, b in pairwise(chosen))]
        cuts = _cuts(lengths, shared, max_tokens) if chosen else []
        return [self._pack(chosen[a:b]) for a, b in cuts]

    def _shared(self, first: int, second: int) -> int:
        """Tokens two texts share in the tree: the end of their nodes' lowest common ancestor."""
        a, b = self._leaf[first], self._leaf[second]
        while a != b:  # parents come before children
            if a > b:
                a = self.parent[a]
            else:
                b = self.parent[b]
            if a < 0 or b < 0:
                return 0
        return self._end[a]

    def _pack(self, texts: Sequence[int]) -> Pack:
        wanted: set[int] = set()
        for text in texts:
            node = self._leaf[text]
            while node >= 0 and node not in wanted:
                wanted.add(node)
                node = self.parent[node]
        nodes = sorted(wanted)
        place = {node: k for k, node in enumerate(nodes)} | {-1: -1}
        spans: list[Span] = []
        parts: list[Ids] = []
        at = 0
        for node in nodes:
            begin, end = self._begin[node], self._end[node]
            parts.append(self._ids[self._source[node]][begin:end])
            spans.append(Span(at, at + end - begin, begin, place[self.parent[node]]))
            at += end - begin
        positions = np.concatenate([np.arange(s.position, s.position + s.stop - s.start) for s in spans])
        leaves = tuple(place[self._leaf[text]] for text in texts)
        return Pack(np.concatenate(parts), positions, tuple(spans), tuple(texts), leaves)


def _common(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differs: Any = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def _cuts(lengths: Sequence[int], shared: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges [a, b) of consecutive texts, each within the budget, with the fewest tokens in all.

    ``shared[k]`` tokens of text k are on the path of text k − 1. A range costs lengths[a] + Σ (lengths[k] − shared[k])
    over the rest of it: starting at a computes shared[a] tokens again.
    """
    count = len(lengths)
    added = [0]  # added[k]: tokens that texts 0 to k − 1 add to one sequence of all
    for k in range(count):
        added.append(added[k] + lengths[k] - shared[k])
    best = [0.0] * (count + 1)
    start = [0] * (count + 1)
    # A start that no longer fits never fits again, so stale ones are dropped as they surface.
    heap: list[tuple[float, int]] = []
    for b in range(1, count + 1):
        a = b - 1
        heapq.heappush(heap, (best[a] + shared[a] + budget / 64, a))
        while heap[0][1] != a and lengths[heap[0][1]] + added[b] - added[heap[0][1] + 1] > budget:
            heapq.heappop(heap)
        best[b], start[b] = heap[0]
    ranges = []
    b = count
    while b:
        ranges.append((start[b], b))
        b = start[b]
    return iter(ranges[::-1])
