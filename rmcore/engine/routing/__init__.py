"""Which pairs go to the judge, and what that may cost.

- ``routers``: the protocol, and routers that look at one batch: threshold, budget, random, always, never.
- ``adaptive``: a share of a whole run by a threshold that follows the scores, within hard budgets.
- ``learned``: by P(the head is wrong), learned from the verdicts (``learned_score``); for a stream nobody knows.
- ``risk``: the least routing under which the error rate among kept pairs is bounded; ``risk_bounds`` has the
  statistics, ``shift`` the tests that the stream is still the one calibrated on.
- ``budget``: hard limits on pairs, calls, tokens or money; ``pair_cost`` estimates what a pair will come to.
- ``pacing``: how large a share of the coming pairs a budget can carry.
- ``drift``: tells when the stream's scores have moved, and keeps a record of each step.
- ``recent``: quantiles that forget and sliding sums, on which the adaptive ones rest.
- ``state``: what survives a restart, as checked JSON.
"""

from __future__ import annotations

from rmcore.engine.routing.adaptive import AdaptiveRouter
from rmcore.engine.routing.budget import Budget
from rmcore.engine.routing.learned import LearnedRouter
from rmcore.engine.routing.learned_score import LearnedScore
from rmcore.engine.routing.risk import RiskControlledRouter
from rmcore.engine.routing.risk_bounds import RiskThreshold, risk_threshold, risk_tiers
from rmcore.engine.routing.routers import (
    AlwaysRoute,
    BudgetedRouter,
    BudgetRouter,
    Candidates,
    NeverRoute,
    PairScore,
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
    "LearnedRouter",
    "LearnedScore",
    "NeverRoute",
    "PairScore",
    "RandomRouter",
    "RankBy",
    "Reservation",
    "RiskControlledRouter",
    "RiskThreshold",
    "Router",
    "StatefulRouter",
    "ThresholdRouter",
    "VerdictRouter",
    "is_budgeted",
    "rank_score",
    "risk_threshold",
    "risk_tiers",
]
