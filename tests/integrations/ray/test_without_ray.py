"""What the actors run, in this process and without ray: the shared judge, the scorer, the chunks."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rmcore._base.errors import InputError, MissingPackageError
from rmcore.engine import RewardEngine
from rmcore.engine.routing import Budget, BudgetRouter
from rmcore.integrations.ray import ActorJudge, Scorer, SharedJudge, connect
from rmcore.integrations.ray.bulk import Chunk, ChunkScorer, read_chunks
from rmcore.integrations.ray.serve.replica import Replica
from rmcore.judge.base import JudgeUsage, Pair, Verdict, buys_once
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.wrappers.disagreement import MonitoredJudge

PAIRS = [Pair("p", f"first {k}", "second") for k in range(6)]


class Told:
    """Says "win" when it is told to, at the price of a call a pair; fails on what is told to."""

    def __init__(self, *, answers: bool = True) -> None:
        self.asked: list[Pair] = []
        self.failing: set[str] = set()
        self.answers = asyncio.Event()
        if answers:
            self.answers.set()

    async def judge(self, pairs):
        self.asked += pairs
        await self.answers.wait()
        return [
            Verdict.none("down", JudgeUsage(calls=1)) if pair.first in self.failing
            else Verdict.of("win", usage=JudgeUsage(calls=1)) for pair in pairs
        ]  # fmt: skip


def test_a_question_is_asked_once_whoever_asks():
    judge = Told(answers=False)
    judge.failing = {"first 1"}

    async def scenario():
        shared = SharedJudge(lambda: judge)
        killed = asyncio.ensure_future(shared.judge(PAIRS[:3]))
        while len(judge.asked) < 3:
            await asyncio.sleep(0)
        killed.cancel()  # its actor was killed: what it asked is paid for
        questions = PAIRS[:3], [*PAIRS[2:5], PAIRS[4]]
        waiting = [asyncio.ensure_future(shared.judge(pairs)) for pairs in questions]
        while len(judge.asked) < 5:  # both have asked: only now is anything answered
            await asyncio.sleep(0)
        judge.answers.set()
        both = await asyncio.gather(*waiting)
        judge.failing = set()
        return shared, both, await shared.judge(PAIRS[:3])

    shared, (one, two), again = asyncio.run(scenario())
    assert [verdict.preference for verdict in one] == [1.0, None, 1.0]
    assert [verdict.preference for verdict in two] == [1.0] * 4
    assert [verdict.usage.calls for verdict in two] == [0, 1, 1, 0]
    assert [verdict.preference for verdict in again] == [1.0] * 3
    assert sorted(str(pair.first) for pair in judge.asked) == sorted(["first 1", *(f"first {k}" for k in range(5))])
    assert shared.stats()["usage"]["calls"] == shared.stats()["asked"] == 6


def test_only_so_many_answers_are_remembered():
    judge = Told()
    judge.failing = {"first 1"}

    async def scenario():
        shared = SharedJudge(lambda: judge, keep=3)
        await shared.judge(PAIRS)  # five answers, of which three stay
        await shared.judge(PAIRS[3:])
        assert len(judge.asked) == 6
        again = await shared.judge(PAIRS[:3])
        return [verdict.preference for verdict in again]

    assert asyncio.run(scenario()) == [1.0, None, 1.0]
    assert [pair.first for pair in judge.asked[6:]] == ["first 0", "first 1", "first 2"]
    with pytest.raises(InputError, match="keep: got -1"):
        SharedJudge(lambda: judge, keep=-1)


@pytest.mark.parametrize(
    ("judge", "once"),
    [
        (Told(), False),
        (MonitoredJudge(Told()), False),
        (RecordedJudge({}), True),
        (MonitoredJudge(RecordedJudge({})), True),
        (SharedJudge(Told), True),
        (ActorJudge(None), True),
        (SimpleNamespace(store="verdicts.sqlite"), True),
        (SimpleNamespace(store=None), False),
        (SimpleNamespace(tiers=[SimpleNamespace(judge=Told()), SimpleNamespace(judge=RecordedJudge({}))]), False),
        (SimpleNamespace(tiers=[SimpleNamespace(judge=RecordedJudge({}))]), True),
    ],
)
def test_a_replica_says_where_a_batch_asked_again_is_paid_for_again(judge, once, caplog):
    with caplog.at_level("WARNING"):
        Replica(lambda: SimpleNamespace(head=None, judge=judge))
    assert ("is paid for again" not in caplog.text) == once == buys_once(judge)


def test_a_budget_holds_over_all_and_over_a_restart(tmp_path):
    file = tmp_path / "budget.json"

    def started():
        return SharedJudge(Told, lambda: [Budget(4, "calls", max_per_pair=1)], file)

    async def ask(shared, pairs):
        return [verdict.reason for verdict in await shared.judge(pairs)]

    first = started()
    assert asyncio.run(ask(first, PAIRS[:3])) == [""] * 3
    second = started()
    assert asyncio.run(ask(second, PAIRS[3:])) == ["", "budget", "budget"]
    assert second.stats()["refused"] == 2
    assert json.loads(file.read_text())[0]["total"] == 4
    with pytest.raises(InputError, match="the state of 0 budgets"):
        SharedJudge(Told, state=file)


def test_a_deadline_is_carried_as_seconds_from_now():
    sent = []

    class Method:
        def remote(self, pairs):
            sent.extend(pairs)
            return asyncio.sleep(0, [Verdict.of("win")] * len(pairs))

    class Actor:
        judge = Method()

    pair = replace(PAIRS[0], deadline=time.monotonic() + 5)
    assert asyncio.run(ActorJudge(Actor()).judge([pair, PAIRS[1]]))[0].preference == 1
    assert 4 < sent[0].deadline <= 5
    assert sent[1].deadline is None
    judge = Told()
    asyncio.run(SharedJudge(lambda: judge).judge(sent))
    assert 4 < judge.asked[0].deadline - time.monotonic() <= 5


GROUPS = [
    {"id": k, "prompt": f"red {word}", "responses": ["good clear", f"bad {word}", "right odd wrong"][: 2 + k % 2]}
    for k, word in enumerate(["tree", "house", "river", "stone", "cloud"])
]


def engine(reward_model):
    return RewardEngine(reward_model, Told(), BudgetRouter(fraction=0.5, by="u"))


def test_a_batch_of_columns_is_scored_as_the_engine_does(reward_model):
    batch = {
        "prompt": np.array([row["prompt"] for row in GROUPS] + [None], dtype=object),
        "responses": np.array([np.array(row["responses"], dtype=object) for row in GROUPS] + [["x"]], dtype=object),
        "kept": np.arange(6),
    }
    found = Scorer(lambda: engine(reward_model), outputs=("rewards", "preference", "routed"))(batch)
    expected = engine(reward_model).score(*zip(*((row["prompt"], row["responses"]) for row in GROUPS), strict=True))
    for k, group in enumerate(expected):
        record = group.to_record()
        assert {name: found[name][k] for name in ("rewards", "preference", "routed")} == {
            name: record[name] for name in ("rewards", "preference", "routed")
        }
    assert found["rewards"][5] is None
    assert list(found["error"])[:5] == [None] * 5
    assert "prompt" in found["error"][5]
    assert list(found["kept"]) == list(range(6))
    with pytest.raises(InputError, match="expected one named 'responses'"):
        Scorer(lambda: engine(reward_model))({"prompt": batch["prompt"]})
    with pytest.raises(InputError, match="outputs: got"):
        Scorer(lambda: engine(reward_model), outputs=("reward",))
    with pytest.raises(InputError, match="they are the engine's"):
        Scorer(lambda: engine(reward_model), Told())


def test_chunks_are_the_batches_of_one_process(reward_model, tmp_path):
    file = tmp_path / "groups.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GROUPS) + '{"prompt": "bad"}\n')

    def chunks(of, after=0):
        rows = [row for part in range(of) for row in read_chunks(str(file), {}, 2, (part, of), after)]
        scorer = ChunkScorer(lambda: engine(reward_model), lambda _, score: score.to_record())
        return [Chunk(**json.loads(scorer(row)["chunk"])) for row in rows]

    whole = chunks(1)
    assert [chunk.last for chunk in whole] == [2, 4, 5]
    assert [chunk.ends is None for chunk in whole] == [True, True, False]
    assert f"{file}:6: responses: missing" in whole[2].ends
    records = [record for chunk in whole for record in chunk.records]
    for start in (0, 2, 4):
        rows = GROUPS[start : start + 2]
        scores = engine(reward_model).score([row["prompt"] for row in rows], [row["responses"] for row in rows])
        for k, group in enumerate(scores):
            digest = records[start + k].pop("digest")
            assert len(digest) == 16
            assert records[start + k] == {"id": start + k, "line": start + k + 1, **group.to_record()}
    whole = chunks(1)
    without = [replace(chunk, summary={}) for chunk in whole]  # which says how long it took
    assert [replace(chunk, summary={}) for chunk in chunks(3)] == without
    assert [chunk.last for chunk in chunks(2, after=3)] == [4, 5]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_extra_is_named():
    with (
        pytest.raises(MissingPackageError, match=r"ray is not installed; pip install 'rmcore\[ray\]'"),
        connect("local"),
    ):
        pass


# -- several who ask, and what goes wrong for one ----------------------------------------------------------------------


class Deadlines(Told):
    """Answers when it is told to, and keeps the deadlines of its pairs."""

    async def judge(self, pairs):
        self.asked += pairs
        try:
            async with asyncio.timeout(min(pair.deadline for pair in pairs) - time.monotonic()):
                await self.answers.wait()
        except TimeoutError:
            return [Verdict.none("deadline", JudgeUsage(calls=1)) for _ in pairs]
        return [Verdict.of("win", usage=JudgeUsage(calls=1)) for _ in pairs]


def within(seconds, pairs=PAIRS[:2]):
    return [replace(pair, deadline=seconds) for pair in pairs]


def test_who_has_more_time_asks_again_where_anothers_ran_out():
    async def main():
        judge = Deadlines(answers=False)
        shared = SharedJudge(lambda: judge)
        short = asyncio.create_task(shared.judge(within(0.05)))
        await asyncio.sleep(0)
        patient = asyncio.create_task(shared.judge(within(60)))
        assert {verdict.reason for verdict in await short} == {"deadline"}
        judge.answers.set()
        verdicts = await asyncio.wait_for(patient, 5)
        assert [(verdict.preference, verdict.usage.calls) for verdict in verdicts] == [(1, 1), (1, 1)]
        assert len(judge.asked) == 4

    asyncio.run(main())


def test_who_has_less_time_waits_no_longer_for_another():
    async def main():
        judge = Deadlines(answers=False)
        shared = SharedJudge(lambda: judge)
        patient = asyncio.create_task(shared.judge(within(60)))
        await asyncio.sleep(0)
        short = await asyncio.wait_for(shared.judge(within(0.05)), 5)
        assert [(verdict.reason, verdict.usage) for verdict in short] == [("deadline", JudgeUsage())] * 2
        judge.answers.set()
        assert [verdict.preference for verdict in await patient] == [1, 1]
        assert len(judge.asked) == 2

    asyncio.run(main())


def test_books_that_cannot_be_kept_cost_no_verdict_and_no_room(tmp_path, monkeypatch):
    """Before it asks a full disk stops it, or a restart would spend it again; after it the verdicts are in."""
    from rmcore.integrations.ray import judge as module

    full: list[bool] = []

    def write(path, text):
        if full.pop(0):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomic", write)

    async def main():
        judge = Told()
        shared = SharedJudge(lambda: judge, lambda: [Budget(4, "calls", max_per_pair=1)], tmp_path / "b.json")
        full[:] = [True]
        assert {verdict.reason for verdict in await shared.judge(PAIRS[:3])} == {"store"}
        assert (judge.asked, shared.budgets[0].stats().left) == ([], 4)
        full[:] = [False, True]
        assert [verdict.preference for verdict in await shared.judge(PAIRS[:3])] == [1, 1, 1]
        assert (shared.budgets[0].stats().spent, shared.budgets[0].stats().reserved) == (3, 0)

    asyncio.run(main())


def test_a_usage_that_cannot_be_booked_costs_the_reservation_and_no_verdict():
    class Odd(Told):
        async def judge(self, pairs):
            return [Verdict.of("win", usage=JudgeUsage(calls=-7)) for _ in pairs]

    async def main():
        shared = SharedJudge(Odd, lambda: [Budget(4, "calls", max_per_pair=1), Budget(9, "pairs")])
        verdicts = await shared.judge(PAIRS[:3])
        assert [verdict.preference for verdict in verdicts] == [1, 1, 1]
        assert all(budget.stats().reserved == 0 for budget in shared.budgets)

    asyncio.run(main())
