"""Labels from a judge, for training: how probable is it that a pair's first response is better?

RLAIF's label (Lee et al. 2023, arXiv:2309.00267) is the softmax over the log-probabilities of the words that stand for
the two responses, averaged over both orders. Here that is P = (1 + preference)/2 of soft verdicts
(:mod:`rmcore.judge.question.soft`), averaged over both orders (:mod:`rmcore.judge.orders`); a judge that says "tie"
gives each response half of that probability.

What is no such label is refused, with a reason, and is never a tie:

- the labels have less than half of the probability at the token where the judge commits itself (``mass``);
- the judge gave no log-probabilities, where hard verdicts are not wanted (``hard:<why>``);
- one order failed, where both are wanted (``one_order:<why>``);
- there is no verdict in either order: the verdict's own reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from rmcore._base.errors import reject
from rmcore.judge.base import Judge, Pair, Verdict, checked_verdicts
from rmcore.judge.orders import Asked

__all__ = ["Keep", "LabelPolicy", "OrdersJudge", "SoftLabel", "asked_orders", "soft_label"]

Keep: TypeAlias = Literal["keep", "refuse"]


@runtime_checkable
class OrdersJudge(Protocol):
    """A judge that tells what it said in each order."""

    async def judge_orders(self, pairs: Sequence[Pair]) -> list[Asked]:
        """One answer a pair, in order, as :meth:`Judge.judge <rmcore.judge.base.Judge.judge>` gives verdicts."""
        ...


@dataclass(frozen=True, slots=True)
class LabelPolicy:
    """What counts as a label.

    Attributes:
        hard: what to do with a verdict without probabilities where soft ones were asked for: ``keep`` it as 0, ½ or 1,
            or ``refuse`` the label.
        one_order: what to do where one order failed: ``keep`` the other, or ``refuse`` the label, since a judge's
            leaning to one place is then in it.

    Raises:
        InputError: another word.
    """

    hard: Keep = "refuse"
    one_order: Keep = "refuse"

    def __post_init__(self) -> None:
        for name in ("hard", "one_order"):
            if getattr(self, name) not in ("keep", "refuse"):
                reject(name, repr(getattr(self, name))[:40], "'keep' or 'refuse'")


@dataclass(frozen=True, slots=True)
class SoftLabel:
    """What a judge's answers on one pair come to. All probabilities are that the pair's **first** response is better.

    Attributes:
        probability: in [0, 1]; ``None`` where there is no label, and then ``reason`` says why.
        reason: why there is none, or the notes of the verdict that is there.
        forward: with the first response shown first; ``None`` where that order gave none.
        backward: with the second response shown first, likewise.
        verdict: of both orders, with usage and critique.
        flipped: the two orders prefer different responses.
    """

    probability: float | None
    reason: str = ""
    forward: float | None = None
    backward: float | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict.none("not_asked"))
    flipped: bool = False


def soft_label(asked: Asked, policy: LabelPolicy | None = None) -> SoftLabel:
    """The label of one pair."""
    policy = policy or LabelPolicy()
    whole = asked.verdict
    if asked.rule is not None or asked.forward is None or asked.backward is None:
        # Decided without a question, or asked in one order on purpose.
        only = _usable(whole, policy)
        found = None if only.preference is None else (1 + only.preference) / 2
        forward = found if asked.forward is not None else None
        backward = found if asked.backward is not None else None
        return SoftLabel(found, only.reason, forward, backward, whole)
    usable = _usable(asked.forward, policy), _usable(asked.backward, policy)
    together = Asked(*usable).verdict
    preference, reason = together.preference, together.reason
    if policy.one_order == "refuse" and sum(one.failed for one in usable) == 1:
        preference = None
        reason = next(f"one_order:{one.reason}" for one in usable if one.failed)
    forward, backward = (None if one.preference is None else (1 + one.preference) / 2 for one in usable)
    probability = None if preference is None else (1 + preference) / 2
    return SoftLabel(probability, reason, forward, backward, whole, together.flipped)


async def asked_orders(judge: Judge, pairs: Sequence[Pair]) -> list[Asked]:
    """What ``judge`` said in each order; of one that does not tell orders apart, its verdict alone."""
    if isinstance(judge, OrdersJudge):
        return await judge.judge_orders(pairs)
    return [Asked(rule=verdict) for verdict in await checked_verdicts(judge, pairs)]


def _usable(verdict: Verdict, policy: LabelPolicy) -> Verdict:
    """The verdict of one order, or none where it is not sure enough to be a label."""
    notes = verdict.reason.split("; ")
    if verdict.failed:
        return verdict
    if "weak:mass" in notes:
        return replace(verdict, preference=None, reason="mass")
    hard = next((note for note in notes if note.startswith("hard:")), None)
    if hard is not None and policy.hard == "refuse":
        return replace(verdict, preference=None, reason=hard)
    return verdict
