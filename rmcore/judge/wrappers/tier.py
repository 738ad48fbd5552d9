"""One tier of a :class:`~rmcore.judge.wrappers.tiers.TieredJudge`, what it accepts, and the cascade they make."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from rmcore._base.clock import Clock
from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore.judge.base import RULE, Judge, JudgeUsage, Pair, Verdict

__all__ = ["Accept", "Cascade", "Tier", "TierCounts", "check_bands"]

_NAME = re.compile(r"[\w./@-]{1,48}")


@dataclass(frozen=True, slots=True)
class Accept:
    """Accepts the verdicts that are not of the kinds ruled out; those by rule always.

    Args:
        min_preference: least |preference|, in [0, 1]: for soft verdicts, and 0.6 also excludes a win in one order that
            was a tie in the other.
        flips: accept a verdict whose two orders contradict each other.
        ties: accept a tie that both orders agree on.
        one_order: accept a verdict of which the other order failed.

    Raises:
        InputError: ``min_preference`` is outside [0, 1].
    """

    always: ClassVar[Accept]
    """Accepts every verdict that there is."""

    min_preference: float = 0.0
    flips: bool = True
    ties: bool = True
    one_order: bool = True

    def __post_init__(self) -> None:
        check_number("min_preference", self.min_preference, Within(least=0, most=1), "a number in [0, 1]")

    def why_not(self, verdict: Verdict) -> str:
        """``no_verdict``, ``flipped``, ``tie``, ``one_order`` or ``weak``; empty if the verdict is accepted."""
        preference = verdict.preference
        if preference is None:
            return "no_verdict"
        if verdict.judge == RULE:
            return ""  # certain, and a stronger judge would say the same
        if verdict.flipped and not self.flips:
            return "flipped"
        if preference == 0 and not verdict.flipped and not self.ties:
            return "tie"
        if verdict.reason.startswith("one_order:") and not self.one_order:
            return "one_order"
        return "weak" if abs(preference) < self.min_preference else ""

    def __call__(self, verdict: Verdict) -> bool:
        """Whether the verdict is accepted."""
        return not self.why_not(verdict)


Accept.always = Accept()


@dataclass(frozen=True, slots=True)
class Tier:
    """One judge of a :class:`TieredJudge`, with its place and its conditions.

    Args:
        judge: who is asked. Its own limits (rate, concurrency, budget) hold as ever.
        name: what verdicts, reasons and counters call it: 1 to 48 letters, digits or ``_ . / @ -``.
        uncertainty: the band [lo, hi) of u in which pairs *start* here. A pair escalated from a weaker tier is
            asked whatever its u.
        accept: which of its verdicts are good enough: an :class:`Accept`, or any function
            from a verdict to a bool. It is not asked about a pair without a verdict.
        batch_size: pairs a call. With 1 a pair is escalated the moment its own verdict is in; larger suits judges that
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
        if low not in Within() or high not in Within(above=low, finite=False):
            reject("uncertainty", (low, high), "a band (lo, hi) of u with lo < hi")
        if not callable(self.accept):
            reject("accept", type(self.accept).__name__, "an Accept or a function from a Verdict to a bool")
        for name in ("batch_size", "concurrency"):
            check_number(name, getattr(self, name), COUNT, "a whole number from 1")

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
class TierCounts:
    """What became of the pairs that one tier was asked about; ``TieredJudge.stats`` says what each field is."""

    asked: int = 0
    accepted: int = 0
    kept: int = 0
    late: int = 0
    unaccepted: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    usage: JudgeUsage = field(default_factory=JudgeUsage)


@dataclass(eq=False)
class Cascade:
    """What all batches of one ``TieredJudge`` share; its arguments are checked there.

    Attributes:
        tiers: cheap to strong.
        keep_unaccepted: whether the strongest verdict that no tier accepted is returned.
        deadline_s: seconds for a batch; None for no limit.
        clock: of the deadlines.
        counts: what each tier was asked; under ``lock``, since batches may run on several loops, in several threads.
    """

    tiers: tuple[Tier, ...]
    keep_unaccepted: bool
    deadline_s: float | None
    clock: Clock

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.counts = [TierCounts() for _ in self.tiers]

    def start(self, pair: Pair) -> int:
        """The index of the tier where a pair starts."""
        u = pair.uncertainty
        if u is None or math.isnan(u):
            return 0
        return next((index for index, tier in enumerate(self.tiers) if tier.starts(max(u, 1.0))), 0)


def check_bands(tiers: Sequence[Tier]) -> None:
    """Raise InputError, naming the gap, unless the tiers' bands together hold every u from 1 up."""
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
