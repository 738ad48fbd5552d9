"""The replicas: a model each, which scores whole batches; and what an assembler asks instead of an engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from rmcore._base.errors import InputError, NonFiniteError, RmcoreError
from rmcore._base.progress import Progress
from rmcore._base.prompt import Prompt, Response
from rmcore.engine.engine import RewardEngine
from rmcore.engine.groups import GroupScores
from rmcore.engine.learning import read_version
from rmcore.engine.options import check_reliability
from rmcore.integrations.server.assembly import BusyError
from rmcore.judge.base import buys_once

__all__ = ["RemoteEngine", "Replica", "ScoreCalls"]

log = logging.getLogger(__name__)

_FAILURES = 3
"""Batches in a row that fail as a whole, after which a replica says that it is ill."""
_DEATHS = 3
"""Replicas that may die of one batch. It may be the batch's fault."""
_ASKED = 3
"""Replicas that are asked at once, at most, for a batch that none of them answers."""


class Replica:
    """One model. Serve makes deployments of the class; it works without.

    Args:
        make: makes the engine, here.
        journal: folder of the journal from which :meth:`reconfigure` takes versions of the head.
        reliability_tau: as in the server's settings; raises InputError where the model knows no such variance.
    """

    def __init__(
        self, make: Callable[[], RewardEngine], journal: Path | None = None, reliability_tau: float | None = None
    ) -> None:
        self.engine = make()
        judge = getattr(self.engine, "judge", None)
        if judge is not None and not buys_once(judge):
            log.warning(
                "%s: this replica's judge is its own and keeps nothing, so a batch that is asked of a further replica "
                "(up to %d) is paid for again; give it a store, or all replicas one judge (start_judge)",
                type(judge).__name__,
                _ASKED,
            )
        if reliability_tau is not None:
            check_reliability(reliability_tau, mode=self.engine.head.config.mode, design=self.engine.design)
        self._base = self.engine.head
        self._journal = journal
        self._failures = 0
        self._started = False
        self._backbone = asyncio.Semaphore(1)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve another version of the head; calls under way finish with theirs.

        Raises as ``read_version`` at the start. Later the version before goes on serving, and the log says why: Serve
        would end the replica.
        """
        starting, self._started = not self._started, True
        version = config.get("head_version")
        if version is None or version == self.engine.head_version:
            return
        if self._journal is None:
            raise RmcoreError(f"head_version: got {version}, expected none, since there is no journal")
        read = functools.partial(read_version, self._base, self._journal, version, backend=self.engine.backend)
        try:
            self.engine.serve_head(*await asyncio.to_thread(read))
        except Exception:
            if starting:
                raise
            log.exception("version %s of the head is not served; the one before is", version)
            return
        log.info("serving version %d of the head", version)

    async def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        principles: Sequence[str] | None = None,
    ) -> GroupScores:
        """A batch, as ``engine.score_async`` with ``on_error="return"``; all of it by one version of the head.

        The backbone runs for one batch at a time, while the judge may have several.
        """
        loop = asyncio.get_running_loop()
        held = True

        def free() -> None:
            nonlocal held
            if held:
                held = False
                self._backbone.release()

        def progress(stage: str, done: int, total: int) -> None:
            if stage != "judging" and done >= total:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(free)

        await self._backbone.acquire()
        try:
            how: dict[str, Any] = {} if principles is None else {"principles": principles}
            scores = await self.engine.score_async(prompts, responses, on_error="return", progress=progress, **how)
        except Exception:
            self._failures += 1
            raise
        finally:
            free()
        self._failures = 0
        return _portable(scores)

    def check_health(self) -> None:
        """Raise where several batches in a row have failed, a GPU that is gone, say: Serve then starts another."""
        if self._failures >= _FAILURES:
            raise RuntimeError(f"the last {self._failures} batches failed")


def _portable(scores: GroupScores) -> GroupScores:
    """The scores for another process: on the CPU, without what only this one needs, errors by kind and message."""
    table = scores.table
    table.values = table.values.cpu()
    table.parts = {name: part.cpu() for name, part in table.parts.items()}
    table.row_novelty = None if table.row_novelty is None else table.row_novelty.cpu()
    scores.__dict__.pop("groups", None)
    scores.errors = {number: _plain_error(error) for number, error in scores.errors.items()}
    return scores


def _plain_error(error: Exception) -> Exception:
    """An error whose class takes its message alone: others do not pass from process to process."""
    for kind in (NonFiniteError, InputError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


class ScoreCalls(Protocol):
    """Scores a batch on some replica; raises ``lost`` where that died."""

    async def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]], *principles: Sequence[str]
    ) -> GroupScores:
        """The scores; by a principle a group, where there are any."""
        ...


class RemoteEngine:
    """What :class:`~rmcore.integrations.server.batching.BatchScorer` takes for an engine: batches go to replicas.

    A batch whose replica dies goes to another one as it is: scoring has no side effect but questions to the judge,
    which are asked and paid for once in a shared judge or store.

    Not every death is told: where a node is gone, or a call was given to a replica as it died, an answer may never
    come. So a batch that nobody has answered for a while goes to a further replica too, and the first answer counts;
    one that is only slow is not given up.

    Args:
        call: asks a replica; cancelled, it takes the question back.
        lost: the exceptions that mean that it died.
        ask_again_s: how long a batch waits for its answer before a further replica is asked.
        principle: of the judge behind the replicas.
        takes_principles: whether it takes one with a pair.
    """

    learner = None
    # What replicas check before they serve, where somebody asks for it.
    head, design = SimpleNamespace(config=SimpleNamespace(mode="difference")), "all"

    def __init__(
        self,
        call: ScoreCalls,
        lost: tuple[type[Exception], ...],
        *,
        ask_again_s: float = 170.0,
        principle: str = "",
        takes_principles: bool = False,
    ) -> None:
        self.head_version: int | None = None
        self.judge = SimpleNamespace(principle=principle, takes_principles=takes_principles)
        self.deaths = self.asked_again = 0
        self.ask_again_s = ask_again_s
        self._call, self._lost = call, lost

    async def score_async(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        *,
        principles: Sequence[str] | None = None,
        on_error: str = "return",
        progress: Progress | None = None,
    ) -> GroupScores:
        """As the engine's. Raises BusyError where several replicas died of the batch, and what a replica raises."""
        if progress is not None:
            progress("encoding", 1, 1)  # the replicas see to their backbones themselves
        how: list[Sequence[str]] = [] if principles is None else [principles]
        scores = await self._first_answer(lambda: self._call(prompts, responses, *how), len(prompts))
        if scores.head_version is not None:
            self.head_version = scores.head_version
        return scores

    async def _first_answer(self, ask: Callable[[], Coroutine[Any, Any, GroupScores]], groups: int) -> GroupScores:
        deaths = 0
        asked = {asyncio.create_task(ask(), name="rmcore batch at a replica")}
        try:
            while deaths < _DEATHS:
                wait_s = self.ask_again_s if len(asked) < _ASKED else None
                done, asked = await asyncio.wait(asked, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                for call in done:
                    error = asyncio.CancelledError() if call.cancelled() else call.exception()
                    if not isinstance(error, (asyncio.CancelledError, *self._lost)):
                        return call.result()
                    deaths += 1
                    self.deaths += 1
                    log.warning("a replica died with a batch of %d groups (%s)", groups, type(error).__name__)
                if not done:
                    self.asked_again += 1
                    log.warning("no replica has answered for %d groups in %g s: a further one is asked", groups, wait_s)
                if deaths < _DEATHS and (not asked or not done):
                    asked.add(asyncio.create_task(ask(), name="rmcore batch at a replica"))
        finally:
            for call in asked:
                call.cancel()
        raise BusyError(f"{_DEATHS} replicas died, one after the other, with the batch this group was in", 5.0)
