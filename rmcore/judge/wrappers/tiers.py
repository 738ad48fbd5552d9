"""An ordered list of judges, cheap to strong: a pair climbs until a verdict is accepted, else it falls to the head."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
from asyncio import TaskGroup
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore.judge.base import Judge, JudgeUsage, Pair, Verdict
from rmcore.judge.contain import close_judge, contained_verdicts, log_contained
from rmcore.judge.rules import RULE
from rmcore.judge.wrappers.accept import Accept

__all__ = ["Tier", "TieredJudge"]

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w./@-]{1,48}")
_REASON_LENGTH = 80  # of one tier's part; a reason may come from anybody's code
_TRAIL_LENGTH = 400
_REASONS_COUNTED = 64
_OVERTIME_S = 1.0
"""How long past a pair's deadline a tier's call may run before it is cancelled. A judge that keeps the deadline itself
ends in time and reports what it spent; cancelled from here, that usage is lost."""


@dataclass(frozen=True, slots=True)
class Tier:
    """One judge of a :class:`TieredJudge`, with its place and its conditions.

    Args:
        judge: who is asked. Its own limits (rate, concurrency, budget) hold as ever.
        name: what verdicts, reasons and counters call it: 1 to 48 letters, digits or ``_ . / @ -``.
        uncertainty: the band [lo, hi) of u in which pairs *start* here. A pair that climbs from a weaker tier is
            asked whatever its u.
        accept: which of its verdicts are good enough: an :class:`~rmcore.judge.wrappers.accept.Accept`, or any function
            from a verdict to a bool. It is not asked about a pair without a verdict.
        batch_size: pairs a call. With 1 a pair climbs the moment its own verdict is in; larger suits judges that
            work in batches, and a pair then waits for those it was called with.
        concurrency: calls under way at most, for each :meth:`TieredJudge.judge`. It bounds memory; to limit the load
            on an endpoint, use the judge's own limits.

    Raises:
        InputError: an argument is unusable.
    """

    judge: Judge
    name: str
    uncertainty: tuple[float, float] = (1.0, math.inf)
    accept: Callable[[Verdict], bool] = Accept.always
    batch_size: int = 1
    concurrency: int = 512

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Judge):
            reject("judge", type(self.judge).__name__, "an object with an async judge(pairs) method")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            reject("name", repr(self.name)[:80], "1 to 48 letters, digits or _ . / @ -")
        low, high = self.uncertainty
        if not low < high or math.isinf(low):
            reject("uncertainty", (low, high), "a band (lo, hi) of u with lo < hi")
        if not callable(self.accept):
            reject("accept", type(self.accept).__name__, "an Accept or a function from a Verdict to a bool")
        for name in ("batch_size", "concurrency"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                reject(name, value, "a whole number from 1")

    def starts(self, u: float) -> bool:
        """Whether u is in the band. Infinite u (a row the head could not score) is in a band without upper end."""
        low, high = self.uncertainty
        return low <= u and (u < high or math.isinf(high))

    def refusal(self, verdict: Verdict) -> str:
        """Why the rule does not accept the verdict, in a word; empty if it does."""
        if isinstance(self.accept, Accept):
            return self.accept.why_not(verdict)
        try:
            return "" if self.accept(verdict) else "not_accepted"
        except Exception as error:  # the rule may be anybody's code, and the next tier can still decide
            return f"rule_raised_{type(error).__name__}"


@dataclass(slots=True)
class _Counts:
    asked: int = 0
    accepted: int = 0
    kept: int = 0
    late: int = 0
    unaccepted: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    usage: JudgeUsage = field(default_factory=JudgeUsage)


@dataclass(slots=True)
class _Climb:
    """A pair on its way up: what it has cost, what it was told, and the last verdict that was not accepted."""

    pair: Pair
    usage: list[JudgeUsage] = field(default_factory=list)
    trail: list[str] = field(default_factory=list)
    unaccepted: Verdict | None = None


class TieredJudge:
    """Judges in order, cheap to strong; itself a :class:`~rmcore.judge.base.Judge`.

    A pair starts at the first tier whose band of u holds it (without a u: at the first tier) and goes up, one tier at a
    time, until a tier's verdict passes that tier's rule. A tier that fails on a pair, raises, or miscounts its verdicts
    sends its pairs up likewise. Pairs move independently: one may be at the strong tier while others wait at the cheap.

    The verdict is that of the tier that decided, with its name in ``Verdict.judge`` (``rule`` stays ``rule``) and the
    usage of all tiers asked. Where no tier's verdict was accepted,

    - and a tier had an unaccepted one, the strongest of those is returned (``keep_unaccepted=True``), with the reason
      ``unaccepted:<trail>``; with ``keep_unaccepted=False`` there is no verdict;
    - and no tier had any, there is no verdict.

    The trail names each tier asked: ``cheap:timeout; strong:http_500``. It ends with ``deadline`` if the pair's
    deadline passed before the next tier could be asked. No verdict means that the head's p̃ stands.

    Why unaccepted verdicts are kept by default: a failed tier then leaves the result as if it had not been in the list,
    the pair is one that the head is unsure of, and what makes a verdict unacceptable (a flip, a tie, a weak soft
    verdict) is already in its small preference and so in its J. Turn it off if a rule of your own refuses full-strength
    verdicts for being *wrong* rather than weak.

    Args:
        tiers: at least one, of different names, whose bands together hold every u from 1 up.
        keep_unaccepted: see above.
        deadline_s: seconds for one :meth:`judge` call over all its pairs and tiers; it becomes each pair's
            ``deadline`` if that has none or a later one. Tiers are called with few pairs at a time, so a limit a call
            of their own (``ChatJudge.deadline_s``) does not bound the batch. ``None``: no limit but the pairs' own.
        clock: a seam for tests.

    Raises:
        InputError: an argument is unusable; bands with a gap name the gap.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        keep_unaccepted: bool = True,
        deadline_s: float | None = 600.0,
        clock: Clock | None = None,
    ) -> None:
        tiers = tuple(tiers)
        if not tiers or not all(isinstance(tier, Tier) for tier in tiers):
            reject("tiers", [type(tier).__name__ for tier in tiers], "at least one Tier, and nothing else")
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names):
            reject("tiers", f"the names {names}", "a different name for each")
        if deadline_s is not None and not deadline_s > 0:
            reject("deadline_s", deadline_s, "seconds above 0, or None")
        _check_bands(tiers)
        self.tiers = tiers
        self.keep_unaccepted = keep_unaccepted
        self.deadline_s = deadline_s
        self._clock: Clock = clock or SystemClock()
        self._lock = threading.Lock()  # judge() may run on several loops, in several threads
        self._counts = [_Counts() for _ in tiers]

    def __repr__(self) -> str:
        return f"TieredJudge({' < '.join(tier.name for tier in self.tiers)})"

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order. Cancelling it cancels the calls of all tiers."""
        return await _Batch(self, list(pairs)).run()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters by tier name since the start, JSON values.

        ``asked`` = ``accepted`` + Σ ``unaccepted`` (by why) + Σ ``failed`` (by reason). ``kept``: unaccepted verdicts
        that were returned since nothing better came. ``late``: pairs not asked, nor asked further
        up, because their deadline had passed.
        ``usage``: what the tier cost, without single latencies.
        """
        with self._lock:
            result = {}
            for tier, counts in zip(self.tiers, self._counts, strict=True):
                record = asdict(counts) | {"unaccepted": dict(counts.unaccepted), "failed": dict(counts.failed)}
                del record["usage"]["latencies_s"]
                result[tier.name] = record
            return result

    async def aclose(self) -> None:
        """Close every tier's judge that can be closed."""
        for tier in self.tiers:
            await close_judge(tier.judge)

    def start(self, pair: Pair) -> int:
        """The index of the tier where a pair starts."""
        u = pair.uncertainty
        if u is None or math.isnan(u):
            return 0
        return next((index for index, tier in enumerate(self.tiers) if tier.starts(max(u, 1.0))), 0)


