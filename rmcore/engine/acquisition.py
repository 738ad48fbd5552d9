"""Which pairs are worth a label? Active learning of a head, on its own posterior.

A pair's logit has mean g and variance V under the posterior. Labels are bought one pair at a time or in batches; in a
batch the next pair is worth what it tells *beyond* those already in it, so each choice first takes what it will tell
off the variance of all others (a rank-one downdate of P⁻¹, never formed: one column of a pivoted Cholesky factor).

- ``bald``: mutual information of the label and β in bits, H(E p) − E H(p) (Houlsby et al. 2011, arXiv:1112.5745).
- ``d_optimality``: log(1 + p(1−p) v), what the label adds to log |P| (pair form: arXiv:2502.04354).
- ``margin``: the closest calls, −|g|.
- ``coreset``: k-centre over the pairs' feature differences, farthest first (Sener & Savarese 2018).
- ``random``.
- ``delta_ucb``: of each prompt the pair (i, j) with the highest g_ij + β√V_ij, i the better (the pair form of DeltaUCB,
  ActiveUltraFeedback, arXiv:2603.09692): pairs that may well be far apart and right.
- ``thompson``: of each prompt the best response under one draw of β, against the best of the others under a second
  draw (double Thompson sampling, Wu & Liu 2016).

The last two choose a pair a prompt, and then the prompts whose pair scores highest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.estimators import PairEstimator
from rmcore.head.frozen import FrozenHead
from rmcore.ops.pair_layout import PairLayout

__all__ = ["Acquisition", "PairPool", "bald", "d_optimality", "pair_pool", "select_pairs"]

Acquisition: TypeAlias = Literal["bald", "d_optimality", "margin", "coreset", "delta_ucb", "thompson", "random"]

_ACQUISITIONS = ("bald", "d_optimality", "margin", "coreset", "delta_ucb", "thompson", "random")
_LINK = math.pi / 8  # a of one unit of kernel variance: u = √(1 + a v) is σ's mean field at logit variance a v · 8/π
_C = math.sqrt(math.pi * math.log(2) / 2)


def bald(logit: Tensor, variance: Tensor) -> Tensor:
    """Mutual information of a label and the logit, in bits, both (Q,): 0 where the logit is known, at most 1.

    The closed form for a probit link (Houlsby et al. 2011), with the sigmoid as Φ(x / 1.6): within 0.035 bits of the
    integral for V ≤ 100.

    Args:
        logit: (Q,) mean g of the logit.
        variance: (Q,) its variance V ≥ 0.
    """
    mean, spread = logit.double() / 1.6, variance.double() / 2.56
    p = torch.special.ndtr(mean / (1 + spread).sqrt())
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
    within = spread + _C**2
    expected = _C * torch.exp(-(mean**2) / (2 * within)) / within.sqrt()
    return torch.where(variance > 0, (entropy - expected).clamp_min(0), 0.0)


def d_optimality(logit: Tensor, variance: Tensor) -> Tensor:
    """log(1 + p(1−p) v), (Q,): what a label adds to the log determinant of the logistic posterior's P."""
    p = torch.sigmoid(logit.double())
    return torch.log1p(p * (1 - p) * variance.double())


@dataclass(frozen=True, eq=False)
class PairPool:
    """Pairs that may be labelled.

    Attributes:
        difference: (Q, D) float64, φ_i − φ_j (concat mode: φ of the pair's row).
        whitened: (Q, D), U times it: P⁻¹ is the identity there, so v is a row's squared norm.
        logit: (Q,) g.
        group: (Q,) prompt of each pair, with ``i`` and ``j`` its responses; i < j.
        scale: V = scale · v is the logit's variance as the head's amplitude has it.
    """

    difference: Tensor
    whitened: Tensor
    logit: Tensor
    group: Tensor
    i: Tensor
    j: Tensor
    scale: float

    def __len__(self) -> int:
        return len(self.logit)

    def __getitem__(self, rows: Tensor) -> PairPool:
        """Some of the pairs, by a mask or by numbers."""
        columns = {name: getattr(self, name)[rows] for name in ("difference", "whitened", "logit", "group", "i", "j")}
        return replace(self, **columns)

    @property
    def variance(self) -> Tensor:
        """(Q,) v."""
        return (self.whitened**2).sum(1)


