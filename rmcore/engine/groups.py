"""What the engine returns: scored groups, their records and their summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.engine.advantage import group_rewards, grpo_advantages, reliable_advantages, rloo_advantages
from rmcore.engine.comparisons import graph_advantages, graph_rewards
from rmcore.engine.pair_table import PairLayout, PairState, PairTable
from rmcore.engine.usage import JudgeTally, Overlap, usage_summary
from rmcore.judge.base import RULE, JudgeUsage, Verdict
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.signal import PairSignal
from rmcore.ops.pair_layout import PartialLayout

__all__ = ["GroupScore", "GroupScores", "PairDecision", "table_of"]


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
        return _table_of([self]).advantage_variance()

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


class GroupScores(Sequence[GroupScore]):
    """A scored batch: a sequence of :class:`GroupScore` in the order of the prompts.

    Kept as one :class:`~rmcore.engine.pair_table.PairTable`; the groups are views of it, made when first asked for.

    Args:
        groups: the scored groups, or the table they are views of.
        seconds: wall seconds by stage: ``backbone`` (tokenising too), ``head``, ``judge`` (at least one call under way)
            and ``total``, which is less than their sum where the judge was hidden behind the backbone (``overlap``).
        encoding: what the backbone did.
        judges: what each judge answered and cost, by ``Verdict.judge``. Equal questions were asked, and count, once.
        overlap: how judge and backbone shared the time.
        unaccounted_questions: questions whose judge did not say what they cost: it raised, or had to be cancelled.
        hidden: the batch's hidden rows on the CPU, in the layout of ``score_hidden``: only from an engine that has a
            learner.
        errors: with ``on_error="return"``: the error of each group of the call that could not be scored, by its number
            in the call. Such a group is not in the sequence; :meth:`outcomes` has everything in its place.
        head_version: which version of a head that changes scored them all; None of one that does not.
    """

    def __init__(
        self,
        groups: Iterable[GroupScore] | PairTable,
        seconds: Mapping[str, float] | None = None,
        encoding: EncodingStats | None = None,
        judges: Mapping[str, JudgeTally] | None = None,
        overlap: Overlap | None = None,
        unaccounted_questions: int = 0,
        hidden: Tensor | None = None,
        errors: Mapping[int, Exception] | None = None,
        head_version: int | None = None,
    ) -> None:
        if isinstance(groups, PairTable):
            self.table = groups
        else:
            self.groups = tuple(groups)
        self.seconds = dict(seconds or {})
        self.encoding = encoding
        self.judges = dict(judges or {})
        self.overlap = overlap or Overlap()
        self.unaccounted_questions = unaccounted_questions
        self.hidden = hidden
        self.errors = dict(errors or {})
        self.head_version = head_version

    @cached_property
    def groups(self) -> tuple[GroupScore, ...]:
        """The groups."""
        return _groups_of(self.table, self.head_version)

    @cached_property
    def table(self) -> PairTable:
        """All pairs, flat, on the head's device."""
        return _table_of(self.groups)

    @property
    def judge_usage(self) -> JudgeUsage:
        """What all questions cost together."""
        return JudgeUsage.total(tally.usage for tally in self.judges.values())

    @overload
    def __getitem__(self, index: int) -> GroupScore: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[GroupScore, ...]: ...
    def __getitem__(self, index: int | slice) -> GroupScore | tuple[GroupScore, ...]:
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups) if "groups" in self.__dict__ else len(self.table.layout)

    def __iter__(self) -> Iterator[GroupScore]:
        return iter(self.groups)

    def __repr__(self) -> str:
        return f"<GroupScores: {len(self)} groups, {len(self.table)} pairs, {len(self.errors)} errors>"

    @property
    def advantages(self) -> Tensor:
        """All groups' advantages, one after the other (ΣK,) float64 on the CPU."""
        return self.table.advantages()

    @property
    def advantage_variance(self) -> Tensor | None:
        """(ΣK,) of ``advantages``, float64 on the CPU, from v and u of the pairs: no further pass over the rows.

        None in concat mode and where a design left pairs out (:attr:`GroupScore.design_variance` is known there).
        :func:`rmcore.engine.advantage.reliability_weights` makes weights for a trainer of it.
        """
        return self.table.advantage_variance()

    @property
    def rewards(self) -> Tensor:
        """All groups' leave-one-out rewards (ΣK,)."""
        return self.rewards_for("leave-one-out")

    def rewards_for(self, baseline: Literal["leave-one-out", "group-mean"]) -> Tensor:
        """All groups' rewards (ΣK,) under the named baseline (``group_rewards``)."""
        return self.table.rewards(baseline)

    @property
    def novelty(self) -> Tensor | None:
        """(ΣK,) float64 on the CPU, every response's ``response_novelty``; None where the head was not asked for it.

        By pair it is a group's ``novelty``, or the table's.
        """
        n = self.table.row_novelty
        return None if n is None else n.cpu()

    def outcomes(self) -> list[GroupScore | Exception]:
        """Every group of the call in its place: its score, or the error for which it has none."""
        scored = iter(self.groups)
        count = len(self.groups) + len(self.errors)
        return [self.errors[k] if k in self.errors else next(scored) for k in range(count)]

    def to_records(self) -> list[dict[str, Any]]:
        """One plain JSON dictionary a group."""
        return [group.to_record() for group in self.groups]

    def summary(self) -> dict[str, Any]:
        """Counts and means over the batch, JSON values; :class:`rmcore.engine.accounts.Accounts` adds them up over
        steps.

        Every pair is in exactly one of ``decided_by``'s counts; ``no_signal`` counts those among them for which the
        head had nothing to go by; ``rule_verdicts`` were decided by rule, here or in the judge, without a call.
        ``judge_ties``, ``judge_flips``, ``judge_cut`` (of too long a pair the judge saw the ends of the texts only) and
        ``judge_failures`` count pairs, ``judges`` and ``judge_usage`` count
        questions: equal pairs are one question. Costs are described
        in :func:`rmcore.engine.usage.usage_summary`.
        """
        table, sizes = self.table, self.table.layout.sizes
        count = dict(zip(PairState, torch.bincount(table.state, minlength=len(PairState)).tolist(), strict=True))
        silent = torch.bincount(table.signal, minlength=len(PairSignal)).tolist()
        failed = count[PairState.JUDGE_FAILED] + count[PairState.UNAFFORDABLE]
        verdicts = [v for v in table.verdicts.values() if v.preference is not None]
        reasons = Counter(v.reason for _, v in sorted(table.verdicts.items()) if v.preference is None)
        reasons[_BUDGET] += count[PairState.UNAFFORDABLE]
        u = table.uncertainty.cpu()
        u = u[u.isfinite()]
        return {
            "groups": len(self),
            "responses": table.layout.responses,
            "single_response_groups": int((sizes == 1).sum()),
            "failed_groups": len(self.errors),
            "pairs": len(table),
            "routed": count[PairState.JUDGE] + failed,
            "decided_by": {
                "head": count[PairState.HEAD],
                "judge": count[PairState.JUDGE],
                "judge_failed": failed,
                "identical": count[PairState.IDENTICAL],
                "nobody": count[PairState.NOBODY],
            },
            "no_signal": {name: silent[signal] for signal, name in _NO_SIGNAL.items()},
            "judge_failures": dict(+reasons),
            "judge_ties": sum(v.preference == 0 and not v.flipped for v in verdicts),
            "judge_flips": sum(v.flipped for v in verdicts),
            "judge_cut": sum(v.cut for v in verdicts),
            "rule_verdicts": count[PairState.IDENTICAL] + sum(v.judge == RULE for v in verdicts),
            "unscorable_responses": int(self.advantages.isnan().sum()),
            "one_order_groups": len(self) if table.one_order else 0,
            "uncertainty": None
            if not len(u)
            else {
                "mean": float(u.mean()),
                "p50": float(u.quantile(0.5)),
                "p90": float(u.quantile(0.9)),
                "count": len(u),
            },
            "seconds": dict(self.seconds),
            "encoding": None if self.encoding is None else asdict(self.encoding),
            "overlap": self.overlap.to_dict(),
            "judge_usage": usage_summary(self.judge_usage),
            "judges": {name: tally.to_dict() for name, tally in self.judges.items()},
            "unaccounted_questions": self.unaccounted_questions,
        }