class _Batch:
    """One call of :meth:`TieredJudge.judge`: who waits at which tier, and what has come back.

    No worker ever waits for work: a call that ends hands its pairs on and starts whatever now has room. So there are as
    many tasks as the tiers' concurrency allows, whatever the number of pairs, and with the last one the batch is over.
    """

    def __init__(self, owner: TieredJudge, pairs: list[Pair]) -> None:
        self.owner = owner
        limit = None if owner.deadline_s is None else owner._clock.now() + owner.deadline_s
        self.climbs = [_Climb(_bounded(pair, limit)) for pair in pairs]
        self.results: list[Verdict | None] = [None] * len(pairs)
        self.waiting: list[deque[int]] = [deque() for _ in owner.tiers]
        self.running = [0] * len(owner.tiers)
        self.logged: set[int] = set()
        for index, pair in enumerate(pairs):
            self.waiting[owner.start(pair)].append(index)

    async def run(self) -> list[Verdict]:
        async with TaskGroup() as group:
            self.group = group
            self.dispatch()
        verdicts = [verdict for verdict in self.results if verdict is not None]
        reasons = Counter(verdict.reason for verdict in verdicts if verdict.failed)
        if reasons:
            counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(8))
            names = " < ".join(tier.name for tier in self.owner.tiers)
            missing = reasons.total()
            _logger.warning("tiers %s: no verdict for %d of %d pairs (%s)", names, missing, len(verdicts), counts)
        return verdicts

    def dispatch(self) -> None:
        """Start every call there is room for, weakest tier first. A pair that is late by now ends here."""
        for level, tier in enumerate(self.owner.tiers):
            waiting = self.waiting[level]
            while waiting and self.running[level] < tier.concurrency:
                chunk: list[int] = []
                while waiting and len(chunk) < tier.batch_size:
                    index = waiting.popleft()
                    if self.late(index):
                        self.give_up(level, index)
                    else:
                        chunk.append(index)
                if chunk:
                    self.running[level] += 1
                    self.group.create_task(self.call(level, chunk))

    async def call(self, level: int, chunk: list[int]) -> None:
        try:
            verdicts = await self.ask(level, [self.climbs[index].pair for index in chunk])
        finally:
            self.running[level] -= 1
        for index, verdict in zip(chunk, verdicts, strict=True):
            self.settle(level, index, verdict)
        self.dispatch()

    async def ask(self, level: int, pairs: list[Pair]) -> list[Verdict]:
        tier = self.owner.tiers[level]
        deadlines = [pair.deadline for pair in pairs if pair.deadline is not None]
        limit = max(deadlines) - self.owner._clock.now() + _OVERTIME_S if len(deadlines) == len(pairs) else None
        try:
            async with asyncio.timeout(limit):
                verdicts, error = await contained_verdicts(tier.judge, pairs)
        except TimeoutError:
            return [Verdict.none("deadline")] * len(pairs)
        if error is not None and level not in self.logged:
            self.logged.add(level)  # a broken judge breaks on every call: the first of the batch tells it all
            log_contained(error, f"judge of tier {tier.name}", len(verdicts))
        return verdicts

    def late(self, index: int) -> bool:
        deadline = self.climbs[index].pair.deadline
        return deadline is not None and self.owner._clock.now() >= deadline

    def give_up(self, level: int, index: int) -> None:
        with self.owner._lock:
            self.owner._counts[level].late += 1
        self.climbs[index].trail.append("deadline")
        self.end(index)

    def settle(self, level: int, index: int, verdict: Verdict) -> None:
        """Book one answer of a tier, and end the pair's way or send it on."""
        tier, case = self.owner.tiers[level], self.climbs[index]
        case.usage.append(verdict.usage)
        refusal = "" if verdict.failed else tier.refusal(verdict)
        with self.owner._lock:
            counts = self.owner._counts[level]
            counts.asked += 1
            counts.usage += replace(verdict.usage, latencies_s=())  # a sum for a whole run must not grow with it
            if verdict.failed:
                _count(counts.failed, _short(verdict.reason))
            elif refusal:
                _count(counts.unaccepted, refusal)
            else:
                counts.accepted += 1
        if verdict.failed:
            self.climb(level, index, _short(verdict.reason))
        elif refusal:
            case.unaccepted = replace(verdict, judge=tier.name)
            self.climb(level, index, refusal)
        else:
            who = RULE if verdict.judge == RULE else tier.name
            self.results[index] = replace(verdict, judge=who, usage=JudgeUsage.total(case.usage))

    def climb(self, level: int, index: int, why: str) -> None:
        self.climbs[index].trail.append(f"{self.owner.tiers[level].name}:{why}")
        if level + 1 < len(self.owner.tiers):
            self.waiting[level + 1].append(index)
        else:
            self.end(index)

    def end(self, index: int) -> None:
        """No tier decided: the strongest verdict that was not accepted, or none."""
        case = self.climbs[index]
        usage, trail, kept = JudgeUsage.total(case.usage), "; ".join(case.trail), case.unaccepted
        if len(trail) > _TRAIL_LENGTH:
            trail = trail[: _TRAIL_LENGTH - 1] + "…"
        if kept is None or not self.owner.keep_unaccepted:
            self.results[index] = Verdict.none(trail, usage)
            return
        with self.owner._lock:
            self.owner._counts[[tier.name for tier in self.owner.tiers].index(kept.judge)].kept += 1
        self.results[index] = replace(kept, reason=f"unaccepted:{trail}", usage=usage)


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


def _check_bands(tiers: Sequence[Tier]) -> None:
    reached = 1.0
    for low, high in sorted(tier.uncertainty for tier in tiers):
        if low > reached:
            break
        reached = max(reached, high)
    if reached < math.inf:
        above = [low for low, _ in (tier.uncertainty for tier in tiers) if low > reached]
        reject(
            "tiers",
            f"no band for u from {reached:g} to {min(above, default=math.inf):g}",
            "bands that together hold every u from 1 up",
            "Give the last tier a band that ends at math.inf, and let bands begin where others end",
        )
