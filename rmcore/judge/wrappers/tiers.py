"""An ordered list of judges, cheap to strong: a pair is escalated until a verdict is accepted."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore.judge.base import RULE, Judge, Pair, Verdict, close_judge
from rmcore.judge.wrappers.escalation import Batch, TierCounts

__all__ = ["Accept", "Tier", "TieredJudge"]

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
        if not 0 <= self.min_preference <= 1:
            reject("min_preference", self.min_preference, "a number in [0, 1]")

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
        self._counts = [TierCounts() for _ in tiers]

    def __repr__(self) -> str:
        return f"TieredJudge({' < '.join(tier.name for tier in self.tiers)})"

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order. Cancelling it cancels the calls of all tiers."""
        return await Batch(self, list(pairs)).run()

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
