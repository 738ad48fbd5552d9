"""Canary pairs: now and then the judge gets a question whose answer is known, and an alarm says when it fails them."""

from __future__ import annotations

import logging
import math
import threading
from asyncio import TaskGroup
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_number, shown_number
from rmcore.judge.base import Judge, JudgeUsage, Pair, Verdict, checked_verdicts, close_judge
from rmcore.judge.wrappers.alarm import Alarm, AlarmCallback, sound_alarm
from rmcore.judge.wrappers.canary_pairs import CANARY_KINDS, Canary, CanaryKind, CanaryMaker

__all__ = ["CanaryJudge"]

_logger = logging.getLogger(__name__)

_ALL = "all"  # every kind together: a judge that has gone bad all round shows there first
_SIGNIFICANCE = 0.01  # one-sided, of each look at a window


@dataclass
class _Record:
    """The canaries of one kind: counts since the start, and the latest ones for the alarm."""

    recent: deque[tuple[bool, float]]  # (passed, threshold)
    counts: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    alarmed: bool = False
    in_a_row: int = 0  # passes
    since_sounded: int = 0  # canaries

    def tail(self) -> tuple[int, int, float]:
        """(failed, canaries, mean threshold) of the window."""
        n = len(self.recent)
        mean = round(math.fsum(threshold for _, threshold in self.recent) / max(n, 1), 12)
        return sum(not passed for passed, _ in self.recent), n, mean


