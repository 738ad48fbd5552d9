"""What an assembler has answered, the one after it knows: copies of scored groups at the others; without ray."""

from __future__ import annotations

import asyncio
import contextvars
import copy as copying
import logging
import pickle
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from support.json_numbers import Numbers, numbers

from rmcore.engine.groups import GroupScore, PairDecision
from rmcore.integrations.ray.serve import assembler, copies, entry, presence
from rmcore.integrations.ray.serve.copies import Copies, GroupCopy, holders
from rmcore.integrations.server.assembly import GroupAssembly, LateError
from rmcore.integrations.server.gym_bonuses import GymBonuses
from rmcore.integrations.server.members import OpenGroup, Outcome, Slot
from rmcore.judge.base import JudgeUsage, Verdict


def by_id(number, slot=None):
    slot = number if slot is None else slot
    return "/v1/rendezvous", {"group_id": "g", "slot": slot, "k": 3, "prompt": "p", "response": f"{number} x"}


def by_content(number):
    return "/v1/rendezvous", {"k": 3, "prompt": "p", "response": f"{number} x"}


def by_reward(number):
    return "/get_reward", {"query": [f"q{number} x"], "prompts": ["q"]}


def by_rollout(number):
    output = [{"type": "message", "content": [{"type": "output_text", "text": f"{number} x"}]}]
    return "/verify", {"responses_create_params": {"input": "red"}, "response": {"output": output}}


WAYS = [by_id, by_content, by_reward, by_rollout]
GYM = {"nemo_gym": True, "gym_bonuses": GymBonuses(answer_bonus=1.0, group_answer_length_penalty_coeff=0.5)}


def go(main, seconds=30):
    asyncio.run(asyncio.wait_for(main(), seconds))


async def settle(times=100):
    for _ in range(times):
        await asyncio.sleep(0)


def owner_of(cluster):
    """The assembler that has scored something."""
    return next(one for one in cluster.assemblers if one.assembler.service.assembly.stats.groups)


def told(reply):
    """The status, and what there is of an answer that is the group's."""
    status, body = reply
    return status, {name: value for name, value in body.items() if name != "slot"}


@pytest.fixture
def quick(monkeypatch):
    """Signs of life fifty times a second."""
    for module in (assembler, entry, presence):
        monkeypatch.setattr(module, "BEAT_S", 0.02)


# -- an answer that was lost with its assembler ------------------------------------------------------------------------


@pytest.mark.parametrize("assemblers", [2, 3, 5])
@pytest.mark.parametrize("way", WAYS)
def test_a_member_whose_siblings_were_answered_gets_its_result_from_the_successor(cluster_of, way, assemblers):
    async def main():
        engine = Numbers()
        engine.version = 4
        cluster = cluster_of(engine, assemblers=assemblers, **GYM)
        first = await asyncio.gather(*(cluster.post(n % 2, *way(n)) for n in range(3)))
        assert [status for status, _ in first] == [200] * 3
        engine.version = 5  # another one would say so
        owner_of(cluster).kill()
        began = time.monotonic()
        assert told(await cluster.post(1, *way(1))) == told(first[1])
        assert time.monotonic() - began < 5  # not the time limit
        assert len(engine.scored) == 1
        if way is by_id:  # of these each may ask again, as ever
            again = await asyncio.gather(*(cluster.post(0, *way(n)) for n in (2, 0)))
            assert list(map(told, again)) == [told(first[2]), told(first[0])]
            assert len(engine.scored) == 1

    go(main)


def test_a_group_scored_in_part_stays_so(cluster_of):
    """Who was there has the same result, who was not is late: as if nothing had died."""

    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=2, time_limit_s=1.0)
        first = await asyncio.gather(*(cluster.post(n, *by_id(n)) for n in (0, 1)))
        assert [(status, reply["complete"]) for status, reply in first] == [(200, False)] * 2
        owner_of(cluster).kill()
        assert (await cluster.post(1, *by_id(1))) == first[1]
        status, reply = await cluster.post(1, *by_id(2))
        assert (status, reply["error"]["type"]) == (410, "late")
        assert len(engine.scored) == 1

    go(main)


@pytest.mark.parametrize("way", [by_id, by_content, by_reward])
def test_where_nobody_is_left_who_knows_a_member_gets_no_result_of_its_own(cluster_of, way):
    """Both assemblers dead at once. To be scored without its siblings would contradict what those were told."""

    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=2, time_limit_s=1.0)
        first = await asyncio.gather(*(cluster.post(n % 2, *way(n)) for n in range(3)))
        assert [status for status, _ in first] == [200] * 3
        for process in cluster.assemblers:
            process.kill()
        status, reply = await cluster.post(0, *way(1))
        assert (status, reply["error"]["type"]) == (410, "late")
        assert len(engine.scored) == 1
        # Whole groups are scored as ever, and soon those that lack somebody, too.
        whole = await asyncio.gather(*(cluster.post(n % 2, *way(n)) for n in range(3)))
        assert [status for status, _ in whole] == [200] * 3
        assert len(engine.scored) == 2
        await asyncio.sleep(0.1)
        alone = await cluster.post(0, "/v1/rendezvous", {**by_id(0)[1], "group_id": "later"})
        assert (alone[0], alone[1]["complete"]) == (200, False)

    go(main)


