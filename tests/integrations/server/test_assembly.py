"""Groups out of single members: whole, late, repeated, equal, cancelled, refused; on a clock the test moves."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.assemblies import go, scored
from support.clocks import settle

from rmcore._base.errors import InputError
from rmcore.integrations.server.assembly import BusyError, ConflictError, LateError
from rmcore.integrations.server.members import OpenGroup, Outcome, Slot, group_digest, text_digest


def test_members_get_their_own_row_whatever_the_order_of_arrival(make):
    async def main():
        assembly, scorer, _ = make()
        texts = ["a", "bb", "ccc", "dddd"]
        order = [2, 0, 3, 1]
        results = await asyncio.gather(*(assembly.join("g", k, 4, "p", texts[k]) for k in order))
        for k, result in zip(order, results, strict=True):
            assert result.index == k
            assert result.complete
            assert float(result.group.advantages[k]) == pytest.approx(len(texts[k]) - (10 - len(texts[k])) / 3)
        assert scorer.calls == [("p", texts)]
        assert assembly.waiting == assembly.open_groups == 0

    go(main())


def test_the_time_limit_scores_those_present_and_refuses_the_late(make):
    async def main():
        assembly, scorer, clock = make()
        waiting = [asyncio.create_task(assembly.join("g", k, 3, "p", "x" * (k + 1))) for k in (0, 2)]
        await clock.advance(99)
        assert not any(task.done() for task in waiting)
        await clock.advance(1)
        first, third = [await task for task in waiting]
        assert first.slots == third.slots == (0, 2)
        assert (first.index, third.index) == (0, 1)
        assert not first.complete
        assert scorer.calls == [("p", ["x", "xxx"])]
        with pytest.raises(LateError, match=r"members \[0, 2\]"):
            await assembly.join("g", 1, 3, "p", "xx")
        again = await assembly.join("g", 2, 3, "p", "xxx")  # a retry of one that was in time
        assert again.index == 1
        assert (assembly.stats.partial_groups, assembly.stats.late_members, assembly.stats.retries) == (1, 1, 1)

    go(main())


def test_who_came_while_the_process_stood_still_was_in_time(make):
    """Suspended over the time limit, it finds timers and members' requests at once; the timers must not win."""

    async def main():
        assembly, scorer, clock = make()
        waiting = [
            asyncio.create_task(assembly.join(group, k, 3, "p", "x" * (k + 1))) for group in "gh" for k in (0, 2)
        ]
        await clock.advance(106)
        third = await assembly.join("g", 1, 3, "p", "xx")
        assert third.complete
        assert all([(await task).complete for task in waiting[:2]])
        await clock.advance(4.9)
        assert not any(task.done() for task in waiting[2:])
        await clock.advance(0.1)
        assert [(await task).slots for task in waiting[2:]] == [(0, 2)] * 2
        assert scorer.calls == [("p", ["x", "xx", "xxx"]), ("p", ["x", "xxx"])]

    go(main())


def test_a_cancelled_waiter_does_not_cancel_the_group_and_its_retry_takes_over(make):
    async def main():
        assembly, scorer, _ = make()
        lost = asyncio.create_task(assembly.join("g", 0, 2, "p", "x"))
        await settle()
        lost.cancel()
        await settle()
        second = asyncio.create_task(assembly.join("g", 1, 2, "p", "yy"))
        assert (await second).slots == (0, 1)
        assert (await assembly.join("g", 0, 2, "p", "x")).index == 0
        assert len(scorer.calls) == 1

    go(main())


def test_an_attempt_makes_a_new_group(make):
    async def main():
        assembly, scorer, _ = make()
        for attempt in (0, 1):
            await asyncio.gather(*(assembly.join("g", k, 2, "p", "xy"[k], attempt=attempt) for k in (0, 1)))
        assert len(scorer.calls) == 2

    go(main())


