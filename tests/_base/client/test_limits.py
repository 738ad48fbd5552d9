"""Requests and tokens per minute: never more than N in any window, whoever asks, cancels or turns out larger."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmcore._base.client.limits import RateLimits, Reservation
from rmcore._base.errors import InputError

W = 60.0


class Call:
    """One planned call and what became of it. Times are multiples of 1/8 s, so that sums are exact."""

    def __init__(self, start, tokens, used, lasts, cancel_after, patience, withdraws):
        self.start, self.tokens, self.used, self.lasts = start / 8, tokens, used, lasts / 8
        self.cancel_after = None if cancel_after is None else cancel_after / 8
        self.patience = None if patience is None else patience / 8
        self.withdraws = withdraws
        self.admitted: float | None = None
        self.arrived: int | None = None
        self.reason = ""
        self.history: list[tuple[float, int]] = []  # (when, tokens it counts with from then on)


times = st.integers(0, 8 * 100)
calls = st.builds(
    Call,
    start=times,
    tokens=st.integers(0, 12),
    used=st.one_of(st.none(), st.integers(0, 20)),
    lasts=st.integers(0, 8 * 90),
    cancel_after=st.one_of(st.none(), st.none(), st.integers(0, 8 * 90)),
    patience=st.one_of(st.none(), st.none(), st.integers(0, 8 * 200)),
    withdraws=st.booleans(),
)


async def play(clock, limits, plan, holds=()):
    """Run the plan; afterwards each call knows when it was admitted and what it counted with when."""
    order = 0

    async def one(call):
        nonlocal order
        await clock.sleep(call.start)
        until = None if call.patience is None else clock.now() + call.patience
        call.arrived, order = order, order + 1
        got = await limits.acquire(call.tokens, until=until)
        if isinstance(got, str):
            call.reason = got
            if until is not None and got == "deadline":
                assert clock.now() <= until
            return
        call.admitted = clock.now()
        assert until is None or call.admitted <= until
        assert got.time == call.admitted
        call.history.append((clock.now(), call.tokens))
        if call.withdraws and call.used is None:
            got.withdraw()
            call.history.append((clock.now(), -1))
            return
        await clock.sleep(call.lasts)
        if call.used is not None:
            got.settle(call.used)
            call.history.append((clock.now(), call.used))

    async def hold(at, seconds):
        await clock.sleep(at / 8)
        limits.hold(seconds / 8)

    async def cancelled(call):
        task = asyncio.create_task(one(call))
        if call.cancel_after is not None:
            await clock.sleep(call.start + call.cancel_after)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            call.reason = call.reason or "cancelled"

    await asyncio.gather(*(cancelled(call) for call in plan), *(hold(*h) for h in holds))


def known(call, now):
    """What ``call`` counted with at ``now``, at least: of what happened in that very moment, the order is not told."""
    before = [tokens for when, tokens in call.history if when < now][-1:]
    return min(before + [tokens for when, tokens in call.history if when == now])


def check_windows(plan, n, t):
    done = sorted((c for c in plan if c.admitted is not None and c.history[-1][1] != -1), key=lambda c: c.admitted)
    for call in done:
        window = [c for c in done if call.admitted <= c.admitted < call.admitted + W]
        assert n is None or len(window) <= n
        behind = [c for c in done if call.admitted - W < c.admitted <= call.admitted]
        assert t is None or sum(known(c, call.admitted) for c in behind) <= t
        if all(c.used is None or c.used <= c.tokens for c in done):
            assert t is None or sum(c.history[-1][1] for c in window) <= t


@given(
    plan=st.lists(calls, max_size=40),
    n=st.one_of(st.none(), st.integers(1, 6)),
    t=st.one_of(st.none(), st.integers(12, 30)),
    holds=st.lists(st.tuples(times, times), max_size=3),
)
@settings(max_examples=150)
def test_no_window_holds_more_than_the_limits(virtual, plan, n, t, holds):
    async def work(clock):
        limits = RateLimits(n, t, clock=clock)
        await play(clock, limits, plan, holds)
        assert limits.state.queued == 0
        await clock.sleep(2 * W)
        assert (limits.state.requests, limits.state.tokens) == (0, 0)

    virtual(work)
    check_windows(plan, n, t)
    for call in plan:  # nobody is lost, and nobody is both
        refused = call.reason in ("deadline", "over_token_limit")
        assert refused == (call.admitted is None) or call.reason == "cancelled"
    admitted = sorted((c for c in plan if c.admitted is not None), key=lambda c: c.arrived)
    assert [c.admitted for c in admitted] == sorted(c.admitted for c in admitted), "first come, first served"


@given(plan=st.lists(calls, max_size=25), n=st.integers(1, 5), t=st.integers(12, 30))
@settings(max_examples=80)
def test_nobody_waits_longer_than_the_limits_ask_for(virtual, plan, n, t):
    """Without surprises, each call is admitted at the first moment that the limits and those before it allow."""
    for call in plan:
        call.used, call.cancel_after, call.patience, call.withdraws = None, None, None, False

    async def work(clock):
        await play(clock, RateLimits(n, t, clock=clock), plan)

    virtual(work)
    before: list[tuple[float, int]] = []
    moment = 0.0
    for call in sorted(plan, key=lambda c: c.arrived):
        moment = max(moment, call.start)
        # Leaving the window makes room: try each such moment.
        for candidate in sorted({moment} | {when + W for when, _ in before if when + W > moment}):
            window = [tokens for when, tokens in before if candidate - W < when <= candidate]
            if len(window) < n and sum(window) + call.tokens <= t:
                moment = candidate
                break
        assert call.admitted == moment
        before.append((moment, call.tokens))


def test_the_window_slides(virtual):
    async def work(clock):
        limits = RateLimits(2, clock=clock)
        times = []
        for pause in (0, 50, 0, 0, 0):
            await clock.sleep(pause)
            await limits.acquire()
            times.append(clock.now())
        return times

    # A counter reset each minute would let four through between 50 and 60.
    assert virtual(work) == [0, 50, 60, 110, 120]


def test_settling_down_lets_the_next_one_in_early(virtual):
    async def work(clock):
        limits = RateLimits(None, 100, clock=clock)
        first = await limits.acquire(90)
        waiting = asyncio.create_task(limits.acquire(50))
        await clock.sleep(3)
        assert limits.state.queued == 1
        first.settle(20)
        second = await waiting
        assert (second.time, limits.state.tokens) == (3, 70)

    virtual(work)


def test_settling_up_makes_the_next_one_wait(virtual):
    async def work(clock):
        limits = RateLimits(None, 100, clock=clock)
        first = await limits.acquire(10)
        first.settle(95)
        assert (await limits.acquire(10)).time == W

    virtual(work)


def test_settling_after_the_window_changes_nothing(virtual):
    async def work(clock):
        limits = RateLimits(None, 100, clock=clock)
        first = await limits.acquire(10)
        await clock.sleep(W)
        assert limits.state.tokens == 0
        first.settle(95)
        assert limits.state.tokens == 0
        assert (await limits.acquire(100)).time == W

    virtual(work)


def test_a_withdrawn_request_makes_room(virtual):
    async def work(clock):
        limits = RateLimits(1, clock=clock)
        first = await limits.acquire()
        waiting = asyncio.create_task(limits.acquire())
        await clock.sleep(1)
        first.withdraw()
        first.withdraw()
        assert (await waiting).time == 1

    virtual(work)


def test_a_request_larger_than_the_limit_fails_at_once(virtual):
    async def work(clock):
        limits = RateLimits(None, 100, clock=clock)
        assert await limits.acquire(101) == "over_token_limit"
        assert isinstance(await limits.acquire(100), Reservation)
        assert clock.now() == 0

    virtual(work)


def test_a_wait_that_cannot_end_in_time_is_not_begun(virtual):
    async def work(clock):
        limits = RateLimits(1, clock=clock)
        await limits.acquire()
        assert await limits.acquire(until=59.5) == "deadline"
        assert clock.now() == 0
        assert (await limits.acquire(until=60.0)).time == W

    virtual(work)


def test_a_cancelled_wait_gives_its_place_up(virtual):
    async def work(clock):
        limits = RateLimits(1, clock=clock)
        await limits.acquire()
        tasks = [asyncio.create_task(limits.acquire()) for _ in range(3)]
        await clock.sleep(1)
        tasks[0].cancel()
        tasks[1].cancel()
        assert (await tasks[2]).time == W
        assert limits.state.queued == 0

    virtual(work)


def test_a_small_request_does_not_overtake_a_large_one(virtual):
    async def work(clock):
        limits = RateLimits(None, 100, clock=clock)
        await limits.acquire(60)
        await clock.sleep(1)
        large, small = await asyncio.gather(limits.acquire(80), limits.acquire(1))
        return large.time, small.time

    assert virtual(work) == (60, 60)


# -- what servers say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "admitted_at"),
    [
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1.5s"}, 1.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "5s",
            },
            5.0,
        ),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 60.0),  # capped
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "999999999h"}, 60.0),
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "9s"}, 0.0),
        ({"x-ratelimit-remaining-requests": "0"}, 0.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "whenever"}, 0.0),
        ({"x-ratelimit-remaining-requests": "none", "x-ratelimit-reset-requests": "9s"}, 0.0),
        ({"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "9s"}, 0.0),
        ({"x-ratelimit-reset-requests": "9s"}, 0.0),
        # in other words and units: a point in time is on the wall clock, which stands at 1,700,000,000 here
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000003"}, 3.0),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000004500"}, 4.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2023-11-14T22:13:25Z"}, 5.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1699999990"}, 0.0),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2023-11-14T22:13:22Z",
            },
            2.0,
        ),
        (
            {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700003604", "date": "Tue, 14 Nov 2023 23:13:20 GMT"},
            4.0,  # by the server's clock, which is an hour ahead
        ),
        ({"ratelimit-remaining": "0", "ratelimit-reset": "7"}, 7.0),
        ({"ratelimit": '"api";r=0;t=8, "day";r=12;t=3600'}, 8.0),
        ({"ratelimit": "limit=10, remaining=0, reset=9"}, 9.0),
        ({"ratelimit": '"api";r=10;t=8'}, 0.0),
        ({}, 0.0),
    ],
)
def test_calls_are_held_until_the_reset_where_nothing_remains(virtual, headers, admitted_at):
    async def work(clock):
        limits = RateLimits(clock=clock)
        limits.observe(headers)
        return (await limits.acquire()).time

    assert virtual(work) == pytest.approx(admitted_at)


def test_a_hold_also_meets_those_already_waiting(virtual):
    async def work(clock):
        limits = RateLimits(1, clock=clock)
        await limits.acquire()
        waiting = asyncio.create_task(limits.acquire())
        await clock.sleep(59)
        limits.hold(10)
        limits.hold(2)  # the longer one stays
        assert limits.state.held_s == 10
        assert (await waiting).time == 69

    virtual(work)


def test_the_servers_limits_are_reported_and_not_enforced(virtual):
    async def work(clock):
        limits = RateLimits(clock=clock)
        limits.observe({"x-ratelimit-limit-requests": "2", "x-ratelimit-limit-tokens": "40000"})
        limits.observe({"x-ratelimit-limit-tokens": "many"})
        assert (limits.state.server_requests, limits.state.server_tokens) == (2, 40000)
        for _ in range(5):
            await limits.acquire(50_000)
        assert clock.now() == 0

    virtual(work)


# -- loops and threads -----------------------------------------------------------------------------------------------


def test_all_loops_and_threads_share_one_window():
    """On the machine's clock; what is checked holds at any speed."""
    limits, window = RateLimits(5, 40, window_s=0.1), 0.1
    admitted: list[Reservation] = []

    async def many():
        found = await asyncio.gather(*(limits.acquire(1 + k % 9) for k in range(10)))
        admitted.extend(found)

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(admitted) == 40
    for one in admitted:
        behind = [other for other in admitted if one.time - window < other.time <= one.time]
        assert len(behind) <= 5
        assert sum(other.tokens for other in behind) <= 40


def test_a_loop_that_was_closed_does_not_block_the_others():
    limits = RateLimits(1, window_s=0.05)
    loop = asyncio.new_event_loop()

    async def take_and_wait():
        await limits.acquire()
        asyncio.get_running_loop().create_task(limits.acquire())
        await asyncio.sleep(0)

    loop.run_until_complete(take_and_wait())
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False
    loop.close()
    assert isinstance(asyncio.run(limits.acquire()), Reservation)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": 2.5}, "requests_per_minute"),
        ({"tokens_per_minute": True}, "tokens_per_minute"),
        ({"max_hold_s": -1}, "max_hold_s"),
        ({"window_s": 0}, "window_s"),
        ({"window_s": float("nan")}, "window_s"),
    ],
)
def test_bad_limits(kwargs, name):
    with pytest.raises(InputError, match=name):
        RateLimits(**kwargs)


@pytest.mark.parametrize("tokens", [-1, 1.5, True, "3"])
def test_bad_tokens(virtual, tokens):
    with pytest.raises(InputError, match="tokens"):
        virtual(lambda clock: RateLimits(clock=clock).acquire(tokens))
