"""The circuit breaker: opens on outages and on nothing else, lets one probe through, and loses nobody who can wait."""

from __future__ import annotations

import asyncio

import pytest

from rmcore._base.client.breaker import BreakerPolicy, CircuitBreaker, Permit
from rmcore._base.errors import InputError

POLICY = BreakerPolicy(failures=3, cooldown_s=1.0, max_cooldown_s=4.0, patience_s=20.0)


async def attempt(breaker, alive, reason="http_500"):
    permit = await breaker.enter()
    assert isinstance(permit, Permit)
    permit.report(alive, reason)


async def broken(clock, policy=POLICY, reason="connection"):
    breaker = CircuitBreaker(policy, clock)
    for _ in range(policy.failures):
        await attempt(breaker, False, reason)
    assert breaker.state.state == "open"
    return breaker


def test_failures_in_a_row_open_it(virtual):
    async def work(clock):
        breaker = CircuitBreaker(POLICY, clock)
        for alive in (False, False, True, False, False, None, None):
            await attempt(breaker, alive)
            await clock.sleep(0.1)
            assert breaker.state.state == "closed"
        await attempt(breaker, False, "timeout")
        state = breaker.state
        assert (state.state, state.failures, state.opened, state.last_failure) == ("open", 3, 1, "timeout")

    virtual(work)


def test_requests_that_hang_together_while_others_go_through_are_no_outage(virtual):
    async def work(clock):
        breaker = CircuitBreaker(POLICY, clock)
        hanging = [await breaker.enter() for _ in range(50)]
        await clock.sleep(1)
        await attempt(breaker, True)
        await clock.sleep(1)
        for permit in hanging:
            permit.report(False, "timeout")
        assert (breaker.state.state, breaker.state.failures) == ("closed", 0)

    virtual(work)


def test_one_probe_closes_it_for_all_who_wait(virtual):
    async def work(clock):
        breaker = await broken(clock)
        probes = []

        async def call():
            permit = await breaker.enter()
            if permit.probe:
                probes.append(clock.now())
                assert breaker.state.state == "half_open"
                await clock.sleep(0.5)
            permit.report(True)
            return clock.now()

        times = await asyncio.gather(*(call() for _ in range(10)))
        assert probes == [1.0]
        assert times == [1.5] * 10
        assert breaker.state.state == "closed"

    virtual(work)


def test_each_failed_probe_doubles_the_cool_down_up_to_its_cap(virtual):
    async def work(clock):
        breaker = await broken(clock)
        probes = []

        async def call():
            while True:
                permit = await breaker.enter()
                if isinstance(permit, str):
                    return permit
                probes.append(clock.now())
                permit.report(False, "connection")

        reasons = await asyncio.gather(*(call() for _ in range(5)))
        assert probes == [1, 3, 7, 11, 15, 19]
        assert reasons == ["breaker_open"] * 5
        assert clock.now() == 20  # patience ends, and then nobody waits any more
        assert await breaker.enter() == "breaker_open"
        assert clock.now() == 20
        await clock.sleep(3)  # a cool-down is over: whoever comes first is the probe, the others go on failing
        probe, other = await breaker.enter(), await breaker.enter()
        assert probe.probe
        assert other == "breaker_open"
        probe.report(True)
        assert not (await breaker.enter()).probe
        assert breaker.state.refused == 7

    virtual(work)


def test_a_probe_of_which_nothing_is_known_makes_room_for_the_next(virtual):
    async def work(clock):
        breaker = await broken(clock)
        first = await breaker.enter()
        second = asyncio.create_task(breaker.enter())
        await clock.sleep(1)
        assert not second.done()
        first.report(None)
        assert (await second).probe
        assert clock.now() == 2

    virtual(work)


def test_nobody_waits_past_a_deadline(virtual):
    async def work(clock):
        breaker = await broken(clock)
        assert await breaker.enter(until=0.5) == "breaker_open"  # the probe comes later, so it fails at once
        assert clock.now() == 0
        probe = await breaker.enter(until=1.5)
        assert clock.now() == 1
        # A probe is out, and nobody knows for how long.
        assert await asyncio.gather(*(breaker.enter(until=3.0) for _ in range(3))) == ["breaker_open"] * 3
        assert clock.now() == 3
        probe.report(True)

    virtual(work)


def test_without_patience_calls_fail_at_once(virtual):
    async def work(clock):
        breaker = await broken(clock, BreakerPolicy(failures=2, patience_s=0))
        assert [await breaker.enter() for _ in range(3)] == ["breaker_open"] * 3
        assert clock.now() == 0

    virtual(work)


def test_nobody_waits_for_a_refused_key(virtual):
    async def work(clock):
        breaker = await broken(clock, reason="http_401")
        assert await breaker.enter() == "breaker_open"
        assert clock.now() == 0
        await clock.sleep(1)
        (await breaker.enter()).report(True)  # the key was renewed
        assert breaker.state.state == "closed"

    virtual(work)


def test_what_was_under_way_when_it_opened_neither_counts_nor_is_lost(virtual):
    async def work(clock):
        breaker = CircuitBreaker(POLICY, clock)
        early, late = await breaker.enter(), await breaker.enter()
        for _ in range(3):
            await attempt(breaker, False)
        assert not early.holds
        early.report(False, "connection")
        assert breaker.state.opened == 1
        late.report(True)  # it is there after all
        assert breaker.state.state == "closed"

    virtual(work)


def test_a_probe_that_fails_after_others_have_shown_life_does_not_open(virtual):
    async def work(clock):
        breaker = CircuitBreaker(POLICY, clock)
        old = await breaker.enter()
        for _ in range(3):
            await attempt(breaker, False)
        probe = await breaker.enter()
        old.report(True)
        probe.report(False, "timeout")
        assert breaker.state.state == "closed"

    virtual(work)


def test_a_cancelled_wait_passes_the_probe_on(virtual):
    async def work(clock):
        breaker = await broken(clock)
        tasks = [asyncio.create_task(breaker.enter()) for _ in range(3)]
        await clock.sleep(0.5)
        tasks[0].cancel()
        done, _ = await asyncio.wait(tasks[1:], return_when=asyncio.FIRST_COMPLETED)
        assert clock.now() == 1
        assert done == {tasks[1]}
        tasks[1].result().report(True)
        assert not (await tasks[2]).probe

    virtual(work)


def test_no_policy_lets_everything_through(virtual):
    async def work(clock):
        breaker = CircuitBreaker(None, clock)
        for _ in range(100):
            await attempt(breaker, False)
        assert breaker.state.state == "closed"

    virtual(work)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"failures": 0}, "failures"),
        ({"failures": 2.0}, "failures"),
        ({"cooldown_s": 0}, "cooldown_s"),
        ({"cooldown_s": 50}, "cooldown_s"),
        ({"patience_s": float("nan")}, "patience_s"),
    ],
)
def test_bad_policies(kwargs, name):
    with pytest.raises(InputError, match=name):
        BreakerPolicy(**kwargs)
