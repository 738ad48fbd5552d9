"""Verdicts that need no judge: blank answers and identical ones are decided by rule, without a call."""

from __future__ import annotations

from rmcore.judge.base import RULE, Pair, Verdict
from rmcore.judge.question.sanitise import blank

__all__ = ["rule_verdict"]


def rule_verdict(pair: Pair) -> Verdict | None:
    """The verdict that the texts alone decide, or ``None`` if a judge is needed.

    - identical responses: a tie, ``rule:identical``;
    - both blank (:func:`~rmcore.judge.question.sanitise.blank`: nothing but white space and invisible characters): a
      tie, ``rule:both_blank``;
    - one blank: the other wins, ``rule:blank``.

    The rule stands in ``reason``, and ``judge`` is :data:`~rmcore.judge.base.RULE`. A pair that is not text is left to
    the judge's own checks.
    """
    first, second = pair.first, pair.second
    if not all(isinstance(text, str) for text in (first, second)):
        return None
    if first == second:
        return Verdict.of("tie", reason="rule:identical", judge=RULE)
    empty = blank(first), blank(second)
    if all(empty):
        return Verdict.of("tie", reason="rule:both_blank", judge=RULE)
    if any(empty):
        return Verdict.of("loss" if empty[0] else "win", reason="rule:blank", judge=RULE)
    return None
