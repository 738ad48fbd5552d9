"""A head and tiers of judges under one bound: of the pairs that any of them decides, at most α are wrong.

The head decides what its :class:`~rmcore.engine.routing.RiskControlledRouter` keeps, the first tier what it is sure
enough of among the rest, and so on up; each is calibrated on the labelled pairs that all before it pass on, and δ is
shared equally between them. A tier is asked only about these, so a calibration costs what serving costs. What nobody is
sure of stays outside the bound: such verdicts carry the reason ``unaccepted:...`` (or there is none, and the head's
preference stands, with ``keep_unaccepted=False``).

    cascade = calibrate_cascade(model, tiers, prompts, pairs, labels, alpha=0.1, delta=0.1)
    engine = RewardEngine(model, cascade.judge, cascade.router)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.loop import run_sync
from rmcore._base.prompt import Prompt, Response, canonical_json
from rmcore.engine.engine import RewardEngine
from rmcore.engine.routing import (
    Candidates,
    PairScore,
    RankBy,
    RiskControlledRouter,
    RiskThreshold,
    rank_score,
    risk_threshold,
)
from rmcore.engine.routing.risk_bounds import RiskMethod, check_risk
from rmcore.head.frozen import FrozenHead
from rmcore.judge.base import RULE, Pair, Verdict
from rmcore.judge.wrappers.tiers import Accept, Tier, TieredJudge
from rmcore.model.reward_model import RewardModel

__all__ = ["RiskCascade", "calibrate_cascade"]

HEAD = "head"


@dataclass(frozen=True)
class RiskCascade:
    """What a calibration made.

    Attributes:
        router: which pairs the head keeps.
        judge: the tiers that are worth asking, each accepting what it is sure enough of; None if none is.
        thresholds: of the head, under ``head``, and of each tier by name, in order. A threshold of -inf: it decides
            nothing, and ``reason`` says why.
        undecided: share of the calibration pairs that nobody is sure of.
        alpha, delta: what was asked, over all together.
    """

    router: RiskControlledRouter
    judge: TieredJudge | None
    thresholds: dict[str, RiskThreshold]
    undecided: float
    alpha: float
    delta: float

    @property
    def guarantee(self) -> str:
        """What may be claimed, in words."""
        first = next(iter(self.thresholds.values()))
        how = "in expectation" if first.method == "conformal" else f"with probability {1 - self.delta:g}"
        return f"the error rate among pairs that the head or a tier decides is at most {self.alpha:g} {how}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        found = {name: threshold.to_dict() for name, threshold in self.thresholds.items()}
        return {"guarantee": self.guarantee, "undecided": self.undecided, "thresholds": found}


@dataclass(frozen=True, slots=True)
class AtLeast:
    """Accepts what a rule accepts whose |preference| is at least ``min_preference``."""

    rule: Callable[[Verdict], bool]
    min_preference: float

    def __call__(self, verdict: Verdict) -> bool:
        """Whether the verdict is accepted."""
        return bool(self.rule(verdict)) and abs(verdict.preference or 0.0) >= self.min_preference


def calibrate_cascade(
    model: RewardModel | FrozenHead,
    tiers: Sequence[Tier],
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Response, Response]],
    labels: npt.ArrayLike,
    *,
    alpha: float,
    delta: float = 0.1,
    by: RankBy | PairScore = "u",
    method: RiskMethod = "fixed-sequence",
    keep_unaccepted: bool = True,
    deadline_s: float | None = 600.0,
    hidden: Tensor | None = None,
    audit: float = 0.05,
    seed: int = 0,
) -> RiskCascade:
    """Calibrate a head and tiers of judges on labelled pairs, each on what is left.

    Args:
        model: as :class:`~rmcore.engine.RewardEngine` takes it.
        tiers: cheap to strong, all with the default band of u: every pair that the head passes on starts at the first.
            What a tier's ``accept`` refuses is passed on, sure or not.
        prompts: one a pair; pairs of equal prompts count as one, drawn with ``seed``.
        pairs: two responses each.
        labels: (N,) 1 where the first response is better, 0 where the second.
        alpha: the error rate that is allowed among the pairs decided.
        delta: how often a calibration may fail to hold it, over the head and all tiers together.
        by: the score by which the head keeps pairs.
        method: as in :func:`~rmcore.engine.routing.risk_threshold`.
        keep_unaccepted: as in :class:`~rmcore.judge.wrappers.tiers.TieredJudge`, as is the next.
        deadline_s: of the judge that is made.
        hidden: difference mode: (2N, h), the responses' rows, where ``model`` is a head alone.
        audit: of the router (:class:`~rmcore.engine.routing.RiskControlledRouter`). The tiers are asked about audited
            pairs too, which were none of those they were calibrated on, but easier ones.
        seed: of the draw of one pair a prompt, and of the router's.

    Raises:
        InputError: arguments do not fit, or a tier has a band of its own; and what
            :meth:`~rmcore.engine.RewardEngine.score` raises.
    """
    check_risk(alpha, delta, method)
    given = TieredJudge(tiers)  # checks them
    if any(tier.uncertainty != Tier.__dataclass_fields__["uncertainty"].default for tier in given.tiers):
        reject("tiers", [tier.uncertainty for tier in given.tiers], "bands of (1, inf): where a pair starts is found")
    truth = np.asarray(labels, dtype=np.float64)
    if truth.shape != (len(pairs),) or len(prompts) != len(pairs) or not np.isin(truth, (0.0, 1.0)).all():
        reject("prompts, pairs, labels", (len(prompts), len(pairs), truth.shape), "N, N and (N,) of 0 and 1")
    names = [canonical_json(prompt) for prompt in prompts]
    cluster = np.unique(names, return_inverse=True)[1].reshape(-1)
    level = delta / (len(given.tiers) + 1)
    router = RiskControlledRouter(alpha, level, by=by, method=method, audit=audit, seed=seed)
    seen = _seen(model, given, router, prompts, pairs, hidden)
    rows = seen.columns["group"].numpy()
    columns = dict(seen.columns) | {"group": torch.from_numpy(cluster[rows])}
    side = torch.from_numpy(2 * truth[rows] - 1)
    found = {HEAD: router.calibrate(replace(seen, columns=columns), seen.logit.double().sign() != side)}
    passed = rank_score(seen, by).numpy() > router.threshold
    left, questions = rows[passed], _questions(seen, passed, rows, prompts, pairs)
    serving = []
    for tier in given.tiers:
        verdicts = _asked(tier, questions)
        score = np.array([_score(tier, verdict) for verdict in verdicts])
        wrong = np.sign([verdict.preference or 0.0 for verdict in verdicts]) != 2 * truth[left] - 1
        threshold = risk_threshold(
            score, wrong, alpha=alpha, delta=level, method=method, cluster=cluster[left], seed=seed
        )
        found[tier.name] = threshold
        if threshold.kept:
            serving.append(replace(tier, accept=_at_least(tier.accept, max(-threshold.threshold, 0.0))))
        on = score > threshold.threshold
        left, questions = left[on], [question for question, up in zip(questions, on, strict=True) if up]
    judge = TieredJudge(serving, keep_unaccepted=keep_unaccepted, deadline_s=deadline_s) if serving else None
    return RiskCascade(router, judge, found, len(left) / max(len(rows), 1), alpha, delta)


@dataclass
class _Onlooker:
    """Routes nothing and keeps what it was shown."""

    sketch: Tensor | None
    by: object
    seen: list[Candidates] = field(default_factory=list)
    whole_batch: ClassVar[bool] = True

    def select(self, candidates: Candidates) -> Tensor:
        self.seen.append(candidates)
        return torch.zeros(len(candidates), dtype=torch.bool)


def _seen(
    model: RewardModel | FrozenHead,
    judge: TieredJudge,
    router: RiskControlledRouter,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Response, Response]],
    hidden: Tensor | None,
) -> Candidates:
    """The pairs as a router of the engine sees them; ``group`` is each one's number."""
    onlooker = _Onlooker(router.sketch, router.by)
    engine = RewardEngine(model, judge, onlooker)
    if hidden is None:
        engine.score(prompts, pairs)
    else:
        engine.score_hidden(hidden, [2] * len(pairs), prompts=prompts, responses=pairs)
    if not onlooker.seen:
        reject("pairs", f"{len(pairs)} pairs, all of equal responses", "pairs that differ")
    return onlooker.seen[0]


