"""How many requests are in flight: found out by trying, halved when refused, fair, and never above the ceiling."""

from __future__ import annotations

import asyncio
import random
import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.client.concurrency import AdaptiveConcurrency
from rmcore._base.errors import InputError


async def round_trip(concurrency, signals):
    """Fill all slots that there are, then answer every request: the signals go round."""
    slots = [await concurrency.acquire() for _ in range(concurrency.state.limit)]
    for slot, k in zip(slots, range(len(slots)), strict=True):
        slot.release(signals[k % len(signals)])
    return concurrency.state.limit


def run(signals_by_round, ceiling=63, start=8):
    async def work():
        concurrency = AdaptiveConcurrency(ceiling, start=start)
        return [await round_trip(concurrency, signals) for signals in signals_by_round]

    return asyncio.run(work())


GOOD, REFUSED, SLOW, ODD = ["success"], ["refused"], ["timeout"], ["neutral"]


def test_the_limit_doubles_each_round_trip_up_to_the_ceiling():
    assert run([GOOD] * 8, ceiling=200) == [16, 32, 64, 128, 200, 200, 200, 200]


def test_a_refusal_halves_it_and_then_it_grows_by_one_a_round_trip():
    assert run([GOOD, GOOD, ["success"] * 31 + ["refused"], GOOD, GOOD, GOOD]) == [16, 32, 31, 32, 33, 34]


def test_a_storm_is_one_cut_a_round_trip_and_never_less_than_one():
    assert run([REFUSED] * 6, start=32) == [16, 8, 4, 2, 1, 1]


def test_after_a_storm_it_comes_back_quickly_to_half_of_what_it_was():
    rounds = run([GOOD] * 5 + [REFUSED] * 6 + [GOOD] * 9, ceiling=256)
    assert rounds[4] == 256
    assert rounds[10] == 4
    assert rounds[11:16] == [8, 16, 32, 64, 128]
    assert all(6 <= later - earlier <= 8 for earlier, later in pairwise(rounds[15:]))


@pytest.mark.parametrize("ceiling", [320, 1000, 2000])
def test_the_way_back_from_half_is_as_long_for_every_ceiling(ceiling):
    rounds = run([REFUSED, *[GOOD] * 17], ceiling=ceiling, start=ceiling)
    assert rounds[0] == ceiling // 2
    assert rounds[14] < ceiling
    assert rounds[17] == ceiling


@pytest.mark.parametrize(("timeouts", "limit"), [(1, 64), (6, 64), (7, 32), (64, 32)])
def test_timeouts_count_when_a_tenth_of_a_round_trip_has_them(timeouts, limit):
    assert run([["timeout"] * timeouts + ["success"] * (64 - timeouts)], start=64, ceiling=64)[0] in (limit, limit + 1)


def test_the_third_timeout_counts_where_little_is_in_flight():
    assert run([SLOW] * 7, start=2) == [2, 1, 1, 1, 1, 1, 1]
    # Hanging now and then is no overload, however few requests there are.
    assert run([["timeout"] + ["success"] * 19] * 30, start=20, ceiling=20) == [20] * 30


def test_other_failures_change_nothing():
    assert run([ODD] * 3) == [8, 8, 8]


def test_calls_one_by_one_do_not_raise_the_limit():
    async def work():
        concurrency = AdaptiveConcurrency(100)
        for _ in range(50):
            (await concurrency.acquire()).release("success")
        return concurrency.state

    state = asyncio.run(work())
    assert (state.limit, state.peak_in_flight, state.in_flight) == (8, 1, 0)


def test_replies_to_requests_from_before_a_cut_do_not_cut_again():
    async def work():
        concurrency = AdaptiveConcurrency(64, start=64)
        slots = [await concurrency.acquire() for _ in range(64)]
        slots[0].release("refused")
        assert concurrency.state.limit == 32
        for slot in slots[1:33]:
            slot.release("refused")
        assert (concurrency.state.limit, concurrency.state.cuts) == (32, 1)
        late = slots[33]
        late.sent()  # this one went out after the cut
        late.release("refused")
        assert (concurrency.state.limit, concurrency.state.cuts) == (16, 2)

    asyncio.run(work())


def test_releasing_twice_frees_one_place():
    async def work():
        concurrency = AdaptiveConcurrency(2)
        first, _ = await concurrency.acquire(), await concurrency.acquire()
        first.release("success")
        first.release("success")
        assert concurrency.state.in_flight == 1

    asyncio.run(work())


