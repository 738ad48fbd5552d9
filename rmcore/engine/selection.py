"""Best-of-n and filtering by uncertainty: what else a scored group is good for besides advantages.

The winner of a group is the response with the highest *lower confidence bound*

    LCB_i = m_i − c · u_i,    m_i = mean over j ≠ i of p̃_ij,    u_i = mean over j ≠ i of u_ij

as uncertainty-aware reward models are used in the literature (UWO and LCB ensembles, arXiv:2310.02743; uncertainty-
penalised RLHF, arXiv:2401.00243). With c = 0 it is the best mean preference. A pair that a judge or a rule decided is
not the head's guess any more and counts with u = 1.

Where the engine's uncertainty is URME, its two measures of each response (arXiv:2410.00847) can stand in u_i's place:
the ``gap`` between its heads' rewards and the norm of their ``covariance``. A pair of two is then dropped, as the paper
does, where either response's is above the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError, reject
from rmcore._base.prompt import Response, response_text
from rmcore.engine.group_score import GroupScore
from rmcore.engine.groups import table_of
from rmcore.engine.pair_table import PairState, PairTable
from rmcore.ops.pair_layout import PairLayout

__all__ = [
    "BestOf",
    "Kept",
    "Measure",
    "Ties",
    "best_of",
    "check_filter",
    "check_measured",
    "check_selection",
    "filter_groups",
    "member_measures",
    "member_uncertainties",
    "member_uncertainty",
]

Measure: TypeAlias = Literal["u", "gap", "covariance"]
"""Of a response: the mean u of its pairs, or one that URME tells of it alone."""

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
    return member_uncertainties([group])


def member_uncertainties(groups: Sequence[GroupScore]) -> Tensor:
    """(ΣK,) :func:`member_uncertainty` of all groups, one after the other, float64 on the CPU."""
    return _uncertainties(table_of(groups), _mean_uncertainty)


def member_measures(groups: Sequence[GroupScore], measure: Measure = "u") -> Tensor:
    """(ΣK,) a measure of all groups' responses, float64 on the CPU; NaN counts as infinite.

    Raises InputError where the engine's uncertainty does not tell it.
    """
    if measure == "u":
        return member_uncertainties(groups)
    found = _measured(table_of(groups), measure)
    return found.masked_fill(found.isnan(), math.inf)


def check_measured(measure: Measure, told: Iterable[str]) -> None:
    """Raise InputError for a measure that is neither u nor one of those ``told``."""
    if measure != "u" and measure not in told:
        has = ", ".join(["u", *told])
        reject("measure", repr(measure), f"what the engine's uncertainty tells: {has}", "'urme' tells gap, covariance")


def _measured(table: PairTable, measure: Measure) -> Tensor:
    check_measured(measure, table.measures)
    return table.measures[measure]


def _uncertainties(table: PairTable, of_squares: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the squares of u, in which decided pairs have 1 and those nobody knows anything of NaN."""
    state, u = table.state.to(table.uncertainty.device), table.uncertainty
    u = u.masked_fill((state == PairState.JUDGE) | (state == PairState.IDENTICAL), 1.0)
    return table.per_response(of_squares, u.masked_fill(state == PairState.NOBODY, torch.nan))


def _mean_uncertainty(u: Tensor) -> Tensor:
    """(n, K, K), NaN where a pair does not count → (n, K)."""
    k = u.shape[-1]
    if k == 1:
        return torch.ones_like(u[..., 0])
    counted = ~(u.isnan() | torch.eye(k, dtype=torch.bool, device=u.device))
    known = counted.sum(-1)
    return (u.masked_fill(~counted, 0.0).sum(-1) / known).masked_fill(known == 0, math.inf)


def _mean_of_group(u: Tensor) -> Tensor:
    """The mean of :func:`_mean_uncertainty` over a group's responses, for each of them."""
    return _mean_uncertainty(u).mean(-1, keepdim=True).expand(-1, u.shape[-1])


def check_selection(penalty: float, ties: str, measure: str = "u") -> None:
    """Raise InputError for a penalty or a rule that :func:`best_of` would refuse, before anything is scored."""
    _check_measure(measure)
    if not (math.isfinite(penalty) and penalty >= 0):
        reject("penalty", penalty, "a finite number, at least 0")
    if ties not in ("first", "shortest", "longest"):
        reject("ties", repr(ties), "first, shortest or longest")


def _check_measure(measure: str) -> None:
    if measure not in get_args(Measure):
        reject("measure", repr(measure), "'u', 'gap' or 'covariance'")


