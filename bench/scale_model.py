"""A serving system as events: clients, replicas of the group server, one judge behind all of them (:func:`predict`).

What is modelled is what the server does (rmcore/integrations/server/batching.py): a replica collects groups into
batches, one of which has its backbone while others wait for the judge; a batch's questions are asked when its pairs
are scored, as routers that look at a whole batch do; its answers go out together when the last verdict is in. Requests
of a replica in flight start at a few and grow by one a reply up to a ceiling (rmcore/_base/client/concurrency.py).

What is assumed: a replica's seconds are those of ``Service``, measured on one; replicas on one machine share its cores
and nothing else; groups go to the replicas in turn; the judge's seconds are drawn from a sample; it works on ``slots``
requests at a time, others wait in order; a limit of requests a minute holds over all replicas together, evenly spread.
Failures, retries and verdicts that were asked for before are left out.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from rmcore._base.errors import reject
from rmcore._base.quantile import quantiles
from rmcore.engine.comparisons import Design, comparison_pairs

__all__ = ["JudgeService", "Prediction", "Service", "Step", "predict"]

Events = Generator[Any, Any, None]

_SLICE_S = 0.01
"""Replicas that share cores take turns in slices of this length: what a scheduler does, coarsely."""


@dataclass(frozen=True)
class Service:
    """What a replica takes for its work, in seconds of one core (or one GPU).

    Attributes:
        batch_s: of a batch, whatever is in it.
        row_s: of one more response: encoding and head.
        call_s: of one call of the judge: prompt, HTTP, verdict; in the replica's one interpreter.
        group_s: of one group's request and answer: HTTP, JSON, advantages; there too.
        batch: groups in one at most.
        wait_s: for which an idle replica waits for company.
        in_flight: batches under way at most, those included that wait for the judge.
        concurrency: judge calls in flight at most, of one replica; it begins at ``first_concurrency``.
    """

    batch_s: float
    row_s: float
    call_s: float = 0.0
    group_s: float = 0.0
    batch: int = 64
    wait_s: float = 0.004
    in_flight: int = 4
    concurrency: int = 16
    first_concurrency: int = 4


@dataclass(frozen=True)
class JudgeService:
    """The judge behind all replicas.

    Attributes:
        latencies_s: a sample of seconds of a call, without waiting; one is drawn for each.
        slots: calls it works on at a time; 0: any number.
        per_minute: calls a minute at most, over all replicas; 0: any number.
        tokens: read and written by a call.
        prices: of a million of each, in the currency of the prices.
    """

    latencies_s: Sequence[float]
    slots: int = 0
    per_minute: float = 0.0
    tokens: tuple[float, float] = (0.0, 0.0)
    prices: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Step:
    """What a training step asks for, and of how many replicas.

    Attributes:
        groups: prompts.
        responses: K, of each.
        share: of the pairs that go to the judge.
        design: which pairs there are: all, a circle, or a regular design.
        orders: in which a pair is asked, 1 or 2.
        replicas: of the group server.
        cores: which the replicas share; 0: each has one of its own.
        arrive_s: seconds over which the groups arrive, evenly at random; 0: all at once.
    """

    groups: int
    responses: int
    share: float
    design: Design = "all"
    orders: int = 2
    replicas: int = 1
    cores: int = 0
    arrive_s: float = 0.0


@dataclass
class Prediction:
    """What came of a step.

    Attributes:
        seconds: from its first group's arrival to its last answer.
        latencies_s: of each group.
        calls: of the judge.
        cost: of those, by the judge's prices.
        backbone_s: in which a backbone worked, of all replicas together.
        judge_s: in which a call was worked on, of all calls together.
        waited_s: for a place at the judge or its limit, of all calls together.
    """

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    calls: int = 0
    cost: float = 0.0
    backbone_s: float = 0.0
    judge_s: float = 0.0
    waited_s: float = 0.0

    def summary(self, step: Step) -> dict[str, float]:
        """The figures of a table."""
        p50, p95 = quantiles(self.latencies_s, (0.5, 0.95))
        return {
            "seconds": self.seconds,
            "groups_per_second": step.groups / self.seconds,
            "p50_s": float(p50),
            "p95_s": float(p95),
            "calls": self.calls,
            "cost": self.cost,
            "backbone_busy": self.backbone_s / (step.replicas * self.seconds),
            "judge_calls_at_once": self.judge_s / self.seconds,
        }


def predict(step: Step, service: Service, judge: JudgeService, *, seed: int = 0) -> Prediction:
    """One step, from its first group to its last answer.

    Raises:
        InputError: a number that no system has.
    """
    _check(step, service, judge)
    return _System(step, service, judge, seed).run()


def _check(step: Step, service: Service, judge: JudgeService) -> None:
    for name, value in (("groups", step.groups), ("replicas", step.replicas), ("responses", step.responses)):
        if value < 1:
            reject(name, value, "at least 1")
    if not 0 <= step.share <= 1:
        reject("share", step.share, "between 0 and 1")
    if step.orders not in (1, 2):
        reject("orders", step.orders, "1 or 2")
    if not judge.latencies_s and step.share > 0:
        reject("latencies_s", "none", "at least one")
    for name, least in (("batch", 1), ("in_flight", 1), ("concurrency", 1), ("first_concurrency", 1)):
        if getattr(service, name) < least:
            reject(name, getattr(service, name), f"at least {least}")


class _System:
    """One run."""

    def __init__(self, step: Step, service: Service, judge: JudgeService, seed: int) -> None:
        self.step, self.service, self.judge = step, service, judge
        self.draw = random.Random(seed)
        self.env = simpy.Environment()
        self.cores = simpy.Resource(self.env, step.cores or 2 * step.replicas)
        self.slots = simpy.Resource(self.env, judge.slots) if judge.slots else None
        self.next_call = 0.0  # when the limit of calls a minute lets the next one go
        self.result = Prediction()
        self.replicas = [_Replica(self) for _ in range(step.replicas)]
        self.pairs = len(comparison_pairs(step.responses, step.design))

    def run(self) -> Prediction:
        arrivals = sorted(self.draw.uniform(0, self.step.arrive_s) for _ in range(self.step.groups))
        self.env.process(self._arrive(arrivals))
        self.env.run()
        self.result.seconds = self.env.now - arrivals[0]
        prices, tokens = self.judge.prices, self.judge.tokens
        self.result.cost = self.result.calls * sum(p * t for p, t in zip(prices, tokens, strict=True)) / 1e6
        return self.result

    def _arrive(self, arrivals: Sequence[float]) -> Events:
        for number, at in enumerate(arrivals):
            yield self.env.timeout(at - self.env.now)
            self.replicas[number % len(self.replicas)].take(self.env.now)

    def work(self, seconds: float) -> Events:
        """So many seconds of a core, in turns with the others."""
        while seconds > 0:
            with self.cores.request() as core:
                yield core
                now = min(seconds, _SLICE_S)
                yield self.env.timeout(now)
                seconds -= now

    def answer(self) -> Events:
        """One call, from where it leaves the client."""
        left = self.env.now
        if self.judge.per_minute:
            at = max(self.next_call, self.env.now)
            self.next_call = at + 60 / self.judge.per_minute
            yield self.env.timeout(at - self.env.now)
        if self.slots is None:
            yield from self._think(left)
        else:
            with self.slots.request() as slot:
                yield slot
                yield from self._think(left)

    def _think(self, left: float) -> Events:
        seconds = self.draw.choice(self.judge.latencies_s)
        self.result.waited_s += self.env.now - left
        self.result.judge_s += seconds
        yield self.env.timeout(seconds)


class _Replica:
    """One group server."""

    def __init__(self, system: _System) -> None:
        self.system, self.env = system, system.env
        self.queue: deque[float] = deque()  # when each group came
        self.came = self.env.event()
        self.interpreter = simpy.Resource(self.env, 1)
        self.room = simpy.Resource(self.env, system.service.in_flight)
        self.in_flight, self.limit = 0, min(system.service.first_concurrency, system.service.concurrency)
        self.waiting: deque[simpy.Event] = deque()
        self.env.process(self._batches())

    def take(self, at: float) -> None:
        self.queue.append(at)
        if not self.came.triggered:
            self.came.succeed()

    def _batches(self) -> Events:
        service = self.system.service
        while True:
            if not self.queue:
                self.came = self.env.event()
                yield self.came
            room = self.room.request()
            yield room
            left = self.queue[0] + service.wait_s - self.env.now
            if left > 0 and len(self.queue) < service.batch:
                yield self.env.timeout(left)
            batch = [self.queue.popleft() for _ in range(min(service.batch, len(self.queue)))]
            seconds = service.batch_s + service.row_s * len(batch) * self.system.step.responses
            began = self.env.now
            yield from self.system.work(seconds)
            self.system.result.backbone_s += self.env.now - began
            self.env.process(self._judged(batch, room))

    def _judged(self, batch: list[float], room: Any) -> Events:
        step = self.system.step
        calls = round(step.share * self.system.pairs * len(batch)) * step.orders
        self.system.result.calls += calls
        yield simpy.AllOf(self.env, [self.env.process(self._call()) for _ in range(calls)])
        yield from self._interpret(self.system.service.group_s * len(batch))
        self.system.result.latencies_s += [self.env.now - came for came in batch]
        self.room.release(room)

    def _call(self) -> Events:
        if self.in_flight >= self.limit:
            turn = self.env.event()
            self.waiting.append(turn)
            yield turn
        else:
            self.in_flight += 1
        yield from self._interpret(self.system.service.call_s)
        yield from self.system.answer()
        self.limit = min(self.limit + 1, self.system.service.concurrency)
        self.in_flight -= 1
        while self.waiting and self.in_flight < self.limit:
            self.in_flight += 1
            self.waiting.popleft().succeed()

    def _interpret(self, seconds: float) -> Events:
        """Work of the replica's one interpreter."""
        if seconds > 0:
            with self.interpreter.request() as turn:
                yield turn
                yield from self.system.work(seconds)
