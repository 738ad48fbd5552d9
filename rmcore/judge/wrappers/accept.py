"""Which verdicts of a judge are good enough: a small rule with names for what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rmcore._base.errors import reject
from rmcore.judge.base import Verdict
from rmcore.judge.rules import RULE

__all__ = ["Accept"]


@dataclass(frozen=True, slots=True)
class Accept:
    """Accepts the verdicts that are not of the kinds ruled out; those by rule (:mod:`rmcore.judge.rules`) always.

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
