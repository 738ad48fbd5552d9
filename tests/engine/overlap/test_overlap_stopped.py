"""Encoding and judging at once, when they are stopped: cancellations, interrupts and deadlines."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections.abc import Sequence

import pytest
from support.cancelling import cancelled_everywhere
from support.overlap import (
    PATIENCE,
    PROMPTS,
    RESPONSES,
    SCORE,
    TEXTS,
    WIN,
    Backbone,
    Books,
    Gated,
    HandClock,
    engine_threads,
    wait,
)

from rmcore import RewardEngine, RewardModel
from rmcore._base.errors import InputError
from rmcore.engine.routing import AdaptiveRouter, Budget
from rmcore.judge import run_sync
from rmcore.judge.base import Pair, Verdict


def test_cancelling_stops_backbone_and_judge_and_leaves_nothing(make_engine):
    judge, reached, go_on = Gated(), threading.Event(), threading.Event()

    def before(n: int) -> None:
        if n == 4:
            wait(judge.came)
            reached.set()
            wait(go_on)

    table = Backbone(before)
    engine = make_engine(judge, table=table)

    async def run() -> None:
        before_it = asyncio.all_tasks()
        task = asyncio.create_task(engine.score_async(PROMPTS, RESPONSES))
        while not reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        while not judge.cancelled:  # at once, while the backbone is still in its micro-batch
            await asyncio.sleep(0.001)
        assert not task.done()
        task.cancel()  # impatience changes nothing
        await asyncio.sleep(0.001)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before_it

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert judge.cancelled == len(judge.calls)
    assert len(table.encoded) == 6, "the micro-batch it was in is finished, the other three are not begun"
    assert not engine_threads()


def test_cancelled_anywhere_books_are_exact_and_others_have_their_scores(make_engine):
    """Whatever the one who left was waiting for: what it had under way counts as spent, and nothing stays reserved."""

    class Told:
        def __init__(self) -> None:
            self.under_way = 0
            self.asked = 0

        async def judge(self, pairs):
            self.under_way += 1
            self.asked += len(pairs)
            try:
                await asyncio.sleep(0)
            finally:
                self.under_way -= 1
            return [WIN] * len(pairs)

    async def scenario(start):
        judge, budget = Told(), Budget(1000, "calls", max_per_pair=2)
        engine = make_engine(judge, AdaptiveRouter(1.0, budget=budget))
        before = asyncio.all_tasks()
        leaves = start(engine.score_async(PROMPTS, RESPONSES))
        stays = asyncio.create_task(engine.score_async(PROMPTS[:2], RESPONSES[:2]))
        assert [len(group.decisions) for group in await asyncio.wait_for(stays, PATIENCE)] == [1, 1]
        await asyncio.wait({leaves}, timeout=PATIENCE)
        assert leaves.done()
        assert asyncio.all_tasks() == before
        assert not engine_threads()
        assert judge.under_way == 0
        stats = budget.stats()
        assert stats.reserved == 0
        # A pair costs a call here, and two where nobody can say: those of the one who left.
        assert judge.asked <= stats.spent <= 2 + 2 * len(PROMPTS)

    assert cancelled_everywhere(scenario) > 2


def test_cancelling_between_two_forward_passes(make_backbone, preferences):
    """Also without a judge: the backbone stops after the pass it is in, not after the batch."""
    backbone = make_backbone("bert", pooling="mean", tokens_per_batch=1)
    model, _ = RewardModel.fit(backbone, preferences, num_features=16)
    passes, reached, go_on = [], threading.Event(), threading.Event()
    forward = backbone.model.forward

    def slow(*args, **kwargs):
        passes.append(1)
        if len(passes) == 2:
            reached.set()
            wait(go_on)
        return forward(*args, **kwargs)

    backbone.model.forward = slow

    async def run() -> None:
        task = asyncio.create_task(RewardEngine(model).score_async(["p"], [["good", "bad", "fox", "dog"]]))
        while not reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.001)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        asyncio.run(asyncio.wait_for(run(), PATIENCE))
    finally:
        backbone.model.forward = forward
    assert len(passes) == 2
    assert not engine_threads()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize("where", ["backbone", "judge"])
def test_an_interrupt_of_a_sync_call_cancels_the_judge(make_engine, where):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    judge, sent = Gated(), threading.Event()
    encoded = len(TEXTS) if where == "judge" else 4
    hold = threading.Event()

    def interrupt() -> None:
        wait(judge.came)
        while len(table.encoded) < encoded:
            hold.wait(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        sent.set()

    table = Backbone(lambda n: hold.wait(PATIENCE) if n == encoded else None)
    router = Books()
    engine = make_engine(judge, router, table=table)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - wherever between the two the signal arrives
            engine.score(PROMPTS, RESPONSES)
            wait(sent)
    finally:
        signal.signal(signal.SIGINT, before)
    assert judge.cancelled == len(judge.calls) > 0
    assert len(table.encoded) == encoded
    assert {usage for _, usage in router.settled} == {None}
    assert len(router.settled) == len(router.reserved)
    assert run_sync(asyncio.sleep(0, result="alive")) == "alive"


def test_a_judge_that_will_not_be_cancelled_is_left(make_engine, monkeypatch, caplog):
    monkeypatch.setattr("rmcore.engine.judging._PATIENCE_S", 0.01)
    asked, release = asyncio.Event(), asyncio.Event()

    class Stubborn:
        def __init__(self) -> None:
            self.tries = 0

        async def judge(self, pairs):
            asked.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    self.tries += 1
            return [WIN] * len(pairs)

    judge = Stubborn()

    async def run() -> None:
        task = asyncio.create_task(make_engine(judge).score_async(["p"], [["1 0", "2 0"]]))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert judge.tries >= 1
    assert "left to itself" in caplog.text


# -- deadlines -------------------------------------------------------------------------------------------------------


class Slow:
    """Never answers about the pairs in ``hang``; knows no deadline."""

    def __init__(self, hang: Sequence[str], clock: HandClock, turn_to: float, calls_first: int) -> None:
        self.hang, self.clock, self.turn_to, self.calls_first = set(hang), clock, turn_to, calls_first
        self.calls = 0
        self.cancelled = 0

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.calls += 1
        if self.calls == self.calls_first:
            self.clock.time = self.turn_to
        if any(pair.id in self.hang for pair in pairs):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return [WIN] * len(pairs)


@SCORE
def test_a_judge_that_overruns_is_cancelled_and_finished_calls_are_kept(make_engine, score):
    clock = HandClock()
    judge = Slow(["1:0:1", "4:0:1"], clock, turn_to=133.0, calls_first=6)
    router = Books()
    engine = make_engine(judge, router, judge_deadline_s=30.0, clock=clock)
    scores = score(engine, PROMPTS, RESPONSES)
    assert judge.cancelled == 2
    assert [group.decisions[0].by for group in scores] == ["judge_failed" if k in (1, 4) else "judge" for k in range(6)]
    assert scores.summary()["judge_failures"] == {"deadline": 2}
    assert scores.unaccounted_questions == 2
    assert scores.judge_usage.calls == 4
    assert [usage for _, usage in router.settled] == [None if k in (1, 4) else WIN.usage for k in range(6)], (
        "nobody knows what a cancelled call has cost"
    )


def test_within_the_overtime_a_judge_may_still_bring_what_it_has(make_engine):
    """A judge that keeps the pairs' deadline itself ends a moment after it, with verdicts and reasons of its own."""
    clock = HandClock()

    class Keeps:
        async def judge(self, pairs):
            clock.time = pairs[0].deadline + 1.0
            return [Verdict.none("deadline", WIN.usage)] * len(pairs)

    scores = make_engine(Keeps(), judge_deadline_s=30.0, clock=clock).score(["p"], [["1 0", "2 0"]])
    assert scores.judge_usage.calls == 1
    assert scores.unaccounted_questions == 0


