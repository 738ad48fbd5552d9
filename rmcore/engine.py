"""Groups in, preferences, uncertainties and advantages out: the uncertainty-routing algorithm (NeurIPS 2025).

    score every pair (p, u)  →  the router picks pairs  →  the judge decides those  →  p̃  →  RLOO advantages

A judge that fails never loses a batch: its pairs keep the head's p̃ and a recorded reason.
"""

from __future__ import annotations

import asyncio
import logging
import numbers
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rmcore import reference
from rmcore.backbone import EncodingStats
from rmcore.errors import reject
from rmcore.groups import GroupScore, GroupScores, PairDecision
from rmcore.head import FrozenHead
from rmcore.judge.base import Judge, JudgeUsage, Pair, Prompt, Verdict
from rmcore.model import Progress, RewardModel
from rmcore.ops import Backend
from rmcore.posterior import check_finite
from rmcore.routing import Candidates, NeverRoute, Router, ThresholdRouter
from rmcore.text import check_prompt

__all__ = ["GroupScore", "GroupScores", "RewardEngine"]

log = logging.getLogger(__name__)


@dataclass
class _Matrices:
    """The head's view of one group, (K, K) float64 on the CPU."""

    logit: Tensor
    variance: Tensor
    uncertainty: Tensor
    preference: Tensor


