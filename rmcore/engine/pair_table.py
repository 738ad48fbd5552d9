"""The head's view of groups as (K, K) matrices, and the pairs in them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rmcore.engine.routing import Candidates
from rmcore.head.frozen import PairScores
from rmcore.ops import reference
from rmcore.ops.functional import Scores

__all__ = ["PairMatrices", "Where", "concat_matrices", "decide_by_rule", "difference_matrices", "find_pairs", "look_up"]

Where: TypeAlias = tuple[int, int, int]
"""A pair: its group's number, i and j, i < j."""


@dataclass(frozen=True, slots=True)
class PairMatrices:
    """One group, each (K, K) float64 on the CPU: g, v, u, p̃. Where the head has no answer p̃ is NaN and u is Inf."""

    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    preference: Tensor

    def put(self, i: int, j: int, preference: float) -> None:
        """Set p̃_ij, and p̃_ji to its negative."""
        self.preference[i, j], self.preference[j, i] = preference, -preference


def difference_matrices(scores: PairScores, sizes: Sequence[int], amplitude: float) -> list[PairMatrices]:
    """From flat pairs i < j, group after group."""
    g, v = scores.logit.double().cpu(), scores.variance.double().cpu()
    result, start = [], 0
    for k in sizes:
        i, j = torch.triu_indices(k, k, 1)
        part = slice(start, start + len(i))
        start = part.stop
        logit, variance = _zeros(k), _zeros(k)
        logit[i, j], logit[j, i] = g[part], -g[part]
        variance[i, j] = variance[j, i] = v[part]
        result.append(_finish(logit, variance, amplitude))
    return result


def concat_matrices(
    scores: Scores, sizes: Sequence[int], amplitude: float, orders: Literal["both", "one"]
) -> list[PairMatrices]:
    """From flat ordered pairs, row-major: i ≠ j, or i < j with one order."""
    g, v = scores.logit.double().cpu(), scores.variance.double().cpu()
    result, start = [], 0
    for k in sizes:
        if orders == "both":
            i, j = (~torch.eye(k, dtype=torch.bool)).nonzero().unbind(1)
        else:
            i, j = torch.triu_indices(k, k, 1)
        part = slice(start, start + len(i))
        start = part.stop
        logit, variance = _zeros(k), _zeros(k)
        logit[i, j], variance[i, j] = g[part], v[part]
        if orders == "one":
            logit[j, i], variance[j, i] = -logit[i, j], variance[i, j]
        result.append(_finish(logit, variance, amplitude))
    return result


def find_pairs(
    sizes: Sequence[int], responses: Sequence[Sequence[str]] | None, first: int
) -> tuple[list[Where], list[Where]]:
    """Pairs i < j of groups ``first``, ``first + 1``, ...: those to decide, and those of equal responses."""
    to_decide: list[Where] = []
    identical: list[Where] = []
    for group, k in enumerate(sizes, start=first):
        for i in range(k):
            for j in range(i + 1, k):
                same = responses is not None and responses[group][i] == responses[group][j]
                (identical if same else to_decide).append((group, i, j))
    return to_decide, identical


def decide_by_rule(matrices: Sequence[PairMatrices], identical: Sequence[Where]) -> None:
    """Equal responses: nothing between them, and no doubt about it."""
    for group, i, j in identical:
        m = matrices[group]
        for matrix, value in ((m.logit, 0.0), (m.variance, 0.0), (m.preference, 0.0), (m.uncertainty, 1.0)):
            matrix[i, j] = matrix[j, i] = value


def look_up(matrices: Sequence[PairMatrices], pairs: Sequence[Where]) -> tuple[Candidates, Tensor]:
    """g, v and u of pairs as a router takes them, and p̃ (Q,) beside."""
    if not pairs:
        empty = torch.empty(0, dtype=torch.float64)
        return Candidates(empty, empty, empty), empty
    # One gather over the groups laid end to end: a loop over pairs in Python would cost more than the head.
    groups = list(dict.fromkeys(group for group, _, _ in pairs))
    sizes = [len(matrices[group].logit) for group in groups]
    offsets = dict(zip(groups, itertools.accumulate((k * k for k in sizes), initial=0), strict=False))
    width = dict(zip(groups, sizes, strict=True))
    index = torch.tensor([offsets[group] + i * width[group] + j for group, i, j in pairs])
    logit, variance, uncertainty, preference = (
        torch.cat([getattr(matrices[group], name).flatten() for group in groups])[index]
        for name in ("logit", "variance", "uncertainty", "preference")
    )
    return Candidates(logit, variance, uncertainty), preference


def _zeros(k: int) -> Tensor:
    return torch.zeros(k, k, dtype=torch.float64)


def _finish(logit: Tensor, variance: Tensor, amplitude: float) -> PairMatrices:
    """u and p̃; in concat mode both orders are averaged here (in difference mode that changes nothing)."""
    u = reference.uncertainty(variance, amplitude)
    preference, u = reference.concat_preference(reference.preference(logit, u), u)
    bad = ~(preference.isfinite() & u.isfinite())
    preference[bad], u[bad] = torch.nan, torch.inf
    return PairMatrices((logit - logit.mT) / 2, (variance + variance.mT) / 2, u, preference)