def test_contradictions_are_refused(make):
    async def main():
        assembly, _, _ = make()
        waiting = asyncio.create_task(assembly.join("g", 0, 2, "p", "x"))
        await settle()
        for arguments, message in [
            (("g", 1, 3, "p", "y"), "size: got 3"),
            (("g", 1, 2, "q", "y"), "prompt: got another prompt"),
            (("g", 0, 2, "p", "other"), "response: got another text"),
            (("g", 2, 2, "p", "y"), "slot: got 2"),
            (("h", -1, 2, "p", "y"), "slot: got -1"),
            (("h", 0, 0, "p", "y"), "size: got 0"),
            (("h", 0, 2, 7, "y"), "prompt: got int"),
            (("h", 0, 2, "p", 7), "response: got int"),
        ]:
            with pytest.raises(InputError, match=message):
                await assembly.join(*arguments)
        await assembly.join("g", 1, 2, "p", "y")
        await waiting
        assert assembly.open_groups == 0

    go(main())


def test_an_error_reaches_all_members_and_is_not_remembered(make):
    async def main():
        assembly, scorer, _ = make()
        scorer.fail = 1
        results = await asyncio.gather(
            *(assembly.join("g", k, 2, "p", "xy"[k]) for k in (0, 1)), return_exceptions=True
        )
        assert [str(r) for r in results] == ["no score today"] * 2
        again = await asyncio.gather(*(assembly.join("g", k, 2, "p", "xy"[k]) for k in (0, 1)))
        assert [r.index for r in again] == [0, 1]
        assert assembly.stats.failed_groups == 1

    go(main())


# -- remembered elsewhere, too ---------------------------------------------------------------------------------------


def test_results_wait_until_somebody_else_knows_and_go_out_whatever_becomes_of_that(make, caplog):
    async def main():
        assembly, _, _ = make()
        told, known = [], asyncio.Event()

        async def finished(group):
            told.append((group.key, [slot.text for slot in group.slots.values()], group.outcome.slots))
            await known.wait()
            raise ZeroDivisionError

        assembly.finished = finished
        calls = [asyncio.create_task(assembly.join("g", k, 2, "p", "xy"[k])) for k in (0, 1)]
        await settle()
        assert told == [(("id", "g", 0), [None, None], (0, 1))]
        assert not any(call.done() for call in calls)
        again = asyncio.create_task(assembly.join("g", 0, 2, "p", "x"))  # waits as they do
        await settle()
        assert not again.done()
        known.set()
        assert [(await call).index for call in (*calls, again)] == [0, 1, 0]
        assert "remembered here alone" in caplog.text
        assert assembly.stats.failed_groups == 0

    go(main())


def finished_elsewhere(key, texts, *, by_content=False):
    slots = {k: Slot(text_digest(text), None) for k, text in enumerate(texts)}
    group = OpenGroup(key, None, group_digest("p"), len(texts), 0.0, by_content=by_content, slots=slots, closed=True)
    group.outcome = Outcome(scored(texts), tuple(slots), {k: k for k in slots}, (None,) * len(texts))
    group.task = asyncio.get_running_loop().create_future()
    group.task.set_result(group.outcome)
    return group


def test_a_group_that_was_scored_elsewhere_is_one_of_its_own(make):
    async def main():
        assembly, scorer, clock = make()
        theirs = finished_elsewhere(("content", "theirs", 1), ["x", "x", "yyy"], by_content=True)
        theirs.slots[2].delivered = True
        assembly.restore(theirs, 60.0)
        assembly.restore(finished_elsewhere(("id", "g", 0), ["x", "yy"]), 300.0)
        assembly.restore(finished_elsewhere(("id", "g", 0), ["other", "texts"]), 300.0)  # the first one holds
        assert (await assembly.join("g", 1, 2, "p", "yy")).index == 1
        with pytest.raises(ConflictError):
            await assembly.join("g", 0, 2, "p", "other")
        # Equal texts are members of their own: each is given once.
        first = [await assembly.join_by_content("p", "x", 3) for _ in range(2)]
        assert sorted(result.index for result in first) == [0, 1]
        # A third one is of a new group, as is what had arrived.
        new = [asyncio.create_task(assembly.join_by_content("p", text, 3)) for text in ("x", "yyy", "zz")]
        assert [(await one).complete for one in new] == [True] * 3
        assert scorer.calls == [("p", ["x", "yyy", "zz"])]
        await clock.advance(61)
        await assembly.join("h", 0, 1, "p", "x")
        assert theirs.key not in assembly._groups
        assert ("id", "g", 0) in assembly._groups
        await clock.advance(240)
        await assembly.join("i", 0, 1, "p", "x")
        assert ("id", "g", 0) not in assembly._groups

    go(main())


