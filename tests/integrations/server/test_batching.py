"""Batches out of single calls: who travels together, who pays for whose mistakes, what is refused."""

from __future__ import annotations

import asyncio
import contextvars
import random

import pytest
import torch
from support.clocks import settle

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine.groups import GroupScore, GroupScores
from rmcore.integrations.server.assembly import BusyError
from rmcore.integrations.server.batching import BatchScorer


def scored(responses) -> GroupScore:
    lengths = torch.tensor([float(len(r)) for r in responses], dtype=torch.float64)
    p = lengths[:, None] - lengths[None, :]
    return GroupScore(p, torch.ones_like(p), p.clone(), torch.zeros_like(p), torch.zeros_like(p, dtype=torch.bool))


BAD = {
    "long": lambda: InputError("prompt and response: got 99 tokens, expected at most 64"),
    "crash": ZeroDivisionError,
    "nan": lambda: NonFiniteError("hidden: got NaN"),
}


class Engine:
    """Records batches. ``gate`` holds them in the backbone, ``judge`` after it."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate, self.judge = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.judge.set()
        self.encoding = self.most_encoding = self.running = self.most_running = 0

    async def score_async(self, prompts, responses, *, on_error="raise", progress=None):
        assert on_error == "return"
        self.batches.append(list(prompts))
        self.running += 1
        self.encoding += 1
        self.most_encoding = max(self.most_encoding, self.encoding)
        self.most_running = max(self.most_running, self.running)
        try:
            try:
                await self.gate.wait()
                await asyncio.sleep(0)
                if any("oom" in texts for texts in responses):
                    raise MemoryError
            finally:
                self.encoding -= 1
            if progress is not None:
                progress("encoding", 10, 10)
            await self.judge.wait()
            found = {k: BAD[t]() for k, texts in enumerate(responses) for t in texts if t in BAD}
            return GroupScores((scored(t) for k, t in enumerate(responses) if k not in found), errors=found)
        finally:
            self.running -= 1


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def start(scorer, count, first=0, texts=("a", "bb")):
    return [asyncio.create_task(scorer.score(f"p{first + k}", list(texts))) for k in range(count)]


def test_calls_at_once_travel_together_in_order_and_each_gets_its_own():
    async def main():
        engine = Engine()
        scorer = BatchScorer(engine, max_groups=8, max_wait_s=0)
        calls = [asyncio.create_task(scorer.score(f"p{k}", ["x" * (k + 1), "y"])) for k in range(20)]
        results = await asyncio.gather(*calls)
        assert [float(r.preference[0, 1]) for r in results] == [float(k) for k in range(20)]
        assert [prompt for batch in engine.batches for prompt in batch] == [f"p{k}" for k in range(20)]
        assert max(map(len, engine.batches)) == 8
        assert len(engine.batches) <= 4
        assert scorer.stats.groups == 20
        assert scorer.queued == scorer.in_flight == 0

    go(main())


def test_the_queue_fills_while_the_backbone_is_busy():
    async def main():
        engine = Engine()
        engine.gate.clear()
        scorer = BatchScorer(engine, max_wait_s=0)
        calls = start(scorer, 1)
        await settle()
        calls += start(scorer, 30, first=1)
        await settle()
        assert scorer.queued == 30
        engine.gate.set()
        await asyncio.gather(*calls)
        assert [len(batch) for batch in engine.batches] == [1, 30]

    go(main())


def test_an_idle_server_waits_a_moment_for_company(manual_clock):
    async def main():
        engine = Engine()
        scorer = BatchScorer(engine, max_groups=3, max_wait_s=1.0, clock=manual_clock)
        calls = start(scorer, 1)
        await manual_clock.advance(0.5)
        calls += start(scorer, 1, first=1)
        await manual_clock.advance(0.25)
        assert not engine.batches
        await manual_clock.advance(0.25)  # counted from the first
        assert engine.batches == [["p0", "p1"]]
        calls += start(scorer, 3, first=2)
        await settle()
        assert engine.batches[1] == ["p2", "p3", "p4"]  # full: nothing to wait for
        await asyncio.gather(*calls)

    go(main())


def test_characters_bound_a_batch():
    async def main():
        engine = Engine()
        scorer = BatchScorer(engine, max_characters=40, max_wait_s=0)
        calls = [asyncio.create_task(scorer.score("p" * 10, ["x" * 10])) for _ in range(6)]
        await asyncio.gather(*calls)
        assert [len(batch) for batch in engine.batches] == [2, 2, 2]

    go(main())


@pytest.mark.parametrize(("text", "kind"), [("long", InputError), ("crash", ZeroDivisionError), ("nan", InputError)])
def test_a_group_that_cannot_be_scored_fails_alone(text, kind):
    async def main():
        engine = Engine()
        scorer = BatchScorer(engine, max_wait_s=0)
        calls = start(scorer, 5) + start(scorer, 1, 5, ("a", text)) + start(scorer, 5, 6)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[5], kind)
        assert not str(results[5]).startswith("group ")
        assert all(isinstance(r, GroupScore) for k, r in enumerate(results) if k != 5)
        assert scorer.stats.failed_groups == 1
        assert engine.batches == [[f"p{k}" for k in range(11)]]  # in the one call that all shared
        await scorer.score("after", ["a"])

    go(main())


def test_what_fails_the_whole_batch_fails_all_of_it_once():
    async def main():
        engine = Engine()
        scorer = BatchScorer(engine, max_wait_s=0)
        calls = start(scorer, 3) + start(scorer, 1, 3, ("a", "oom"))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {MemoryError}
        assert scorer.stats.failed_groups == 4
        assert len(engine.batches) == 1  # a router that has seen it is not asked again
        await scorer.score("after", ["a"])

    go(main())


def test_the_next_backbone_runs_while_the_judge_answers_but_never_two_at_once():
    async def main():
        engine = Engine()
        engine.judge.clear()
        scorer = BatchScorer(engine, max_groups=1, max_wait_s=0, max_in_flight=3)
        calls = start(scorer, 6)
        await settle()
        assert engine.running == 3
        assert scorer.in_flight == 3
        assert scorer.queued == 3
        engine.judge.set()
        await asyncio.gather(*calls)
        assert (engine.most_encoding, engine.most_running) == (1, 3)
        assert engine.batches == [[f"p{k}"] for k in range(6)]

    go(main())


def test_without_news_from_the_backbone_batches_follow_one_another():
    async def main():
        engine = Engine()
        engine.gate.clear()
        scorer = BatchScorer(engine, max_groups=1, max_wait_s=0, max_in_flight=3)
        calls = start(scorer, 3)
        await settle()
        assert engine.running == 1
        engine.gate.set()
        await asyncio.gather(*calls)

    go(main())


def test_a_cancelled_caller_is_withdrawn_from_the_queue_and_leaves_a_batch_alone():
    async def main():
        engine = Engine()
        engine.gate.clear()
        scorer = BatchScorer(engine, max_groups=2, max_wait_s=0)
        calls = start(scorer, 4)
        await settle()
        calls[0].cancel()  # in the batch
        calls[2].cancel()  # in the queue
        await settle()
        assert scorer.queued == 1
        engine.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(r, GroupScore) for r in results] == [False, True, False, True]
        assert engine.batches == [["p0", "p1"], ["p3"]]
        assert scorer.stats.withdrawn_groups == 1

    go(main())


def test_all_withdrawn_leaves_nothing_behind():
    async def main():
        engine = Engine()
        engine.gate.clear()
        scorer = BatchScorer(engine, max_groups=1, max_wait_s=0)
        calls = start(scorer, 3)
        await settle()
        for call in calls[1:]:
            call.cancel()
        engine.gate.set()
        await calls[0]
        await settle()
        assert engine.batches == [["p0"]]
        assert scorer.queued == scorer.in_flight == 0
        await scorer.score("after", ["a"])

    go(main())


def test_a_full_queue_refuses_and_tells_when_to_come_back(manual_clock):
    async def main():
        engine = Engine()
        scorer = BatchScorer(engine, max_groups=2, max_wait_s=0, max_queue=4, clock=manual_clock)
        assert scorer.retry_after_s == 1.0
        engine.gate.clear()
        calls = start(scorer, 2)
        await settle()
        await manual_clock.advance(6.0)  # two groups in six seconds
        engine.gate.set()
        await asyncio.gather(*calls)
        engine.gate.clear()
        calls = start(scorer, 2)
        await settle()
        calls += start(scorer, 4)
        await settle()
        assert scorer.queued == 4
        with pytest.raises(BusyError) as error:
            await scorer.score("one more", ["a"])
        assert error.value.retry_after_s == pytest.approx(15.0)  # 3 s a group, five groups
        with pytest.raises(BusyError):
            await scorer.submit([("a", ["a"])] * 2)
        late = asyncio.create_task(scorer.score("admitted", ["a"], admitted=True))
        await settle()
        assert scorer.queued == 5
        engine.gate.set()
        await asyncio.gather(*calls, late)
        assert scorer.stats.refused_groups == 3

    go(main())


def test_several_groups_are_accepted_together_or_not_at_all():
    async def main():
        engine = Engine()
        scorer = BatchScorer(engine, max_wait_s=0, max_queue=4)
        results = await scorer.submit([(f"p{k}", ["a", "b" * k]) for k in range(4)])
        assert [float(r.group.preference[1, 0]) for r in results] == [-1.0, 0.0, 1.0, 2.0]
        assert {r.batch for r in results} == {4}
        with pytest.raises(InputError, match="groups: got 5, expected at most 4"):
            await scorer.submit([("p", ["a"])] * 5)
        with pytest.raises(InputError, match=r"groups\[2\]: prompt and response: got 99 tokens"):
            await scorer.submit([("p", ["a"]), ("q", ["a"]), ("r", ["long"])])
        with pytest.raises(InputError, match=r"responses\[1\]: got an empty list"):
            await scorer.submit([("p", ["a"]), ("q", [])])
        assert scorer.queued == 0

    go(main())


def test_a_batch_belongs_to_none_of_its_callers():
    """Ray Serve cancels with a request what was called in its context: that must not be the batch of everybody."""
    request = contextvars.ContextVar("request", default="nobody's")

    async def main():
        class Seen(Engine):
            async def score_async(self, *arguments, **options):
                contexts.append(request.get())
                return await super().score_async(*arguments, **options)

        contexts: list[str] = []
        scorer = BatchScorer(Seen(), max_groups=2, max_wait_s=0.0)

        async def ask(name):
            request.set(name)
            return await scorer.score(name, ["a", "bb"])

        await asyncio.gather(*map(ask, "abcde"))
        assert contexts == ["nobody's"] * 3

    go(main())


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemError])
def test_whatever_ends_a_batch_nobody_is_left_waiting(error, caplog):
    async def main():
        class Ends(Engine):
            async def score_async(self, *arguments, **options):
                if not self.batches:
                    self.batches.append([])
                    raise error
                return await super().score_async(*arguments, **options)

        scorer = BatchScorer(Ends(), max_groups=2, max_wait_s=0.0, max_in_flight=1)
        ended = await asyncio.gather(*start(scorer, 4), return_exceptions=True)
        kind = BusyError if error is asyncio.CancelledError else error
        assert [type(one) for one in ended] == [kind, kind, GroupScore, GroupScore]
        await scorer.drain()
        assert scorer.stats.failed_groups == 2

    go(main())


def test_what_fails_while_answers_go_out_reaches_those_who_have_none():
    async def main():
        def observe(groups):
            raise ZeroDivisionError

        scorer = BatchScorer(Engine(), max_wait_s=0.0, observe=observe)
        assert isinstance(await scorer.score("p", ["a", "bb"]), GroupScore)
        assert scorer.stats.failed_groups == 0
        await scorer.drain()

    go(main())


def test_draining_answers_what_was_accepted():
    async def main():
        engine = Engine()
        engine.gate.clear()
        scorer = BatchScorer(engine, max_groups=2, max_wait_s=5.0)
        calls = start(scorer, 5)
        await settle()
        drained = asyncio.create_task(scorer.drain())
        await settle()
        with pytest.raises(BusyError):
            await scorer.score("new", ["a"])
        assert not drained.done()
        engine.gate.set()
        await asyncio.gather(*calls)
        await drained
        await scorer.drain()  # nothing left

    go(main())


def test_the_real_engine_gives_the_same_scores_in_batches(engine, some_texts):
    rng = random.Random(3)
    groups = [(f"red house {k}", some_texts(rng, rng.randrange(1, 6))) for k in range(25)]

    async def main():
        scorer = BatchScorer(engine, max_groups=7)
        return await asyncio.gather(*(scorer.score(*group) for group in groups))

    alone = [engine.score([prompt], [responses])[0] for prompt, responses in groups]
    for got, expected in zip(go(main()), alone, strict=True):
        assert torch.allclose(got.preference, expected.preference, atol=1e-4)
        assert torch.allclose(got.uncertainty, expected.uncertainty, atol=1e-4)


def test_costs_are_told_by_group_and_add_up(judged_engine):
    same = ("red tree", ["good", "bad wrong"])

    async def main():
        scorer = BatchScorer(judged_engine, max_wait_s=0)
        scored = await scorer.submit([same, ("blue", ["kind", "rude", "kind"]), same])
        return scored, scorer.stats

    scored, stats = go(main())
    # Three equal questions are one; the second group's pair of equal texts is decided by rule, its others are equal.
    assert [s.usage.cost for s in scored] == [2.0, 4.0, 0.0]
    assert stats.usage.cost == 6.0
    assert stats.usage.latencies_s == ()
    assert dict(stats.pairs) == {"head": 0, "judge": 4, "identical": 1}
    assert scored[0].group.decisions[0].by == scored[2].group.decisions[0].by == "judge"


@pytest.mark.parametrize(
    "option", [{"max_groups": 0}, {"max_characters": 0}, {"max_wait_s": -1}, {"max_queue": 0}, {"max_in_flight": 0}]
)
def test_bad_limits_are_named(option):
    with pytest.raises(InputError, match=next(iter(option))):
        BatchScorer(Engine(), **option)


def test_the_state_is_saved_before_answers_go_out_and_a_full_disk_loses_none(caplog):
    async def main():
        saved, calls = [], []

        def save():
            saved.append([call.done() for call in calls])
            if len(saved) == 2:
                raise OSError(28, "No space left on device")

        scorer = BatchScorer(Engine(), max_groups=2, max_wait_s=0, save_state=save)
        calls += start(scorer, 4)
        assert len(await asyncio.gather(*calls)) == 4
        assert len(saved) == 2
        assert not any(saved[0])
        assert "No space left" in caplog.text

    go(main())
