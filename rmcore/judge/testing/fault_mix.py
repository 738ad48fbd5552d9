"""How faults are mixed into a run: spread over it, and in storms."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rmcore._base.errors import reject
from rmcore._base.numbers import SEED, Within, check_number
from rmcore.judge.testing.fault import Fault
from rmcore.judge.testing.faults import FAULTS, STORM_FAULTS

__all__ = ["FaultMix", "Storm"]


@dataclass(frozen=True, slots=True)
class Storm:
    """From request number ``at`` on, for ``seconds``, every request is refused in the way of ``kind``.

    Raises:
        InputError: ``kind`` is none of :data:`STORM_FAULTS`, or a number makes no sense.
    """

    at: int
    seconds: float
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in STORM_FAULTS:
            reject("kind", repr(self.kind)[:40], f"one of {', '.join(STORM_FAULTS)}")
        check_number("at", self.at, SEED)
        check_number("seconds", self.seconds, Within(least=0), "seconds, at least 0")


class FaultMix:
    """Faults spread over the requests, all kinds equally often in a shuffled order, and storms; a server's ``faults``.

    Args:
        share: of the requests that meet a fault, in [0, 1].
        kinds: which; all of :data:`FAULTS` by default.
        storms: in order of their beginning.
        seed: of the choice.
        clock: seconds, for the length of storms.
    """

    def __init__(
        self,
        share: float,
        *,
        kinds: Sequence[Fault] | None = None,
        storms: Sequence[Storm] = (),
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_number("share", share, Within(least=0, most=1), "a fraction in [0, 1]")
        check_number("seed", seed, Within(whole=True))
        self._share, self._storms, self._clock = share, list(storms), clock
        self._kinds = list(FAULTS.values() if kinds is None else kinds)
        self._random = random.Random(seed)
        self._order: list[Fault] = []
        self._storm: Fault | None = None
        self._storm_ends = -math.inf

    def __call__(self, number: int) -> Fault | None:
        """What request ``number`` meets; to be asked once a request, in order."""
        now = self._clock()
        if self._storms and number >= self._storms[0].at:
            storm = self._storms.pop(0)
            self._storm, self._storm_ends = STORM_FAULTS[storm.kind], now + storm.seconds
        if now < self._storm_ends:
            return self._storm
        if not self._kinds or self._random.random() >= self._share:
            return None
        if not self._order:
            self._order = list(self._kinds)
            self._random.shuffle(self._order)
        return self._order.pop()
