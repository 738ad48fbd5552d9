"""Copies of scored groups: what is kept, where, and for how long."""

from __future__ import annotations

import asyncio
import copy as copying
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from support.clocks import settle
from support.json_numbers import numbers
from support.ray_calls import go

from rmcore.engine.groups import GroupScore, PairDecision
from rmcore.integrations.ray.serve import copies
from rmcore.integrations.ray.serve.copies import Copies, GroupCopy, holders
from rmcore.integrations.server.assembly import GroupAssembly, LateError
from rmcore.integrations.server.members import OpenGroup, Outcome, Slot
from rmcore.judge.base import JudgeUsage, Verdict

# -- what is kept, where, and for how long -----------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time

    async def sleep(self, seconds):
        await asyncio.Event().wait()


def scored(key="k", texts=("1 x", "2 x", "3 x"), *, by_content=False, digest="d"):
    digests = [text.encode() for text in texts]
    slots = {k: Slot(digest, None) for k, digest in enumerate(digests)}
    group = OpenGroup(key, None, digest, len(texts), 0.0, by_content=by_content, slots=slots, closed=True)
    group.outcome = Outcome(numbers(texts, 7), tuple(slots), {k: k for k in slots}, (None,) * len(texts))
    return group


@pytest.mark.parametrize("count", range(1, 8))
def test_two_others_hold_each_ones_copies_and_each_holds_two_others(count):
    names = [f"Assembler{k}" for k in range(count)]
    found = {name: holders(name, names) for name in names}
    for name, others in found.items():
        assert len(set(others)) == len(others) == min(2, count - 1)
        assert name not in others
        assert sum(name in held for held in found.values()) == min(2, count - 1)


def same(got, expected):
    if isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            same(got[name], value)
    else:
        assert got == expected


def test_a_score_is_the_same_afterwards_and_takes_nothing_else_along():
    """Tensors are views of their batch's; a copy has the group's part."""
    batch = torch.randn(500, 4, 4, dtype=torch.float64)
    batch[3, 0, 1] = float("nan")
    mine = batch[3]
    verdict = Verdict(1.0, critique="because " * 10, usage=JudgeUsage(calls=2, latencies_s=(0.5,)), judge="j")
    decisions = (PairDecision(0, 1, "judge", verdict=verdict), PairDecision(0, 2, "judge", verdict=verdict))
    score = GroupScore(
        mine, mine.abs(), mine.T, mine * 2, mine > 0, decisions, True, batch[3, 0], mine > 1, True,
        epistemic=mine / 2, measures={"gap": batch[4, 1]}, head_version=3,
    )  # fmt: skip
    group = scored(texts=("1", "2", "3", "4"))
    group.outcome = Outcome(score, (0, 1, 2, 3), {0: 0, 1: 1, 2: 2, 3: 3}, ("note",) * 4)
    made = GroupCopy.of(group, "n")
    sent = pickle.dumps(made)
    assert len(sent) < 6000 < len(pickle.dumps(score))
    assert len(sent) < 2 * made.nbytes

    async def main():
        again = pickle.loads(sent).opened()
        assert (again.key, again.digest, again.size, again.closed) == ("k", "d", 4, True)
        assert again.task.result() is again.outcome
        assert (again.outcome.slots, again.outcome.rows, again.outcome.notes) == (
            group.outcome.slots,
            group.outcome.rows,
            group.outcome.notes,
        )
        for one in fields(GroupScore):
            same(getattr(again.outcome.score, one.name), getattr(score, one.name))
        first, second = (decision.verdict for decision in again.outcome.score.decisions)
        assert first is second  # one question: what it cost is counted by its object

    go(main)


def test_memory_is_bounded_by_bytes_and_the_latest_stay(monkeypatch):
    async def main():
        keeper = Copies("a", dict.fromkeys("ab"), Clock())
        one = GroupCopy.of(scored(), "0")
        monkeypatch.setattr(copies, "MAX_BYTES", 10 * one.nbytes)
        for number in range(1, 100):
            keeper.hold("b", [(0.0, GroupCopy.of(scored(), str(number)))], {})
            assert keeper._shelves["b"].nbytes <= copies.MAX_BYTES
        keeper.hold("c", [(0.0, GroupCopy.of(scored(), "100"))], {})
        assert [copy.name for _, copy in keeper.held("b")] == [str(number) for number in range(90, 100)]
        assert keeper._shelves["b"].nbytes == 10 * one.nbytes
        keeper.hold("b", [(0.0, GroupCopy.of(scored(), "99"))], {})  # it has that one
        assert len(keeper.held("b")) == 10

    go(main)


