"""Groups whose members are known by their texts alone."""

from __future__ import annotations

import asyncio

import pytest
from support.assemblies import go, scored
from support.clocks import settle

from rmcore.integrations.server.assembly import ConflictError

# -- by content ------------------------------------------------------------------------------------------------------


def test_equal_responses_are_members_of_their_own(make):
    async def main():
        assembly, scorer, _ = make()
        results = await asyncio.gather(*(assembly.join_by_content("p", text, 3) for text in ("x", "x", "yy")))
        assert sorted(r.index for r in results) == [0, 1, 2]
        assert scorer.calls == [("p", ["x", "x", "yy"])]

    go(main())


def test_a_repeated_call_whose_first_went_away_is_the_same_member(make):
    """OpenRLHF gives up after 180 s and asks again, one second later."""

    async def main():
        assembly, scorer, clock = make(time_limit_s=150.0)
        hung = asyncio.Event()

        async def slow(prompt, responses):
            scorer.calls.append((prompt, list(responses)))
            await hung.wait()
            return scored(responses)

        assembly.score = slow
        calls = [asyncio.create_task(assembly.join_by_content("p", text, 2)) for text in ("x", "yy")]
        await clock.advance(180)
        for call in calls:
            call.cancel()
        await clock.advance(1)
        again = [asyncio.create_task(assembly.join_by_content("p", text, 2)) for text in ("x", "yy")]
        await settle()
        hung.set()
        assert [(await task).index for task in again] == [0, 1]
        assert len(scorer.calls) == 1
        assert assembly.stats.retries == 2

    go(main())


def test_the_same_texts_later_are_a_new_group_once_delivered(make):
    async def main():
        assembly, scorer, _ = make()
        for _ in range(2):
            await asyncio.gather(*(assembly.join_by_content("p", text, 2) for text in ("x", "y")))
        assert len(scorer.calls) == 2

    go(main())


def test_prompts_do_not_mix(make):
    async def main():
        assembly, scorer, _ = make()
        chat = [{"role": "user", "content": "p"}]
        calls = [("p", "a"), (chat, "b"), ("p", "c"), (chat, "d")]
        await asyncio.gather(*(assembly.join_by_content(prompt, text, 2) for prompt, text in calls))
        assert sorted((str(p), r) for p, r in scorer.calls) == sorted([("p", ["a", "c"]), (str(chat), ["b", "d"])])

    go(main())


def test_a_lost_answer_is_given_again(make):
    async def main():
        assembly, scorer, _ = make()
        results = await asyncio.gather(*(assembly.join_by_content("p", text, 2) for text in ("x", "yy")))
        results[1].lost()
        again = await assembly.join_by_content("p", "yy", 2)
        assert (again.index, again.group) == (results[1].index, results[1].group)
        assert len(scorer.calls) == 1

    go(main())


def test_a_repetition_after_an_answer_that_nobody_knew_was_lost_gets_that_answer_at_the_time_limit(make):
    async def main():
        assembly, scorer, clock = make()
        texts = ("x", "x", "yy", "zzz")
        await asyncio.gather(*(assembly.join_by_content("p", text, 4) for text in texts))
        again = [asyncio.create_task(assembly.join_by_content("p", text, 4)) for text in ("x", "zzz", "x")]
        await clock.advance(99)
        assert not any(task.done() for task in again)
        await clock.advance(1)
        results = [await task for task in again]
        assert len(scorer.calls) == 1
        assert [len(texts[r.index]) for r in results] == [1, 3, 1]
        assert results[0].index != results[2].index
        assert all(r.complete for r in results)
        assert (assembly.stats.recovered, assembly.stats.partial_groups) == (3, 0)
        # Other texts, or one text more often than before, are a group of their own.
        for repeated in (("x", "other"), ("x", "x", "x")):
            calls = [asyncio.create_task(assembly.join_by_content("p", text, 4)) for text in repeated]
            await clock.advance(100)
            assert not (await calls[0]).complete
        assert len(scorer.calls) == 3

    go(main())


def test_what_a_killed_trainer_left_behind_does_not_meet_its_successor(make):
    async def main():
        assembly, scorer, clock = make(abandon_s=15.0)
        dead = [asyncio.create_task(assembly.join_by_content("p", text, 3)) for text in ("old", "older")]
        await clock.advance(1)
        for task in dead:
            task.cancel()
        await clock.advance(14)
        back = asyncio.create_task(assembly.join_by_content("p", "old", 3))  # only this one had lost its connection
        await clock.advance(5)
        new = [asyncio.create_task(assembly.join_by_content("p", text, 3)) for text in ("a", "bb")]
        results = [await task for task in (back, *new)]
        assert scorer.calls == [("p", ["old", "a", "bb"])]
        assert [r.index for r in results] == [0, 1, 2]
        assert assembly.stats.abandoned == 1

    go(main())


def test_a_group_left_by_all_is_closed(make):
    async def main():
        assembly, scorer, clock = make(abandon_s=15.0)
        lost = asyncio.create_task(assembly.join_by_content("p", "old", 2))
        await settle()
        lost.cancel()
        await clock.advance(20)
        await asyncio.gather(*(assembly.join_by_content("p", text, 2) for text in ("a", "b")))
        assert scorer.calls == [("p", ["a", "b"])]
        assert assembly.open_groups == 0

    go(main())


def test_a_scored_group_keeps_no_texts(make):
    async def main():
        assembly, _, _ = make()
        await asyncio.gather(*(assembly.join("g", k, 2, "p", "xy"[k]) for k in (0, 1)))
        (group,) = assembly._groups.values()
        assert group.prompt is None
        assert [slot.text for slot in group.slots.values()] == [None, None]
        with pytest.raises(ConflictError):
            await assembly.join("g", 0, 2, "q", "x")

    go(main())
