"""Fewer comparisons than all pairs: which to make among K responses, and what they say of each.

All pairs are K(K−1)/2: at K = 16 a judge is asked 120 times a prompt. A connected design of K or 2K pairs orders the
responses too, and least squares turns its preferences into scores with a known variance.

Designs:

- ``all``: every pair.
- ``circular``: i against i + 1, and the last against the first: K pairs (NeMo-Gym's ``genrm_compare``).
- ``regular``: every response in ``degree`` comparisons, with the neighbours chosen so that scores vary least (the
  A-optimal circulant design, steps taken greedily).
- Swiss, by :func:`swiss_round`: in each round, responses of like standing that have not met.

Scores: preferences p_ij = s_i − s_j + noise of variance σ²/w_ij with Σ s = 0 give the Gaussian posterior with precision
L/σ² + I/τ², L the Laplacian of the comparison graph with weights w (Thurstone-Mosteller by least squares; HodgeRank,
Jiang et al. 2011). For all pairs of equal weight and τ = ∞ the advantage K/(K−1) · s is exactly RLOO's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.engine.advantage import Baseline

__all__ = [
    "ComparisonScores",
    "Design",
    "comparison_advantages",
    "comparison_pairs",
    "comparison_scores",
    "design_pairs",
    "graph_advantages",
    "graph_rewards",
    "parse_design",
    "swiss_pairs",
    "swiss_round",
]

Design: TypeAlias = Literal["all", "circular", "regular"]


def comparison_pairs(size: int, design: Design = "all", *, degree: int = 4) -> Tensor:
    """The pairs (i, j), i < j, that a design compares among ``size`` responses.

    Args:
        size: K ≥ 1 responses.
        design: see the module's text. With few responses any design may come to all pairs.
        degree: of ``regular``: comparisons a response takes part in, even; half of it are steps round the circle.

    Returns:
        (P, 2) int64 in order.

    Raises:
        InputError: an argument is out of range.
    """
    if size < 1:
        reject("size", size, "at least 1 response")
    if design not in ("all", "circular", "regular"):
        reject("design", repr(design), "'all', 'circular' or 'regular'")
    if design == "regular" and (degree < 2 or degree % 2):
        reject("degree", degree, "an even number from 2")
    if design == "all" or (design == "regular" and degree >= size - 1):
        steps = list(range(1, size // 2 + 1))
    else:
        steps = [1] if design == "circular" else _steps(size, degree // 2)
    around = torch.arange(size)
    pairs = [torch.stack([around, (around + step) % size], 1) for step in steps if size > 1]
    if not pairs:
        return torch.empty(0, 2, dtype=torch.int64)
    return torch.unique(torch.cat(pairs).sort(1).values, dim=0)


def _steps(size: int, count: int) -> list[int]:
    """Steps of a circulant graph, one after the other each the one with which scores vary least in the mean.

    Its Laplacian has the eigenvalues Σ 2(1 − cos 2π m s / K) over its steps s; scores' variances sum to Σ 1/λ.
    """
    waves = torch.arange(1, size, dtype=torch.float64)[:, None] * (2 * math.pi / size)
    steps = torch.arange(1, size // 2 + 1)
    # The step of half a round has one comparison a response, not two.
    of_step = (2 - 2 * torch.cos(waves * steps)) * torch.where(2 * steps == size, 0.5, 1.0)
    chosen, total = [0], of_step[:, 0].clone()
    while len(chosen) < min(count, len(steps)):
        variance = (1 / (total[:, None] + of_step)).sum(0)
        variance[chosen] = math.inf
        chosen.append(int(variance.argmin()))
        total += of_step[:, chosen[-1]]
    return [int(steps[k]) for k in chosen]


def swiss_round(score: Tensor, met: Tensor) -> Tensor:
    """The next round of a Swiss tournament: neighbours in standing that have not met, from the top down.

    Args:
        score: (K,) standing so far; equal scores keep their order.
        met: (K, K) bool, symmetric: who has met whom.

    Returns:
        (P, 2) int64, i < j, each response at most once. With an odd K, or where all that is left has met, some sit out.

    Raises:
        InputError: shapes do not fit.
    """
    size = len(score)
    if met.shape != (size, size):
        reject("met", tuple(met.shape), f"({size}, {size})")
    waiting = torch.argsort(score, descending=True, stable=True).tolist()
    pairs = []
    while waiting:
        first = waiting.pop(0)
        other = next((k for k in waiting if not bool(met[first, k])), None)
        if other is not None:
            waiting.remove(other)
            pairs.append(sorted((first, other)))
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


@dataclass(frozen=True, eq=False)
class ComparisonScores:
    """What comparisons say of K responses.

    Attributes:
        score: (..., K) float64, summing to 0 within a group.
        covariance: (..., K, K) of the scores, for noise of variance ``noise`` a comparison.
    """

    score: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """(..., K) of each score."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)


