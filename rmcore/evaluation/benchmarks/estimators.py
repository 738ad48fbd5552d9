"""Estimators of a model for benchmarks: its head, and what was fitted beside it (:mod:`rmcore.head.estimators`).

An estimator is made for a model once and then asked for groups of rows, so that several of them share one pass of the
backbone. :data:`ESTIMATORS` has them by name, ``head`` and those of :mod:`rmcore.head.estimators`; what it holds
``rmcore benchmark --uncertainty`` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import Tensor

from rmcore._base.errors import reject
from rmcore.model.reward_model import RewardModel
from rmcore.model.uncertainties import HEAD, UNCERTAINTIES

__all__ = ["ESTIMATORS", "HEAD", "Estimator", "make_estimator"]

Estimator: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Hidden rows (R, h) and group sizes (G,) → g and v (Q,) of all pairs: i < j, group after group, in difference mode;
one a row in concat mode, where a row is a pair. v ≥ 0 is on the scale of a logit's variance."""


def _of_model(model: RewardModel, *, name: str) -> Estimator:
    known = model.estimator_named(name)
    if known is None:
        return model.head_pairs

    def pairs(hidden: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        found = known.pairs(hidden.cpu(), sizes.cpu())
        return found.logit, found.variance

    return pairs


ESTIMATORS: dict[str, Callable[[RewardModel], Estimator]] = {
    name: partial(_of_model, name=name) for name in UNCERTAINTIES
}
"""Name → what makes it for a model; it raises InputError for a model that has it not."""


def make_estimator(model: RewardModel, name: str) -> Estimator:
    """An estimator of a model by its name; raises InputError with the names there are, or that the model has."""
    if name not in ESTIMATORS:
        reject("estimator", repr(name)[:60], f"one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name](model)