# -- limits ----------------------------------------------------------------------------------------------------------


def test_too_many_waiting_members_are_sent_away_and_leave_nothing_behind(make):
    async def main():
        assembly, _, _ = make(max_members=3)
        waiting = [asyncio.create_task(assembly.join("g", k, 4, "p", "x")) for k in range(3)]
        await settle()
        with pytest.raises(BusyError) as error:
            await assembly.join("h", 0, 2, "p", "y")
        assert error.value.retry_after_s > 0
        assert assembly.open_groups == 1
        with pytest.raises(BusyError):
            await assembly.join("g", 3, 4, "p", "x")
        for task in waiting:
            task.cancel()
        await settle()
        assert assembly.waiting == 0
        assert (await assembly.join("g", 3, 4, "p", "x")).slots == (0, 1, 2, 3)

    go(main())


def test_draining_finishes_what_was_accepted(make):
    async def main():
        assembly, scorer, clock = make()
        half = asyncio.create_task(assembly.join("g", 0, 2, "p", "x"))
        lone = asyncio.create_task(assembly.join("h", 0, 2, "q", "x"))
        await settle()
        drained = asyncio.create_task(assembly.drain())
        await settle()
        with pytest.raises(BusyError):
            await assembly.join("new", 0, 2, "p", "x")
        assert (await assembly.join("g", 1, 2, "p", "y")).complete
        await half
        assert not drained.done()
        await clock.advance(100)
        assert not (await lone).complete
        await drained
        assert len(scorer.calls) == 2

    go(main())


def test_a_drain_may_be_cut_short(make):
    async def main():
        assembly, _scorer, clock = make()
        lone = asyncio.create_task(assembly.join("h", 0, 2, "q", "x"))
        await settle()
        drained = asyncio.create_task(assembly.drain(30.0))
        await clock.advance(29)
        assert not drained.done()
        await clock.advance(1)
        await drained
        assert (await lone).slots == (0,)
        assert clock.now() == 30

    go(main())


def test_only_so_many_finished_groups_are_remembered(make):
    async def main():
        assembly, scorer, _ = make(max_kept=3)
        for k in range(10):
            await assembly.join(k, 0, 1, "p", "x")
        assert len(assembly._groups) <= 4
        await assembly.join(9, 0, 1, "p", "x")
        await assembly.join(0, 0, 1, "p", "x")
        assert len(scorer.calls) == 11

    go(main())


def test_old_groups_are_forgotten(make):
    async def main():
        assembly, _, clock = make(keep_s=10.0)
        for k in range(50):
            await asyncio.gather(*(assembly.join(k, s, 2, "p", "xy"[s]) for s in (0, 1)))
            await asyncio.gather(*(assembly.join_by_content(f"p{k}", t, 2) for t in "xy"))
        assert len(assembly._groups) == 100
        await clock.advance(11)
        await asyncio.gather(*(assembly.join("last", s, 2, "p", "xy"[s]) for s in (0, 1)))
        assert len(assembly._groups) == 1
        assert not assembly._by_prompt

    go(main())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_any_interleaving_scores_every_group_once_and_mixes_none(make, seed, sizes):
    async def main():
        assembly, scorer, _ = make()
        rng = random.Random(seed)
        members = [(g, k, size) for g, size in enumerate(sizes) for k in range(size)]
        members += [m for m in members if rng.random() < 0.3]  # calls made twice
        rng.shuffle(members)

        async def call(g, k, size):
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            return await assembly.join(g, k, size, f"prompt {g}", "x" * (10 * g + k + 1))

        results = await asyncio.gather(*(call(*member) for member in members))
        assert len(scorer.calls) == len(sizes)
        for (g, k, size), result in zip(members, results, strict=True):
            assert result.slots == tuple(range(size))
            assert result.index == k
            own = [len("x" * (10 * g + j + 1)) for j in range(size)]
            assert result.group.preference[k].tolist() == [own[k] - other for other in own]

    go(main())


@pytest.mark.parametrize(
    "options", [{"time_limit_s": 0}, {"keep_s": -1}, {"abandon_s": -1}, {"max_members": 0}, {"max_kept": -1}]
)
def test_bad_limits_are_named(make, options):
    with pytest.raises(InputError, match=next(iter(options))):
        make(**options)
