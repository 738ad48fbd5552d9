"""Groups in, preferences, uncertainties and advantages out: the uncertainty-routing algorithm (NeurIPS 2025).

    score every pair (p, u)  →  the router picks pairs  →  the judge decides those  →  p̃  →  RLOO advantages

The groups are worked off in micro-batches: while the judge answers for the first ones, the backbone runs on the next.
A judge that fails never loses a batch: its pairs keep the head's p̃ and a recorded reason.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import reject
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response
from rmcore.engine.call_groups import CallGroups, OnError, check_group_sizes
from rmcore.engine.group_score import GroupScore, PairDecision
from rmcore.engine.groups import GroupScores
from rmcore.engine.learning import VerdictLearner
from rmcore.engine.options import check_engine_options, check_estimator_goes
from rmcore.engine.routing import LearnedRouter, NeverRoute, Router
from rmcore.engine.running import CallRunner
from rmcore.engine.score_call import ScoreCall
from rmcore.engine.selection import BestOf, Measure, Ties, best_of, check_measured, check_selection
from rmcore.engine.served_head import ServedHead
from rmcore.head.estimators import PairEstimator, VarianceKind
from rmcore.head.frozen import FrozenHead
from rmcore.judge.base import Judge, takes_principles
from rmcore.model.critiques import Critiques
from rmcore.model.encoding_stats import EncodingStats
from rmcore.model.reward_model import RewardModel
from rmcore.model.text import OverlongPolicy
from rmcore.model.uncertainties import find_estimator
from rmcore.ops.dispatch import Backend

__all__ = ["GroupScore", "GroupScores", "PairDecision", "RewardEngine"]

log = logging.getLogger(__name__)

DEFAULT_FRACTION = 0.25
"""Of the pairs that go to a judge where nobody says how many."""


class RewardEngine(ServedHead):
    """Scores groups of responses.

    Args:
        model: a :class:`RewardModel`, or a :class:`FrozenHead` for callers that only use :meth:`score_hidden`.
        judge: decides routed pairs; needed unless the router never routes. Several of its ``judge`` calls may be under
            way at once, one a micro-batch.
        router: which pairs to route. Default: with a judge ``LearnedRouter(0.25, prior=model.error_prior)``, a quarter
            of the pairs, those on which the head is most likely wrong as the verdicts so far have taught; never without
            a judge. The paper's rule is ``ThresholdRouter(1.4)``, u > 1.4, with a threshold of your choice. A router
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
        novelty: ask the head how far each response is from its training data (``GroupScores.novelty``, the routers'
            column ``novelty``): a second pass over the rows. None: where a judge may be asked and the head can tell.
        design: which pairs of a group are compared (:mod:`rmcore.engine.comparisons`): ``all``, ``circular``,
            ``regular:4`` or ``swiss:3``. Only these may be routed, in concat mode only these are encoded, and the
            advantages are those of least squares over them. For large K.
        uncertainty: where g, v and p̃ come from instead of the head (:mod:`rmcore.head.estimators`): the name of an
            estimator that the model has (:meth:`RewardModel.add_estimator`), ``head``, or an estimator. u is
            √(1 + π/8·v) then. Difference mode, without a learner. None: what the model is served with.
        variance: which part of that variance u is made of, and with it routing, selection and filters: ``epistemic``
            (what more data would tell), ``aleatoric`` (in the answers themselves) or ``total``, their sum. None: all
            that the uncertainty tells by itself, which of the head is the epistemic part. Both parts are in the results
            where both are known: URME's, and of a published model that scores attributes beside its posterior.
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
        novelty: bool | None = None,
        design: str = "all",
        uncertainty: str | PairEstimator | None = None,
        variance: VarianceKind | None = None,
        learner: VerdictLearner | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not isinstance(model, (RewardModel, FrozenHead)):
            reject("model", type(model).__name__, "a RewardModel or a FrozenHead")
        check_engine_options(
            judge,
            router,
            epsilon=epsilon,
            nonfinite=nonfinite,
            orders=orders,
            backend=backend,
            judge_deadline_s=judge_deadline_s,
            micro_batch_tokens=micro_batch_tokens,
            novelty=novelty,
            design=design,
            uncertainty=uncertainty,
            variance=variance,
            learner=learner,
            clock=clock,
        )
        if router is None:
            prior = model.error_prior if isinstance(model, RewardModel) else None
            router = NeverRoute() if judge is None else LearnedRouter(DEFAULT_FRACTION, prior=prior)
        self.model = model if isinstance(model, RewardModel) else None
        self.head = model.head if isinstance(model, RewardModel) else model
        if judge is not None and getattr(router, "by", None) == "u" and self.head.config.resolved_amplitude == 0:
            log.warning(
                "the head's amplitude is 0, so u is 1 for every pair and %s, which goes by it, cannot tell them apart: "
                "give a published reward model uncertainties with `rmcore upgrade`",
                type(router).__name__,
            )
        self.judge = judge
        self.router = router
        self.epsilon = epsilon
        self.nonfinite = nonfinite
        self.orders = orders
        self.backend: Backend = backend
        self.judge_deadline_s = judge_deadline_s
        self.micro_batch_tokens = micro_batch_tokens
        self.novelty, self.design = novelty, design
        if design.startswith("swiss") and self.head.config.mode == "concat":
            reject("design", repr(design), "another in concat mode, where a standing takes all pairs to begin with")
        if novelty or (judge is not None and getattr(router, "by", None) == "novelty"):
            self.head.check_novelty()
        self.estimator, self.variance = self._estimator(uncertainty), variance
        if self.estimator is not None:
            named = f"{self.estimator.name!r}, which the model is served with," if uncertainty is None else "given"
            check_estimator_goes("uncertainty", named, learner=learner, nonfinite=nonfinite)
        elif variance in ("aleatoric", "total") and (self.model is None or not self.model.tells_attributes):
            reject("variance", repr(variance), "'epistemic': the head alone tells no other part")
        self.clock: Clock = clock or SystemClock()
        self.learner = learner
        self.head_version: int | None = None
        self._publishing = threading.Lock()
        if learner is not None:
            learner.check_head(self.head)
            self._serve_head_of(learner)

    def _estimator(self, uncertainty: str | PairEstimator | None) -> PairEstimator | None:
        if uncertainty is None or isinstance(uncertainty, str):
            known, default = ({}, None) if self.model is None else (self.model.estimators, self.model.uncertainty)
            uncertainty = find_estimator(uncertainty, self.head, known, default)
        if uncertainty is None:
            return None
        if self.head.config.mode != "difference":
            reject("uncertainty", "given in concat mode", "None, or a model in difference mode")
        if self.model is not None and self.model.deterministic == "batch":
            reject("uncertainty", "given with deterministic='batch'", "None: estimators score all pairs together")
        return uncertainty

    # -- public verbs ------------------------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        critiques: Critiques | None = None,
        principles: Sequence[str] | None = None,
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
        on_error: OnError = "raise",
        progress: Progress | None = None,
    ) -> GroupScores:
        """Score groups of texts.

        Every group is checked and encoded before any is scored.

        The backbone runs in the caller's thread, the judge's calls on the library's background loop. An exception here,
        Ctrl-C included, cancels them.

        Args:
            prompts: one prompt a group, text or message list.
            responses: one sequence of K ≥ 1 responses a prompt, each text or messages (:mod:`rmcore._base.prompt`); K
                may differ. Equal responses are decided by rule: 0. Different ones whose inputs are equal (cut to the
                limit, say) have no preference, u = Inf, unless the judge decides: they are first in line.
            critiques: for each response its critiques, each a text that is read behind it
                (:mod:`rmcore.model.critiques`). Preferences are means over them, and u counts how far they differ. In
                concat mode one at most.
            principles: for each group what the judge is to judge it by, empty for its own. The head knows of none.
            max_length: most tokens of a text in this call; None is the backbone's own limit.
            overlong: what happens to longer ones (:data:`~rmcore.model.text.OverlongPolicy`); None is the backbone's.
                With ``no-reward`` such a response has no preference but what a judge says, and its siblings are scored
                as if it were not there.
            on_error: ``raise`` raises the first group's error. ``return`` leaves out the groups that cannot be scored
                (wrong type, over-long text, hidden rows that are not finite) and puts their errors into
                ``GroupScores.errors``; the others are scored, routed and judged in one call, as if they were alone.
            progress: called with (stage, done, total); for the stage ``judging`` from another thread.

        Returns:
            One :class:`GroupScore` a prompt, in order; but for those in ``errors``.

        Raises:
            InputError: wrong nesting, nothing to score, or an over-long text under the policy ``error``; in any case
                before a judge is asked and before a step of the router begins.
            NonFiniteError: the backbone produced NaN or Inf and ``nonfinite`` is ``raise``.
        """
        given = critiques, principles, max_length, overlong, on_error, progress
        return self._runner.run(self._call_with_texts(prompts, responses, *given))

    async def score_async(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        critiques: Critiques | None = None,
        principles: Sequence[str] | None = None,
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
        on_error: OnError = "raise",
        progress: Progress | None = None,
    ) -> GroupScores:
        """As :meth:`score`, for callers in an event loop: the backbone runs in a thread, the judge is awaited.

        Cancelling it cancels the judge's calls and stops the backbone after its current forward pass; when the
        CancelledError comes out, neither a thread nor a task is left.
        """
        given = critiques, principles, max_length, overlong, on_error, progress
        return await self._runner.run_async(self._call_with_texts(prompts, responses, *given))

    def score_hidden(
        self,
        hidden: Tensor,
        group_sizes: Sequence[int] | Tensor,
        *,
        prompts: Sequence[Prompt] | None = None,
        responses: Sequence[Sequence[Response]] | None = None,
        states: Sequence[Sequence[int]] | None = None,
        on_error: OnError = "raise",
    ) -> GroupScores:
        """Score groups whose hidden states are already at hand: a trainer's own forward pass, for instance.

        Args:
            hidden: difference mode: (ΣK, h), one row a response, group after group. Concat mode: a row for every
                ordered pair (i, j), i ≠ j, row-major (only i < j with ``orders="one"``).
            group_sizes: K of each group.
            prompts: texts for the judge; needed with ``responses`` if pairs may be routed.
            responses: as in :meth:`score`.
            states: difference mode: for each group how many rows each response has, one for each critique that it was
                read behind; its rows follow each other (:mod:`rmcore.model.critiques`). None: one each.
            on_error: as in :meth:`score`.

        Raises as :meth:`score`.
        """
        return self._runner.run(self._call_with_rows(hidden, group_sizes, prompts, responses, states, on_error))

    async def score_hidden_async(
        self,
        hidden: Tensor,
        group_sizes: Sequence[int] | Tensor,
        *,
        prompts: Sequence[Prompt] | None = None,
        responses: Sequence[Sequence[Response]] | None = None,
        states: Sequence[Sequence[int]] | None = None,
        on_error: OnError = "raise",
    ) -> GroupScores:
        """As :meth:`score_hidden`, for callers in an event loop: the head runs in a thread, the judge is awaited."""
        return await self._runner.run_async(
            self._call_with_rows(hidden, group_sizes, prompts, responses, states, on_error)
        )

    def best_of(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        critiques: Critiques | None = None,
        penalty: float = 0.0,
        ties: Ties = "first",
        measure: Measure = "u",
        max_length: int | None = None,
        overlong: OverlongPolicy | None = None,
    ) -> list[BestOf]:
        """Score groups and choose the best response of each (:func:`rmcore.engine.selection.best_of`).

        Args:
            prompts: one prompt a group.
            responses: its responses.
            critiques: as in :meth:`score`.
            penalty: c ≥ 0: choose by mean preference minus c times uncertainty.
            measure: which uncertainty, as of that function.
            ties: which of several equally good ones: the first, the shortest or the longest text.
            max_length: as in :meth:`score`, as is the next.
            overlong: what happens to over-long texts.

        Raises as :meth:`score` and :func:`~rmcore.engine.selection.best_of`.
        """
        check_selection(penalty, ties, measure)
        self.check_measure(measure)
        scores = self.score(prompts, responses, critiques=critiques, max_length=max_length, overlong=overlong)
        return best_of(scores, responses, penalty=penalty, ties=ties, measure=measure)

    def check_measure(self, measure: Measure) -> None:
        """Raise InputError for a measure of responses that this engine's uncertainty does not tell."""
        check_measured(measure, getattr(self.estimator, "measures", ()))

    # -- a call, from its arguments ----------------------------------------------------------------------------------

    @property
    def _runner(self) -> CallRunner:
        return CallRunner(
            self.judge, self.router, self.clock, self.nonfinite, self.epsilon, tokens=self.micro_batch_tokens
        )

    def _call_with_texts(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        critiques: Critiques | None,
        principles: Sequence[str] | None,
        max_length: int | None,
        overlong: OverlongPolicy | None,
        on_error: OnError,
        progress: Progress | None,
    ) -> ScoreCall:
        if self.model is None:
            reject("model", "a FrozenHead", "a RewardModel to score texts; or call score_hidden")
        call = self._new_call(on_error)
        call.progress, call.encoding = progress, EncodingStats()
        if (max_length, overlong) != (None, None):
            call.limit = self.model.backbone.text_limit(max_length, overlong)
        call.groups.check_texts(prompts, responses)
        if critiques is not None:
            call.groups.check_critiques(critiques)
        if principles is not None:
            if any(principles) and not takes_principles(self.judge):
                reject("principles", "some", "None: there is no judge that takes them")
            call.groups.check_principles(principles)
        return call

    def _call_with_rows(
        self,
        hidden: Tensor,
        group_sizes: Sequence[int] | Tensor,
        prompts: Sequence[Prompt] | None,
        responses: Sequence[Sequence[Response]] | None,
        states: Sequence[Sequence[int]] | None,
        on_error: OnError,
    ) -> ScoreCall:
        if (prompts is None) != (responses is None):
            reject("prompts, responses", "only one of them", "both or neither")
        call = self._new_call(on_error)
        call.groups.sizes = check_group_sizes(group_sizes)
        if states is not None:
            call.groups.check_states(states)
        call.groups.check_hidden(hidden)
        if prompts is not None and responses is not None:
            call.groups.check_texts(prompts, responses)
        elif not isinstance(self.router, NeverRoute):
            reject(
                "prompts, responses", "None", f"texts, since {type(self.router).__name__} may route pairs to the judge"
            )
        return call

    def _new_call(self, on_error: OnError) -> ScoreCall:
        if on_error not in ("raise", "return"):
            reject("on_error", repr(on_error), "'raise' or 'return'")
        with self._publishing:
            head, version = self.head, self.head_version
        groups = CallGroups(head.config, self.orders, self.design, on_error, learning=self.learner is not None)
        call = ScoreCall(
            self.clock,
            head,
            groups,
            self.model,
            nonfinite=self.nonfinite,
            backend=self.backend,
            estimator=self.estimator,
            variance=self.variance,
            head_version=version,
            novelty=self._runner.may_ask and head.rows is not None if self.novelty is None else self.novelty,
            kept=None if self.learner is None else [],
        )
        if self.judge_deadline_s is not None:
            call.deadline = call.started + self.judge_deadline_s
        return call