def pair_pool(
    head: FrozenHead, hidden: Tensor, group_sizes: Tensor, *, uncertainty: PairEstimator | None = None
) -> PairPool:
    """All pairs i < j of each group, from difference-mode hidden rows (ΣK, h), group after group.

    Args:
        head: whose posterior says what is known.
        hidden: the rows.
        group_sizes: K of each group.
        uncertainty: an estimator that says it instead (:mod:`rmcore.head.estimators`). Its pairs' covariance is taken
            as that of normals, and the hidden rows themselves stand in for φ (``coreset``).

    Raises:
        InputError: the head is of another mode, has no posterior, or the sizes do not fit; an estimator without an
            epistemic part.
    """
    if head.config.mode != "difference":
        reject("head.mode", head.config.mode, "a difference-mode head")
    layout = PairLayout(group_sizes)
    if layout.responses != len(hidden):
        reject("group_sizes", f"a sum of {layout.responses}", f"{len(hidden)}, one a hidden row")
    first, second, columns = layout.first, layout.second, (layout.group, layout.i, layout.j)
    if uncertainty is not None:
        rows = hidden.double().cpu()
        y, logit = uncertainty.deviations(rows).cpu(), uncertainty.pairs(rows, layout.sizes).logit.cpu()
        return PairPool(rows[first] - rows[second], y[first] - y[second], logit, *columns, 1.0)
    if head.posterior is None:
        reject("head.posterior", "none", "a head fitted here or saved with include_posterior=True")
    phi = head.feature_map(hidden.to(head.device)).double() * head.feature_map.feature_scale
    difference = (phi[first.to(phi.device)] - phi[second.to(phi.device)]).cpu()
    whitened = difference @ head.posterior.factor().cpu().mT
    scale = head.config.resolved_amplitude / _LINK
    return PairPool(difference, whitened, difference @ head.beta.cpu(), *columns, scale)