class Held:
    """An assembler that holds what it is told."""

    def __init__(self, keeper):
        self.keeper, self.fails = keeper, False

    async def hold(self, origin, given, reached):
        self.keeper.hold(origin, copying.deepcopy(given), reached)

    async def held(self, asker):
        if self.fails:
            raise ValueError("away")
        return copying.deepcopy(self.keeper.held(asker))


def test_copies_grow_old_and_so_does_what_is_made_of_them(monkeypatch):
    async def main():
        clock = Clock()
        holding = Copies("b", dict.fromkeys("ab"), clock)
        first = Copies("a", {"a": None, "b": Held(holding)}, clock)
        await first.hand_on(scored("named"))
        await first.hand_on(scored(("content", "d", 1), by_content=True))
        clock.time += 100

        async def never(prompt, responses):
            return numbers(responses, None)

        assembly = GroupAssembly(never, clock=clock, keep_s=600.0)
        assert await Copies("a", {"a": None, "b": Held(holding)}, clock).restore(assembly) == 2
        until = {group.by_content: at for at, group in assembly._finished.values()}
        assert until == {True: 100 + copies.KEEP_S, False: 100 + 600}
        assert list(until) == [True, False]  # in the order in which they are forgotten
        clock.time = 100 + copies.KEEP_S + 1
        assembly._forget_old()
        assert [group.key for _, group in assembly._finished.values()] == ["named"]
        assert not assembly._by_prompt
        assert holding.held("a") == []
        holding.beat()
        assert holding._shelves["a"].nbytes == 0

    go(main)


def test_one_of_two_who_hold_copies_is_enough(caplog):
    async def main():
        clock, names = Clock(), "abc"
        keepers = {name: Copies(name, dict.fromkeys(names), clock) for name in "bc"}
        calls = {"a": None, **{name: Held(keeper) for name, keeper in keepers.items()}}
        group = scored(("content", "d", 1), by_content=True)
        first = Copies("a", calls, clock)
        await first.hand_on(group)
        group.slots[1].reached = True
        first.beat()
        await settle()
        calls["b"].fails = True
        assembly = GroupAssembly(None, clock=clock)
        assert await Copies("a", calls, clock).restore(assembly) == 1
        ((_, restored),) = assembly._finished.values()
        assert [slot.delivered for slot in restored.slots.values()] == [False, True, False]
        assert "b does not tell what it holds of a's groups" in caplog.text

    go(main)


def test_a_group_that_has_begun_anew_is_left_as_it_is():
    async def main():
        holding = Copies("b", dict.fromkeys("ab"))
        await Copies("a", {"a": None, "b": Held(holding)}).hand_on(scored(("id", "g", 0)))
        assembly = GroupAssembly(None, time_limit_s=0.05)
        joining = asyncio.create_task(assembly.join("g", 0, 2, "p", "x"))
        await settle(3)
        await Copies("a", {"a": None, "b": Held(holding)}).restore(assembly)
        assert not assembly._finished
        joining.cancel()

    go(main)


def test_late_is_late_at_the_successor():
    async def main():
        holding = Copies("b", dict.fromkeys("ab"))
        calls = {"a": None, "b": Held(holding)}

        async def score(prompt, responses):
            return numbers(responses, None)

        before = GroupAssembly(score, time_limit_s=0.05)
        before.finished = Copies("a", calls).hand_on
        first = await before.join("g", 0, 2, "p", "1 x")
        after = GroupAssembly(score)
        await Copies("a", calls).restore(after)
        again = await after.join("g", 0, 2, "p", "1 x")
        assert (again.slots, again.complete, again.index) == (first.slots, False, 0)
        with pytest.raises(LateError, match=r"members \[0\]"):
            await after.join("g", 1, 2, "p", "2 x")

    go(main)
