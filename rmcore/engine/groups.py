"""What the engine returns: scored groups, their records and their summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rmcore.engine.advantage import group_rewards, grpo_advantages, rloo_advantages
from rmcore.engine.usage import JudgeTally, Overlap, usage_summary
from rmcore.judge.base import RULE, JudgeUsage, Verdict
from rmcore.model.backbone import EncodingStats

__all__ = ["GroupScore", "GroupScores", "PairDecision"]


@dataclass(frozen=True, slots=True)
class PairDecision:
    """How a pair i < j that was not left to the head was decided.

    ``by``: ``judge``; ``judge_failed`` (no verdict: the head's preference stands, ``reason`` says why; ``budget`` means
    that a pair which the head cannot score was not asked about, since the router's budget was used up); ``identical``
    (equal responses: 0 by rule).
    """

    i: int
    j: int
    by: Literal["judge", "judge_failed", "identical"]
    reason: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True)
class GroupScore:
    """One prompt's K responses. All matrices (K, K) float64 on the CPU; row i, column j is "i against j".

    Attributes:
        preference: p̃, antisymmetric, logits: the judge's J where it decided, the head's g/u elsewhere. NaN only where
            a non-finite row was to be judged and the judge failed.
        uncertainty: u, symmetric, ≥ 1, the head's own, also where the judge decided.
        logit: g, antisymmetric, before division by u.
        variance: v, symmetric.
        routed: True where the pair was to be decided by the judge.
        decisions: the pairs not left to the head, each once, i < j.
        one_order: True where concat mode scored only i < j, so that position bias is not averaged out.
    """

    preference: Tensor
    uncertainty: Tensor
    logit: Tensor
    variance: Tensor
    routed: Tensor
    decisions: tuple[PairDecision, ...] = ()
    one_order: bool = False

    @property
    def size(self) -> int:
        """K."""
        return self.preference.shape[0]

    @property
    def advantages(self) -> Tensor:
        """RLOO advantages A_i (K,); 0 for K = 1."""
        return rloo_advantages(self.preference)

    @property
    def rewards(self) -> Tensor:
        """(K,) rewards that give ``advantages`` back under a leave-one-out baseline."""
        return group_rewards(self.preference)

    def rewards_for(self, baseline: Literal["leave-one-out", "group-mean"]) -> Tensor:
        """(K,) rewards that give ``advantages`` back under the named baseline (``group_rewards``)."""
        return group_rewards(self.preference, baseline)

    def grpo_advantages(self, *, scale_by_std: bool = True) -> Tensor:
        """(K,) GRPO advantages of the rewards."""
        return grpo_advantages(self.rewards, scale_by_std=scale_by_std)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        return {
            "advantages": _plain(self.advantages),
            "rewards": _plain(self.rewards),
            "preference": _plain(self.preference),
            "uncertainty": _plain(self.uncertainty),
            "logit": _plain(self.logit),
            "variance": _plain(self.variance),
            "routed": self.routed.tolist(),
            "decisions": [_decision_record(decision) for decision in self.decisions],
            "one_order": self.one_order,
        }


@dataclass(frozen=True)
class GroupScores(Sequence[GroupScore]):
    """A scored batch: a sequence of :class:`GroupScore` in the order of the prompts."""

    groups: tuple[GroupScore, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by stage: ``backbone`` (tokenising too), ``head``, ``judge`` (at least one call under way) and
    ``total``, which is less than their sum where the judge was hidden behind the backbone (``overlap``)."""
    encoding: EncodingStats | None = None
    judges: dict[str, JudgeTally] = field(default_factory=dict)
    """What each judge answered and cost, by ``Verdict.judge``. Equal questions were asked, and count, once."""
    overlap: Overlap = field(default_factory=Overlap)
    unaccounted_questions: int = 0
    """Questions whose judge did not say what they cost: it raised, or had to be cancelled."""
    hidden: Tensor | None = field(default=None, repr=False, compare=False)
    """The batch's hidden rows on the CPU, in the layout of ``score_hidden``: only from an engine that has a learner."""

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
        return len(self.groups)

    def __iter__(self) -> Iterator[GroupScore]:
        return iter(self.groups)

    @property
    def advantages(self) -> Tensor:
        """All groups' advantages, one after the other (ΣK,)."""
        return torch.cat([group.advantages for group in self.groups])

    @property
    def rewards(self) -> Tensor:
        """All groups' leave-one-out rewards (ΣK,)."""
        return torch.cat([group.rewards for group in self.groups])

    def to_records(self) -> list[dict[str, Any]]:
        """One plain JSON dictionary a group."""
        return [group.to_record() for group in self.groups]

    def summary(self) -> dict[str, Any]:
        """Counts and means over the batch, JSON values; :class:`rmcore.engine.accounts.Accounts` adds them up over
        steps.

        Every pair is in exactly one of ``decided_by``'s counts; ``rule_verdicts`` were decided by rule, here or in the
        judge, without a call. ``judge_ties``, ``judge_flips`` and ``judge_failures``
        count pairs, ``judges`` and ``judge_usage`` count questions: equal pairs are one question. Costs are described
        in :func:`rmcore.engine.usage.usage_summary`.
        """
        pairs = sum(group.size * (group.size - 1) // 2 for group in self.groups)
        decisions = [decision for group in self.groups for decision in group.decisions]
        by = Counter(decision.by for decision in decisions)
        verdicts = [d.verdict for d in decisions if d.by == "judge" and d.verdict is not None]
        u = [g.uncertainty[tuple(torch.triu_indices(g.size, g.size, 1))] for g in self.groups if g.size > 1]
        flat = torch.cat(u) if u else torch.empty(0)
        flat = flat[flat.isfinite()]
        return {
            "groups": len(self.groups),
            "responses": sum(group.size for group in self.groups),
            "single_response_groups": sum(group.size == 1 for group in self.groups),
            "pairs": pairs,
            "routed": by["judge"] + by["judge_failed"],
            "decided_by": {
                "head": pairs - len(decisions),
                "judge": by["judge"],
                "judge_failed": by["judge_failed"],
                "identical": by["identical"],
            },
            "judge_failures": dict(Counter(d.reason for d in decisions if d.by == "judge_failed")),
            "judge_ties": sum(v.preference == 0 and not v.flipped for v in verdicts),
            "judge_flips": sum(v.flipped for v in verdicts),
            "rule_verdicts": by["identical"] + sum(v.judge == RULE for v in verdicts),
            "unscorable_responses": sum(int(group.advantages.isnan().sum()) for group in self.groups),
            "one_order_groups": sum(group.one_order for group in self.groups),
            "uncertainty": None
            if not len(flat)
            else {
                "mean": float(flat.mean()),
                "p50": float(flat.quantile(0.5)),
                "p90": float(flat.quantile(0.9)),
                "count": len(flat),
            },
            "seconds": dict(self.seconds),
            "encoding": None if self.encoding is None else asdict(self.encoding),
            "overlap": self.overlap.to_dict(),
            "judge_usage": usage_summary(self.judge_usage),
            "judges": {name: tally.to_dict() for name, tally in self.judges.items()},
            "unaccounted_questions": self.unaccounted_questions,
        }


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
    verdict = decision.verdict
    if verdict is not None and verdict.preference is not None:
        record |= {"outcome": verdict.outcome, "preference": verdict.preference, "flipped": verdict.flipped}
        if verdict.critique:
            record["critique"] = verdict.critique
    return record
