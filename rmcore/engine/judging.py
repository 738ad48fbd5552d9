"""The judge's side of one score call: questions come in from the backbone's thread, verdicts are awaited on a loop."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rmcore._base import tracing
from rmcore._base.clock import Clock
from rmcore.judge.base import Judge, JudgeUsage, Pair, Verdict, isolated_verdicts, log_judge_error

__all__ = ["ExitError", "JudgeQueue", "Submission"]

log = logging.getLogger(__name__)

_OVERTIME_S = 2.0
"""How long past the deadline a judge may take before it is cancelled. One that keeps the pairs' deadline itself ends in
time, with the verdicts it has and what they cost; cancelled from here, both are lost."""
_PATIENCE_S = 5.0
"""How long a cancelled judge may take to end before nobody waits for it any more."""


@dataclass(eq=False)
class Submission:
    """The questions of one micro-batch.

    Attributes:
        slots: for each question, where its verdict is in ``JudgeQueue.verdicts``; equal questions share one.
        new: those asked here for the first time, the only ones that cost anything.
        usage: what they cost; None until it is known, and for ever if the judge does not say.
    """

    slots: list[int]
    new: list[Pair] = field(default_factory=list)
    new_slots: list[int] = field(default_factory=list)
    usage: JudgeUsage | None = None


class JudgeQueue:
    """Asks a judge, micro-batch by micro-batch, each distinct question once, by a deadline.

    :meth:`submit` and :meth:`close` may be called from any thread; :meth:`run` is the coroutine that does the asking.

    Args:
        judge: whom to ask; several of its ``judge`` calls may be under way at once.
        loop: where :meth:`run` will run.
        clock: of the deadline and of ``spans``.
        deadline: on the clock's scale. What is not answered by then fails with ``deadline``.
        answered: called on the loop with (verdicts there, questions so far) after every judge call.

    Attributes:
        verdicts: one a distinct question, in the order they were asked; complete once :meth:`run` has returned.
        spans: when each judge call began and ended.
        unaccounted: questions whose judge did not say what they cost.
        broken: set when :meth:`run` has failed or was cancelled, so that nobody need ask further.
    """

    def __init__(
        self,
        judge: Judge,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        *,
        deadline: float | None = None,
        answered: Callable[[int, int], None] | None = None,
    ) -> None:
        self.verdicts: list[Verdict] = []
        self.spans: list[tuple[float, float]] = []
        self.unaccounted = 0
        self.broken = threading.Event()
        self._judge, self._loop, self._clock, self._deadline = judge, loop, clock, deadline
        self._answered = answered
        self._slots: dict[bytes, int] = {}
        self._inbox: asyncio.Queue[Submission | None] = asyncio.Queue()
        self._done = 0

    def submit(self, questions: Sequence[Pair]) -> Submission:
        """Hand over the questions of a micro-batch and go on; the verdicts are there when :meth:`run` has returned."""
        submission = Submission([])
        for question in questions:
            # Texts may be long and many: a digest is kept, not the text. repr, because it cannot fail on any text.
            text = repr((question.prompt, question.first, question.second, question.principle))
            key = hashlib.sha256(text.encode()).digest()
            if key not in self._slots:
                self._slots[key] = len(self.verdicts)
                submission.new.append(question)
                submission.new_slots.append(len(self.verdicts))
                self.verdicts.append(Verdict.none("not_asked"))
            submission.slots.append(self._slots[key])
        if submission.new:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, submission)
        else:
            submission.usage = JudgeUsage()
        return submission

    def close(self) -> None:
        """No more questions will come."""
        self._loop.call_soon_threadsafe(self._inbox.put_nowait, None)

    async def run(self) -> None:
        """Ask until :meth:`close`, and return when all is answered. Cancelling it cancels every judge call.

        Raises nothing on a judge's account but :class:`ExitError`; what ``answered`` raises gets out.
        """
        try:
            async with asyncio.TaskGroup() as group:
                while (submission := await self._inbox.get()) is not None:
                    group.create_task(self._answer(submission))
        except BaseExceptionGroup as errors:
            self.broken.set()
            raise errors.exceptions[0] from None
        except BaseException:
            self.broken.set()
            raise

    async def _answer(self, submission: Submission) -> None:
        started = self._clock.now()
        with tracing.span("rmcore.judge", rmcore__questions=len(submission.new)) as span:
            verdicts, reported = await self._verdicts(submission.new)
            span.set(rmcore__failed=sum(verdict.failed for verdict in verdicts))
        self.spans.append((started, self._clock.now()))
        for slot, verdict in zip(submission.new_slots, verdicts, strict=True):
            self.verdicts[slot] = verdict
        if reported:
            submission.usage = JudgeUsage.total(v.usage for v in verdicts)
        self._done += len(verdicts)
        if self._answered is not None:
            self._answered(self._done, len(self.verdicts))

    async def _verdicts(self, questions: list[Pair]) -> tuple[list[Verdict], bool]:
        """One judge call, ended by force where it would not end in time; and whether it said what it cost."""
        left = None if self._deadline is None else self._deadline - self._clock.now()
        if left is not None and left <= 0:
            return [Verdict.none("deadline")] * len(questions), True
        call = asyncio.create_task(self._call(questions))
        overtime = None if left is None else asyncio.create_task(self._clock.sleep(left + _OVERTIME_S))
        try:
            await asyncio.wait({call} if overtime is None else {call, overtime}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                message = "the judge ran %.0f s past the deadline; its %d pairs get no verdict"
                log.error(message, _OVERTIME_S, len(questions))
                await _cancel(call)
        except asyncio.CancelledError:
            await _cancel(call)
            raise
        finally:
            if overtime is not None:
                overtime.cancel()
        if call.cancelled() or not call.done():
            self.unaccounted += len(questions)
            return [Verdict.none("deadline")] * len(questions), False
        verdicts, error = call.result()  # on time, or the judge made something of being cancelled
        if error is not None:
            log_judge_error(error, "the judge", len(verdicts))
        unreported = len(verdicts) if error is not None else sum(v.reason == "not_a_verdict" for v in verdicts)
        self.unaccounted += unreported
        return verdicts, not unreported

    async def _call(self, questions: list[Pair]) -> tuple[list[Verdict], BaseException | None]:
        try:
            return await isolated_verdicts(self._judge, questions)
        except (KeyboardInterrupt, SystemExit) as error:
            raise ExitError(error) from error  # as they are, these two would stop the loop itself


class ExitError(Exception):
    """Carries a KeyboardInterrupt or SystemExit out of a task."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


async def _cancel(call: asyncio.Task[Any]) -> None:
    """Cancel a judge call and wait for its end, but not for ever: a judge may be anybody's code."""
    call.cancel()
    _, pending = await asyncio.wait((call,), timeout=_PATIENCE_S)
    if pending:
        log.error("the judge did not end within %.0f s of being cancelled; it is left to itself", _PATIENCE_S)
