"""Two tests of whether a stream is still the one that was calibrated on, each wrong with a stated probability for ever.

- :class:`ScoreShift`: are the scores drawn as the calibration's were? Blocks of new scores against the calibration's,
  by the two-sample Kolmogorov-Smirnov test; block j spends 6δ / π²j², so all blocks together raise a false alarm with
  probability ≤ δ.
- :class:`ErrorExcess`: is the error rate among kept pairs above α? Bets against "it is at most α" on every audited
  pair (Waudby-Smith & Ramdas 2024): their wealth is a non-negative supermartingale, so it ever reaches 1/δ with
  probability ≤ δ (Ville 1939). Bets of several sizes share the stake, and it is laid out little by little, part j with
  6/π²j² of it: what is staked after a change has lost nothing before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rmcore._base.errors import reject
from rmcore.engine.routing.recent import Floats

__all__ = ["BLOCK", "ErrorExcess", "ScoreShift"]

BLOCK = 256
"""Scores to a block: a shift of half a standard deviation is found in one."""
_BETS = (0.03125, 0.0625, 0.125, 0.25, 0.5)
"""What a bet puts at risk on one pair, as a share of the wealth; below 1, so that no wealth is ever lost for good."""
_PART = 32
"""Audited pairs from one part of the stake to the next."""


@dataclass
class ScoreShift:
    """Whether scores are still drawn as the calibration's were.

    Args:
        calibration: (N,) its scores.
        delta: probability of a false alarm, over any number of blocks.

    Attributes:
        waiting: scores of the block that is filling.
        blocks: tested so far.
        least_p: the smallest p-value so far, and the level its block had.
    """

    calibration: Floats
    delta: float
    waiting: list[float] = field(default_factory=list)
    blocks: int = 0
    least_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            reject("delta", self.delta, "a number strictly between 0 and 1")

    def add(self, score: Floats) -> bool:
        """Take new scores; True as soon as a block says that they come from elsewhere."""
        from scipy import stats  # here, so that routing needs none

        self.waiting.extend(score.tolist())
        shifted = False
        while len(self.waiting) >= BLOCK:
            block, self.waiting = np.array(self.waiting[:BLOCK]), self.waiting[BLOCK:]
            self.blocks += 1
            level = 6 * self.delta / (math.pi * self.blocks) ** 2
            p = float(stats.ks_2samp(block, self.calibration, method="asymp").pvalue)
            self.least_p = min(self.least_p, p)
            shifted |= p <= level
        return shifted


@dataclass
class ErrorExcess:
    """Whether the error rate among audited pairs is above ``alpha``.

    Args:
        alpha: the rate that is allowed.
        delta: probability of a false alarm, over any number of pairs.

    Attributes:
        wealth: of each bet, the stakes laid out so far with what they won.
        pairs: audited so far.
        errors: of them, those that the head got wrong.
    """

    alpha: float
    delta: float
    wealth: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    pairs: int = 0
    errors: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "delta"):
            if not 0 < getattr(self, name) < 1:
                reject(name, getattr(self, name), "a number strictly between 0 and 1")

    @property
    def evidence(self) -> float:
        """The wealth, beginning at 1: the mean over the bets, and what is not laid out yet."""
        parts = -(-self.pairs // _PART)
        held = 1 - math.fsum(6 / (math.pi * j) ** 2 for j in range(1, parts + 1))
        return math.fsum(self.wealth) / len(_BETS) + held

    def add(self, wrong: npt.NDArray[np.bool_]) -> bool:
        """Take audited pairs, in order; True as soon as the evidence is in."""
        found = False
        for mistake in wrong.tolist():
            part, begins = divmod(self.pairs, _PART)
            stake = 6 / (math.pi * (part + 1)) ** 2 if begins == 0 else 0.0
            self.pairs += 1
            self.errors += mistake
            # A right answer loses the share that is at risk, a wrong one wins (1 − α) / α of it: nothing in the mean.
            odds = (mistake - self.alpha) / self.alpha
            self.wealth = [(w + stake) * (1 + share * odds) for w, share in zip(self.wealth, _BETS, strict=True)]
            found = found or self.evidence >= 1 / self.delta
        return found
