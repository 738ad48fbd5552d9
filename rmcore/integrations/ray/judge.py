"""One judge for all actors of a cluster: in an actor of its own, so that limits, budgets and its store are one.

    scorers  →  ActorJudge  →  SharedJudge, one actor  →  ChatJudge  →  endpoint

The real judge's limits on requests and its store work as in one process, since there is one process. A question that
two scorers ask is asked once, and so is one asked again by a scorer that was killed and started anew: what was answered
is kept, and what is under way is waited for.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore.engine.routing import Budget
from rmcore.integrations.ray.cluster import ray_module
from rmcore.judge.base import Judge, JudgeUsage, Pair, Verdict, checked_verdicts, close_judge, takes_principles
from rmcore.judge.keys import pair_key

__all__ = ["BUDGET", "ActorJudge", "SharedJudge", "start_judge"]

BUDGET = "budget"
"""``Verdict.reason`` of a pair that the budget had no room for."""
_CONCURRENT_CALLS = 4096


class SharedJudge:
    """The judge behind all scorers; a class that Ray makes an actor of, and that works without.

    Args:
        make: makes the judge, in the actor.
        budgets: makes hard limits over all scorers. Which pairs they still have room for is a matter of who asks first.
        state: file that keeps what the budgets have spent over a restart of the actor, and of the job.
    """

    def __init__(
        self,
        make: Callable[[], Judge | None],
        budgets: Callable[[], Sequence[Budget]] = tuple,
        state: Path | None = None,
    ) -> None:
        inner = make()
        if inner is None:
            reject("make", "None", "what makes a judge")
        self.inner = inner
        self.takes_principles = takes_principles(inner)
        self.budgets = list(budgets())
        self.usage = JudgeUsage()
        self.asked = self.repeated = self.refused = 0
        self._state = state
        self._answers: dict[str, asyncio.Future[Verdict]] = {}
        self._asking: set[asyncio.Task[None]] = set()
        if state is not None and state.exists():
            kept = json.loads(state.read_text(encoding="utf-8"))
            if not isinstance(kept, list) or len(kept) != len(self.budgets):
                reject("state", str(state), f"the state of {len(self.budgets)} budgets")
            for budget, known in zip(self.budgets, kept, strict=True):
                budget.load_state_dict(known, str(state))

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order; deadlines are seconds from now.

        A pair with a principle of its own, which the real judge would not read, has none (``no_principles``).
        """
        if not self.takes_principles and any(pair.principle for pair in pairs):
            others = iter(await self.judge([pair for pair in pairs if not pair.principle]))
            return [Verdict.none("no_principles") if pair.principle else next(others) for pair in pairs]
        loop, mine = asyncio.get_running_loop(), {}
        waited: list[asyncio.Future[Verdict]] = []
        for pair in pairs:
            key = f"{pair_key(pair.prompt, pair.first, pair.second)}{pair.principle}"
            if key not in self._answers:
                self._answers[key] = loop.create_future()
                mine[key] = replace(pair, deadline=None if pair.deadline is None else time.monotonic() + pair.deadline)
            else:
                self.repeated += 1
            waited.append(self._answers[key])
        own = {id(self._answers[key]) for key in mine}
        if mine:
            # A task of its own: what was asked is paid for, so it is kept even if the scorer that asked is killed.
            asking = asyncio.ensure_future(self._ask(mine))
            self._asking.add(asking)  # the loop itself holds tasks weakly
            asking.add_done_callback(self._asking.discard)
        found = await asyncio.gather(*(asyncio.shield(future) for future in waited))
        verdicts = []
        for verdict, future in zip(found, waited, strict=True):
            verdicts.append(verdict if id(future) in own else replace(verdict, usage=JudgeUsage(cache_hits=1)))
            own.discard(id(future))
        return verdicts

    def stats(self) -> dict[str, Any]:
        """What happened so far, JSON values."""
        return {
            "asked": self.asked,
            "repeated": self.repeated,
            "refused": self.refused,
            "usage": asdict(replace(self.usage, latencies_s=())),
            "budgets": [budget.stats().to_dict() for budget in self.budgets],
        }

    async def close(self) -> None:
        """Close the judge's connections and store."""
        await close_judge(self.inner)

    async def _ask(self, questions: dict[str, Pair]) -> None:
        futures = {key: self._answers[key] for key in questions}
        try:
            verdicts = await self._within_budgets(list(questions.values()))
        except Exception as error:
            verdicts = [Verdict.none(f"raised_{type(error).__name__}")] * len(questions)
        for (key, future), verdict in zip(futures.items(), verdicts, strict=True):
            if verdict.failed:  # may be asked again
                del self._answers[key]
            future.set_result(verdict)

    async def _within_budgets(self, pairs: list[Pair]) -> list[Verdict]:
        room, reservations = len(pairs), []
        for budget in self.budgets:
            reservations.append(budget.reserve(room))
            room = reservations[-1].pairs
        held = [budget.shrink(r, room) for budget, r in zip(self.budgets, reservations, strict=True)]
        self._save()
        try:
            verdicts = await checked_verdicts(self.inner, pairs[:room])
        except BaseException:
            for budget, reservation in zip(self.budgets, held, strict=True):
                budget.settle(reservation, None)
            raise
        usage = JudgeUsage.total(verdict.usage for verdict in verdicts)
        for budget, reservation in zip(self.budgets, held, strict=True):
            budget.settle(reservation, usage)
        self.usage = replace(self.usage + usage, latencies_s=())
        self.asked += room
        self.refused += len(pairs) - room
        self._save()
        return verdicts + [Verdict.none(BUDGET)] * (len(pairs) - room)

    def _save(self) -> None:
        """Keep what is spent; what is in flight counts, since an actor that dies cannot settle it."""
        if self.budgets and self._state is not None:
            write_atomic(self._state, json.dumps([budget.state_dict() for budget in self.budgets]))


