"""What the engine returns: a batch of scored groups, their records and their summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rmcore.engine.group_score import NO_SIGNAL, NOT_ASKED, GroupScore, PairDecision, groups_of_table, table_of_groups
from rmcore.engine.pair_table import PairState, PairTable
from rmcore.engine.usage import JudgeTally, Overlap, usage_summary
from rmcore.judge.base import RULE, JudgeUsage
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.signal import PairSignal

__all__ = ["GroupScore", "GroupScores", "PairDecision", "table_of"]


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
        return groups_of_table(self.table, self.head_version)

    @cached_property
    def table(self) -> PairTable:
        """All pairs, flat, on the head's device."""
        return table_of_groups(self.groups)

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
        reasons[NOT_ASKED] += count[PairState.UNAFFORDABLE]
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
            "no_signal": {name: silent[signal] for signal, name in NO_SIGNAL.items()},
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


def table_of(groups: Sequence[GroupScore]) -> PairTable:
    """The table that groups are views of, or one made of groups that came without: some of a batch's, say."""
    return groups.table if isinstance(groups, GroupScores) else table_of_groups(groups)
