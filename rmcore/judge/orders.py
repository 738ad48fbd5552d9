"""Both orders of a pair: judges favour a place, so a pair is shown twice, exchanged, and the answers are put together.

The rules, which every judge of this package follows:

- both orders answered: the preferences are averaged. Win and loss make 0 with ``flipped=True``; win and tie make a
  weak win of 0.5, which is no flip.
- one order answered, the other failed: the answer stands at full strength, exactly as under ``orders="one"``, and
  ``reason`` says ``one_order:<why the other failed>``, so that it can be counted. It is not weakened: a failed call is
  no evidence for the other response.
- neither answered: no verdict, with the reason of the order that was asked first.

Notes in the ``reason`` of a verdict that is there (``cut:120``, ``hard:mass``) are kept, each once, joined by ``; ``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast

from rmcore._base.errors import reject
from rmcore.judge.base import Pair, Verdict
from rmcore.judge.keys import pair_key

__all__ = ["Asked", "Orders", "check_orders", "combine_orders", "exchanged", "shown_exchanged"]

Orders: TypeAlias = Literal["both", "one"]
"""``both``: each pair in both orders, averaged; ``one``: in the order :func:`shown_exchanged` picks."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a judge said of one pair in each order, **both from the first response's side**.

    Attributes:
        forward: the pair as given, its first response shown first; ``None`` where that was not asked.
        backward: the pair shown exchanged; ``None`` where that was not asked.
        rule: instead of both: decided without a question, or by a judge that has no orders.
    """

    forward: Verdict | None = None
    backward: Verdict | None = None
    rule: Verdict | None = None

    @property
    def verdict(self) -> Verdict:
        """The one verdict that they come to (:func:`combine_orders`)."""
        if self.rule is not None:
            return self.rule
        if self.forward is not None and self.backward is not None:
            return combine_orders(self.forward, self.backward)
        return self.forward or self.backward or Verdict.none("not_asked")


def check_orders(orders: str) -> Orders:
    """``orders``, if it is one of the two words; :class:`~rmcore._base.errors.InputError` otherwise."""
    if orders not in ("both", "one"):
        reject("orders", repr(orders)[:80], "'both' or 'one'")
    return cast("Orders", orders)


def shown_exchanged(pair: Pair) -> bool:
    """Whether ``orders="one"`` shows ``pair.second`` first: decided by a stable hash of the texts.

    The order with the smaller key is shown. So (a, b) and (b, a) put the very same question to the judge and get the
    same answer, and over many pairs each place is used half of the time.
    """
    return pair_key(pair.prompt, pair.second, pair.first) < pair_key(pair.prompt, pair.first, pair.second)


def exchanged(verdict: Verdict) -> Verdict:
    """The same verdict seen from the other response's side."""
    if verdict.preference is None:
        return verdict
    return replace(verdict, preference=0.0 - verdict.preference)  # 0 - 0 is +0; negating would make -0


def combine_orders(forward: Verdict, backward: Verdict) -> Verdict:
    """One verdict from those of both orders, **both from the first response's side** (see the rules above).

    ``forward`` is the pair as given, ``backward`` the exchanged one after :func:`exchanged`. Usage adds up; both
    critiques are kept, the second under a line that says its "first" and "second" are exchanged.
    """
    usage = forward.usage + backward.usage
    critique = forward.critique
    if backward.critique:
        critique = (critique + "\n\n" if critique else "") + "[other order: first and second exchanged]\n"
        critique += backward.critique
    f, b = forward.preference, backward.preference
    if f is None and b is None:
        return Verdict.none(forward.reason, usage, critique)
    if f is None or b is None:
        kept, lost = (backward, forward) if f is None else (forward, backward)
        return replace(kept, reason=_notes(f"one_order:{lost.reason}", kept.reason), critique=critique, usage=usage)
    return Verdict(
        (f + b) / 2,
        reason=_notes(forward.reason, backward.reason),
        flipped=f * b < 0,
        critique=critique,
        usage=usage,
        judge=forward.judge if forward.judge == backward.judge else _notes(forward.judge, backward.judge),
    )


def _notes(*notes: str) -> str:
    """Several notes as one, each once."""
    return "; ".join(dict.fromkeys(part for note in notes for part in note.split("; ") if part))