class CanaryJudge:
    """Asks the inner judge a canary after every ``every`` real pairs; itself a :class:`~rmcore.judge.base.Judge`.

    A canary is made from the pair that was just passed on (:data:`~rmcore.judge.wrappers.canary_pairs.CanaryKind` lists
    the kinds) and asked at the same time as the batch, in a call of its own: whatever happens to it, the batch's
    verdicts are what they would have been. It is never returned. Its ``Pair.id`` begins with ``canary:``, so that a
    store can tell it from data. Its cost is added to the usage of the verdict of the pair it was made from, and shown
    apart in :meth:`stats`.

    **The alarm.** For each kind, and for all kinds together, the latest ``window`` canaries are kept. An alarm is
    raised when the exact (Clopper-Pearson) lower 99% bound of the failure rate exceeds ``threshold``: 3 failures of the
    first 3 do it at 0.2, as do 18 of 50. It is repeated after every ``window`` further canaries while it lasts, and
    ends, with a fresh window, when ``recovery`` canaries in a row have passed. Each look has a false-alarm rate of 1%
    at a failure rate *equal* to the threshold; many looks add up. A canary without a verdict neither passes nor fails.

    **Muting.** With ``stop="mute"`` an alarm stops the judging: verdicts become failures with the reason
    ``canary_alarm``, those of the batch that raised it included, so that the head's p̃ stands. Real pairs are then not
    asked at all, which saves their cost; canaries still are, of the kinds that failed, and end it. (While no pair is
    long enough for those kinds, it stays.)

    Args:
        judge: who is watched.
        every: real pairs to a canary. A pair whose responses are too short for any kind leaves it to the next pair.
        seed: of the choice of texts and places. Equal batches in equal order give equal canaries, so a stored run
            replays without buying them again.
        kinds: which kinds, used in turn.
        threshold: tolerated failure rate, in (0, 1): one for all kinds, or by kind (others 0.2). 0.2 is a starting
            value, not a measurement: see in ``stats()`` what your judge does.
        window, recovery: see above.
        stop: ``never`` (alarms only) or ``mute``.
        on_alarm: called with each :class:`~rmcore.judge.wrappers.alarm.Alarm`.

    Raises:
        InputError: an argument is unusable.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        every: int = 50,
        seed: int = 0,
        kinds: Sequence[CanaryKind] = CANARY_KINDS,
        threshold: float | Mapping[CanaryKind, float] = 0.2,
        window: int = 50,
        recovery: int = 10,
        stop: Literal["never", "mute"] = "never",
        on_alarm: AlarmCallback | None = None,
    ) -> None:
        if not isinstance(judge, Judge):
            reject("judge", type(judge).__name__, "an object with an async judge(pairs) method")
        for name, value in (("every", every), ("window", window), ("recovery", recovery)):
            check_number(name, value, COUNT, "a whole number from 1")
        check_number("seed", seed, Within(whole=True))
        if stop not in ("never", "mute"):
            reject("stop", repr(stop), "'never' or 'mute'")
        if on_alarm is not None and not callable(on_alarm):
            reject("on_alarm", type(on_alarm).__name__, "a function that takes an Alarm, or None")
        self.inner = judge
        self.every = every
        self.kinds = _check_kinds(kinds)
        self.thresholds = _check_thresholds(threshold)
        self.window = window
        self.recovery = recovery
        self.stop = stop
        self.on_alarm = on_alarm
        self._maker = CanaryMaker(self.kinds, seed)
        self._lock = threading.Lock()  # judge() may run on several loops, in several threads
        names = (*self.kinds, _ALL) if len(self.kinds) > 1 else self.kinds
        self._records = {name: _Record(deque(maxlen=window)) for name in names}
        self._pairs = self._muted_pairs = 0
        self._due = False
        self._usage = JudgeUsage()

    @property
    def alarmed(self) -> tuple[str, ...]:
        """The kinds whose alarm is on; ``all`` stands for all together."""
        return tuple(name for name, record in self._records.items() if record.alarmed)

    @property
    def muted(self) -> bool:
        """Whether verdicts are held back now."""
        return self.stop == "mute" and bool(self.alarmed)

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order; canaries are asked beside them and stay here."""
        pairs = list(pairs)
        with self._lock:
            muted = self.muted
            planned = self._plan(pairs)
        asked: list[Pair] = [] if muted else pairs
        async with TaskGroup() as group:
            answers = group.create_task(checked_verdicts(self.inner, asked))
            results = group.create_task(
                checked_verdicts(self.inner, [canary.pair for _, canary in planned], name="judge, on canaries,")
            )
        verdicts = answers.result() if not muted else [Verdict.none("canary_alarm")] * len(pairs)
        alarms = []
        with self._lock:
            for (index, canary), result in zip(planned, results.result(), strict=True):
                alarms += self._book(canary, result)
                verdicts[index] = replace(verdicts[index], usage=verdicts[index].usage + result.usage)
            if muted or self.muted:
                verdicts = [Verdict.none("canary_alarm", verdict.usage, verdict.critique) for verdict in verdicts]
                self._muted_pairs += len(verdicts)
        for alarm in alarms:  # outside the lock: the callback may ask for stats()
            sound_alarm(alarm, self.on_alarm, _logger)
        return verdicts

    def stats(self) -> dict[str, Any]:
        """The state as JSON values.

        ``kinds`` has for each kind, and for ``all`` if there are several: ``asked`` = ``passed`` + ``failed`` +
        Σ ``unanswered`` (by reason) since the start; and of the latest ones ``window``, ``failure_rate``, its two-sided
        98% ``interval``, ``threshold`` and ``alarm``. ``usage``: what the canaries cost, without single latencies.
        """
        with self._lock:
            usage = asdict(self._usage)
            del usage["latencies_s"]
            return {
                "pairs": self._pairs,
                "muted_pairs": self._muted_pairs,
                "muted": self.muted,
                "alarms": list(self.alarmed),
                "kinds": {name: self._describe(record) for name, record in self._records.items()},
                "usage": usage,
            }

    async def aclose(self) -> None:
        """Close the inner judge if it can be closed."""
        await close_judge(self.inner)

    def _plan(self, pairs: list[Pair]) -> list[tuple[int, Canary]]:
        """The canaries of a batch, each with the index of the pair that it was made from."""
        alarmed = frozenset(kind for kind in self.kinds if self._records[kind].alarmed)
        only = alarmed if self.stop == "mute" else frozenset()
        planned = []
        for index, pair in enumerate(pairs):
            self._pairs += 1
            self._due = self._due or self._pairs % self.every == 0
            if self._due:
                canary = self._maker.make(pair, only)
                if canary is not None:
                    planned.append((index, canary))
                    self._due = False
            self._maker.remember(pair)
        return planned

    def _book(self, canary: Canary, verdict: Verdict) -> list[Alarm]:
        """Enter one result; the alarms that it raises."""
        self._usage += replace(verdict.usage, latencies_s=())  # a sum for a whole run must not grow with it
        passed = canary.passed(verdict)
        alarms = []
        for name in (canary.kind, _ALL):
            record = self._records.get(name)
            if record is None:
                continue
            record.counts["asked"] += 1
            if passed is None:
                reason = verdict.reason[:80]
                record.unanswered[
                    reason if reason in record.unanswered or len(record.unanswered) < 64 else "other"
                ] += 1
                continue
            record.counts["passed" if passed else "failed"] += 1
            record.recent.append((passed, self.thresholds[canary.kind]))
            record.in_a_row = record.in_a_row + 1 if passed else 0
            alarm = self._watch(name, record)
            if alarm is not None:
                alarms.append(alarm)
        return alarms

    def _watch(self, name: str, record: _Record) -> Alarm | None:
        """Switch the alarm of one kind on or off; the alarm, if it is to be sounded now."""
        if record.alarmed and record.in_a_row >= self.recovery:
            record.alarmed = False
            record.recent.clear()
            _logger.info("canary alarm over: %d canaries (%s) in a row passed", record.in_a_row, name)
            return None
        failed, n, threshold = record.tail()
        high = _at_least(failed, n, threshold) < _SIGNIFICANCE
        record.since_sounded += 1
        if record.alarmed and not (high and record.since_sounded >= self.window):
            return None
        if not high:
            return None
        record.alarmed, record.since_sounded = True, 0
        low, up = _interval(failed, n)
        what = "canaries" if name == _ALL else f"canaries of the kind {name!r}"
        effect = "Its verdicts are held back until canaries pass again. " if self.stop == "mute" else ""
        message = (
            f"the judge failed {failed} of the latest {n} {what} (rate between {low:.0%} and {up:.0%}, tolerated "
            f"{threshold:.0%}). {effect}Read the critiques of its latest verdicts for what it rewards; then change the "
            "judge's model or prompt, or raise the threshold if these canaries are unfair to your prompts."
        )
        details = {
            "kind": name,
            "failed": failed,
            "canaries": n,
            "interval": [low, up],
            "threshold": threshold,
            "muted": self.muted,
        }
        return Alarm("canary", message, details)

    def _describe(self, record: _Record) -> dict[str, Any]:
        failed, n, threshold = record.tail()
        return {
            **{name: record.counts[name] for name in ("asked", "passed", "failed")},
            "unanswered": dict(record.unanswered),
            "window": n,
            "failure_rate": failed / n if n else None,
            "interval": list(_interval(failed, n)) if n else None,
            "threshold": threshold if n else None,
            "alarm": record.alarmed,
        }


