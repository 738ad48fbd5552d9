"""What an assembler has answered, the one after it knows: copies of scored groups at the others; without ray."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time

import pytest
from support.clocks import settle
from support.json_numbers import Numbers
from support.ray_calls import by_content, go

from rmcore.integrations.ray.serve import assembler, copies, entry, presence
from rmcore.integrations.server.gym_bonuses import GymBonuses


def by_id(number, slot=None):
    slot = number if slot is None else slot
    return "/v1/rendezvous", {"group_id": "g", "slot": slot, "k": 3, "prompt": "p", "response": f"{number} x"}


def by_reward(number):
    return "/get_reward", {"query": [f"q{number} x"], "prompts": ["q"]}


def by_rollout(number):
    output = [{"type": "message", "content": [{"type": "output_text", "text": f"{number} x"}]}]
    return "/verify", {"responses_create_params": {"input": "red"}, "response": {"output": output}}


WAYS = [by_id, by_content, by_reward, by_rollout]
GYM = {"nemo_gym": True, "gym_bonuses": GymBonuses(answer_bonus=1.0, group_answer_length_penalty_coeff=0.5)}


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
