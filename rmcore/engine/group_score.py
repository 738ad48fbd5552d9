"""One prompt's scored responses as squares; the groups of a pair table, and the table of some groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.engine.advantage import group_rewards, grpo_advantages, reliable_advantages, rloo_advantages
from rmcore.engine.comparisons import graph_advantages, graph_rewards
from rmcore.engine.pair_table import PairLayout, PairState, PairTable
from rmcore.judge.base import Verdict
from rmcore.model.signal import PairSignal
from rmcore.ops.pair_layout import PartialLayout

__all__ = ["NOT_ASKED", "NO_SIGNAL", "GroupScore", "PairDecision", "groups_of_table", "table_of_groups"]

NOT_ASKED: Final = "budget"
"""The reason of a pair that nobody was asked about."""

NO_SIGNAL: Final = {PairSignal.EQUAL_INPUTS: "equal_inputs", PairSignal.UNREAD: "unread"}
_SIGNAL_OF: Final = {name: signal for signal, name in NO_SIGNAL.items()}
_PARTS: Final = ("epistemic", "aleatoric")

DecidedBy: TypeAlias = Literal["judge", "judge_failed", "identical", "nobody"]


@dataclass(frozen=True, slots=True)
class PairDecision:
    """How a pair i < j that was not left to the head was decided.

    ``by``: ``judge``; ``judge_failed`` (no verdict: the head's preference stands, ``reason`` says why; ``budget`` means
    that a pair which the head cannot score was not asked about, since the router's budget was used up); ``identical``
    (equal responses: 0 by rule); ``nobody`` (no preference: the head has nothing to go by and no judge was asked).

    ``no_signal``: why the head has nothing to go by, whoever decided: ``equal_inputs`` (different responses whose
    inputs to the backbone are equal, cut to the limit for instance), ``unread`` (over-long under the policy
    ``no-reward``); otherwise empty.
    """

    i: int
    j: int
    by: DecidedBy
    reason: str = ""
    verdict: Verdict | None = None
    no_signal: str = ""


@dataclass(frozen=True)
class GroupScore:
    """One prompt's K responses. All matrices (K, K) float64 on the CPU; row i, column j is "i against j".

    Attributes:
        preference: p̃, antisymmetric, logits: the judge's J where it decided, the head's g/u elsewhere. NaN means no
            preference: nobody decided, or a non-finite row was to be judged and the judge failed. Means leave it out.
        uncertainty: u, symmetric, ≥ 1, the head's own, also where the judge decided; Inf where the head has nothing to
            go by.
        logit: g, antisymmetric, before division by u.
        variance: v, symmetric.
        routed: True where the pair was to be decided by the judge.
        decisions: the pairs not left to the head, each once, i < j.
        one_order: True where concat mode scored only i < j, so that position bias is not averaged out.
        response_novelty: (K,) how far each response is from the training data, in (0, 1] (:mod:`rmcore.head.rows`);
            NaN where it has no finite row, or was left unread. None where the head was not asked, or knows of none.
        compared: (K, K) bool, symmetric: which pairs the engine's ``design`` compared; the others have NaN in every
            matrix. None where all were.
        shared_rows: difference mode: pairs share the responses' hidden rows, so that their v determine the covariance.
        epistemic: symmetric, the part of the variance of a pair's logit that more data would take away; None where the
            engine's uncertainty tells no parts.
        aleatoric: symmetric, the part that is in the answers themselves; None likewise.
        measures: (K,) by name: what the engine's uncertainty says of each response besides; of URME ``gap`` and
            ``covariance``.
        head_version: which version of a head that changes scored it (:attr:`RewardEngine.head_version`); None of one
            that does not.
    """

    preference: Tensor
    uncertainty: Tensor
    logit: Tensor
    variance: Tensor
    routed: Tensor
    decisions: tuple[PairDecision, ...] = ()
    one_order: bool = False
    response_novelty: Tensor | None = None
    compared: Tensor | None = None
    shared_rows: bool = False
    epistemic: Tensor | None = None
    aleatoric: Tensor | None = None
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    head_version: int | None = None

    @property
    def novelty(self) -> Tensor | None:
        """(K, K) symmetric: the mean of two responses' ``response_novelty``; None without it."""
        n = self.response_novelty
        return None if n is None else (n[:, None] + n[None, :]) / 2

    @property
    def size(self) -> int:
        """K."""
        return self.preference.shape[0]

    @property
    def advantages(self) -> Tensor:
        """RLOO advantages A_i (K,); 0 for K = 1. Least squares over the pairs compared, where those are not all."""
        return rloo_advantages(self.preference) if self.compared is None else graph_advantages(self.preference)[0]

    @property
    def advantage_variance(self) -> Tensor | None:
        """(K,) of ``advantages``: what the head's posterior leaves open of them (:func:`rloo_variance`), u as it is.

        A judge's verdicts count as certain. None in concat mode and where a design left pairs out.
        """
        return table_of_groups([self]).advantage_variance()

    @property
    def design_variance(self) -> Tensor:
        """(K,) of the advantages, for comparisons with a noise of variance 1: 1/(K−1) where all pairs are compared."""
        return graph_advantages(self.preference)[1]

    @property
    def rewards(self) -> Tensor:
        """(K,) rewards that give ``advantages`` back under a leave-one-out baseline."""
        return self.rewards_for("leave-one-out")

    def reliable_advantages(self, tau: float, *, centred: bool = False) -> Tensor:
        """(K,) ``advantages`` times 1/(1 + ``advantage_variance``/τ) (:mod:`rmcore.engine.advantage`).

        Raises InputError where the variance is not known: in concat mode, and where a design left pairs out.
        """
        variance = self.advantage_variance
        if variance is None:
            why = "concat mode" if self.compared is None else "a design that leaves pairs out"
            reject("advantage_variance", f"none, of {why}", "difference mode with all pairs compared")
        return reliable_advantages(self.advantages, variance, tau, centred=centred)

    def rewards_for(
        self,
        baseline: Literal["leave-one-out", "group-mean"],
        *,
        missing_as_zero: bool = False,
        tau: float | None = None,
    ) -> Tensor:
        """(K,) rewards that give ``advantages`` back under the named baseline (``group_rewards``).

        A response without any preference has NaN. ``missing_as_zero``: the trainer counts it as 0 in a baseline over
        all K, so the others' rewards are made for that; with 0 in its place its own advantage is 0 too. With ``tau``
        they give back ``reliable_advantages(tau, centred=True)``; raises as that does.
        """
        if tau is not None:
            found = self.reliable_advantages(tau, centred=True)
            count = self.size if missing_as_zero else int((~found.isnan()).sum())
            return found if baseline == "group-mean" else found * (max(count - 1, 0) / max(count, 1))
        of = group_rewards if self.compared is None else graph_rewards
        rewards = of(self.preference, baseline)
        if missing_as_zero and baseline == "leave-one-out" and bool(rewards.isnan().any()):
            return self.advantages * (self.size - 1) / self.size
        return rewards

    def grpo_advantages(self, *, scale_by_std: bool = True) -> Tensor:
        """(K,) GRPO advantages of the rewards."""
        return grpo_advantages(self.rewards, scale_by_std=scale_by_std)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        novelty = {} if self.response_novelty is None else {"novelty": _plain(self.response_novelty)}
        return {
            **novelty,
            **{name: _plain(values) for name, values in self.measures.items()},
            "advantages": _plain(self.advantages),
            "rewards": _plain(self.rewards),
            "preference": _plain(self.preference),
            "uncertainty": _plain(self.uncertainty),
            "logit": _plain(self.logit),
            "variance": _plain(self.variance),
            **{name: _plain(part) for name in _PARTS if (part := getattr(self, name)) is not None},
            "routed": self.routed.tolist(),
            "decisions": [_decision_record(decision) for decision in self.decisions],
            "one_order": self.one_order,
        } | ({} if self.compared is None else {"compared": self.compared.tolist()})


# -- from a table and back ---------------------------------------------------------------------------------------------

_BY: dict[PairState, DecidedBy] = {
    PairState.JUDGE: "judge",
    PairState.JUDGE_FAILED: "judge_failed",
    PairState.UNAFFORDABLE: "judge_failed",
    PairState.IDENTICAL: "identical",
    PairState.NOBODY: "nobody",
}


def groups_of_table(table: PairTable, head_version: int | None) -> tuple[GroupScore, ...]:
    """The groups that are views of a table, in its order; ``head_version`` is of the head that scored it."""
    decisions: dict[int, list[PairDecision]] = {}
    rows = (table.state != PairState.HEAD).nonzero()[:, 0]
    layout = table.layout
    where = (layout.group[rows], layout.i[rows], layout.j[rows], table.state[rows], table.signal[rows])
    for row, group, i, j, code, signal in zip(rows.tolist(), *(column.tolist() for column in where), strict=True):
        state, verdict = PairState(code), table.verdicts.get(row)
        reason = NOT_ASKED if state is PairState.UNAFFORDABLE else "" if verdict is None else verdict.reason
        silent = NO_SIGNAL.get(PairSignal(signal), "")
        decisions.setdefault(group, []).append(PairDecision(i, j, _BY[state], reason, verdict, silent))
    sizes = layout.sizes.tolist()
    novelty = [None] * len(sizes) if table.row_novelty is None else table.row_novelty.cpu().split(sizes)
    measures = {name: values.split(sizes) for name, values in table.measures.items()}
    groups: dict[int, GroupScore] = {}
    for number, squares in table.squares():
        known = tuple(decisions.get(number, ()))
        groups[number] = GroupScore(
            **squares,
            decisions=known,
            one_order=table.one_order,
            response_novelty=novelty[number],
            measures={name: values[number] for name, values in measures.items()},
            compared=_compared(layout, number),
            shared_rows=table.shared,
            head_version=head_version,
        )
    return tuple(groups[number] for number in range(len(groups)))


def _compared(layout: PairLayout, number: int) -> Tensor | None:
    if not isinstance(layout, PartialLayout):
        return None
    size = int(layout.sizes[number])
    (i, j), compared = layout.edges[number].unbind(1), torch.zeros(size, size, dtype=torch.bool)
    compared[i, j] = compared[j, i] = True
    return compared


def table_of_groups(groups: Sequence[GroupScore]) -> PairTable:
    """A table made of groups; raises InputError where some were scored in one order and some in both."""
    one_order = any(group.one_order for group in groups)
    if one_order and not all(group.one_order or group.size == 1 for group in groups):
        reject("groups", "some with one_order and some without", "groups scored alike")
    if not groups:
        return PairTable.joined([])
    sizes, layout = [group.size for group in groups], PairLayout([group.size for group in groups])
    if any(group.compared is not None for group in groups):
        every = [torch.ones_like(g.routed) if g.compared is None else g.compared for g in groups]
        layout = PartialLayout(sizes, [compared.triu(1).nonzero() for compared in every])
    names = ("logit", "variance", "uncertainty", "preference")
    values = [layout.flat([getattr(group, name) for group in groups]) for name in names]
    table = PairTable(layout, torch.stack(values).double(), one_order)
    novelty = [group.response_novelty for group in groups if group.response_novelty is not None]
    table.row_novelty = torch.cat(novelty) if len(novelty) == len(groups) else None
    for name in set.intersection(*(set(group.measures) for group in groups)):
        table.measures[name] = torch.cat([group.measures[name] for group in groups])
    for name in _PARTS:
        own = [part for group in groups if (part := getattr(group, name)) is not None]
        if len(own) == len(groups):
            table.parts[name] = layout.flat(own).double()
    table.shared = all(group.shared_rows for group in groups)
    for number, group in enumerate(groups):
        for decision in group.decisions:
            _note(table, layout.row(number, decision.i, decision.j), decision)
    return table


def _note(table: PairTable, row: int, decision: PairDecision) -> None:
    state = {by: state for state, by in _BY.items()}[decision.by]
    if decision.by == "judge_failed":  # which of the two follows from the reason
        state = PairState.JUDGE_FAILED
    if decision.no_signal:
        table.signal[row], table.silent = _SIGNAL_OF[decision.no_signal], True
    verdict = decision.verdict
    if verdict is None and state is PairState.JUDGE_FAILED:
        if decision.reason == NOT_ASKED:
            state = PairState.UNAFFORDABLE
        else:
            verdict = Verdict.none(decision.reason)
    table.state[row] = state
    if verdict is not None:
        table.verdicts[row] = verdict


# -- as JSON values --------------------------------------------------------------------------------------------------


def _plain(tensor: Tensor) -> Any:
    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        return value if math.isfinite(value) else None

    return walk(tensor.tolist())


def _decision_record(decision: PairDecision) -> dict[str, Any]:
    record: dict[str, Any] = {"i": decision.i, "j": decision.j, "by": decision.by}
    if decision.reason:
        record["reason"] = decision.reason
    if decision.no_signal:
        record["no_signal"] = decision.no_signal
    verdict = decision.verdict
    if verdict is not None and verdict.preference is not None:
        record |= {"outcome": verdict.outcome, "preference": verdict.preference, "flipped": verdict.flipped}
        if verdict.critique:
            record["critique"] = verdict.critique
    return record