def comparison_scores(
    pairs: Tensor,
    preference: Tensor,
    size: int,
    *,
    weight: Tensor | None = None,
    noise: float = 1.0,
    prior: float = math.inf,
    apart: bool = False,
) -> ComparisonScores:
    """Scores from comparisons, for any number of groups that share a design.

    Args:
        pairs: (P, 2) int64, i < j or not; a pair may occur several times.
        preference: (..., P) p̃ of i against j; NaN where a comparison failed: it is left out.
        size: K.
        weight: (..., P) ≥ 0, how much each comparison counts; default 1.
        noise: σ², variance of a preference of weight 1.
        prior: τ, standard deviation of the scores before any comparison; finite, it shrinks them and takes groups that
            fall apart.
        apart: with an infinite prior, take groups that fall apart too: the scores of each part then sum to 0.

    Raises:
        InputError: shapes do not fit, values are out of range, or, with an infinite prior, the comparisons of a group
            that are there do not connect its responses.
    """
    if pairs.ndim != 2 or pairs.shape[1] != 2 or preference.shape[-1:] != pairs.shape[:1]:
        reject("pairs, preference", f"{tuple(pairs.shape)}, {tuple(preference.shape)}", "(P, 2) and (..., P)")
    if len(pairs) and not (int(pairs.min()) >= 0 and int(pairs.max()) < size):
        reject("pairs", f"{int(pairs.min())} to {int(pairs.max())}", f"responses 0 to {size - 1}")
    if not (math.isfinite(noise) and noise > 0):
        reject("noise", noise, "a positive number")
    if not prior > 0:
        reject("prior", prior, "a positive number, or inf")
    known = preference.double()
    if bool(known.isinf().any()):
        reject("preference", "an infinite value", "numbers, or NaN for none")
    w = torch.ones_like(known) if weight is None else weight.double().expand(known.shape).clone()
    if bool((~(w >= 0)).any()) or bool(w.isinf().any()):
        reject("weight", "a negative, infinite or missing value", "numbers from 0")
    w = torch.where(known.isnan(), 0.0, w)
    incidence = torch.zeros(len(pairs), size, dtype=torch.float64)
    rows = torch.arange(len(pairs))
    incidence[rows, pairs[:, 0]] += 1
    incidence[rows, pairs[:, 1]] -= 1
    laplacian = incidence.mT @ (w[..., :, None] * incidence) / noise
    target = (w * known.nan_to_num(0.0) / noise) @ incidence
    values, vectors = torch.linalg.eigh(laplacian)
    # Upwards: the first is the constant vector's, 0, which is no freedom, since scores sum to 0.
    scale = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    if math.isinf(prior) and not apart and size > 1 and bool((values[..., 1] <= 1e-10 * scale[..., 0]).any()):
        reject("pairs", "comparisons that leave some response apart", "a connected group", "Give prior=, or more pairs")
    inverse = 1 / (values + prior**-2)
    if math.isinf(prior):
        inverse = torch.where(values <= 1e-10 * scale, 0.0, inverse)
    centre = torch.eye(size, dtype=torch.float64) - 1 / size
    covariance = centre @ (vectors * inverse[..., None, :]) @ vectors.mT @ centre
    return ComparisonScores((covariance @ target[..., None])[..., 0], covariance)


def comparison_advantages(scores: ComparisonScores) -> tuple[Tensor, Tensor]:
    """(..., K) leave-one-out advantages K/(K−1) · s and their variances; 0 and 0 for a group of one.

    For all pairs of equal weight they are those of :func:`rmcore.engine.advantage.rloo_advantages`.
    """
    size = scores.score.shape[-1]
    factor = size / (size - 1) if size > 1 else 0.0
    return factor * scores.score, factor**2 * scores.variance


# -- in an engine ----------------------------------------------------------------------------------------------------