class RewardEngine:
    """Scores groups of responses.

    Args:
        model: a :class:`RewardModel`, or a :class:`FrozenHead` for callers that only use :meth:`score_hidden`.
        judge: decides routed pairs; needed unless the router never routes.
        router: which pairs to route. Default: u > 1.4 with a judge, never without one. 1.4 is a starting value, not a
            recommendation: heads differ in scale, so choose from ``rmcore evaluate`` or use a BudgetRouter.
        epsilon: ε of the judge's logit J = ±σ⁻¹(1−ε).
        nonfinite: ``raise``, or ``route`` to send pairs with a non-finite hidden state to the judge.
        orders: concat mode: score ``both`` orders and average, or ``one`` (i < j), flagged in the result.
        backend: of the head's kernels.
    """

    def __init__(
        self,
        model: RewardModel | FrozenHead,
        judge: Judge | None = None,
        router: Router | None = None,
        *,
        epsilon: float = 0.12,
        nonfinite: Literal["raise", "route"] = "raise",
        orders: Literal["both", "one"] = "both",
        backend: Backend = "auto",
    ) -> None:
        if not isinstance(model, (RewardModel, FrozenHead)):
            reject("model", type(model).__name__, "a RewardModel or a FrozenHead")
        if judge is not None and not isinstance(judge, Judge):
            reject("judge", type(judge).__name__, "an object with an async judge(pairs) method")
        if router is None:
            router = NeverRoute() if judge is None else ThresholdRouter(1.4)
        if judge is None and not isinstance(router, NeverRoute):
            reject("judge", "None", f"a judge, since {type(router).__name__} may route pairs")
        if not 0 < epsilon < 0.5:
            reject("epsilon", epsilon, "a probability strictly between 0 and 0.5")
        if nonfinite not in ("raise", "route"):
            reject("nonfinite", repr(nonfinite), "'raise' or 'route'")
        if nonfinite == "route" and judge is None:
            reject("nonfinite", "'route'", "'raise', since there is no judge to route to")
        if orders not in ("both", "one"):
            reject("orders", repr(orders), "'both' or 'one'")
        self.model = model if isinstance(model, RewardModel) else None
        self.head = model.head if isinstance(model, RewardModel) else model
        self.judge = judge
        self.router = router
        self.epsilon = epsilon
        self.nonfinite = nonfinite
        self.orders = orders
        self.backend: Backend = backend

    # -- public verbs ------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[str]],
        *,
        progress: Progress | None = None,
    ) -> GroupScores:
        """Score groups of texts.

        Args:
            prompts: one prompt a group, text or message list.
            responses: one sequence of K ≥ 1 responses a prompt; K may differ. Equal responses are decided by rule: 0.
            progress: called with (stage, done, total).

        Returns:
            One :class:`GroupScore` a prompt, in order.

        Raises:
            InputError: wrong nesting, nothing to score, or an over-long text under the policy ``error``.
            NonFiniteError: the backbone produced NaN or Inf and ``nonfinite`` is ``raise``.
        """
        pending = self._prepare(prompts, responses, progress)
        if not pending.questions:
            return pending.finish([])
        from rmcore.judge.sync import run_sync

        return pending.finish(*run_sync(self._ask(pending.questions)), progress)

    async def score_async(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[str]],
        *,
        progress: Progress | None = None,
    ) -> GroupScores:
        """As :meth:`score`, for callers in an event loop: the backbone runs in a thread, the judge is awaited."""
        pending = await asyncio.to_thread(self._prepare, prompts, responses, progress)
        if not pending.questions:
            return pending.finish([])
        return pending.finish(*await self._ask(pending.questions), progress)

    def score_hidden(
        self,
        hidden: Tensor,
        group_sizes: Sequence[int] | Tensor,
        *,
        prompts: Sequence[Prompt] | None = None,
        responses: Sequence[Sequence[str]] | None = None,
    ) -> GroupScores:
        """Score groups whose hidden states are already at hand: a trainer's own forward pass, for instance.

        Args:
            hidden: difference mode: (ΣK, h), one row a response, group after group. Concat mode: a row for every
                ordered pair (i, j), i ≠ j, row-major (only i < j with ``orders="one"``).
            group_sizes: K of each group.
            prompts: texts for the judge; needed with ``responses`` if pairs may be routed.
            responses: as in :meth:`score`.

        Raises as :meth:`score`.
        """
        sizes = _check_sizes(group_sizes)
        if (prompts is None) != (responses is None):
            reject("prompts, responses", "only one of them", "both or neither")
        if prompts is not None and responses is not None:
            _check_groups(prompts, responses)
            if [len(r) for r in responses] != sizes:
                reject("responses", f"group sizes {[len(r) for r in responses]}", f"{sizes} as in group_sizes")
        elif not isinstance(self.router, NeverRoute):
            reject(
                "prompts, responses", "None", f"texts, since {type(self.router).__name__} may route pairs to the judge"
            )
        matrices, seconds = self._score_rows(hidden, sizes)
        pending = self._route(matrices, prompts, responses, {"head": seconds}, None)
        if not pending.questions:
            return pending.finish([])
        from rmcore.judge.sync import run_sync

        return pending.finish(*run_sync(self._ask(pending.questions)))

    # -- the algorithm, step by step ---------------------------------------------------------------------------------

    def _prepare(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]], progress: Progress | None
    ) -> _Pending:
        if self.model is None:
            reject("model", "a FrozenHead", "a RewardModel to score texts; or call score_hidden")
        _check_groups(prompts, responses)
        before = EncodingStats(*(getattr(self.model.backbone.stats, f.name) for f in fields(EncodingStats)))
        started = time.perf_counter()
        hidden = self.model.hidden_states(prompts, responses, orders=self.orders, progress=progress)
        backbone = time.perf_counter() - started
        after = self.model.backbone.stats
        stats = EncodingStats(*(getattr(after, f.name) - getattr(before, f.name) for f in fields(EncodingStats)))
        matrices, seconds = self._score_rows(hidden, [len(group) for group in responses])
        return self._route(matrices, prompts, responses, {"backbone": backbone, "head": seconds}, stats)

    def _score_rows(self, hidden: Tensor, sizes: list[int]) -> tuple[list[_Matrices], float]:
        if not isinstance(hidden, Tensor):
            reject("hidden", type(hidden).__name__, "a torch.Tensor")
        if hidden.dim() != 2 or hidden.shape[1] != self.head.config.hidden_size:
            reject("hidden", f"shape {tuple(hidden.shape)}", f"(rows, {self.head.config.hidden_size})")
        difference = self.head.config.mode == "difference"
        ordered = 2 if self.orders == "both" else 1
        rows = sum(sizes) if difference else sum(k * (k - 1) // 2 * ordered for k in sizes)
        if hidden.shape[0] != rows:
            unit = "response" if difference else f"{'ordered' if ordered == 2 else 'i < j'} pair"
            reject("hidden", f"{hidden.shape[0]} rows", f"{rows}, one a {unit} for group sizes {sizes[:8]}")
        if self.nonfinite == "raise" and rows:
            check_finite(hidden)
        started = time.perf_counter()
        hidden = hidden.to(self.head.device)
        matrices = self._difference(hidden, sizes) if difference else self._concat(hidden, sizes)
        return matrices, time.perf_counter() - started

    def _difference(self, hidden: Tensor, sizes: list[int]) -> list[_Matrices]:
        scores = self.head.score_pairs(
            hidden, torch.tensor(sizes, dtype=torch.int64), backend=self.backend, nonfinite=self._keep
        )
        g, v = scores.logit.double().cpu(), scores.variance.double().cpu()
        finite = hidden.isfinite().all(dim=1).cpu()
        result, pair, row = [], 0, 0
        for k in sizes:
            i, j = torch.triu_indices(k, k, 1)
            count = len(i)
            logit, variance = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
            logit[i, j], logit[j, i] = g[pair : pair + count], -g[pair : pair + count]
            variance[i, j] = variance[j, i] = v[pair : pair + count]
            bad = ~finite[row : row + k]
            if bool(bad.any()) or not bool((logit + variance).isfinite().all()):
                # A kernel may share work between the rows of a group; only pairs of the bad row itself are unusable.
                # A finite row is bad too where it overflows in the head.
                own = self.head.score(hidden[row : row + k], backend=self.backend, nonfinite="keep")
                bad |= ~(own.logit + own.variance).isfinite().cpu()
                self._repair(logit, variance, hidden[row : row + k], bad)
            result.append(self._finish(logit, variance))
            pair, row = pair + count, row + k
        return result

    def _repair(self, logit: Tensor, variance: Tensor, hidden: Tensor, bad: Tensor) -> None:
        good = (~bad).nonzero()[:, 0]
        logit.fill_(torch.nan)
        variance.fill_(torch.nan)
        logit.fill_diagonal_(0.0)
        variance.fill_diagonal_(0.0)
        if len(good) > 1:
            sizes = torch.tensor([len(good)])
            rows = hidden[good.to(hidden.device)]
            scores = self.head.score_pairs(rows, sizes, backend=self.backend, nonfinite="keep")
            i, j = torch.triu_indices(len(good), len(good), 1)
            g, v = scores.logit.double().cpu(), scores.variance.double().cpu()
            logit[good[i], good[j]], logit[good[j], good[i]] = g, -g
            variance[good[i], good[j]] = variance[good[j], good[i]] = v

    def _concat(self, hidden: Tensor, sizes: list[int]) -> list[_Matrices]:
        scores = self.head.score(hidden, backend=self.backend, nonfinite=self._keep)
        g, v = scores.logit.double().cpu(), scores.variance.double().cpu()
        result, start = [], 0
        for k in sizes:
            if self.orders == "both":
                i, j = (~torch.eye(k, dtype=torch.bool)).nonzero().unbind(1)
            else:
                i, j = torch.triu_indices(k, k, 1)
            count = len(i)
            logit, variance = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64)
            logit[i, j], variance[i, j] = g[start : start + count], v[start : start + count]
            if self.orders == "one":
                logit[j, i], variance[j, i] = -logit[i, j], variance[i, j]
            result.append(self._finish(logit, variance))
            start += count
        return result

    @property
    def _keep(self) -> Literal["raise", "keep"]:
        return "keep" if self.nonfinite == "route" else "raise"

    def _finish(self, logit: Tensor, variance: Tensor) -> _Matrices:
        """u and p̃; in concat mode both orders are averaged here (in difference mode that changes nothing)."""
        u = reference.uncertainty(variance, self.head.weights.amplitude)
        preference, u = reference.concat_preference(reference.preference(logit, u), u)
        bad = ~(preference.isfinite() & u.isfinite())
        preference[bad], u[bad] = torch.nan, torch.inf
        return _Matrices((logit - logit.mT) / 2, (variance + variance.mT) / 2, u, preference)

    def _route(
        self,
        matrices: list[_Matrices],
        prompts: Sequence[Prompt] | None,
        responses: Sequence[Sequence[str]] | None,
        seconds: dict[str, float],
        stats: EncodingStats | None,
    ) -> _Pending:
        where: list[tuple[int, int, int]] = []
        identical: list[tuple[int, int, int]] = []
        for group, m in enumerate(matrices):
            k = len(m.logit)
            for i in range(k):
                for j in range(i + 1, k):
                    same = responses is not None and responses[group][i] == responses[group][j]
                    (identical if same else where).append((group, i, j))
        for group, i, j in identical:
            m = matrices[group]
            for matrix, value in ((m.logit, 0.0), (m.variance, 0.0), (m.preference, 0.0), (m.uncertainty, 1.0)):
                matrix[i, j] = matrix[j, i] = value
        index = torch.tensor(where, dtype=torch.int64).view(-1, 3)
        candidates = Candidates(*(_gather(matrices, index, n) for n in ("logit", "variance", "uncertainty")))
        finite = candidates.uncertainty.isfinite()
        chosen = ~finite  # only possible with nonfinite="route"
        if bool(finite.any()):
            usable = Candidates(candidates.logit[finite], candidates.variance[finite], candidates.uncertainty[finite])
            picked = self.router.select(usable)
            if not isinstance(picked, Tensor) or picked.shape != (len(usable),) or picked.dtype != torch.bool:
                got = f"{tuple(picked.shape)} {picked.dtype}" if isinstance(picked, Tensor) else type(picked).__name__
                reject("router.select", got, f"a ({len(usable)},) bool tensor")
            chosen[finite] = picked
        routed = [pair for pair, yes in zip(where, chosen.tolist(), strict=True) if yes]
        questions = []
        if routed:
            if prompts is None or responses is None:
                reject("prompts, responses", "None", f"texts, since {len(routed)} pairs need the judge")
            questions = [Pair(prompts[g], responses[g][i], responses[g][j], id=f"{g}:{i}:{j}") for g, i, j in routed]
        one_order = self.head.config.mode == "concat" and self.orders == "one"
        return _Pending(matrices, routed, identical, questions, self.epsilon, one_order, seconds, stats)

    async def _ask(self, questions: list[Pair]) -> tuple[list[Verdict], JudgeUsage]:
        """One verdict a question, and what they cost; equal questions are asked once; only cancellation gets out."""
        assert self.judge is not None
        distinct: dict[str, int] = {}
        unique: list[Pair] = []
        order = []
        for question in questions:
            key = repr((question.prompt, question.first, question.second))
            if key not in distinct:
                distinct[key] = len(unique)
                unique.append(question)
            order.append(distinct[key])
        answers: list[object]
        try:
            answers = list(await self.judge.judge(unique))
        except Exception as error:  # a judge may be anybody's code, and the batch must survive it
            log.exception("the judge raised; %d pairs keep the head's preference", len(questions))
            answers = [Verdict.none(f"raised_{type(error).__name__}")] * len(unique)
        if len(answers) != len(unique):
            log.error("the judge returned %d results for %d pairs; none is used", len(answers), len(unique))
            answers = [Verdict.none("wrong_number_of_verdicts")] * len(unique)
        verdicts = [_checked(answer) for answer in answers]
        return [verdicts[k] for k in order], JudgeUsage.total(v.usage for v in verdicts)


