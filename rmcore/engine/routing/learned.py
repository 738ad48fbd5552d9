"""The router for who does not know his stream: it learns from the verdicts it buys which pairs are worth one."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.numbers import Within, check_number
from rmcore.engine.routing.learned_score import LearnedScore
from rmcore.engine.routing.routers import Candidates
from rmcore.model.error_prior import ErrorPrior

__all__ = ["LearnedRouter"]

_FORMAT, _VERSION = "rmcore-learned-router", 1


class LearnedRouter:
    """Routes the pairs on which the head is most likely wrong, as learned so far (:mod:`.learned_score`).

    Args:
        fraction: of the pairs to route, the likeliest of each micro-batch. What rounding leaves over is carried on, so
            that calls of one pair get their share too.
        threshold: instead: every pair with P(the head is wrong) above it.
        prior: of the model (``RewardModel.error_prior``); None begins without one.
        score: instead of ``prior``: a score made before, with columns of its own say, or shared with another router.

    Raises:
        InputError: not exactly one of ``fraction`` and ``threshold``, or one out of range.

    For a share of a whole run, or within a budget: ``AdaptiveRouter(0.1, budget, by=LearnedScore(prior))``.
    """

    whole_batch = False

    def __init__(
        self,
        fraction: float | None = None,
        *,
        threshold: float | None = None,
        prior: ErrorPrior | None = None,
        score: LearnedScore | None = None,
    ) -> None:
        if (fraction is None) == (threshold is None):
            reject("fraction, threshold", (fraction, threshold), "exactly one of them")
        for name, value in (("fraction", fraction), ("threshold", threshold)):
            if value is not None:
                check_number(name, value, Within(least=0, most=1), "a number in [0, 1]")
        if prior is not None and score is not None:
            reject("prior, score", "both", "at most one: a score has its prior")
        self.fraction, self.threshold = fraction, threshold
        self.score = LearnedScore(prior) if score is None else score
        self._owed = 0.0  # of the fraction, in pairs; below one
        self._lock = threading.Lock()

    @property
    def sketch(self) -> Tensor | None:
        """The score's, for the engine."""
        return self.score.sketch

    def select(self, candidates: Candidates) -> Tensor:
        """The likeliest errors; pairs of which nothing is known first."""
        score = self.score(candidates)
        if self.threshold is not None:
            return score > self.threshold
        chosen = torch.zeros(len(candidates), dtype=torch.bool)
        assert self.fraction is not None
        with self._lock:
            self._owed += self.fraction * len(candidates)
            count = min(math.floor(self._owed + 1e-9), len(candidates))
            self._owed = max(self._owed - count, 0.0)
        chosen[torch.argsort(score, descending=True, stable=True)[:count]] = True
        return chosen

    def observe(self, candidates: Candidates, routed: Tensor, preference: Tensor) -> None:
        """Learn from the verdicts; see :class:`~rmcore.engine.routing.routers.VerdictRouter`."""
        self.score.observe(candidates, routed, preference)

    def explain(self) -> dict[str, Any]:
        """What it goes by: see :meth:`LearnedScore.explain`."""
        return self.score.explain()

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on, JSON values."""
        return {"format": _FORMAT, "version": _VERSION, "owed": self._owed, "score": self.score.state_dict()}

    def load_state_dict(self, state: object) -> None:
        """Go on from a state, bit for bit; fraction or threshold may be new ones.

        Raises CheckpointError as :meth:`LearnedScore.load_state_dict`; nothing is changed then.
        """
        from rmcore._base.states import checked
        from rmcore.engine.routing.schema import LearnedRouterState

        found = checked(LearnedRouterState, state, "router")
        self.score.load_state_dict(found.score)
        self._owed = found.owed