def test_nothing_is_bought_after_the_deadline(make_engine, scripted_judge):
    clock, router = HandClock(), Books()
    judge = scripted_judge(lambda _: WIN)

    def before(n: int) -> None:
        if n == 6:
            clock.time += 31

    engine = make_engine(judge, router, Backbone(before), judge_deadline_s=30.0, clock=clock)
    scores = engine.score(PROMPTS, RESPONSES)
    asked = len(judge.asked)
    assert asked <= 3
    assert scores.summary()["judge_failures"] == {"deadline": 6 - asked}
    assert scores.unaccounted_questions == 0
    assert sum(usage.calls for _, usage in router.settled) == asked


def test_a_judge_that_makes_something_of_being_cancelled(make_engine):
    clock = HandClock()

    class Salvages:
        async def judge(self, pairs):
            await asyncio.sleep(0.005)  # the engine's own alarm is set by now
            clock.time += 100
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return [WIN, Verdict.none("deadline", WIN.usage)]

    engine = make_engine(Salvages(), judge_deadline_s=30.0, clock=clock, micro_batch_tokens=100)
    scores = engine.score(["p", "q"], [["1 0", "2 0"]] * 2)
    assert scores.summary()["decided_by"] == {"head": 0, "judge": 1, "judge_failed": 1, "identical": 0, "nobody": 0}
    assert scores.judge_usage.calls == 2


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_bad_deadlines(make_engine, seconds):
    with pytest.raises(InputError, match="judge_deadline_s"):
        make_engine(Gated(), judge_deadline_s=seconds)