_COUNTED = (("regular", True, 0), ("swiss", True, 0), ("swiss", True, 1))
"""A design's name, whether its number is positive, and its remainder by 2."""


def parse_design(text: str, where: str = "design") -> tuple[str, int]:
    """A design as the engine takes it, its name and number: ``all``, ``circular``, ``regular:4``, ``swiss:3``.

    The number is the comparisons a response takes part in (``regular``), or the rounds (``swiss``); 0 for the others.
    Raises InputError for anything else, which ``where`` says by what name it came.
    """
    name, _, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    count = int(number) if number.isascii() and number.isdigit() else 0
    if text not in ("all", "circular") and (name, count > 0, count % 2) not in _COUNTED:
        reject(where, repr(text), "'all', 'circular', 'regular:k' with an even k from 2, or 'swiss:r' with r rounds")
    return name, count


def design_pairs(size: int, design: str) -> Tensor:
    """(P, 2) the pairs of a design that depends on K alone, by its name as of :func:`parse_design`."""
    name, degree = parse_design(design)
    if name == "regular":
        return comparison_pairs(size, "regular", degree=degree)
    return comparison_pairs(size, "circular" if name == "circular" else "all")


def swiss_pairs(score: Tensor, rounds: int) -> Tensor:
    """(P, 2) all pairs of some Swiss rounds among responses of a standing that does not change meanwhile.

    Rounds alone would leave the group in parts of 2, 4, 8 responses of like standing; where two neighbours in standing
    are in different parts, they are compared too.

    Args:
        score: (K,) standing; NaN is last.
        rounds: how many, each at most one comparison a response.
    """
    size, standing = len(score), score.double().nan_to_num(nan=-math.inf)
    met = torch.eye(size, dtype=torch.bool)
    for _ in range(rounds):
        i, j = swiss_round(standing, met).unbind(1)
        met[i, j] = met[j, i] = True
    part = list(range(size))
    for i, j in met.triu(1).nonzero().tolist():
        old, new = part[i], part[j]
        part = [new if own == old else own for own in part]
    order = torch.argsort(standing, descending=True, stable=True).tolist()
    for i, j in pairwise(order):
        if part[i] != part[j]:
            old, new = part[i], part[j]
            part = [new if own == old else own for own in part]
            met[i, j] = met[j, i] = True
    return met.triu(1).nonzero()


def graph_advantages(preferences: Tensor) -> tuple[Tensor, Tensor]:
    """Leave-one-out advantages from whatever pairs were compared, and their variances.

    Least squares over the comparison graph; for all pairs the means of :func:`rmcore.engine.advantage.rloo_advantages`.
    Responses that no path of comparisons joins are not put in order: each part's advantages sum to 0.

    Args:
        preferences: (..., K, K) antisymmetric p̃; NaN where a pair was not compared. The diagonal is not read.

    Returns:
        (..., K) float64 and (..., K), for comparisons with a noise of variance 1: multiply by theirs. NaN for a
        response that was compared with nobody; 0 and 0 for K = 1.
    """
    size = preferences.shape[-1]
    if size == 1:
        nothing = torch.zeros_like(preferences[..., 0], dtype=torch.float64)
        return nothing, nothing.clone()
    i, j = torch.triu_indices(size, size, 1)
    pairs = preferences.double().cpu()[..., i, j]
    found = comparison_scores(torch.stack([i, j], 1), pairs, size, apart=True)
    members, count = _members(preferences)
    factor = (count / (count - 1).clamp_min(1))[..., None]
    advantages, variance = factor * found.score, factor**2 * found.variance
    return advantages.masked_fill(~members, math.nan), variance.masked_fill(~members, math.nan)


def graph_rewards(preferences: Tensor, baseline: Baseline = "leave-one-out") -> Tensor:
    """(..., K) rewards from which a stock trainer gets :func:`graph_advantages` back, to rounding."""
    advantages = graph_advantages(preferences)[0]
    if baseline == "group-mean":
        return advantages
    _, count = _members(preferences)
    return advantages * ((count - 1) / count.clamp_min(1))[..., None]


def _members(preferences: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) bool, responses with a comparison; (...) float64, how many."""
    own = torch.eye(preferences.shape[-1], dtype=torch.bool, device=preferences.device)
    members = (~(preferences.isnan() | own)).any(-1).cpu()
    return members, members.sum(-1).double()
