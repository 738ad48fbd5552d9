"""The amplitude a of u = √(1 + a v), fitted on pairs held out (design 2.5): :func:`fit_amplitude`."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.frozen import FrozenHead
from rmcore.head.ranks import Ranks
from rmcore.ops import reference

__all__ = ["fit_amplitude"]

log = logging.getLogger(__name__)


@torch.no_grad()
def fit_amplitude(
    head: FrozenHead, logit: Tensor, variance: Tensor, labels: Tensor, *, ranks: Ranks | None = None
) -> FrozenHead:
    """The same head with the amplitude a ≥ 0 that minimises the held-out NLL of σ(g / √(1 + a v)).

    Args:
        head: a frozen head.
        logit: (N,) g of held-out pairs.
        variance: (N,) v of the same pairs.
        labels: (N,) in [0, 1].
        ranks: each of which gives its part of these; all get one amplitude.

    The NLL is unimodal in log a for all practical data; a grid brackets it and golden section refines it. A held-out
    set the head gets mostly wrong wants a → ∞ (say nothing); the search stops at 10⁴ / median v and logs a warning.
    """
    g, v, y = logit.double(), variance.double(), labels.double()
    if ranks is not None:
        with ranks.work("the amplitude"):
            counts = ranks.counts(len(g))
            own = torch.arange(len(g)) + sum(counts[: ranks.rank])
            g, v, y = ranks.rows(torch.stack([g, v, y], dim=1), own, sum(counts)).T
            found = _amplitude(g, v, y) if ranks.rank == 0 else None
            amplitude = float(ranks.share(values={"amplitude": found}).values["amplitude"])
    else:
        amplitude = _amplitude(g, v, y)
    config = replace(head.config, amplitude=amplitude)
    weights = replace(head.weights, amplitude=amplitude)
    return FrozenHead(config, head.feature_map, head.beta, head.beta0, head.posterior, weights, rows=head.rows)


def _amplitude(g: Tensor, v: Tensor, y: Tensor) -> float:
    if not len(g):
        reject("logit", "0 held-out pairs", "at least one")

    def nll(amplitude: float) -> float:
        return -float(reference.log_likelihood(g / torch.sqrt(1 + amplitude * v), y).mean())

    middle = float(v.median())
    if middle <= 0:
        reject("variance", "a median of 0", "held-out pairs with positive variance")
    grid = [10 ** (e / 4) / middle for e in range(-16, 17)]
    best = min(range(len(grid)), key=lambda i: nll(grid[i]))
    if best == len(grid) - 1:
        log.warning("held-out data wants the largest amplitude tried: the head is no better than chance there")
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if nll(math.exp(left)) <= nll(math.exp(right)):
            high = right
        else:
            low = left
    amplitude = math.exp((low + high) / 2)
    amplitude = 0.0 if nll(0.0) <= nll(amplitude) else amplitude
    if amplitude == 0:
        wrong = int((((g > 0) != (y > 0.5)) & (y != 0.5)).sum())
        log.warning(
            "the %d held-out pairs, %d of them wrong, want no uncertainty at all: amplitude 0 makes u = 1 everywhere, "
            "so no router that goes by u can choose",
            len(g),
            wrong,
        )
    return amplitude
