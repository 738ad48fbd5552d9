"""One judge for all actors of a cluster: in an actor of its own, so that limits, budgets and its store are one.

    scorers  →  ActorJudge  →  SharedJudge, one actor  →  ChatJudge  →  endpoint

The real judge's limits on requests and its store work as in one process, since there is one process. A question that
two scorers ask is asked once, and so is one asked again by a scorer that was killed and started anew: what was answered
is kept, and what is under way is waited for.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore._base.loop import own_thread
from rmcore._base.numbers import Within, check_number
from rmcore.engine.routing import Budget
from rmcore.engine.routing.routers import Reservation
from rmcore.integrations.ray.cluster import ray_module
from rmcore.judge.base import (
    Judge,
    JudgeUsage,
    Pair,
    Verdict,
    checked_verdicts,
    close_judge,
    log_judge_error,
    takes_principles,
)
from rmcore.judge.keys import pair_key

__all__ = ["BUDGET", "ActorJudge", "SharedJudge", "start_judge"]

BUDGET = "budget"
"""``Verdict.reason`` of a pair that the budget had no room for."""

log = logging.getLogger(__name__)

_CONCURRENT_CALLS = 4096
_CLOSE_S = 15.0


class SharedJudge:
    """The judge behind all scorers; a class that Ray makes an actor of, and that works without.

    Args:
        make: makes the judge, in the actor.
        budgets: makes hard limits over all scorers. Which pairs they still have room for is a matter of who asks first.
        state: file that keeps what the budgets have spent over a restart of the actor, and of the job.
        keep: answers that are remembered, the latest ones; a kilobyte or two each. Older ones are the store's, and
            without one are bought again where they are asked for again.
    """

    buys_once = True

    def __init__(
        self,
        make: Callable[[], Judge | None],
        budgets: Callable[[], Sequence[Budget]] = tuple,
        state: Path | None = None,
        keep: int = 100_000,
    ) -> None:
        check_number("keep", keep, Within(whole=True, least=0))
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
        self._keep = keep
        self._kept: deque[str] = deque()  # of the answers, those that are known, the oldest first
        self._asking: set[asyncio.Task[list[Verdict]]] = set()
        self._saving = asyncio.Lock()
        if state is not None and state.exists():
            kept = json.loads(state.read_text(encoding="utf-8"))
            if not isinstance(kept, list) or len(kept) != len(self.budgets):
                reject("state", str(state), f"the state of {len(self.budgets)} budgets")
            for budget, known in zip(self.budgets, kept, strict=True):
                budget.load_state_dict(known, str(state))

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict a pair, in order; deadlines are seconds from now.

        A question under way for somebody else is waited for until the pair's own deadline, and asked again where it
        failed only for the other's. A pair with a principle of its own, which the real judge would not read, has none
        (``no_principles``).
        """
        if not self.takes_principles and any(pair.principle for pair in pairs):
            others = iter(await self.judge([pair for pair in pairs if not pair.principle]))
            return [Verdict.none("no_principles") if pair.principle else next(others) for pair in pairs]
        now = time.monotonic()
        asked = [pair if pair.deadline is None else replace(pair, deadline=now + pair.deadline) for pair in pairs]
        verdicts: list[Verdict] = [Verdict.none("not_asked")] * len(asked)
        missing = list(range(len(asked)))
        while missing:
            flights, own = self._join([asked[k] for k in missing])
            again = []
            for k, flight in zip(missing, flights, strict=True):
                until = asked[k].deadline
                # The judge itself keeps the deadline of what was asked here, and tells what it cost.
                bound = None if until is None or flight in own else max(0.0, until - time.monotonic())
                await asyncio.wait({flight}, timeout=bound)  # unlike awaiting it, this leaves it alone when cancelled
                if not flight.done():
                    verdicts[k] = Verdict.none("deadline")
                elif flight in own:
                    own.discard(flight)
                    verdicts[k] = flight.result()
                elif flight.result().reason == "deadline" and (until is None or time.monotonic() < until):
                    again.append(k)
                else:
                    verdicts[k] = replace(flight.result(), usage=JudgeUsage(cache_hits=1))
            missing = again
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

    def _join(self, pairs: list[Pair]) -> tuple[list[asyncio.Future[Verdict]], set[asyncio.Future[Verdict]]]:
        """Where the answer to each pair will be, and those of them that are asked for now."""
        loop, mine = asyncio.get_running_loop(), dict[str, Pair]()
        flights = []
        for pair in pairs:
            key = f"{pair_key(pair.prompt, pair.first, pair.second)}{pair.principle}"
            if key not in self._answers:
                self._answers[key] = loop.create_future()
                mine[key] = pair
            else:
                self.repeated += 1
            flights.append(self._answers[key])
        own = {self._answers[key] for key in mine}
        if mine:
            # A task of its own, in a context of its own: what was asked is paid for, so it is kept even if the scorer
            # that asked is killed, and belongs to nobody who may be cancelled.
            context = contextvars.Context()
            asking = loop.create_task(self._within_budgets(list(mine.values())), context=context)
            self._asking.add(asking)  # the loop itself holds tasks weakly
            asking.add_done_callback(partial(self._answered, list(mine)))
        return flights, own

    def _answered(self, keys: list[str], asking: asyncio.Task[list[Verdict]]) -> None:
        """However asking ended, and if it never began: whoever waits is told."""
        self._asking.discard(asking)
        error = asyncio.CancelledError() if asking.cancelled() else asking.exception()
        if error is not None:
            log_judge_error(error, "the shared judge", len(keys))
        reason = "" if error is None else f"raised_{type(error).__name__}"
        verdicts = asking.result() if error is None else [Verdict.none(reason)] * len(keys)
        for key, verdict in zip(keys, verdicts, strict=True):
            flight = self._answers[key]
            if verdict.failed:  # may be asked again
                del self._answers[key]
            else:
                self._kept.append(key)
            flight.set_result(verdict)
        while len(self._kept) > self._keep:
            del self._answers[self._kept.popleft()]

    async def _within_budgets(self, pairs: list[Pair]) -> list[Verdict]:
        held, room = self._reserve(len(pairs))
        usage: JudgeUsage | None = JudgeUsage()  # nothing is asked yet
        try:
            if not await self._saved():
                # Without its books a budget buys nothing: what they do not hold would be spent again after a restart.
                return [Verdict.none("store")] * len(pairs)
            usage = None
            verdicts = await checked_verdicts(self.inner, pairs[:room])
            usage = JudgeUsage.total(verdict.usage for verdict in verdicts)
        finally:
            for budget, reservation in held:
                self._settle(budget, reservation, usage)
        self.usage = replace(self.usage + usage, latencies_s=())
        self.asked += room
        self.refused += len(pairs) - room
        await self._saved()  # where not, the books still hold what was reserved, which is no less
        return verdicts + [Verdict.none(BUDGET)] * (len(pairs) - room)

    def _reserve(self, pairs: int) -> tuple[list[tuple[Budget, Reservation]], int]:
        """What each budget has set aside, and for how many of the pairs all have room."""
        held: list[tuple[Budget, Reservation]] = []
        room = pairs
        for budget in self.budgets:
            held.append((budget, budget.reserve(room)))
            room = held[-1][1].pairs
        return [(budget, budget.shrink(reservation, room)) for budget, reservation in held], room

    def _settle(self, budget: Budget, reservation: Reservation, usage: JudgeUsage | None) -> None:
        try:
            budget.settle(reservation, usage)
        except Exception:  # a judge's usage may be anybody's, and the verdicts are in
            log.exception("the judge's usage cannot be booked; what was reserved counts as spent")
            budget.settle(reservation, None)

    async def _saved(self) -> bool:
        """Keep what is spent, in a thread; what is in flight counts, since an actor that dies cannot settle it."""
        if not self.budgets or self._state is None:
            return True
        async with self._saving:  # one after the other: the latest is what stays
            books = json.dumps([budget.state_dict() for budget in self.budgets])
            try:
                await own_thread(partial(write_atomic, self._state, books), "rmcore-budgets", daemon=True)
            except OSError:
                log.exception("%s: what the budgets have spent could not be kept", self._state)
                return False
        return True


class ActorJudge:
    """A :class:`~rmcore.judge.base.Judge` that asks a :class:`SharedJudge` in its actor; what scorers are given.

    Args:
        actor: its handle.
    """

    takes_principles = True
    """The judge behind it says of each pair whether it does."""
    buys_once = True

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
        try:
            ray.get(self.actor.close.remote(), timeout=_CLOSE_S)
        except Exception:  # it hangs, or is gone already
            log.warning("the shared judge did not close within %g s and is ended", _CLOSE_S, exc_info=True)
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
