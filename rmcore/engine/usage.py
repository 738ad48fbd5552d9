"""What judging cost and how long it took in *one* score call, as JSON values; :mod:`rmcore.engine.accounts` adds up the
calls of a run, and this module knows nothing of steps or files.

Unknown is not nothing: a cost without prices is ``None``, with the number of calls that have no price beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rmcore._base.quantile import quantiles
from rmcore.judge.base import JudgeUsage, Verdict

__all__ = [
    "JudgeTally",
    "Overlap",
    "Span",
    "covered_s",
    "known_cost",
    "latency_summary",
    "merge_latencies",
    "shared_s",
    "tally_by_judge",
    "usage_summary",
]

Span: TypeAlias = tuple[float, float]
"""(begin, end), seconds on one clock."""

_BUCKET = math.log(1.1)
"""Latencies are kept in buckets 10% wide, so that quantiles of many calls can be added up: within 5% of the truth."""

_LEVELS = (0.5, 0.95)


# -- time ------------------------------------------------------------------------------------------------------------


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was under way."""
    return math.fsum(end - begin for begin, end in _union(spans))


def shared_s(some: Iterable[Span], others: Iterable[Span]) -> float:
    """Seconds in which at least one of ``some`` and at least one of ``others`` were under way."""
    left, right = _union(some), _union(others)
    total, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        total.append(max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0])))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return math.fsum(total)


def _union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


@dataclass(frozen=True, slots=True)
class Overlap:
    """How judging and the backbone shared the wall time of a score call.

    Attributes:
        micro_batches: parts in which the backbone worked.
        judge_s: seconds in which at least one judge call was under way.
        hidden_s: those of them in which the backbone (or the head) worked too, so that nobody waited for the judge.
        why_not: why nothing could overlap, empty where it could.
    """

    micro_batches: int = 1
    judge_s: float = 0.0
    hidden_s: float = 0.0
    why_not: str = ""

    @classmethod
    def of(cls, judge: Sequence[Span], backbone: Sequence[Span], *, micro_batches: int, why_not: str = "") -> Overlap:
        """From when each worked."""
        return cls(micro_batches, covered_s(judge), shared_s(judge, backbone), why_not)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``fraction`` is the hidden share of the judge's time, None if there was none."""
        return {
            "micro_batches": self.micro_batches,
            "judge_s": self.judge_s,
            "hidden_s": self.hidden_s,
            "fraction": self.hidden_s / self.judge_s if self.judge_s else None,
            "why_not": self.why_not,
        }


# -- usage -----------------------------------------------------------------------------------------------------------


def latency_summary(latencies_s: Sequence[float]) -> dict[str, Any] | None:
    """p50, p95 (:func:`rmcore._base.quantile.quantiles`) and largest latency in seconds; None where there are none.

    ``histogram`` counts calls by ⌊log₁.₁ s⌋, so that figures of several batches can be added up.
    """
    values = [float(s) for s in latencies_s if math.isfinite(s)]
    if not values:
        return None
    histogram: dict[str, int] = {}
    for value in values:
        key = str(math.floor(math.log(max(value, 1e-6)) / _BUCKET))
        histogram[key] = histogram.get(key, 0) + 1
    p50, p95 = quantiles(values, _LEVELS)
    return {"count": len(values), "p50": p50, "p95": p95, "max": max(values), "histogram": histogram}


def usage_summary(usage: JudgeUsage) -> dict[str, Any]:
    """A usage as JSON values: counts, tokens by kind, cost, latency.

    ``cost`` is None where nothing is known of it; where only some calls have a price it is theirs, and
    ``unpriced_calls`` says how many are missing.
    """
    return {
        "calls": usage.calls,
        "attempts": usage.attempts,
        "retries": max(0, usage.attempts - usage.calls),
        "cache_hits": usage.cache_hits,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "seconds": usage.seconds,
        "latency_s": latency_summary(usage.latencies_s),
        "cost": known_cost(
            usage.cost,
            calls=usage.calls,
            unpriced=usage.unpriced_calls,
            work=usage.attempts + usage.prompt_tokens,
        ),
        "unpriced_calls": usage.unpriced_calls,
    }


def known_cost(cost: float, *, calls: int, unpriced: int, work: int) -> float | None:
    """The cost, or None where a zero means that it is not known; ``work`` is anything but calls that was counted."""
    # A judge of somebody else's may count tokens or attempts but no calls: that is no sign of its being free.
    unknown = unpriced > 0 or (calls == 0 and work > 0)
    return None if cost == 0 and unknown else cost


def merge_latencies(sums: Mapping[str, Any]) -> dict[str, Any] | None:
    """Latency figures from a summed ``count`` and ``histogram`` and the ``max``; None where there is nothing.

    p50 and p95 are those of calls that each took as long as the middle of their bucket: within 5% of the truth.
    """
    if not sums:
        return None
    histogram = dict(sums["histogram"])
    middles = [min(math.exp((int(bucket) + 0.5) * _BUCKET), sums["max"]) for bucket in histogram]
    p50, p95 = quantiles(middles, _LEVELS, counts=list(histogram.values()))
    return {"count": sums["count"], "p50": p50, "p95": p95, "max": sums["max"], "histogram": histogram}


@dataclass(frozen=True, slots=True)
class JudgeTally:
    """What one judge answered to the questions put to it, and what they cost. Flips are not counted as ties."""

    questions: int = 0
    failed: int = 0
    ties: int = 0
    flips: int = 0
    usage: JudgeUsage = field(default_factory=JudgeUsage)

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> JudgeTally:
        """Count verdicts."""
        return cls(
            questions=len(verdicts),
            failed=sum(v.failed for v in verdicts),
            ties=sum(v.preference == 0 and not v.flipped for v in verdicts),
            flips=sum(v.flipped and not v.failed for v in verdicts),
            usage=JudgeUsage.total(v.usage for v in verdicts),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        counts = {"questions": self.questions, "failed": self.failed, "ties": self.ties, "flips": self.flips}
        return counts | {"usage": usage_summary(self.usage)}


def tally_by_judge(verdicts: Sequence[Verdict]) -> dict[str, JudgeTally]:
    """Tallies by who answered (``Verdict.judge``), in order of first appearance; ``(unnamed)`` if it does not say.

    A verdict's whole usage counts for the judge that answered, also where others were asked before it.
    """
    by_name: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_name.setdefault(verdict.judge or "(unnamed)", []).append(verdict)
    return {name: JudgeTally.of(own) for name, own in by_name.items()}