def check_filter(max_uncertainty: float, by: str, min_responses: int, measure: str = "u") -> None:
    """Raise InputError for arguments that :func:`filter_groups` would refuse, before anything is scored."""
    _check_measure(measure)
    if measure == "u" and not max_uncertainty >= 1:
        reject("max_uncertainty", max_uncertainty, "a number, at least 1 (u ≥ 1)")
    if not max_uncertainty >= 0:
        reject("max_uncertainty", max_uncertainty, "a number, at least 0")
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
    measure: Measure = "u",
) -> list[BestOf]:
    """The best response of each group.

    Args:
        groups: scored groups.
        responses: their texts; needed for ``ties`` by length and for :attr:`BestOf.response`.
        penalty: c ≥ 0 of the lower confidence bound.
        ties: see :data:`Ties`.
        measure: what the penalty is multiplied with; another than u wants an engine whose uncertainty tells it.

    Raises:
        InputError: a negative or non-finite penalty, an unknown rule or measure, or texts that do not fit the groups.
        NonFiniteError: a group has no response with a preference; its index is in ``rows``.
    """
    check_selection(penalty, ties, measure)
    if responses is None and ties != "first":
        reject("responses", "None", f"texts, since ties={ties!r} compares them")
    table = table_of(groups)
    sizes = table.layout.sizes.tolist()
    if responses is not None and [len(texts) for texts in responses] != sizes:
        reject("responses", f"groups of {[len(t) for t in responses][:8]}", f"{sizes[:8]} as scored")
    bound = table.advantages()
    if penalty:  # without one, no uncertainty: 0 · ∞ would be no number
        u = _uncertainties(table, _mean_uncertainty) if measure == "u" else _measured(table, measure)
        bound = bound - penalty * u
    usable = ~(bound.isnan() | bound.isneginf())
    top, owner = _extreme(bound.masked_fill(~usable, -math.inf), table.layout, "amax"), table.layout.owner
    if bool((lost := top.isneginf()).any()):
        k = int(lost.nonzero()[0])
        raise NonFiniteError(f"groups[{k}]: got no response with a preference, expected at least one", (k,))
    best = usable & (bound == top[owner])
    tied = torch.zeros_like(table.layout.sizes).index_add_(0, owner, best.long())
    if ties != "first" and responses is not None:
        lengths = torch.tensor([len(response_text(text)) for texts in responses for text in texts])
        lengths = lengths if ties == "shortest" else -lengths
        best &= lengths == _extreme(lengths.masked_fill(~best, _LAST), table.layout, "amin")[owner]
    winners = _extreme(table.layout.place.masked_fill(~best, _LAST), table.layout, "amin").tolist()
    texts = ["" for _ in winners] if responses is None else [of[i] for of, i in zip(responses, winners, strict=True)]
    found = zip(winners, texts, top.tolist(), bound.split(sizes), tied.tolist(), strict=True)
    return [BestOf(*one) for one in found]


_LAST = torch.iinfo(torch.int64).max
"""In a minimum, of what is not asked for."""


def _extreme(values: Tensor, layout: PairLayout, reduce: Literal["amax", "amin"]) -> Tensor:
    """(G,) the largest or smallest of the values (ΣK,) of each group."""
    start = values.new_empty(len(layout))
    return start.scatter_reduce_(0, layout.owner, values, reduce, include_self=False)


def filter_groups(
    groups: Sequence[GroupScore],
    max_uncertainty: float,
    *,
    by: Literal["response", "group"] = "response",
    min_responses: int = 2,
    measure: Measure = "u",
) -> Kept:
    """Drop what the head is unsure of, as filtered rejection sampling and data cleaning do.

    Args:
        groups: scored groups.
        max_uncertainty: highest u kept; see :func:`member_uncertainty`.
        by: ``response`` drops single responses; ``group`` drops groups whose mean u over responses is higher.
        min_responses: a group left with fewer is dropped whole (1 keeps every group with a response left).
        measure: what is compared with ``max_uncertainty``; another than u wants an engine whose uncertainty tells it.

    Raises:
        InputError: ``max_uncertainty`` below 1 for u (u ≥ 1, so everything would go) or below 0, an unknown ``by``, no
            positive ``min_responses``, or a measure that the groups do not have.
    """
    check_filter(max_uncertainty, by, min_responses, measure)
    table = table_of(groups)
    layout = table.layout
    if measure == "u":
        sure = _uncertainties(table, _mean_uncertainty if by == "response" else _mean_of_group) <= max_uncertainty
    else:
        found = _measured(table, measure)
        if by == "group":
            total = torch.zeros(len(layout), dtype=found.dtype).index_add_(0, layout.owner, found)
            found = (total / layout.sizes)[layout.owner]
        sure = found <= max_uncertainty  # of an unread response it is NaN, which is not sure
    counts = torch.zeros_like(layout.sizes).index_add_(0, layout.owner, sure.long())
    stay = counts >= min_responses
    left = iter(layout.place[sure & stay[layout.owner]].tolist())
    kept = tuple(tuple(islice(left, count)) for count in counts.mul(stay).tolist())
    survivors = tuple(stay.nonzero()[:, 0].tolist())
    return Kept(kept, survivors, layout.responses - sum(map(len, kept)), len(layout) - len(survivors))