def select_pairs(
    pool: PairPool,
    count: int,
    by: Acquisition = "bald",
    *,
    beta: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The pairs to label, best first.

    Args:
        pool: what may be labelled.
        count: how many; all of the pool if it has no more (for ``delta_ucb`` and ``thompson``: of its prompts).
        by: see the module's text.
        beta: of ``delta_ucb``, how many standard deviations count.
        seed: of ``random``, ``thompson`` and the first pair of ``coreset``.
        progress: called with (chosen, count) as a batch fills.

    Returns:
        (n,) rows of the pool, and (n,) what each was worth when it was chosen.

    Raises:
        InputError: an argument is out of range.
    """
    if by not in _ACQUISITIONS:
        reject("by", repr(by), f"one of {', '.join(_ACQUISITIONS)}")
    if count < 1:
        reject("count", count, "at least 1")
    if not (math.isfinite(beta) and beta >= 0):
        reject("beta", beta, "a number from 0")
    told = progress or (lambda _done, _of: None)
    generator = torch.Generator().manual_seed(seed)
    if by == "random":
        rows = torch.randperm(len(pool), generator=generator)[:count]
        return rows, torch.zeros(len(rows), dtype=torch.float64)
    if by == "margin":
        return _top(-pool.logit.abs(), count)
    if by == "coreset":
        return _farthest_first(pool, min(count, len(pool)), generator, told)
    if by in ("bald", "d_optimality"):
        return _greedy(pool, min(count, len(pool)), by, told)
    spread = (pool.scale * pool.variance).sqrt()
    if by == "delta_ucb":
        worth, choice = pool.logit.abs() + beta * spread, None
    else:
        choice = _double_thompson(pool, generator)
        worth = spread
    return _one_a_prompt(pool, worth, choice, count)


def _top(worth: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = torch.argsort(worth, descending=True, stable=True)[:count]
    return rows, worth[rows]


def _greedy(
    pool: PairPool, count: int, by: Literal["bald", "d_optimality"], told: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """One by one, each time the pair worth most given those chosen before it.

    A label of weight w = p(1−p) at row q takes w·c²/(1 + w v_q) off v_r, c the covariance of r and q by then.
    """
    v, p = pool.variance, torch.sigmoid(pool.logit)
    weight = p * (1 - p)
    columns = torch.empty(count, len(pool), dtype=torch.float64)
    free = torch.ones(len(pool), dtype=torch.bool)
    rows, worths = [], []
    for k in range(count):
        worth = bald(pool.logit, pool.scale * v) if by == "bald" else d_optimality(pool.logit, v)
        row = int(torch.where(free, worth, -torch.inf).argmax())
        rows.append(row)
        worths.append(float(worth[row]))
        free[row] = False
        covariance = pool.whitened @ pool.whitened[row] - columns[:k].mT @ columns[:k, row]
        columns[k] = covariance * (weight[row] / (1 + weight[row] * v[row])).sqrt()
        v = (v - columns[k] ** 2).clamp_min(0)
        told(k + 1, count)
    return torch.tensor(rows), torch.tensor(worths, dtype=torch.float64)


def _farthest_first(
    pool: PairPool, count: int, generator: torch.Generator, told: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """k-centre: each time the pair farthest from all chosen; ±Δ are one pair, seen from either side."""
    norm = (pool.difference**2).sum(1)
    row = int(torch.randint(len(pool), (), generator=generator))
    rows, worths = [row], [math.inf]
    nearest = torch.full((len(pool),), math.inf, dtype=torch.float64)
    for k in range(1, count):
        apart = norm + norm[row] - 2 * (pool.difference @ pool.difference[row]).abs()
        nearest = torch.minimum(nearest, apart.clamp_min(0))
        nearest[row] = -1.0
        row = int(nearest.argmax())
        rows.append(row)
        worths.append(float(nearest[row]) ** 0.5)
        told(k + 1, count)
    return torch.tensor(rows), torch.tensor(worths, dtype=torch.float64)


def _double_thompson(pool: PairPool, generator: torch.Generator) -> Tensor:
    """(Q,) bool: of each prompt the pair of the winner of one draw of β and the best other response of another.

    Under a draw β + Uᵀz a pair's logit is g + (UΔ)ᵀz: no draw of D numbers a response is needed.
    """
    noise = torch.randn(pool.whitened.shape[1], 2, dtype=torch.float64, generator=generator)
    first, second = (pool.logit[:, None] + math.sqrt(pool.scale) * (pool.whitened @ noise)).unbind(1)
    winner = _winners(pool, first)
    has_winner = (pool.i == winner) | (pool.j == winner)
    # Among the pairs that hold the winner: the other response does best where the winner's own logit is lowest.
    against = torch.where(pool.i == winner, -second, second)
    score = torch.where(has_winner, against, -torch.inf)
    return _first_of_each(pool.group, score)


def _winners(pool: PairPool, logit: Tensor) -> Tensor:
    """(Q,) for each pair, which response of its prompt wins most under ``logit``: mean logit against the others."""
    groups = int(pool.group.max()) + 1
    members = int(torch.maximum(pool.i, pool.j).max()) + 1
    total = torch.full((groups, members), 0.0, dtype=torch.float64)
    total.index_put_((pool.group, pool.i), logit, accumulate=True)
    total.index_put_((pool.group, pool.j), -logit, accumulate=True)
    known = torch.zeros(groups, members, dtype=torch.bool)
    known[pool.group, pool.i] = True
    known[pool.group, pool.j] = True
    return total.masked_fill(~known, -torch.inf).argmax(1)[pool.group]


def _one_a_prompt(pool: PairPool, worth: Tensor, choice: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    chosen = _first_of_each(pool.group, worth) if choice is None else choice
    rows = chosen.nonzero()[:, 0]
    order, _ = _top(worth[rows], count)
    return rows[order], worth[rows[order]]


def _first_of_each(group: Tensor, score: Tensor) -> Tensor:
    """(Q,) bool: the highest score of each group, the first of equal ones."""
    order = torch.argsort(score, descending=True, stable=True)
    by_group = order[torch.argsort(group[order], stable=True)]
    starts = torch.ones(len(by_group), dtype=torch.bool)
    starts[1:] = group[by_group][1:] != group[by_group][:-1]
    chosen = torch.zeros(len(group), dtype=torch.bool)
    chosen[by_group[starts]] = True
    return chosen
