"""Dynamic batching: groups from any number of callers, scored together, each caller given its own.

    callers  →  queue (first in, first out)  →  batch  →  engine.score_async  →  callers

While the judge answers for one batch the backbone may run on the next, but never on two at once. A batch is closed as
soon as the backbone is free and either the batch is full or its first group has waited ``max_wait_s``; under load the
queue fills by itself while the backbone is busy, so waiting costs something only when there is little to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rmcore._base.clock import Clock, SystemClock
from rmcore._base.errors import InputError, reject
from rmcore._base.numbers import COUNT, Within, check_number
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_groups, text_length
from rmcore.engine.engine import RewardEngine
from rmcore.engine.group_score import GroupScore
from rmcore.engine.groups import GroupScores
from rmcore.integrations.server.assembly import BusyError
from rmcore.integrations.server.stream import StreamStats
from rmcore.judge.base import JudgeUsage

__all__ = ["BatchScorer", "BatchStats", "ScoredGroup"]

log = logging.getLogger(__name__)

_PACE_MEMORY = 0.3  # weight of the newest batch in the running mean of seconds a group
_RETRY_AFTER_S = (0.1, 60.0)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """One caller's group.

    Attributes:
        group: as ``engine.score`` returns it.
        usage: what its verdicts cost. A question that a group before it in the batch had asked too counts there.
        waited_s: from the call to the start of its batch.
        scoring_s: its batch's, from start to end.
        batch: groups in its batch.
    """

    group: GroupScore
    usage: JudgeUsage
    waited_s: float
    scoring_s: float
    batch: int


@dataclass
class BatchStats:
    """What happened so far; pairs are counted by who decided them, as in ``GroupScores.summary()``."""

    batches: int = 0
    groups: int = 0
    responses: int = 0
    failed_groups: int = 0
    withdrawn_groups: int = 0
    refused_groups: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    flips: int = 0
    unscorable_responses: int = 0
    unaccounted_questions: int = 0
    usage: JudgeUsage = field(default_factory=JudgeUsage)
    stream: StreamStats = field(default_factory=StreamStats)


@dataclass(eq=False)
class _Request:
    prompt: Canonical
    responses: Sequence[Canonical]
    principle: str
    characters: int
    arrived: float
    future: asyncio.Future[ScoredGroup]


class BatchScorer:
    """Puts groups of many callers together into batches, on one event loop.

    Args:
        engine: scores the batches. A router that looks at the whole batch looks at what happened to come together.
        max_groups: groups in a batch at most.
        max_characters: characters the backbone reads for a batch, about: a batch is closed when it has as many. None
            for no limit; the engine splits large batches by tokens anyhow.
        max_wait_s: how long the first group of a batch waits for company while the backbone is idle.
        max_queue: groups waiting for a batch at most; more are refused with
            :class:`~rmcore.integrations.server.members.BusyError`.
        max_in_flight: batches under way at most, those included that only wait for the judge.
        clock: of waits and of the seconds reported; a seam for tests.
        observe: called with each batch's groups when it is done, for histograms.
        save_state: called in a thread when a batch is scored, before its answers go out; what it raises is logged.
    """

    def __init__(
        self,
        engine: RewardEngine,
        *,
        max_groups: int = 64,
        max_characters: int | None = None,
        max_wait_s: float = 0.004,
        max_queue: int = 1024,
        max_in_flight: int = 4,
        clock: Clock | None = None,
        observe: Callable[[Sequence[ScoredGroup]], None] | None = None,
        save_state: Callable[[], None] | None = None,
    ) -> None:
        limits = (("max_groups", max_groups), ("max_queue", max_queue), ("max_in_flight", max_in_flight))
        for name, value in limits:
            check_number(name, value, COUNT, "at least 1")
        if max_characters is not None:
            check_number("max_characters", max_characters, COUNT, "at least 1, or None")
        check_number("max_wait_s", max_wait_s, Within(least=0), "seconds, at least 0")
        self.engine = engine
        self.max_groups = max_groups
        self.max_characters = max_characters
        self.max_wait_s = max_wait_s
        self.max_queue = max_queue
        self.max_in_flight = max_in_flight
        self.clock: Clock = clock or SystemClock()
        self.stats = BatchStats()
        self._observe = observe
        self._save_state = save_state
        self._queue: deque[_Request] = deque()
        self._characters = 0
        self._full = asyncio.Event()
        self._room = asyncio.Semaphore(max_in_flight)
        self._backbone = asyncio.Semaphore(1)
        self._dispatcher: asyncio.Task[None] | None = None
        self._flights: set[asyncio.Task[None]] = set()
        self._pace_s: float | None = None
        self._last_end = 0.0
        self._draining = False

    @property
    def queued(self) -> int:
        """Groups waiting for a batch now."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Batches under way now."""
        return len(self._flights)

    @property
    def retry_after_s(self) -> float:
        """Seconds in which the queue of now would be worked off, at the pace of late; 1 while there is no pace yet."""
        low, high = _RETRY_AFTER_S
        return 1.0 if self._pace_s is None else min(max(self._pace_s * (len(self._queue) + 1), low), high)

    async def score(
        self, prompt: Prompt, responses: Sequence[Response], *, principle: str = "", admitted: bool = False
    ) -> GroupScore:
        """Score one group in the next batch that has room.

        Args:
            prompt: text or message list.
            responses: K ≥ 1 texts.
            principle: what the judge is to judge it by, empty for its own.
            admitted: the group was accepted earlier, so neither a full queue nor draining refuses it.

        Raises:
            InputError: the group cannot be scored. Its batch mates are none the wiser.
            BusyError: ``max_queue`` groups wait, or the scorer is draining.
        """
        return (await self.submit([(prompt, responses)], principle=principle, admitted=admitted))[0].group

    async def submit(
        self, groups: Sequence[tuple[Prompt, Sequence[Response]]], *, principle: str = "", admitted: bool = False
    ) -> list[ScoredGroup]:
        """Score several groups, in as few batches as there is room for; all are accepted or none is.

        Cancelling this withdraws the groups that are not in a batch yet and leaves the batches alone.

        Raises:
            InputError: the first group found that cannot be scored, named by its place if there are several; the
                others' results are lost to the caller.
            BusyError: there is no room for all of them, or the scorer is draining.
        """
        prompts, responses = canonical_groups([prompt for prompt, _ in groups], [texts for _, texts in groups])
        self._admit(len(groups), admitted)
        requests = [self._enqueue(prompt, texts, principle) for prompt, texts in zip(prompts, responses, strict=True)]
        try:
            return await asyncio.gather(*(request.future for request in requests))
        except InputError as error:
            where = next(k for k, r in enumerate(requests) if r.future.done() and _error_of(r.future) is error)
            raise InputError(str(error) if len(groups) == 1 else f"groups[{where}]: {error}") from error
        finally:
            for request in requests:
                self._withdraw(request)

    def close(self) -> None:
        """Take nothing new but what is ``admitted``."""
        self._draining = True
        self._full.set()

    async def drain(self) -> None:
        """:meth:`close`, and return when everything accepted is answered."""
        self.close()
        while self._dispatcher is not None or self._flights:
            await asyncio.wait({*self._flights, *({self._dispatcher} if self._dispatcher is not None else set())})

    # -- the queue ---------------------------------------------------------------------------------------------------

    def _admit(self, count: int, admitted: bool) -> None:
        if admitted:
            return
        if self._draining:
            self.stats.refused_groups += count
            raise BusyError("draining: no new groups are taken", 1.0)
        if count > self.max_queue:
            reject("groups", count, f"at most {self.max_queue}, the length of the queue")
        if len(self._queue) + count > self.max_queue:
            self.stats.refused_groups += count
            raise BusyError(f"{len(self._queue)} groups wait already", self.retry_after_s)

    def _enqueue(self, prompt: Canonical, responses: Sequence[Canonical], principle: str) -> _Request:
        characters = len(responses) * text_length(prompt) + sum(map(text_length, responses))
        future: asyncio.Future[ScoredGroup] = asyncio.get_running_loop().create_future()
        request = _Request(prompt, responses, principle, characters, self.clock.now(), future)
        self._queue.append(request)
        self._characters += characters
        if self._is_full():
            self._full.set()
        if self._dispatcher is None:
            # A batch belongs to none of its callers. What is called in the context of a request, Ray Serve cancels with
            # that request, and with it all the groups beside.
            own = contextvars.Context()
            self._dispatcher = asyncio.create_task(self._dispatch(), name="rmcore batches", context=own)
        return request

    def _withdraw(self, request: _Request) -> None:
        """Its caller has gone, with its result or without."""
        request.future.cancel()  # nothing happens to one that is done
        if not request.future.cancelled():
            return
        with contextlib.suppress(ValueError):  # it is in a batch already
            self._queue.remove(request)
            self._characters -= request.characters
            self.stats.withdrawn_groups += 1

    def _is_full(self) -> bool:
        many = len(self._queue) >= self.max_groups
        return many or (self.max_characters is not None and self._characters >= self.max_characters)

    def _take(self) -> list[_Request]:
        batch: list[_Request] = []
        characters = 0
        while self._queue and len(batch) < self.max_groups:
            if batch and self.max_characters is not None and characters >= self.max_characters:
                break
            request = self._queue.popleft()
            self._characters -= request.characters
            characters += request.characters
            batch.append(request)
        self._full.clear()
        if self._is_full():
            self._full.set()
        return batch

    # -- batches -----------------------------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        """Start batches until the queue is empty."""
        try:
            while self._queue:
                await self._room.acquire()
                permit = _Permit(self._backbone)
                try:
                    await permit.take()
                    await self._wait_for_company()
                    batch = self._take()
                except BaseException:
                    permit.free()
                    self._room.release()
                    raise
                if not batch:  # all were withdrawn meanwhile
                    permit.free()
                    self._room.release()
                    continue
                flight = asyncio.create_task(self._fly(batch, permit), name="rmcore batch")
                self._flights.add(flight)
                flight.add_done_callback(functools.partial(self._landed, batch, permit))
        except BaseException as error:  # there is nobody to start further batches: nobody is left waiting for one
            waiting = list(self._queue)
            self._queue.clear()
            self._characters = 0
            self._fail(waiting, _told(error))
            raise
        finally:
            self._dispatcher = None

    async def _wait_for_company(self) -> None:
        if not self._queue:
            return
        left = self._queue[0].arrived + self.max_wait_s - self.clock.now()
        if left <= 0 or self._full.is_set() or self._draining:
            return
        full = asyncio.ensure_future(self._full.wait())
        time_up = asyncio.ensure_future(self.clock.sleep(left))
        try:
            await asyncio.wait({full, time_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            full.cancel()
            time_up.cancel()

    async def _fly(self, batch: list[_Request], permit: _Permit) -> None:
        await self._score(batch, permit, self.clock.now())

    def _landed(self, batch: list[_Request], permit: _Permit, flight: asyncio.Task[None]) -> None:
        """However a batch ended, and if it never began: its places are free, and nobody is left waiting."""
        self._flights.discard(flight)
        permit.free()
        self._room.release()
        error = asyncio.CancelledError() if flight.cancelled() else flight.exception()
        if error is not None:
            self._fail(batch, _told(error))

    async def _score(self, batch: list[_Request], permit: _Permit, started: float) -> None:
        """Score a batch in one call. A group that cannot be scored fails alone, and no router is asked twice for it."""
        batch = [request for request in batch if not request.future.done()]
        if not batch:
            return
        loop = asyncio.get_running_loop()

        def progress(stage: str, done: int, total: int) -> None:
            # From the backbone's thread. Too early or never would cost time, not correctness.
            if stage != "judging" and done >= total:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(permit.free)

        prompts, responses = [request.prompt for request in batch], [request.responses for request in batch]
        principles = [request.principle for request in batch]
        how: dict[str, Any] = {"principles": principles} if any(principles) else {}
        try:
            scores = await self.engine.score_async(prompts, responses, on_error="return", progress=progress, **how)
        except Exception as error:  # not one group's: the backbone out of memory, a router that fails
            self._fail(batch, error)
            return
        await self._saved()
        for number, reason in scores.errors.items():
            self._fail([batch[number]], reason)
        scored = [request for number, request in enumerate(batch) if number not in scores.errors]
        if scored:
            self._deliver(scored, scores, started)

    async def _saved(self) -> None:
        if self._save_state is None:
            return
        try:
            await asyncio.to_thread(self._save_state)
        except Exception:  # the verdicts are paid for and in; a full disk must not lose them too
            log.exception("the state could not be saved; a restart would go on from the one before")

    def _fail(self, requests: list[_Request], error: BaseException) -> None:
        requests = [request for request in requests if not request.future.done()]
        self.stats.failed_groups += len(requests)
        if not isinstance(error, InputError):
            log.error("%d groups could not be scored", len(requests), exc_info=error)
        for request in requests:
            request.future.set_exception(error)

    def _deliver(self, batch: list[_Request], scores: GroupScores, started: float) -> None:
        ended = self.clock.now()
        seen: set[int] = set()  # a verdict is one object, shared by equal questions
        results = []
        for request, group in zip(batch, scores, strict=True):
            verdicts = [d.verdict for d in group.decisions if d.verdict is not None and id(d.verdict) not in seen]
            seen.update(map(id, verdicts))
            usage = JudgeUsage.total({id(v): v.usage for v in verdicts}.values())
            results.append(ScoredGroup(group, usage, started - request.arrived, ended - started, len(batch)))
            if not request.future.done():
                request.future.set_result(results[-1])
        self._count(scores, results, ended - max(started, self._last_end))
        self._last_end = ended
        if self._observe is not None:
            self._observe(results)

    def _count(self, scores: GroupScores, results: list[ScoredGroup], seconds: float) -> None:
        pace = seconds / len(results)
        self._pace_s = pace if self._pace_s is None else self._pace_s + _PACE_MEMORY * (pace - self._pace_s)
        stats = self.stats
        stats.batches += 1
        stats.groups += len(results)
        stats.unaccounted_questions += scores.unaccounted_questions
        stats.stream.add(scores)
        for result in results:
            group = result.group
            stats.responses += group.size
            by = Counter[str](decision.by for decision in group.decisions)
            by["head"] = group.size * (group.size - 1) // 2 - len(group.decisions)
            stats.pairs.update(by)
            stats.flips += sum(d.by == "judge" and d.verdict is not None and d.verdict.flipped for d in group.decisions)
            stats.unscorable_responses += int(group.advantages.isnan().sum())
        total = JudgeUsage.total((stats.usage, *(result.usage for result in results)))
        stats.usage = replace(total, latencies_s=())  # one a call would grow for ever


class _Permit:
    """A batch's right to the backbone: taken, and given back at the latest when the batch is done."""

    def __init__(self, semaphore: asyncio.Semaphore) -> None:
        self._semaphore, self._held = semaphore, False

    async def take(self) -> None:
        if not self._held:
            await self._semaphore.acquire()
            self._held = True

    def free(self) -> None:
        if self._held:
            self._held = False
            self._semaphore.release()


def _told(error: BaseException) -> BaseException:
    """What those are told whose batch ended with ``error``: a future that raised CancelledError would cancel them."""
    cancelled = isinstance(error, asyncio.CancelledError)
    return BusyError("the batch of this group was cancelled", 1.0) if cancelled else error


def _error_of(future: asyncio.Future[ScoredGroup]) -> BaseException | None:
    return None if future.cancelled() else future.exception()