@pytest.mark.usefixtures("quick")
def test_a_call_that_waited_while_the_successor_started_is_not_scored_without_its_siblings(cluster_of):
    """Its entry has seen nobody die."""

    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=1, time_limit_s=1.0)
        await asyncio.gather(*(cluster.post(n % 2, *by_id(n)) for n in range(3)))
        await asyncio.sleep(0.05)
        process = cluster.place(0)
        process.die()
        waiting = asyncio.create_task(cluster.post(0, *by_id(1)))
        await asyncio.sleep(0.05)
        process.start()
        status, reply = await waiting
        assert (status, reply["error"]["type"]) == (410, "late")
        assert not any(one.resent for one in cluster.entries)
        assert len(engine.scored) == 1

    go(main)


@pytest.mark.parametrize("way", [by_content, by_reward, by_rollout])
@pytest.mark.usefixtures("quick")
def test_a_later_group_of_the_same_texts_is_a_group_of_its_own(cluster_of, way):
    """Answers that are known to have arrived are nobody's repetition, at the successor neither."""

    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=2, **GYM)
        await asyncio.gather(*(cluster.post(n % 2, *way(n)) for n in range(3)))
        await asyncio.sleep(0.25)  # a few signs of life
        owner_of(cluster).kill()
        later = await asyncio.gather(*(cluster.post(n % 2, *way(n)) for n in (0, 1, 9)))
        assert [status for status, _ in later] == [200] * 3
        assert [sorted(group) for group in engine.scored] == [["0 x", "1 x", "2 x"], ["0 x", "1 x", "9 x"]]

    go(main)


def test_a_copy_is_not_outlived_by_the_one_that_was_started_again(cluster_of):
    """An assembler that is started anew is given the others' copies, which the one before it held."""

    async def main():
        engine = Numbers()
        cluster = cluster_of(engine, assemblers=2)
        first = await asyncio.gather(*(cluster.post(n % 2, *by_reward(n)) for n in range(3)))
        owner = owner_of(cluster)
        other = next(one for one in cluster.assemblers if one is not owner)
        other.kill()
        await other.beat("somebody")  # it begins
        await settle()
        owner.kill()
        assert await cluster.post(1, *by_reward(2)) == first[2]
        owner.kill()  # and a second time
        assert await cluster.post(1, *by_reward(0)) == first[0]
        assert len(engine.scored) == 1

    go(main)


# -- a help, never a reason not to answer ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hangs", "down", "fails"])
def test_who_takes_no_copies_holds_answers_up_once_and_not_for_long(cluster_of, monkeypatch, caplog, how):
    monkeypatch.setattr(copies, "LIMIT_S", 0.6)
    monkeypatch.setattr(copies, "_RESTORE_S", 0.1)

    async def main():
        cluster = cluster_of(Numbers(), assemblers=2)
        sick, well = cluster.assemblers
        names = iter(range(1000))

        async def group():
            """Of the assembler that is well; returns how long it took."""
            while True:
                before, number, began = well.assembler.service.assembly.stats.groups, next(names), time.monotonic()
                posts = (cluster.post(0, "/v1/rendezvous", {**by_id(n)[1], "group_id": number}) for n in range(3))
                assert [status for status, _ in await asyncio.gather(*posts)] == [200] * 3
                if well.assembler.service.assembly.stats.groups > before:
                    return time.monotonic() - began

        await group()
        taken = sick.assembler.copies._shelves["Assembler1"].copies
        before = len(taken)
        await group()
        assert len(taken) == before + 1
        if how == "hangs":
            sick.answers_copies = False
        elif how == "fails":
            monkeypatch.setattr(sick.assembler, "hold", lambda *_: 1 / 0)
        else:
            monkeypatch.setattr(entry, "owner", lambda key, names: "Assembler1")
            sick.die()
        first = await group()
        assert (first < 0.5) if how == "fails" else (0.6 <= first < 3)
        assert all([await group() < 0.5 for _ in range(3)])
        why = "ZeroDivisionError" if how == "fails" else "TimeoutError"
        said = [one.getMessage() for one in caplog.records if "takes no copies" in one.getMessage()]
        assert said == [f"Assembler0 takes no copies of Assembler1's groups ({why})"]
        if how == "hangs":
            sick.answers_copies = True
            await asyncio.sleep(0.7)  # the call that tries it
            await group()
            await settle()
            before = len(taken)
            await group()
            assert len(taken) == before + 1

    caplog.set_level(logging.WARNING, logger="rmcore")
    go(main)


def test_groups_of_one_moment_go_in_one_call_that_is_no_requests(cluster_of):
    request = contextvars.ContextVar("request", default=None)

    async def main():
        cluster = cluster_of(Numbers(), assemblers=2, batch_wait_s=0.05)
        seen = []
        for process in cluster.assemblers:
            hold = process.assembler.copies.hold

            def seen_hold(origin, given, reached, hold=hold):
                seen.append((len(given), request.get()))
                hold(origin, given, reached)

            process.assembler.copies.hold = seen_hold

        async def post(number, slot):
            request.set("some")
            return await cluster.post(0, "/v1/rendezvous", {**by_id(slot)[1], "group_id": number})

        answers = await asyncio.gather(*(post(number, slot) for number in range(30) for slot in range(3)))
        assert [status for status, _ in answers] == [200] * 90
        assert sum(count for count, _ in seen) == 30
        assert len(seen) <= 4
        assert {of for _, of in seen} == {None}

    go(main)


def test_one_assembler_makes_no_copies(cluster_of):
    async def main():
        cluster = cluster_of(Numbers(), assemblers=1)
        await asyncio.gather(*(cluster.post(0, *by_id(n)) for n in range(3)))
        known = cluster.place(0).assembler
        assert known.copies is None
        assert known.service.assembly.finished is None
        await known.hold("Assembler0", [], {})
        assert await known.held("Assembler0") == []

    go(main)


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
