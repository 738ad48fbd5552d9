"""A clock and streams of candidates for tests of the router that keeps a share."""

from __future__ import annotations

import numpy as np
import torch
from support.clocks import SetClock

from rmcore import AdaptiveRouter
from rmcore.engine.routing import (
    Budget,
    Candidates,
)
from rmcore.judge.base import JudgeUsage

__all__ = ["FREE", "busy", "drifting", "drive", "of", "route", "stream"]


FREE = JudgeUsage()


def of(u) -> Candidates:
    u = torch.as_tensor(np.asarray(u), dtype=torch.float64)
    return Candidates(torch.ones_like(u), u**2 - 1, u)


def route(router, u, calls_a_pair: int = 2) -> np.ndarray:
    mask, reservation = router.reserve(of(u))
    assert mask.dtype == torch.bool
    assert mask.shape == (len(u),)
    assert reservation.pairs == int(mask.sum())
    router.settle(reservation, JudgeUsage(calls=calls_a_pair * reservation.pairs))
    return mask.numpy()


def stream(router, u, size: int) -> np.ndarray:
    return np.concatenate([route(router, u[k : k + size]) for k in range(0, len(u), size)])


def drifting(pairs: int = 40_000, seed: int = 0) -> np.ndarray:
    """u over a run: its mean moves by ten of its own first standard deviations, its spread doubles, then it falls."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 1, pairs)
    mean = np.interp(at, [0, 0.1, 0.6, 0.7, 1], [1.4, 1.4, 2.4, 2.4, 1.6])
    return np.maximum(1.0, rng.normal(mean, 0.1 * (1 + at)))


def busy(clock: SetClock, **changes) -> AdaptiveRouter:
    budgets = [
        Budget(4_000, "tokens", "step", first_estimate=200, clock=clock),
        Budget(500, "calls", "minute", clock=clock),
        Budget(3.5, "cost", "run", max_per_pair=0.004, clock=clock),
    ]
    return AdaptiveRouter(0.2, budgets, **{"half_life": 128, "warmup": 64, "history": 4, **changes})


def drive(router, clock, u, rng, steps) -> list:
    seen = []
    for step in steps:
        router.begin_step()
        for start in range(0, 200, 25):
            mask, reservation = router.reserve(of(u[200 * step + start : 200 * step + start + 25]))
            k = reservation.pairs
            tokens = int(rng.integers(50, 90)) * k
            usage = JudgeUsage(calls=2 * k, prompt_tokens=tokens, cost=0.0031 * k)
            router.settle(reservation, usage if rng.random() < 0.9 else None)
            clock.time += 0.5
            seen.append((mask.tolist(), reservation, router.threshold))
    return seen