def _questions(
    seen: Candidates,
    passed: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.int64],
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Response, Response]],
) -> list[Pair]:
    u, p = seen.uncertainty.double(), (seen.logit / seen.uncertainty).double()
    return [
        Pair(prompts[row], pairs[row][0], pairs[row][1], str(row), float(u[k]), float(p[k]))
        for k, row in enumerate(rows.tolist())
        if passed[k]
    ]


def _asked(tier: Tier, questions: list[Pair]) -> list[Verdict]:
    """The tier's answers, by its own batch size and concurrency."""
    alone = TieredJudge([replace(tier, accept=Accept.always)], deadline_s=None)
    return run_sync(alone.judge(questions)) if questions else []


def _score(tier: Tier, verdict: Verdict) -> float:
    """Highest for the next tier: −|preference|; Inf for what the tier's own rule passes on."""
    if verdict.preference is None or tier.refusal(verdict):
        return math.inf
    return -1.0 if verdict.judge == RULE else -abs(verdict.preference)  # by rule is accepted whatever the threshold


def _at_least(rule: Callable[[Verdict], bool], least: float) -> Callable[[Verdict], bool]:
    if isinstance(rule, Accept):
        return replace(rule, min_preference=max(rule.min_preference, least))
    return AtLeast(rule, least)
