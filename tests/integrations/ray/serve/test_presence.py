"""Who is alive, on a clock the test moves."""

from __future__ import annotations

import asyncio

import pytest

from rmcore.integrations.ray.serve.presence import BEAT_S, Presence


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds
        await asyncio.sleep(0)


def go(main):
    asyncio.run(asyncio.wait_for(main(), 10))


@pytest.fixture
def clock():
    return Clock()


def test_an_answer_counts_as_delivered_when_its_entry_has_lived_on_for_two_beats(clock):
    presence, lost, reached = Presence(patience_s=3.0, clock=clock), [], []
    presence.heard("a")
    presence.answered("a", b"early", lambda: lost.append("early"), lambda: reached.append("early"))
    clock.time += BEAT_S
    presence.heard("a")  # was on its way when the answer was
    clock.time += BEAT_S
    presence.answered("a", b"late", lambda: lost.append("late"), lambda: reached.append("late"))
    assert reached == []
    presence.heard("a")
    assert reached == ["early"]
    clock.time += 3.1
    presence.give_up_silent()
    assert (lost, reached) == (["late"], ["early"])
    assert presence.given_up == 1
    presence.give_up_silent()
    assert presence.given_up == 1


def test_answers_of_a_time_in_doubt_count_as_lost_when_the_doubt_is_over(clock):
    presence, lost = Presence(patience_s=3.0, clock=clock), []
    presence.heard("a")
    presence.answered("a", b"early", lambda: lost.append("early"))
    clock.time += 2 * BEAT_S
    presence.heard("a")  # delivered
    presence.answered("a", b"late", lambda: lost.append("late"))
    for _ in range(20):  # alive all the while, and nothing is given up
        clock.time += BEAT_S
        presence.heard("a", vouched=False)
        presence.give_up_silent()
    assert (lost, presence.given_up) == ([], 0)
    presence.heard("a")
    assert lost == ["late"]
    presence.heard("a")
    assert lost == ["late"]


def test_in_doubt_a_text_that_comes_again_waits_even_through_its_own_entry(clock):
    async def main():
        presence = Presence(patience_s=3.0, clock=clock)
        presence.heard("a")
        twin = asyncio.ensure_future(asyncio.Event().wait())

        async def held():
            with presence.holding("a", twin, b"text"):
                await asyncio.wait({twin})

        holding = asyncio.ensure_future(held())
        await asyncio.sleep(0)
        presence.heard("a", vouched=False)
        waiting = [asyncio.ensure_future(presence.no_repetition(entry, b"text")) for entry in ("a", "b")]
        clock.time += BEAT_S
        presence.heard("a", vouched=False)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(one.done() for one in waiting)
        twin.cancel()  # its caller was found to be gone
        await holding
        presence.heard("a")
        await asyncio.gather(*waiting)

    go(main)


def test_what_a_silent_entry_has_under_way_is_cancelled_once(clock):
    async def main():
        presence = Presence(patience_s=3.0, clock=clock)
        presence.heard("a")
        presence.heard("b")
        calls = [asyncio.ensure_future(asyncio.Event().wait()) for _ in range(2)]
        with presence.holding("a", calls[0]), presence.holding("b", calls[1]):
            clock.time += 2
            presence.heard("b")
            clock.time += 2
            presence.give_up_silent()
            await asyncio.wait({calls[0]})
            assert calls[0].cancelled()
            assert not calls[1].done()
        calls[1].cancel()

    go(main)


def test_a_repetition_waits_for_its_twins_entry_to_be_heard_or_given_up(clock):
    async def main():
        presence = Presence(patience_s=3.0, clock=clock)
        presence.heard("a")
        twin = asyncio.ensure_future(asyncio.Event().wait())

        async def held():
            with presence.holding("a", twin, b"text"):
                await asyncio.wait({twin})

        holding = asyncio.ensure_future(held())
        await asyncio.sleep(0)
        await presence.no_repetition("a", b"text")  # its own entry is alive: it has just sent this one
        await presence.no_repetition("b", b"another text")
        waiting = asyncio.ensure_future(presence.no_repetition("b", b"text"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done()
        presence.heard("a")
        await waiting
        assert not twin.done()
        before = clock.time
        await presence.no_repetition("b", b"text")  # nothing is heard any more
        assert twin.cancelled()
        assert 3.0 <= clock.time - before < 3.0 + 3 * BEAT_S
        await holding

    go(main)