def _at_least(k: int, n: int, rate: float) -> float:
    """P(X ≥ k) of a binomial X. By the mean rate for trials of different rates, where it is an upper bound at the tail
    that matters here (Hoeffding 1956: for k above the mean number).
    """
    if k <= 0:
        return 1.0
    terms = (
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(rate)
        + (n - i) * math.log1p(-rate)
        for i in range(k, n + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def _interval(k: int, n: int) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a rate, ``_SIGNIFICANCE`` on each side."""

    def lower(k: int) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if _at_least(k, n, middle) < _SIGNIFICANCE else (low, middle)
        return low if k else 0.0

    return lower(k), 1.0 - lower(n - k)


def _check_kinds(kinds: Sequence[CanaryKind]) -> tuple[CanaryKind, ...]:
    given = tuple(kinds)
    if isinstance(kinds, str) or not given or len(set(given)) != len(given) or not set(given) <= set(CANARY_KINDS):
        reject("kinds", given, f"different ones of {', '.join(CANARY_KINDS)}")
    return given


def _check_thresholds(threshold: float | Mapping[CanaryKind, float]) -> dict[CanaryKind, float]:
    given = dict(threshold) if isinstance(threshold, Mapping) else dict.fromkeys(CANARY_KINDS, threshold)
    unknown = sorted(set(given) - set(CANARY_KINDS))
    if unknown:
        reject("threshold", f"the kinds {unknown}", f"kinds of {', '.join(CANARY_KINDS)}")
    for kind, value in given.items():
        if value not in Within(above=0, below=1):
            reject("threshold", f"{shown_number(value)} for {kind}", "a rate strictly between 0 and 1")
    return {kind: given.get(kind, 0.2) for kind in CANARY_KINDS}
