"""An ordered list of judges, cheap to strong: a pair is escalated until a verdict is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.numbers import Within, check_number
from rmcore.judge.base import Pair, Verdict, close_judge
from rmcore.judge.wrappers.escalation import Batch
from rmcore.judge.wrappers.tier import Accept, Cascade, Tier, check_bands

__all__ = ["Accept", "Tier", "TieredJudge"]


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
        if deadline_s is not None:
            check_number("deadline_s", deadline_s, Within(above=0), "seconds above 0, or None")
        check_bands(tiers)
        self._cascade = Cascade(tiers, keep_unaccepted, deadline_s, clock or SystemClock())

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers, cheap to strong."""
        return self._cascade.tiers

    @property
    def keep_unaccepted(self) -> bool:
        """As given."""
        return self._cascade.keep_unaccepted

    @property
    def deadline_s(self) -> float | None:
        """As given."""
        return self._cascade.deadline_s

    def __repr__(self) -> str:
        return f"TieredJudge({' < '.join(tier.name for tier in self.tiers)})"

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order. Cancelling it cancels the calls of all tiers."""
        return await Batch(self._cascade, list(pairs)).run()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters by tier name since the start, JSON values.

        ``asked`` = ``accepted`` + Σ ``unaccepted`` (by why) + Σ ``failed`` (by reason). ``kept``: unaccepted verdicts
        that were returned since nothing better came. ``late``: pairs not asked, nor asked further
        up, because their deadline had passed.
        ``usage``: what the tier cost, without single latencies.
        """
        with self._cascade.lock:
            result = {}
            for tier, counts in zip(self.tiers, self._cascade.counts, strict=True):
                record = asdict(counts) | {"unaccepted": dict(counts.unaccepted), "failed": dict(counts.failed)}
                del record["usage"]["latencies_s"]
                result[tier.name] = record
            return result

    async def aclose(self) -> None:
        """Close every tier's judge that can be closed."""
        for tier in self.tiers:
            await close_judge(tier.judge)
