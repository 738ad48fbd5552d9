"""A score call from its start to its result: the uncertainty-routing algorithm, micro-batch by micro-batch.

While the judge answers for the first ones, the backbone runs on the next. What the steps are is in
:mod:`rmcore.engine.steps`, how they run side by side in :mod:`rmcore.engine.overlap`.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass

from rmcore._base import tracing
from rmcore._base.clock import Clock
from rmcore._base.loop import background_loop
from rmcore.engine.groups import GroupScores
from rmcore.engine.judging import JudgeQueue
from rmcore.engine.monitor import note_scores
from rmcore.engine.overlap import run_alongside, run_alongside_async
from rmcore.engine.routing import NeverRoute, Router, is_budgeted
from rmcore.engine.score_call import ScoreCall
from rmcore.engine.scored_part import ScoredPart
from rmcore.engine.steps import plan, route, score_pairs, settle
from rmcore.judge.base import Judge

__all__ = ["CallRunner"]


@dataclass(frozen=True, slots=True)
class CallRunner:
    """What a call is run with; the fields are those of :class:`~rmcore.engine.engine.RewardEngine`.

    Attributes:
        judge: decides routed pairs, where there is one.
        router: chooses them.
        clock: of deadlines and seconds.
        nonfinite: ``raise`` or ``route``.
        epsilon: of the judge's logit.
        tokens: about how many a micro-batch has; None for the engine's choice.
    """

    judge: Judge | None
    router: Router
    clock: Clock
    nonfinite: str
    epsilon: float
    tokens: int | None

    @property
    def may_ask(self) -> bool:
        """Whether a pair may go to the judge."""
        return self.judge is not None and not (isinstance(self.router, NeverRoute) and self.nonfinite == "raise")

    def run(self, call: ScoreCall) -> GroupScores:
        """The backbone in this thread, the judge's calls on the library's background loop."""
        try:
            with tracing.span("rmcore.score") as span:
                if self.may_ask:
                    call.queue = self._judge_queue(call, background_loop())
                run_alongside(functools.partial(self._work, call), call.queue)
                return note_scores(span, call.result(self.epsilon))
        finally:
            settle(call, self.router)

    async def run_async(self, call: ScoreCall) -> GroupScores:
        """The backbone in a thread, the judge awaited."""
        try:
            with tracing.span("rmcore.score") as span:
                if self.may_ask:
                    call.queue = self._judge_queue(call, asyncio.get_running_loop())
                await run_alongside_async(functools.partial(self._work, call), call.queue, call.unwanted)
                return note_scores(span, call.result(self.epsilon))
        finally:
            settle(call, self.router)

    def _judge_queue(self, call: ScoreCall, loop: asyncio.AbstractEventLoop) -> JudgeQueue:
        assert self.judge is not None
        return JudgeQueue(self.judge, loop, self.clock, deadline=call.deadline, answered=call.report_answers)

    # -- the algorithm, step by step ---------------------------------------------------------------------------------

    def _work(self, call: ScoreCall) -> None:
        """Everything but the judge: encoding, then backbone, head and router, micro-batch by micro-batch."""
        if call.groups.hidden is None:
            call.encode()
        if not call.groups.sizes:
            return  # no group is left
        if is_budgeted(self.router):
            self.router.begin_step()
        batches = plan(call, overlap=self._may_overlap, tokens=self.tokens)
        call.micro_batches, call.why_no_overlap = len(batches), self._why_no_overlap(len(batches))
        for batch in batches:
            part = score_pairs(call, batch, getattr(self.router, "sketch", None) if self.may_ask else None)
            part.first = sum(len(earlier.groups) for earlier in call.parts)
            call.parts.append(part)
            if not call.why_no_overlap:
                route(call, part, self.router, may_ask=self.may_ask)
        if call.why_no_overlap:
            call.parts = [ScoredPart.joined(call.parts)]
            route(call, call.parts[0], self.router, may_ask=self.may_ask)

    @property
    def _whole_batch(self) -> bool:
        return getattr(self.router, "whole_batch", True)

    @property
    def _may_overlap(self) -> bool:
        return self.may_ask and not self._whole_batch and not isinstance(self.router, NeverRoute)

    def _why_no_overlap(self, batches: int) -> str:
        if not self.may_ask:
            return "no judge is asked"
        if self._whole_batch:
            return f"{type(self.router).__name__} chooses from the whole batch"
        return "one micro-batch" if batches == 1 else ""
