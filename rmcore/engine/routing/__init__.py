"""Which pairs go to the judge, and what that may cost.

- ``routers``: the protocol, and routers that look at one batch: threshold, budget, random, always, never.
- ``adaptive``: a share of a whole run by a threshold that follows the scores, within hard budgets.
- ``budget``: hard limits on pairs, calls, tokens or money; ``pair_cost`` estimates what a pair will come to.
- ``pacing``: how large a share of the coming pairs a budget can carry.
- ``drift``: tells when the stream's scores have moved, and keeps a record of each step.
- ``recent``: quantiles that forget and sliding sums, on which the adaptive ones rest.
- ``state``: what survives a restart, as checked JSON.
"""

from __future__ import annotations

from rmcore.engine.routing.adaptive import AdaptiveRouter
from rmcore.engine.routing.budget import Budget
from rmcore.engine.routing.routers import (
    AlwaysRoute,
    BudgetedRouter,
    BudgetRouter,
    Candidates,
    NeverRoute,
    RandomRouter,
    RankBy,
    Reservation,
    Router,
    ThresholdRouter,
    VerdictRouter,
    is_budgeted,
    rank_score,
)
from rmcore.engine.routing.state import StatefulRouter

__all__ = [
    "AdaptiveRouter",
    "AlwaysRoute",
    "Budget",
    "BudgetRouter",
    "BudgetedRouter",
    "Candidates",
    "NeverRoute",
    "RandomRouter",
    "RankBy",
    "Reservation",
    "Router",
    "StatefulRouter",
    "ThresholdRouter",
    "VerdictRouter",
    "is_budgeted",
    "rank_score",
]