class ActorJudge:
    """A :class:`~rmcore.judge.base.Judge` that asks a :class:`SharedJudge` in its actor; what scorers are given.

    Args:
        actor: its handle.
    """

    takes_principles = True
    """The judge behind it says of each pair whether it does."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order."""
        now = time.monotonic()  # of this machine: the actor's clock is another
        sent = [pair if pair.deadline is None else replace(pair, deadline=pair.deadline - now) for pair in pairs]
        verdicts: list[Verdict] = await self.actor.judge.remote(sent)
        return verdicts

    def stats(self) -> dict[str, Any]:
        """What all scorers together have asked so far."""
        found: dict[str, Any] = ray_module().get(self.actor.stats.remote())
        return found

    def close(self) -> None:
        """Close the judge and end its actor."""
        ray = ray_module()
        ray.get(self.actor.close.remote())
        ray.kill(self.actor)


def start_judge(
    make: Callable[[], Judge | None],
    budgets: Callable[[], Sequence[Budget]] = tuple,
    *,
    state: Path | None = None,
    name: str | None = None,
    **options: Any,
) -> ActorJudge:
    """Start one judge for all actors, and return what scorers ask.

    Args:
        make: makes the judge, in its actor; ``functools.partial(ChatJudge, url, model, store=...)``, say. The store's
            file is where that actor runs: this machine's, unless ``options`` say otherwise.
        budgets: makes hard limits over all scorers together, in the actor too.
        state: file that keeps what the budgets have spent.
        name: of the actor; None for none.
        **options: of the actor, such as ``num_cpus`` or ``scheduling_strategy``.

    Raises MissingPackageError without ray.
    """
    ray = ray_module()
    if "scheduling_strategy" not in options:
        strategies = ray_module("ray.util.scheduling_strategies")
        here = ray.get_runtime_context().get_node_id()
        options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, **options}
    actor = ray.remote(SharedJudge).options(name=name, max_concurrency=_CONCURRENT_CALLS, **options)
    return ActorJudge(actor.remote(make, budgets, state))
