"""One batch on its way through the tiers of a :class:`~rmcore.judge.wrappers.tiers.TieredJudge`."""

from __future__ import annotations

import asyncio
import logging
from asyncio import TaskGroup
from collections import Counter, deque
from dataclasses import dataclass, field, replace

from rmcore.judge.base import RULE, JudgeUsage, Pair, Verdict, isolated_verdicts, log_judge_error
from rmcore.judge.wrappers.tier import Cascade

__all__ = ["Batch"]

_logger = logging.getLogger(__name__)

_REASON_LENGTH = 80  # of one tier's part; a reason may come from anybody's code
_TRAIL_LENGTH = 400
_REASONS_COUNTED = 64
_OVERTIME_S = 1.0
"""How long past a pair's deadline a tier's call may run before it is cancelled. A judge that keeps the deadline itself
ends in time and reports what it spent; cancelled from here, that usage is lost."""


@dataclass(slots=True)
class _Escalation:
    """A pair on its way up: what it has cost, what each tier answered, and the last verdict not accepted."""

    pair: Pair
    usage: list[JudgeUsage] = field(default_factory=list)
    trail: list[str] = field(default_factory=list)
    unaccepted: Verdict | None = None


class Batch:
    """One call of ``TieredJudge.judge``: which pairs are queued at which tier, and what has come back.

    No worker ever waits for work: a call that ends hands its pairs on and starts whatever now has room. So there are as
    many tasks as the tiers' concurrency allows, whatever the number of pairs, and with the last one the batch is over.
    """

    def __init__(self, cascade: Cascade, pairs: list[Pair]) -> None:
        self._cascade = cascade
        limit = None if cascade.deadline_s is None else cascade.clock.now() + cascade.deadline_s
        self._cases = [_Escalation(_bounded(pair, limit)) for pair in pairs]
        self._results: list[Verdict | None] = [None] * len(pairs)
        self._queues: list[deque[int]] = [deque() for _ in cascade.tiers]
        self._running = [0] * len(cascade.tiers)
        self._logged: set[int] = set()
        for index, pair in enumerate(pairs):
            self._queues[cascade.start(pair)].append(index)

    async def run(self) -> list[Verdict]:
        """One verdict a pair, in order."""
        async with TaskGroup() as group:
            self._group = group
            self._dispatch()
        verdicts = [verdict for verdict in self._results if verdict is not None]
        reasons = Counter(verdict.reason for verdict in verdicts if verdict.failed)
        if reasons:
            counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(8))
            names = " < ".join(tier.name for tier in self._cascade.tiers)
            missing = reasons.total()
            _logger.warning("tiers %s: no verdict for %d of %d pairs (%s)", names, missing, len(verdicts), counts)
        return verdicts

    def _dispatch(self) -> None:
        """Start every call there is room for, weakest tier first. A pair that is late by now ends here."""
        for level, tier in enumerate(self._cascade.tiers):
            queue = self._queues[level]
            while queue and self._running[level] < tier.concurrency:
                chunk: list[int] = []
                while queue and len(chunk) < tier.batch_size:
                    index = queue.popleft()
                    if self._late(index):
                        self._give_up(level, index)
                    else:
                        chunk.append(index)
                if chunk:
                    self._running[level] += 1
                    self._group.create_task(self._call(level, chunk))

    async def _call(self, level: int, chunk: list[int]) -> None:
        try:
            verdicts = await self._ask(level, [self._cases[index].pair for index in chunk])
        finally:
            self._running[level] -= 1
        for index, verdict in zip(chunk, verdicts, strict=True):
            self._settle(level, index, verdict)
        self._dispatch()

    async def _ask(self, level: int, pairs: list[Pair]) -> list[Verdict]:
        tier = self._cascade.tiers[level]
        deadlines = [pair.deadline for pair in pairs if pair.deadline is not None]
        limit = max(deadlines) - self._cascade.clock.now() + _OVERTIME_S if len(deadlines) == len(pairs) else None
        try:
            async with asyncio.timeout(limit):
                verdicts, error = await isolated_verdicts(tier.judge, pairs)
        except TimeoutError:
            return [Verdict.none("deadline")] * len(pairs)
        if error is not None and level not in self._logged:
            self._logged.add(level)  # a broken judge breaks on every call: the first of the batch tells it all
            log_judge_error(error, f"judge of tier {tier.name}", len(verdicts))
        return verdicts

    def _late(self, index: int) -> bool:
        deadline = self._cases[index].pair.deadline
        return deadline is not None and self._cascade.clock.now() >= deadline

    def _give_up(self, level: int, index: int) -> None:
        with self._cascade.lock:
            self._cascade.counts[level].late += 1
        self._cases[index].trail.append("deadline")
        self._end(index)

    def _settle(self, level: int, index: int, verdict: Verdict) -> None:
        """Book one answer of a tier, and end the pair's way or send it on."""
        tier, case = self._cascade.tiers[level], self._cases[index]
        case.usage.append(verdict.usage)
        refusal = "" if verdict.failed else tier.refusal(verdict)
        with self._cascade.lock:
            counts = self._cascade.counts[level]
            counts.asked += 1
            counts.usage += replace(verdict.usage, latencies_s=())  # a sum for a whole run must not grow with it
            if verdict.failed:
                _count(counts.failed, _short(verdict.reason))
            elif refusal:
                _count(counts.unaccepted, refusal)
            else:
                counts.accepted += 1
        if verdict.failed:
            self._escalate(level, index, _short(verdict.reason))
        elif refusal:
            case.unaccepted = replace(verdict, judge=tier.name)
            self._escalate(level, index, refusal)
        else:
            who = RULE if verdict.judge == RULE else tier.name
            self._results[index] = replace(verdict, judge=who, usage=JudgeUsage.total(case.usage))

    def _escalate(self, level: int, index: int, why: str) -> None:
        self._cases[index].trail.append(f"{self._cascade.tiers[level].name}:{why}")
        if level + 1 < len(self._cascade.tiers):
            self._queues[level + 1].append(index)
        else:
            self._end(index)

    def _end(self, index: int) -> None:
        """No tier decided: the strongest verdict that was not accepted, or none."""
        case = self._cases[index]
        usage, trail, kept = JudgeUsage.total(case.usage), "; ".join(case.trail), case.unaccepted
        if len(trail) > _TRAIL_LENGTH:
            trail = trail[: _TRAIL_LENGTH - 1] + "…"
        if kept is None or not self._cascade.keep_unaccepted:
            self._results[index] = Verdict.none(trail, usage)
            return
        with self._cascade.lock:
            self._cascade.counts[[tier.name for tier in self._cascade.tiers].index(kept.judge)].kept += 1
        self._results[index] = replace(kept, reason=f"unaccepted:{trail}", usage=usage)


def _bounded(pair: Pair, limit: float | None) -> Pair:
    if limit is None or (pair.deadline is not None and pair.deadline <= limit):
        return pair
    return replace(pair, deadline=limit)


def _short(reason: str) -> str:
    """A reason as one printable line of bounded length."""
    line = "".join(c if c.isprintable() else " " for c in reason[:_REASON_LENGTH]).strip()
    return line or "unknown"


def _count(counter: Counter[str], reason: str) -> None:
    """Count a reason; past a number of different ones they are counted together, so a long run stays small."""
    counter[reason if reason in counter or len(counter) < _REASONS_COUNTED else "other"] += 1