_PARTS = ("epistemic", "aleatoric")
_BUDGET = "budget"
"""The reason of a pair that nobody was asked about."""

_NO_SIGNAL = {PairSignal.EQUAL_INPUTS: "equal_inputs", PairSignal.UNREAD: "unread"}
_SIGNAL_OF = {name: signal for signal, name in _NO_SIGNAL.items()}

_BY: dict[PairState, DecidedBy] = {
    PairState.JUDGE: "judge",
    PairState.JUDGE_FAILED: "judge_failed",
    PairState.UNAFFORDABLE: "judge_failed",
    PairState.IDENTICAL: "identical",
    PairState.NOBODY: "nobody",
}


def _groups_of(table: PairTable, head_version: int | None) -> tuple[GroupScore, ...]:
    decisions: dict[int, list[PairDecision]] = {}
    rows = (table.state != PairState.HEAD).nonzero()[:, 0]
    layout = table.layout
    where = (layout.group[rows], layout.i[rows], layout.j[rows], table.state[rows], table.signal[rows])
    for row, group, i, j, code, signal in zip(rows.tolist(), *(column.tolist() for column in where), strict=True):
        state, verdict = PairState(code), table.verdicts.get(row)
        reason = _BUDGET if state is PairState.UNAFFORDABLE else "" if verdict is None else verdict.reason
        silent = _NO_SIGNAL.get(PairSignal(signal), "")
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


def table_of(groups: Sequence[GroupScore]) -> PairTable:
    """The table that groups are views of, or one made of groups that came without: some of a batch's, say."""
    return groups.table if isinstance(groups, GroupScores) else _table_of(groups)


def _table_of(groups: Sequence[GroupScore]) -> PairTable:
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
        if decision.reason == _BUDGET:
            state = PairState.UNAFFORDABLE
        else:
            verdict = Verdict.none(decision.reason)
    table.state[row] = state
    if verdict is not None:
        table.verdicts[row] = verdict


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
