"""Groups in, preferences, uncertainties and advantages out: the uncertainty-routing algorithm (NeurIPS 2025).

    score every pair (p, u)  →  the router picks pairs  →  the judge decides those  →  p̃  →  RLOO advantages

The groups are worked off in micro-batches: while the judge answers for the first ones, the backbone runs on the next.
A judge that fails never loses a batch: its pairs keep the head's p̃ and a recorded reason.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import NonFiniteError, reject
from rmcore._base.loop import background_loop
from rmcore._base.prompt import Prompt
from rmcore.engine.checks import check_group_sizes, check_groups
from rmcore.engine.groups import GroupScore, GroupScores, PairDecision
from rmcore.engine.judging import Asking
from rmcore.engine.learning import UpdateReport, VerdictLearner
from rmcore.engine.overlap import run_alongside, run_alongside_async
from rmcore.engine.pair_table import (
    PairMatrices,
    concat_matrices,
    decide_by_rule,
    difference_matrices,
    find_pairs,
    look_up,
)
from rmcore.engine.routing import BudgetedRouter, Candidates, NeverRoute, Router, ThresholdRouter
from rmcore.engine.score_call import MicroBatch, ScoreCall, micro_batches
from rmcore.engine.selection import BestOf, Ties, best_of, check_selection
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import check_finite
from rmcore.judge.base import Judge
from rmcore.model.backbone import EncodingStats
from rmcore.model.reward_model import Progress, RewardModel
from rmcore.ops.dispatch import Backend

__all__ = ["GroupScore", "GroupScores", "PairDecision", "RewardEngine"]

log = logging.getLogger(__name__)

# Measured on a CPU, 256 groups of 2, a small Llama: cutting the batch into micro-batches of 1, 2, 4, 8 or 16 forward
# passes took 18, 17, 5, 3 or 0% more processor time than not cutting it; with groups of 4, which share more, nothing.
_LEAST_PASSES = 4
_MOST_MICRO_BATCHES = 12


class RewardEngine:
    """Scores groups of responses.

    Args:
        model: a :class:`RewardModel`, or a :class:`FrozenHead` for callers that only use :meth:`score_hidden`.
        judge: decides routed pairs; needed unless the router never routes. Several of its ``judge`` calls may be under
            way at once, one a micro-batch.
        router: which pairs to route. Default: u > 1.4 with a judge, never without one. 1.4 is a starting value, not a
            recommendation: heads differ in scale, so choose from ``rmcore evaluate`` or use a BudgetRouter. A router
            that must see the whole batch (``whole_batch``) is asked, and so the judge, when all is scored; the
            ``overlap`` of the summary says so.
        epsilon: ε of the judge's logit J = ±σ⁻¹(1−ε).
        nonfinite: ``raise``, or ``route`` to send pairs with a non-finite hidden state to the judge.
        orders: concat mode: score ``both`` orders and average, or ``one`` (i < j), flagged in the result.
        backend: of the head's kernels.
        judge_deadline_s: seconds from the start of a score call after which verdicts are of no use. It goes with each
            pair as its ``deadline``; a judge that pays no heed is cancelled two seconds later, and its pairs fail with
            ``deadline``.
        micro_batch_tokens: about how many tokens a micro-batch has, whole groups. None: a twelfth of the call's, but at
            least four full forward passes of the backbone. Smaller starts the judge earlier; larger pads less and
            shares more. It decides what is computed together, so it may show in the last bits of a result; the judge's
            timing never does.
        learner: lets the head learn from verdicts by :meth:`update`; without one it never changes. The engine takes
            over the learner's head, and results keep their hidden rows.
        clock: of deadlines and of the seconds reported; a seam for tests.
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
        judge_deadline_s: float | None = None,
        micro_batch_tokens: int | None = None,
        learner: VerdictLearner | None = None,
        clock: Clock | None = None,
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
        if judge_deadline_s is not None and not (math.isfinite(judge_deadline_s) and judge_deadline_s > 0):
            reject("judge_deadline_s", judge_deadline_s, "seconds above 0, or None")
        if micro_batch_tokens is not None and micro_batch_tokens < 1:
            reject("micro_batch_tokens", micro_batch_tokens, "at least 1, or None")
        self.model = model if isinstance(model, RewardModel) else None
        self.head = model.head if isinstance(model, RewardModel) else model
        self.judge = judge
        self.router = router
        self.epsilon = epsilon
        self.nonfinite = nonfinite
        self.orders = orders
        self.backend: Backend = backend
        self.judge_deadline_s = judge_deadline_s
        self.micro_batch_tokens = micro_batch_tokens
        self.clock: Clock = clock or SystemClock()
        self.learner = learner
        self._publishing = threading.Lock()
        if learner is not None:
            learner.check_head(self.head)
            self._serve_head_of(learner)

    # -- public verbs ------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[str]],
        *,
        progress: Progress | None = None,
    ) -> GroupScores:
        """Score groups of texts.

        The backbone runs in the caller's thread, the judge's calls on the library's background loop. An exception here,
        Ctrl-C included, cancels them.

        Args:
            prompts: one prompt a group, text or message list.
            responses: one sequence of K ≥ 1 responses a prompt; K may differ. Equal responses are decided by rule: 0.
            progress: called with (stage, done, total); for the stage ``judging`` from another thread.

        Returns:
            One :class:`GroupScore` a prompt, in order.

        Raises:
            InputError: wrong nesting, nothing to score, or an over-long text under the policy ``error``; in any case
                before a judge is asked.
            NonFiniteError: the backbone produced NaN or Inf and ``nonfinite`` is ``raise``.
        """
        return self._run(self._call_with_texts(prompts, responses, progress))

    async def score_async(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[str]],
        *,
        progress: Progress | None = None,
    ) -> GroupScores:
        """As :meth:`score`, for callers in an event loop: the backbone runs in a thread, the judge is awaited.

        Cancelling it cancels the judge's calls and stops the backbone after its current forward pass; when the
        CancelledError comes out, neither a thread nor a task is left.
        """
        return await self._run_async(self._call_with_texts(prompts, responses, progress))

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
        return self._run(self._call_with_rows(hidden, group_sizes, prompts, responses))

    async def score_hidden_async(
        self,
        hidden: Tensor,
        group_sizes: Sequence[int] | Tensor,
        *,
        prompts: Sequence[Prompt] | None = None,
        responses: Sequence[Sequence[str]] | None = None,
    ) -> GroupScores:
        """As :meth:`score_hidden`, for callers in an event loop: the head runs in a thread, the judge is awaited."""
        return await self._run_async(self._call_with_rows(hidden, group_sizes, prompts, responses))

    def best_of(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[str]],
        *,
        penalty: float = 0.0,
        ties: Ties = "first",
    ) -> list[BestOf]:
        """Score groups and choose the best response of each (:func:`rmcore.engine.selection.best_of`).

        Args:
            prompts: one prompt a group.
            responses: its responses.
            penalty: c ≥ 0: choose by mean preference minus c times uncertainty.
            ties: which of several equally good ones: the first, the shortest or the longest text.

        Raises as :meth:`score` and :func:`~rmcore.engine.selection.best_of`.
        """
        check_selection(penalty, ties)
        return best_of(self.score(prompts, responses), responses, penalty=penalty, ties=ties)

    # -- learning ----------------------------------------------------------------------------------------------------

    def update(self, scores: GroupScores) -> UpdateReport:
        """Learn from the verdicts of a scored batch (:class:`~rmcore.engine.learning.VerdictLearner`).

        The next score call uses the new head, as do ``model`` and what it saves; calls under way finish with theirs.

        Raises InputError for an engine without a learner; otherwise as the learner's ``learn``.
        """
        learner = self._checked_learner()
        report = learner.update(scores)
        self._serve_head_of(learner)
        return report

    def revert(self, version: int) -> None:
        """Serve an earlier (or later) version of the head again, bit for bit. Raises as the learner's ``revert``."""
        learner = self._checked_learner()
        learner.revert(version)
        self._serve_head_of(learner)

    def _checked_learner(self) -> VerdictLearner:
        if self.learner is None:
            reject("learner", "None", "a VerdictLearner, given when the engine was made")
        return self.learner

    def _serve_head_of(self, learner: VerdictLearner) -> None:
        with self._publishing:  # of two updates at once, the one that publishes last must not publish the older head
            self.head = learner.head
            if self.model is not None:
                self.model.head = self.head

    # -- a call, from its arguments to its result --------------------------------------------------------------------

    def _call_with_texts(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]], progress: Progress | None
    ) -> ScoreCall:
        if self.model is None:
            reject("model", "a FrozenHead", "a RewardModel to score texts; or call score_hidden")
        sizes = check_groups(prompts, responses)
        return self._new_call(sizes, prompts, responses, progress=progress, encoding=EncodingStats())

    def _call_with_rows(
        self,
        hidden: Tensor,
        group_sizes: Sequence[int] | Tensor,
        prompts: Sequence[Prompt] | None,
        responses: Sequence[Sequence[str]] | None,
    ) -> ScoreCall:
        sizes = check_group_sizes(group_sizes)
        if (prompts is None) != (responses is None):
            reject("prompts, responses", "only one of them", "both or neither")
        if prompts is not None and responses is not None:
            if (given := check_groups(prompts, responses)) != sizes:
                reject("responses", f"group sizes {given}", f"{sizes} as in group_sizes")
        elif not isinstance(self.router, NeverRoute):
            reject(
                "prompts, responses", "None", f"texts, since {type(self.router).__name__} may route pairs to the judge"
            )
        call = self._new_call(sizes, prompts, responses)
        call.hidden = self._checked_rows(hidden, sizes)
        return call

    def _new_call(
        self,
        sizes: list[int],
        prompts: Sequence[Prompt] | None,
        responses: Sequence[Sequence[str]] | None,
        *,
        progress: Progress | None = None,
        encoding: EncodingStats | None = None,
    ) -> ScoreCall:
        call = ScoreCall(sizes, prompts, responses, self.clock, self.head, progress=progress, encoding=encoding)
        call.kept = None if self.learner is None else []
        if self.judge_deadline_s is not None:
            call.deadline = call.started + self.judge_deadline_s
        return call

    def _run(self, call: ScoreCall) -> GroupScores:
        try:
            if self._may_ask:
                call.asking = self._asking(call, background_loop())
            run_alongside(functools.partial(self._work, call), call.asking)
            return call.result(self.epsilon, one_order=self._one_order)
        finally:
            self._settle(call)

    async def _run_async(self, call: ScoreCall) -> GroupScores:
        try:
            if self._may_ask:
                call.asking = self._asking(call, asyncio.get_running_loop())
            await run_alongside_async(functools.partial(self._work, call), call.asking, call.unwanted)
            return call.result(self.epsilon, one_order=self._one_order)
        finally:
            self._settle(call)

    def _asking(self, call: ScoreCall, loop: asyncio.AbstractEventLoop) -> Asking:
        assert self.judge is not None
        return Asking(self.judge, loop, self.clock, deadline=call.deadline, answered=call.report_answers)

    @property
    def _may_ask(self) -> bool:
        return self.judge is not None and not (isinstance(self.router, NeverRoute) and self.nonfinite == "raise")

    @property
    def _whole_batch(self) -> bool:
        return getattr(self.router, "whole_batch", True)

    @property
    def _one_order(self) -> bool:
        return self.head.config.mode == "concat" and self.orders == "one"

    # -- the algorithm, step by step ---------------------------------------------------------------------------------

    def _work(self, call: ScoreCall) -> None:
        """Everything but the judge: backbone, head and router, micro-batch by micro-batch."""
        if isinstance(self.router, BudgetedRouter):
            self.router.begin_step()
        parts = self._plan(call)
        together = self._why_no_overlap(parts)
        for part in parts:
            hidden = self._rows(call, part)
            with call.time("head"):
                call.matrices += self._matrices(call.head, hidden, part)
            if call.kept is not None:
                call.kept.append(hidden.detach().to("cpu", copy=True))  # the caller may use its tensor again
            if not together:
                self._route(call, part)
        if together:
            self._route(call, MicroBatch(0, 0, call.sizes))
        call.micro_batches, call.why_no_overlap = len(parts), together

    def _plan(self, call: ScoreCall) -> list[MicroBatch]:
        if call.hidden is not None or self.model is None:
            return [MicroBatch(0, 0, call.sizes)]
        with call.time("backbone"):
            assert call.prompts is not None
            assert call.responses is not None
            call.encoded = self.model.encode_groups(call.prompts, call.responses, orders=self.orders)
        limit: float = math.inf
        if self._may_ask and not self._whole_batch and not isinstance(self.router, NeverRoute):
            total = sum(len(text) for group in call.encoded for text in group)
            least = _LEAST_PASSES * self.model.backbone.tokens_per_batch
            limit = self.micro_batch_tokens or max(least, total / _MOST_MICRO_BATCHES)
        return micro_batches(call.sizes, call.encoded, limit)

    def _why_no_overlap(self, parts: list[MicroBatch]) -> str:
        if not self._may_ask:
            return "no judge is asked"
        if self._whole_batch:
            return f"{type(self.router).__name__} chooses from the whole batch"
        return "one micro-batch" if len(parts) == 1 else ""

    def _rows(self, call: ScoreCall, part: MicroBatch) -> Tensor:
        """The hidden rows of a micro-batch, checked and on the head's device."""
        if call.hidden is not None:
            hidden = call.hidden
        else:
            assert self.model is not None
            with call.time("backbone"):
                groups = call.encoded[part.first : part.stop]
                progress = call.encoding_progress(part)
                hidden = self.model.hidden_rows(groups, progress=progress, stats=call.encoding)
                if hidden.is_cuda:
                    torch.cuda.current_stream(hidden.device).synchronize()  # or its time would count as the head's
        if self.nonfinite == "raise" and len(hidden):
            try:
                check_finite(hidden)
            except NonFiniteError as error:
                raise _renumbered(error, part) from None
        return hidden.to(self.head.device)

    def _checked_rows(self, hidden: Tensor, sizes: list[int]) -> Tensor:
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
        return hidden

    def _matrices(self, head: FrozenHead, hidden: Tensor, part: MicroBatch) -> list[PairMatrices]:
        policy: Literal["raise", "keep"] = "keep" if self.nonfinite == "route" else "raise"
        amplitude = head.weights.amplitude
        try:
            if head.config.mode == "difference":
                sizes = torch.tensor(part.sizes, dtype=torch.int64)
                pairs = head.score_pairs(hidden, sizes, backend=self.backend, nonfinite=policy)
                return difference_matrices(pairs, part.sizes, amplitude)
            rows = head.score(hidden, backend=self.backend, nonfinite=policy)
            return concat_matrices(rows, part.sizes, amplitude, self.orders)
        except NonFiniteError as error:
            raise _renumbered(error, part) from None

    def _route(self, call: ScoreCall, part: MicroBatch) -> None:
        """Decide equal responses by rule, let the router choose among the rest, and hand those over to the judge."""
        where, identical = find_pairs(part.sizes, call.responses, part.first)
        decide_by_rule(call.matrices, identical)
        call.identical += identical
        candidates, preference = look_up(call.matrices, where)
        finite = candidates.uncertainty.isfinite()  # always, unless nonfinite="route"
        reserved = None
        if isinstance(self.router, BudgetedRouter):
            chosen, reservation = self.router.reserve(candidates)
            reserved = call.reserve(reservation)
            _check_choice("router.reserve", chosen, len(candidates))
            call.unaffordable += [where[n] for n in (~finite & ~chosen).nonzero()[:, 0].tolist()]
        else:
            chosen = ~finite
            if bool(finite.any()):
                values = (candidates.logit, candidates.variance, candidates.uncertainty)
                usable = Candidates(*(value[finite] for value in values))
                picked = self.router.select(usable)
                _check_choice("router.select", picked, len(usable))
                chosen[finite] = picked
        asked = call.ask(
            [where[n] for n in chosen.nonzero()[:, 0].tolist()], preference[chosen], candidates.uncertainty[chosen]
        )
        if reserved is not None:
            reserved.asked = asked

    def _settle(self, call: ScoreCall) -> None:
        """Tell a budgeted router what each reservation came to: exactly once, whatever has happened.

        Only now and in this order, so that what the router chooses within a call never depends on the judge's timing.
        """
        for reserved in call.reservations:
            assert isinstance(self.router, BudgetedRouter)
            try:
                self.router.settle(reserved.reservation, reserved.usage)
            except Exception:  # the verdicts are paid for and in; a router's books must not lose them
                log.exception("router.settle raised; its books may be wrong from here on")


def _renumbered(error: NonFiniteError, part: MicroBatch) -> NonFiniteError:
    """The error with its rows counted from the first of the whole call, as the caller counts them."""
    if part.first_row == 0:
        return error
    where = f"rows counted within groups {part.first} to {part.stop - 1}, whose first is row {part.first_row} of all"
    return NonFiniteError(f"{error} ({where})", tuple(part.first_row + row for row in error.rows))


def _check_choice(what: str, chosen: object, count: int) -> None:
    if not isinstance(chosen, Tensor) or chosen.shape != (count,) or chosen.dtype != torch.bool:
        got = f"{tuple(chosen.shape)} {chosen.dtype}" if isinstance(chosen, Tensor) else type(chosen).__name__
        reject(what, got, f"a ({count},) bool tensor")
