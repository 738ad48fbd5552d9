"""An alarm for a judge and a head that disagree more often than the head's calibration and the judge's errors allow.

A calibrated head with preference p̃ errs with probability d = σ(−|p̃|), and a judge that errs with probability e then
contradicts it with probability at most

    q = d (1 − e) + (1 − d) e.

Each verdict is a bet against "still at most q": wealth is multiplied by r/q where the judge contradicts the head and by
(1 − r)/(1 − q) where it does not, r being q with a larger error rate e′ in the place of e. Under the null the factor's
expectation is at most 1. A judge may go bad after any number of good verdicts, so the bets start anew at every moment
(the Shiryaev-Roberts sum M ← L·(M + 1)), and the alarm is M ≥ c. Since M minus the number of steps is then a
supermartingale, the expected number of steps to a false alarm is at least c, and n steps hold one with probability at
most n/c: for any stream of p̃, without a window, a distribution or a limit theorem (Shin, Ramdas, Rinaldo,
"E-detectors", 2022). M is averaged over a few e′, which keeps all that.

Pairs of one prompt share responses, so their disagreements come together; an average of their factors is a fair bet
whatever their dependence. So one **step is one prompt** of one call, and all rates are in prompts.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore.judge.base import RULE, Judge, Pair, Verdict, checked_verdicts, close_judge
from rmcore.judge.wrappers.alarm import Alarm, AlarmCallback, sound_alarm

__all__ = ["DisagreementAlarm", "MonitoredJudge"]

_logger = logging.getLogger(__name__)

_FLOOR = 1e-6  # of q: no head is that sure, and the factor r/q stays finite


class DisagreementAlarm:
    """Watches a stream of pairs with the head's preference and their verdicts; see the module's text for the test.

    What counts: pairs with a finite ``Pair.preference`` and a verdict. The verdict's strength |preference| is the share
    of wealth that is bet on it, so a hard verdict counts in full, a soft or half-contradicted one in part, and a tie or
    a flip to 0 not at all: neither says that the head is wrong. A head's preference of exactly 0 has no side to
    contradict and does not count; nor does a verdict by rule, which no judge gave. All are counted in :meth:`stats`.

    The test says *that* they disagree too much, not who is wrong: a judge that has changed or is being fooled, or a
    head that is confidently wrong on what the policy now writes. With human labels for verdicts, a head is quiet on the
    distribution it was fitted to and raises the alarm on another; look at the verdicts before distrusting the judge.

    Args:
        judge_error: e, the rate of wrong verdicts to be expected of a healthy judge, in [0, 0.5). It also has to cover
            what the head lacks in calibration on the pairs it routes, so set it from a stretch you trust:
            ``stats()["recent"]["explaining_judge_error"]`` is the e that explains what was seen of late. Where that is
            near 0.5 or above, the head itself is wrong and no setting helps.
        run_length: c, the least expected number of prompts to a false alarm. A larger one delays a true alarm by
            log(c) over the information in a prompt; ``tests/judge/wrappers/test_disagreement.py`` holds the delays.
        window: prompts over which :meth:`stats` reports recent rates. While disagreement lasts, an alarm is repeated
            after so many prompts, not at every crossing; without a crossing for so many prompts it is over.
        on_alarm: called with each :class:`~rmcore.judge.wrappers.alarm.Alarm`.

    Raises:
        InputError: an argument is outside its range.
    """

    def __init__(
        self,
        *,
        judge_error: float = 0.2,
        run_length: float = 100_000,
        window: int = 500,
        on_alarm: AlarmCallback | None = None,
    ) -> None:
        check_number("judge_error", judge_error, Within(least=0, below=0.5), "a rate in [0, 0.5)")
        check_number("run_length", run_length, Within(above=1), "a finite number of prompts above 1")
        check_number("window", window, COUNT, "a whole number of prompts from 1")
        if on_alarm is not None and not callable(on_alarm):
            reject("on_alarm", type(on_alarm).__name__, "a function that takes an Alarm, or None")
        self.judge_error = judge_error
        self.run_length = run_length
        self.window = window
        self.on_alarm = on_alarm
        # What a judge may have become: halfway to a coin, a coin, mostly wrong, and all but always wrong.
        self._rates = ((judge_error + 0.5) / 2, 0.5, 0.75, 0.95)
        self._lock = threading.Lock()
        self._evidence = [0.0] * len(self._rates)
        self._steps = 0
        self._counts = {"pairs": 0, "counted": 0, "ties": 0, "flips_to_zero": 0, "by_rule": 0}
        self._counts |= {"no_verdict": 0, "no_preference": 0}
        self._recent: deque[tuple[float, float, float, float]] = deque(maxlen=window)
        self._alarms = 0
        self._crossed: int | None = None  # the step of the last crossing
        self._sounded = 0  # the step of the last alarm

    @property
    def active(self) -> bool:
        """Whether the evidence crossed its limit within the last ``window`` prompts."""
        return self._crossed is not None and self._steps - self._crossed < self.window

    def observe(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> None:
        """Take in verdicts, one a pair, in order. Pairs of one prompt should come in one call.

        Raises:
            InputError: ``verdicts`` is not as long as ``pairs``.
        """
        if len(pairs) != len(verdicts):
            reject("verdicts", len(verdicts), f"{len(pairs)}, one a pair")
        alarms = []
        with self._lock:
            prompts: dict[str, list[tuple[float, float, float]]] = {}
            for pair, verdict in zip(pairs, verdicts, strict=True):
                seen = self._read(pair, verdict)
                if seen is not None:
                    prompts.setdefault(repr(pair.prompt), []).append(seen)
            for observed in prompts.values():
                alarm = self._step(observed)
                if alarm is not None:
                    alarms.append(alarm)
        for alarm in alarms:  # outside the lock: the callback may ask for stats()
            sound_alarm(alarm, self.on_alarm, _logger)

    def stats(self) -> dict[str, Any]:
        """The state as JSON values.

        ``recent`` is over the last ``window`` prompts: observed and expected disagreement weighted by the verdicts'
        strength, their difference ``z`` in standard deviations (the pairs of a prompt taken as one observation), and
        the judge's error rate that would explain it; None where there is nothing to tell. ``evidence`` is M and
        ``run_length`` the c that it is compared with; M starts at 0 again after each crossing.
        """
        with self._lock:
            return {
                "judge_error": self.judge_error,
                "run_length": self.run_length,
                "active": self.active,
                "alarms": self._alarms,
                "prompts": self._steps,
                **self._counts,
                "evidence": math.fsum(self._evidence) / len(self._evidence),
                "recent": self._window(),
            }

    def _read(self, pair: Pair, verdict: Verdict) -> tuple[float, float, float] | None:
        """(weight, disagreed, d) of one pair; ``None`` where it tells nothing."""
        counts, head, answer = self._counts, pair.preference, verdict.preference
        counts["pairs"] += 1
        if answer is None:
            counts["no_verdict"] += 1
        elif verdict.judge == RULE:
            counts["by_rule"] += 1
        elif head is None or not math.isfinite(head) or head == 0:
            counts["no_preference"] += 1
        elif answer == 0:
            counts["flips_to_zero" if verdict.flipped else "ties"] += 1
        else:
            counts["counted"] += 1
            odds = math.exp(-abs(head))
            return abs(answer), float((answer > 0) != (head > 0)), odds / (1 + odds)
        return None

    def _step(self, observed: list[tuple[float, float, float]]) -> Alarm | None:
        """One prompt: bet, book, and say if the evidence crossed its limit."""
        e = self.judge_error
        self._steps += 1
        for k, rate in enumerate(self._rates):
            factor = 0.0
            for weight, disagreed, d in observed:
                q, r = (max(x + d * (1 - 2 * x), _FLOOR) for x in (e, rate))
                factor += 1 + weight * ((r / q if disagreed else (1 - r) / (1 - q)) - 1)
            self._evidence[k] = factor / len(observed) * (self._evidence[k] + 1)
        total = math.fsum(weight for weight, _, _ in observed)
        share = [(weight / total, disagreed, d) for weight, disagreed, d in observed]
        seen = math.fsum(w * disagreed for w, disagreed, _ in share)
        wrong = math.fsum(w * d for w, _, d in share)
        expected = e + wrong * (1 - 2 * e)
        self._recent.append((seen, expected, wrong, expected * (1 - expected)))
        if math.fsum(self._evidence) / len(self._evidence) < self.run_length:
            return None
        ongoing = self.active
        self._evidence = [0.0] * len(self._rates)
        self._crossed = self._steps
        if ongoing and self._steps - self._sounded < self.window:
            return None
        self._sounded = self._steps
        self._alarms += 1
        return self._alarm()

    def _alarm(self) -> Alarm:
        seen, recent = self._stretch(), self._window()
        message = (
            f"judge and head disagree on {seen['observed']:.0%} of the last {seen['prompts']} judged prompts, where "
            f"{seen['expected']:.0%} is what a calibrated head and a judge with {self.judge_error:.0%} errors give. "
            "Read those verdicts and their critiques: if the judge is wrong, check its model, its prompt and its "
            "canaries; if it is right, recalibrate or refit the head on judged pairs, or raise judge_error."
        )
        details = {"judge_error": self.judge_error, "run_length": self.run_length, "prompts": self._steps}
        return Alarm("disagreement", message, details | {"stretch": seen, "recent": recent})

    def _stretch(self) -> dict[str, Any]:
        """The latest prompts that stand out most, where the trouble probably began; picked, so no test of its own."""
        best, result = -math.inf, {}
        observed = expected = variance = 0.0
        for n, (seen, due, _, spread) in enumerate(reversed(self._recent), start=1):
            observed, expected, variance = observed + seen, expected + due, variance + spread
            z = (observed - expected) / math.sqrt(max(variance, 1e-12))
            if z > best:
                best, result = z, {"prompts": n, "observed": observed / n, "expected": expected / n}
        return result

    def _window(self) -> dict[str, Any]:
        n = len(self._recent)
        if not n:
            return {"prompts": 0, "observed": None, "expected": None, "z": None, "explaining_judge_error": None}
        observed, expected, wrong, variance = (math.fsum(column) / n for column in zip(*self._recent, strict=True))
        # observed = wrong + e (1 − 2·wrong), solved for e; at wrong = ½ every e explains the same.
        explains = (observed - wrong) / (1 - 2 * wrong) if wrong < 0.5 - 1e-9 else None
        return {
            "prompts": n,
            "observed": observed,
            "expected": expected,
            "z": (observed - expected) / math.sqrt(variance / n) if variance > 0 else None,
            "explaining_judge_error": None if explains is None else min(max(explains, 0.0), 1.0),
        }


class MonitoredJudge:
    """A judge whose verdicts an alarm watches; itself a :class:`~rmcore.judge.base.Judge`, and it changes no verdict.

    Put it around everything else, so that it sees whole batches: ``MonitoredJudge(CanaryJudge(TieredJudge([...])))``.
    An alarm may be shared by several judges, or be fed by hand (``alarm.observe``).

    Raises:
        InputError: ``judge`` is no judge, or ``alarm`` no :class:`DisagreementAlarm`.
    """

    def __init__(self, judge: Judge, alarm: DisagreementAlarm | None = None) -> None:
        if not isinstance(judge, Judge):
            reject("judge", type(judge).__name__, "an object with an async judge(pairs) method")
        if alarm is not None and not isinstance(alarm, DisagreementAlarm):
            reject("alarm", type(alarm).__name__, "a DisagreementAlarm")
        self.inner = judge
        self.alarm = alarm or DisagreementAlarm()

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The inner judge's verdicts, observed."""
        pairs = list(pairs)
        verdicts = await checked_verdicts(self.inner, pairs)
        self.alarm.observe(pairs, verdicts)
        return verdicts

    def stats(self) -> dict[str, Any]:
        """The alarm's state."""
        return self.alarm.stats()

    async def aclose(self) -> None:
        """Close the inner judge if it can be closed."""
        await close_judge(self.inner)