def _checked(answer: object) -> Verdict:
    """A judge's answer as a verdict whose preference is a number in [-1, 1], or none with the reason."""
    if not isinstance(answer, Verdict):
        return Verdict.none("not_a_verdict")
    preference: Any = answer.preference
    reason, usage, critique = str(answer.reason), cast("object", answer.usage), str(answer.critique)
    if preference is not None and not (isinstance(preference, numbers.Real) and -1 <= float(preference) <= 1):
        preference, reason = None, f"preference_{str(preference)[:40]}"
    return replace(
        answer,
        preference=None if preference is None else float(preference),
        reason=reason or ("unknown" if preference is None else ""),
        critique=critique,
        usage=usage if isinstance(usage, JudgeUsage) else JudgeUsage(),
    )


@dataclass
class _Pending:
    """A scored batch that waits for its verdicts."""

    matrices: list[_Matrices]
    routed: list[tuple[int, int, int]]
    identical: list[tuple[int, int, int]]
    questions: list[Pair]
    epsilon: float
    one_order: bool
    seconds: dict[str, float]
    stats: EncodingStats | None

    def __post_init__(self) -> None:
        self.started = time.perf_counter()

    def finish(
        self, verdicts: list[Verdict], usage: JudgeUsage | None = None, progress: Progress | None = None
    ) -> GroupScores:
        """Put the verdicts in: p̃ = J where there is one, the head's elsewhere."""
        decisions: list[list[PairDecision]] = [[] for _ in self.matrices]
        masks = [torch.zeros_like(m.logit, dtype=torch.bool) for m in self.matrices]
        for group, i, j in self.identical:
            decisions[group].append(PairDecision(i, j, "identical"))
        for (group, i, j), verdict in zip(self.routed, verdicts, strict=True):
            masks[group][i, j] = masks[group][j, i] = True
            if verdict.preference is None:
                decisions[group].append(PairDecision(i, j, "judge_failed", verdict.reason, verdict))
                continue
            value = float(reference.verdict_logit(verdict.preference, self.epsilon))
            self.matrices[group].preference[i, j], self.matrices[group].preference[j, i] = value, -value
            decisions[group].append(PairDecision(i, j, "judge", verdict.reason, verdict))
        if verdicts:
            self.seconds["judge"] = time.perf_counter() - self.started
            if progress is not None:
                progress("judging", len(verdicts), len(verdicts))
        groups = tuple(
            GroupScore(
                preference=m.preference,
                uncertainty=m.uncertainty,
                logit=m.logit,
                variance=m.variance,
                routed=mask,
                decisions=tuple(sorted(decided, key=lambda d: (d.i, d.j))),
                one_order=self.one_order,
            )
            for m, mask, decided in zip(self.matrices, masks, decisions, strict=True)
        )
        return GroupScores(groups, self.seconds, self.stats, usage or JudgeUsage())


