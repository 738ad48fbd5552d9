"""Groups of verdicts for a learner."""

from __future__ import annotations

import torch

from rmcore.engine.groups import GroupScore
from rmcore.engine.learning.judged import JudgedPairs

__all__ = ["batch", "bits", "group", "learnt"]


def group(size, decisions, *, one_order=False):
    """A scored group of which only the decisions matter."""
    blank = torch.zeros(size, size, dtype=torch.float64)
    return GroupScore(blank, blank + 1, blank, blank, blank > 0, tuple(decisions), one_order)


def bits(head):
    """Everything a head serves and learns with, as bytes."""
    tensors = [head.beta, head.posterior.gram.tril(), *head.weights.tensors().values()]
    if head.rows is not None:
        tensors += [head.rows.posterior.gram.tril(), *head.rows.weights.tensors().values()]
    counts = head.posterior.count, None if head.rows is None else head.rows.count
    return [t.view(torch.uint8).numpy().tobytes() for t in tensors], counts, head.weights.factor_scale


def batch(data, k):
    """The k-th ten pairs, with wrong labels so that every update moves the head."""
    part = slice(10 * k, 10 * k + 10)
    return JudgedPairs(data.hidden, 1 - data.labels[part], torch.ones(10), data.pairs[part])


def learnt(learner, data, updates):
    """The bits of every version after so many updates."""
    states = [bits(learner.head)]
    for k in range(updates):
        learner.learn(batch(data, k))
        states.append(bits(learner.head))
    return states
