"""Verdicts that need no judge: blank answers and identical ones are decided by rule, without a call."""

from __future__ import annotations

from rmcore._base.errors import InputError
from rmcore._base.prompt import Canonical, canonical_response
from rmcore.judge.base import RULE, Pair, Verdict
from rmcore.judge.question.sanitise import blank

__all__ = ["rule_verdict"]


def rule_verdict(pair: Pair) -> Verdict | None:
    """The verdict that the texts alone decide, or ``None`` if a judge is needed.

    - identical responses: a tie, ``rule:identical``;
    - both blank (:func:`~rmcore.judge.question.sanitise.blank`: nothing but white space and invisible characters): a
      tie, ``rule:both_blank``;
    - one blank: the other wins, ``rule:blank``.

    Of several messages the whole counts: one that calls a tool is not blank. The rule stands in ``reason``, and
    ``judge`` is :data:`~rmcore.judge.base.RULE`. What is no response is left to the judge's own checks.
    """
    try:
        first, second = canonical_response(pair.first), canonical_response(pair.second)
    except InputError:
        return None
    if first == second:
        return Verdict.of("tie", reason="rule:identical", judge=RULE)
    empty = _blank(first), _blank(second)
    if all(empty):
        return Verdict.of("tie", reason="rule:both_blank", judge=RULE)
    if any(empty):
        return Verdict.of("loss" if empty[0] else "win", reason="rule:blank", judge=RULE)
    return None


def _blank(response: Canonical) -> bool:
    if isinstance(response, str):
        return blank(response)
    return all(message.keys() == {"role", "content"} and blank(message["content"]) for message in response)
