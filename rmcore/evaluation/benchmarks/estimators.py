"""Estimators of a model for benchmarks: its head, and what was fitted beside it (:mod:`rmcore.head.estimators`).

An estimator is made for a model once and then asked for groups of rows, so that several of them share one pass of the
backbone. The names are those of :data:`rmcore.head.estimators.ESTIMATORS`, and ``head``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.estimators import estimator_named
from rmcore.model.reward_model import RewardModel

__all__ = ["HEAD", "Estimator", "make_estimator"]

Estimator: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Hidden rows (R, h) and group sizes (G,) → g and v (Q,) of all pairs: i < j, group after group, in difference mode;
one a row in concat mode, where a row is a pair. v ≥ 0 is on the scale of a logit's variance."""

HEAD = "head"


def make_estimator(model: RewardModel, name: str) -> Estimator:
    """An estimator of a model by its name; raises InputError with the names there are, or that the model has."""
    if name == HEAD:
        return model.head_pairs
    known = model.estimators.get(estimator_named(name).name)
    if known is None:
        has = ", ".join([HEAD, *model.estimators])
        reject("estimator", repr(name), f"one that the model has: {has}", "RewardModel.add_estimator fits one")

    def pairs(hidden: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        found = known.pairs(hidden.cpu(), sizes.cpu())
        return found.logit, found.variance

    return pairs