def test_first_come_first_served(virtual):
    async def work(clock):
        concurrency = AdaptiveConcurrency(1)
        order = []

        async def one(k):
            slot = await concurrency.acquire()
            order.append(k)
            await clock.sleep(1)
            slot.release("success")

        await asyncio.gather(*(one(k) for k in range(20)))
        return order

    assert virtual(work) == list(range(20))


def test_a_wait_ends_with_its_time(virtual):
    async def work(clock):
        concurrency = AdaptiveConcurrency(1)
        held = await concurrency.acquire()
        assert await concurrency.acquire(0) is None
        assert await concurrency.acquire(2.5) is None
        assert clock.now() == 2.5
        assert concurrency.state.queued == 0
        held.release()
        assert await concurrency.acquire(0) is not None

    virtual(work)


@given(st.integers(1, 6), st.integers(0, 2**32))
@settings(max_examples=60)
def test_places_are_never_lost_or_doubled_whatever_is_cancelled(virtual, ceiling, seed):
    rng = random.Random(seed)

    async def work(clock):
        concurrency = AdaptiveConcurrency(ceiling)
        now = most = 0

        async def one():
            nonlocal now, most
            await clock.sleep(rng.randrange(8) / 4)
            slot = await concurrency.acquire(rng.choice([None, None, 0.5, 1.0]))
            if slot is None:
                return
            try:
                now += 1
                most = max(most, now)
                assert now <= ceiling
                await clock.sleep(rng.randrange(4) / 4)
            finally:
                now -= 1
                slot.release(rng.choice(["success", "refused", "timeout", "neutral"]))

        async def cancelled(task, after):
            await clock.sleep(after)
            task.cancel()

        tasks = [asyncio.create_task(one()) for _ in range(30)]
        await asyncio.gather(
            *tasks,
            *(cancelled(task, rng.randrange(20) / 4) for task in tasks if rng.random() < 0.5),
            return_exceptions=True,
        )
        state = concurrency.state
        assert (state.in_flight, state.queued) == (0, 0)
        assert 1 <= state.limit <= ceiling
        # A place that was given in the moment its caller was cancelled counts, and nobody was in it.
        assert most <= state.peak_in_flight <= ceiling
        for task in tasks:
            assert task.cancelled() or task.exception() is None

    virtual(work)


def test_one_count_over_threads_and_loops():
    concurrency = AdaptiveConcurrency(3)
    lock = threading.Lock()
    now = most = done = 0

    async def one():
        nonlocal now, most, done
        slot = await concurrency.acquire()
        with lock:
            now += 1
            most = max(most, now)
        await asyncio.sleep(0.001)
        with lock:
            now -= 1
            done += 1
        slot.release("success")

    async def many():
        await asyncio.gather(*(one() for _ in range(50)))

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (done, concurrency.state.in_flight, concurrency.state.queued) == (200, 0, 0)
    assert 1 <= most <= 3


@pytest.mark.parametrize("kwargs", [{"ceiling": 0}, {"ceiling": 1.5}, {"ceiling": True}, {"ceiling": 1, "start": 0}])
def test_bad_arguments(kwargs):
    with pytest.raises(InputError, match=list(kwargs)[-1]):
        AdaptiveConcurrency(**kwargs)


@pytest.mark.parametrize("places", [1, 2, 3, 12])
def test_a_server_with_few_places_is_not_asked_for_more_all_the_time(places):
    """Of 35 requests to two places 17 were refused where the limit started at 8 and was halved again and again."""

    async def work():
        concurrency = AdaptiveConcurrency(16, start=4)
        in_use = refused = 0

        async def call():
            nonlocal in_use, refused
            while True:
                slot = await concurrency.acquire()
                if in_use < places:
                    break
                refused += 1
                slot.release("refused")
                await asyncio.sleep(0)
            in_use += 1
            for _ in range(8):
                await asyncio.sleep(0)
            in_use -= 1
            slot.release("success")

        await asyncio.gather(*(call() for _ in range(200)))
        return refused, concurrency.state

    refused, state = asyncio.run(work())
    assert refused <= 12
    assert state.in_flight == state.queued == 0
    assert state.limit <= places + 1


def test_a_wall_that_is_gone_is_passed_and_forgotten():
    # 3 is refused twice; then the server has room, and after the longer tries the limit grows as before.
    rounds = run([REFUSED, GOOD, GOOD, REFUSED, *[GOOD] * 40], start=3)
    assert max(rounds) > 20
