"""Best-of-n and filtering by uncertainty: what else a scored group is good for besides advantages.

The winner of a group is the response with the highest *lower confidence bound*

    LCB_i = m_i − c · u_i,    m_i = mean over j ≠ i of p̃_ij,    u_i = mean over j ≠ i of u_ij

as uncertainty-aware reward models are used in the literature (UWO and LCB ensembles, arXiv:2310.02743; uncertainty-
penalised RLHF, arXiv:2401.00243). With c = 0 it is the best mean preference. A pair that a judge or a rule decided is
not the head's guess any more and counts with u = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError, reject
from rmcore._base.prompt import Response, response_text
from rmcore.engine.groups import GroupScore

__all__ = [
    "BestOf",
    "Kept",
    "Ties",
    "best_of",
    "check_filter",
    "check_selection",
    "filter_groups",
    "member_uncertainty",
]

Ties: TypeAlias = Literal["first", "shortest", "longest"]
"""Which of several responses with the very same bound wins: the first in the group, or the shortest or longest text
(and the first of those)."""


@dataclass(frozen=True, slots=True)
class BestOf:
    """The chosen response of one group.

    Attributes:
        index: its place in the group.
        response: itself; empty text where no texts were given.
        score: its lower confidence bound.
        scores: (K,) every response's bound, NaN for those that have no preference.
        tied: how many had the winning bound, itself included.
    """

    index: int
    response: Response
    score: float
    scores: Tensor
    tied: int = 1


@dataclass(frozen=True, slots=True)
class Kept:
    """What a filter left.

    Attributes:
        responses: a group: the indices kept, in order; empty where the group is dropped.
        groups: indices of the groups that keep at least ``min_responses``.
        dropped_responses, dropped_groups: counts. Responses of a dropped group count as dropped.
    """

    responses: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    dropped_responses: int
    dropped_groups: int


def member_uncertainty(group: GroupScore) -> Tensor:
    """(K,) u_i: mean u of a response's pairs, decided pairs as 1; a pair without a finite u makes it infinite.

    Pairs of which nobody knows anything are left out, as of all means; a response that has no others gets Inf. K = 1
    gives 1: there is nothing to compare, so nothing to be unsure of.
    """
    k = group.size
    if k == 1:
        return torch.ones(1, dtype=torch.float64)
    u, counted = group.uncertainty.clone(), ~torch.eye(k, dtype=torch.bool)
    for decision in group.decisions:
        if decision.by in ("judge", "identical"):
            u[decision.i, decision.j] = u[decision.j, decision.i] = 1.0
        if decision.by == "nobody":
            counted[decision.i, decision.j] = counted[decision.j, decision.i] = False
    known = counted.sum(1)
    return (u.masked_fill(~counted, 0.0).sum(1) / known).masked_fill(known == 0, math.inf)


def check_selection(penalty: float, ties: str) -> None:
    """Raise InputError for a penalty or a rule that :func:`best_of` would refuse, before anything is scored."""
    if not (math.isfinite(penalty) and penalty >= 0):
        reject("penalty", penalty, "a finite number, at least 0")
    if ties not in ("first", "shortest", "longest"):
        reject("ties", repr(ties), "first, shortest or longest")


def check_filter(max_uncertainty: float, by: str, min_responses: int) -> None:
    """Raise InputError for arguments that :func:`filter_groups` would refuse, before anything is scored."""
    if not max_uncertainty >= 1:
        reject("max_uncertainty", max_uncertainty, "a number, at least 1 (u ≥ 1)")
    if by not in ("response", "group"):
        reject("by", repr(by), "'response' or 'group'")
    if min_responses < 1:
        reject("min_responses", min_responses, "at least 1")


def best_of(
    groups: Sequence[GroupScore],
    responses: Sequence[Sequence[Response]] | None = None,
    *,
    penalty: float = 0.0,
    ties: Ties = "first",
) -> list[BestOf]:
    """The best response of each group.

    Args:
        groups: scored groups.
        responses: their texts; needed for ``ties`` by length and for :attr:`BestOf.response`.
        penalty: c ≥ 0 of the lower confidence bound.
        ties: see :data:`Ties`.

    Raises:
        InputError: a negative or non-finite penalty, an unknown rule, or texts that do not fit the groups.
        NonFiniteError: a group has no response with a preference; its index is in ``rows``.
    """
    check_selection(penalty, ties)
    if responses is None and ties != "first":
        reject("responses", "None", f"texts, since ties={ties!r} compares them")
    if responses is not None and [len(texts) for texts in responses] != [group.size for group in groups]:
        reject("responses", f"groups of {[len(t) for t in responses][:8]}", f"{[g.size for g in groups][:8]} as scored")
    result = []
    for k, group in enumerate(groups):
        texts: list[Response] = [""] * group.size if responses is None else list(responses[k])
        # No penalty, no uncertainty: 0 · ∞ would be no number.
        bound = group.advantages - (penalty * member_uncertainty(group) if penalty else 0.0)
        usable = ~(bound.isnan() | bound.isneginf())
        if not bool(usable.any()):
            raise NonFiniteError(f"groups[{k}]: got no response with a preference, expected at least one", (k,))
        top = bound[usable].max()
        winners = [i for i in range(group.size) if bool(usable[i]) and bool(bound[i] == top)]
        if ties != "first":
            winners.sort(key=lambda i, texts=texts: len(response_text(texts[i])) * (1 if ties == "shortest" else -1))  # type: ignore[misc]
        result.append(BestOf(winners[0], texts[winners[0]], float(top), bound, len(winners)))
    return result


def filter_groups(
    groups: Sequence[GroupScore],
    max_uncertainty: float,
    *,
    by: Literal["response", "group"] = "response",
    min_responses: int = 2,
) -> Kept:
    """Drop what the head is unsure of, as filtered rejection sampling and data cleaning do.

    Args:
        groups: scored groups.
        max_uncertainty: highest u kept; see :func:`member_uncertainty`.
        by: ``response`` drops single responses; ``group`` drops groups whose mean u over responses is higher.
        min_responses: a group left with fewer is dropped whole (1 keeps every group with a response left).

    Raises:
        InputError: ``max_uncertainty`` below 1 (u ≥ 1, so everything would go), an unknown ``by``, or no positive
            ``min_responses``.
    """
    check_filter(max_uncertainty, by, min_responses)
    kept: list[tuple[int, ...]] = []
    for group in groups:
        u = member_uncertainty(group)
        sure = u <= max_uncertainty if by == "response" else (u.mean() <= max_uncertainty).expand(group.size)
        members = tuple(i for i in range(group.size) if bool(sure[i]))
        kept.append(members if len(members) >= min_responses else ())
    stay = tuple(k for k, members in enumerate(kept) if members)
    total = sum(group.size for group in groups)
    return Kept(tuple(kept), stay, total - sum(map(len, kept)), len(groups) - len(stay))
