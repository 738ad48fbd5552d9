"""What the trainer's log is told of a scored call."""

from __future__ import annotations

import math
from typing import Any

from rmcore.engine.advantage import reliability_weights
from rmcore.engine.groups import GroupScores
from rmcore.engine.monitor import monitored

__all__ = ["mean_weight", "score_metrics"]


def mean_weight(scores: GroupScores | None, tau: float) -> float:
    """The mean weight of the advantages that there are at τ; NaN without any."""
    variance = None if scores is None else scores.advantage_variance
    return math.nan if variance is None else float(reliability_weights(variance, tau).nanmean())


def score_metrics(scores: GroupScores | None) -> dict[str, float]:
    """The figures worth a curve. The same names on every rank and at every step: TRL averages what it gets."""
    summary: dict[str, Any] = {} if scores is None else scores.summary()
    decided = summary.get("decided_by", {})
    pairs = max(int(summary.get("pairs", 0)), 1)
    u, usage = summary.get("uncertainty") or {}, summary.get("judge_usage", {})
    cost = usage.get("cost", 0.0)
    return {
        "judge_rate": summary.get("routed", 0) / pairs,
        "judge_failed": float(decided.get("judge_failed", 0)),
        "judge_flips": float(summary.get("judge_flips", 0)),
        "judge_calls": float(usage.get("calls", 0)),
        "judge_cache_hits": float(usage.get("cache_hits", 0)),
        "judge_cost": math.nan if cost is None else float(cost),  # an unknown price is no number, never 0
        "judge_hidden_s": float(summary.get("overlap", {}).get("hidden_s", 0.0)),
        "uncertainty": float(u.get("mean", math.nan)) if u else 1.0,
    } | monitored(scores)