def _gather(matrices: list[_Matrices], index: Tensor, name: str) -> Tensor:
    if not len(index):
        return torch.empty(0, dtype=torch.float64)
    flat = torch.cat([getattr(m, name).flatten() for m in matrices])
    sizes = torch.tensor([len(m.logit) for m in matrices])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (sizes * sizes).cumsum(0)[:-1]])
    group, i, j = index.unbind(1)
    return flat[offsets[group] + i * sizes[group] + j]


def _check_sizes(group_sizes: Sequence[int] | Tensor) -> list[int]:
    given: Any = group_sizes.tolist() if isinstance(group_sizes, Tensor) else group_sizes
    if not isinstance(given, Iterable):
        reject("group_sizes", repr(given), "a sequence of positive integers")
    sizes = list(given)
    if not sizes:
        reject("group_sizes", "an empty list", "at least one group")
    for k, size in enumerate(sizes):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            reject(f"group_sizes[{k}]", size, "a positive integer")
    return sizes


def _check_groups(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        reject("prompts", type(prompts).__name__, "a list with one prompt a group")
    if isinstance(responses, str) or not isinstance(responses, Sequence):
        reject("responses", type(responses).__name__, "a list with one list of responses a prompt")
    if not prompts:
        reject("prompts", "an empty list", "at least one prompt")
    if len(prompts) != len(responses):
        reject("responses", f"{len(responses)} groups", f"{len(prompts)}, one a prompt")
    for k, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        check_prompt(prompt, f"prompts[{k}]")
        if isinstance(group, str) or not isinstance(group, Sequence):
            reject(f"responses[{k}]", type(group).__name__, "a list of strings")
        if not group:
            reject(f"responses[{k}]", "an empty list", "at least one response")
        for i, response in enumerate(group):
            if not isinstance(response, str):
                reject(f"responses[{k}][{i}]", type(response).__name__, "a string")
