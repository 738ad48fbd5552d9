"""Limits that many processes share: none is ever broken, and deadlines hold whatever happens to the database."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import time

import pytest

from rmcore._base.client.limits import Used
from rmcore._base.errors import InputError

pytestmark = pytest.mark.postgres


@pytest.fixture
def make(database):
    from rmcore.judge.store.shared_limits import SharedLimits

    made = []

    def make(name="judge", **how) -> SharedLimits:
        made.append(SharedLimits(database, name, **how))
        return made[-1]

    yield make
    for limits in made:
        limits.close()


def admitted(results) -> int:
    return sum(not isinstance(result, str) for result in results)


def test_requests_of_two_processes_worth_of_limits_count_together(make, execute, database):
    async def run():
        one, other = make(requests_per_minute=6, window_s=0.6), make(requests_per_minute=6, window_s=0.6)
        return await asyncio.gather(*(limits.acquire(1) for limits in [one, other] * 8))

    results = asyncio.run(run())
    assert admitted(results) == 16
    times = [row[0] for row in execute(database, "SELECT extract(epoch FROM at)::float8 FROM admissions ORDER BY at")]
    assert all(late - early > 0.6 for early, late in zip(times, times[6:], strict=False))


def test_tokens_are_reserved_settled_and_given_back(make):
    async def run():
        limits = make(tokens_per_minute=100)
        first = await limits.acquire(80)
        now = limits.clock.now()
        assert await limits.acquire(101) == "over_token_limit"
        assert await limits.acquire(30, until=now + 0.2) == "deadline"
        first.settle(20)
        second = await limits.acquire(80, until=limits.clock.now() + 5)
        assert limits.state.tokens == 20  # before the latest admission
        second.withdraw()
        third = await limits.acquire(70, until=limits.clock.now() + 5)
        return first, second, third

    assert admitted(asyncio.run(run())) == 3


def test_a_run_has_a_budget_whatever_the_endpoint(make):
    async def run():
        one, other = make("a", run="r", max_requests=5, max_tokens=100), make("b", run="r", max_requests=5)
        results = [await limits.acquire(10) for limits in (one, other) * 4]
        free = await make("a", run="s", max_requests=5).acquire(10)
        results[0].withdraw()
        again = await one.acquire(10)
        return results, free, again, await one.acquire(101)

    results, free, again, large = asyncio.run(run())
    assert admitted(results) == 5
    assert set(results[5:]) == {"over_budget"}
    assert admitted([free, again]) == 2
    assert large == "over_budget"


PRICE = {"prompt": 1.0, "completion": 10.0, "cached": 0.5}


def spent(execute, database: str, run: str) -> float:
    ((cost,),) = execute(database, f"SELECT cost FROM limits WHERE name = 'run:{run}'")
    return cost / 1e9


def test_money_of_a_run_is_one_sum_over_models_and_machines(make, execute, database):
    """A reservation is the most its tokens can cost; replies settle it, refusals cost nothing, silence keeps it."""

    async def run():
        one = make("a", run="r", max_cost=0.05, price=PRICE)
        other = make("b", run="r", max_cost=0.05, price={"prompt": 2.0, "completion": 2.0})
        first, second = await one.acquire(2000), await one.acquire(2000)  # 0.02 each
        dear = await one.acquire(2000)
        third = await other.acquire(4000)  # 0.008
        first.settle(1000, Used(900, 100, cached=400))  # 0.0017
        second.unpaid()
        fourth = await one.acquire(4000)  # 0.04: 0.0017 + 0.008 + 0.04
        full = await other.acquire(1000)  # 0.002
        third.settle(4000)  # no counts by kind: what was reserved
        fourth.settle(50, Used(10, 40, cached=20))  # a part larger than its whole: what was reserved
        last = await other.acquire(100)
        return dear, full, [first, second, third, fourth, last]

    dear, full, good = asyncio.run(run())
    assert (dear, full) == ("over_budget", "over_budget")
    assert admitted(good) == 5
    assert spent(execute, database, "r") == pytest.approx(0.0017 + 0.008 + 0.04 + 0.0002)


def test_money_that_was_never_sent_is_given_back(make, execute, database):
    async def run():
        limits = make("a", run="w", max_cost=0.02, price=PRICE)
        (await limits.acquire(2000)).withdraw()
        return await limits.acquire(2000), await limits.acquire(1)

    first, second = asyncio.run(run())
    assert admitted([first]) == 1
    assert second == "over_budget"
    assert spent(execute, database, "w") == pytest.approx(0.02)


def test_a_run_has_one_currency(make):
    make("a", run="c", price=PRICE)
    make("a", run="d", price=PRICE, currency="EUR")
    with pytest.raises(InputError, match="currency: got 'EUR', expected 'USD'"):
        make("b", run="c", price=PRICE, currency="EUR")
    for wrong in ({"max_cost": 1.0}, {"max_cost": 0.0, "price": PRICE}, {"max_cost": float("nan"), "price": PRICE}):
        with pytest.raises(InputError, match="max_cost"):
            make("b", **wrong)


def test_a_database_from_before_there_was_money_gets_its_columns(make, execute, database, monkeypatch):
    from rmcore.judge.store import postgres_schema

    with monkeypatch.context() as old:
        old.setattr(postgres_schema, "_MIGRATIONS", postgres_schema._MIGRATIONS[:1])
        old.setattr(postgres_schema, "SCHEMA_VERSION", 1)
        postgres_schema.prepare(database, 5.0)
    execute(database, "INSERT INTO limits (name, requests) VALUES ('run:old', 3)")
    postgres_schema.prepare(database, 5.0)
    limits = make("a", run="old", max_requests=4, max_cost=1.0, price=PRICE)

    async def run():
        return [await limits.acquire(100) for _ in range(2)]

    first, second = asyncio.run(run())
    assert admitted([first]) == 1
    assert second == "over_budget", "what was counted before still is"
    assert spent(execute, database, "old") == pytest.approx(0.001)


def test_four_processes_never_spend_more_than_the_run_may(make, execute, database):
    """One in five requests hangs without an answer, as of a process that dies: its reservation stays."""
    spending = """
async def spend(limits, k):
    admission = await limits.acquire(200)
    if isinstance(admission, str):
        return False
    await asyncio.sleep(0.002)
    if k % 5:
        admission.settle(120, Used(60, 60))
    return True

limits = SharedLimits(sys.argv[1], "judge", run="money", max_cost=0.1, price={"prompt": 1.0, "completion": 10.0})
async def main():
    print(sum([await spend(limits, k) for k in range(60)]))
asyncio.run(main())
limits.close()
"""
    start = "import asyncio, sys\nfrom rmcore._base.client.limits import Used\n"
    start += "from rmcore.judge.store.shared_limits import SharedLimits\n"
    running = [
        subprocess.Popen([sys.executable, "-c", start + spending, database], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    sent = [int(process.communicate(timeout=120)[0]) for process in running]
    assert all(process.returncode == 0 for process in running)
    cost = spent(execute, database, "money")
    assert cost <= 0.1
    assert cost > 0.1 - 4 * 0.002, "and it was nearly all spent"
    assert sum(sent) < 240


def test_a_server_that_asks_for_patience_holds_everybody(make):
    async def run():
        one, other = make(), make()
        await one.acquire()
        one.observe({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"})
        one.hold(0.1)  # an earlier, longer one stays
        await asyncio.sleep(0.1)
        assert await other.acquire(until=other.clock.now() + 0.05) == "deadline"
        began = time.monotonic()
        await other.acquire()
        return time.monotonic() - began

    assert 0.05 < asyncio.run(run()) < 5


def test_one_who_gave_up_takes_no_place(make):
    async def run():
        limits = make(requests_per_minute=1, window_s=0.3, max_requests=3)
        await limits.acquire()
        gone = asyncio.create_task(limits.acquire())
        await asyncio.sleep(0.05)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        return [await limits.acquire(), await limits.acquire()]

    assert admitted(asyncio.run(run())) == 2


def test_a_hanging_or_missing_database_admits_nobody_and_keeps_no_deadline_waiting(make, server):
    async def run():
        limits = make()
        await limits.acquire()
        with server.frozen():
            began = time.monotonic()
            hung = await limits.acquire(until=limits.clock.now() + 0.5)
            waited = time.monotonic() - began
        server.stop()
        gone = await limits.acquire(until=limits.clock.now() + 0.5)
        server.start()
        return hung, gone, waited, await limits.acquire(until=limits.clock.now() + 20)

    hung, gone, waited, back = asyncio.run(run())
    assert (hung, gone) == ("deadline", "deadline")
    assert waited < 3
    assert admitted([back]) == 1


PROCESS = """
import asyncio, sys
from rmcore.judge.store.shared_limits import SharedLimits

async def run():
    limits = SharedLimits(sys.argv[1], "judge", requests_per_minute=40, window_s=1.0, max_requests=150)
    results = await asyncio.gather(*(limits.acquire(1) for _ in range(60)))
    print(sum(not isinstance(result, str) for result in results))
    limits.close()

asyncio.run(run())
"""


def test_four_processes_keep_one_limit_and_one_budget(database, execute):
    children = [
        subprocess.Popen([sys.executable, "-c", PROCESS, database], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    counts = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sum(counts) == 150
    times = [row[0] for row in execute(database, "SELECT extract(epoch FROM at)::float8 FROM admissions ORDER BY at")]
    assert len(times) == 150
    assert all(late - early > 1.0 for early, late in zip(times, times[40:], strict=False))


def test_a_judge_asks_them(make, mock_judge, chat_reply, ask):
    from rmcore.judge import Pair

    limits = make(max_requests=3)
    judge = mock_judge(
        lambda request: chat_reply(request, "<verdict>$win</verdict>"), limits=limits, orders="one", clock=limits.clock
    )
    verdicts = ask(judge, *(Pair(f"p{k}", "a", "b") for k in range(5)))
    assert sorted(verdict.reason for verdict in verdicts) == ["", "", "", "over_budget", "over_budget"]
    copy = pickle.loads(pickle.dumps(limits))
    assert asyncio.run(copy.acquire()) == "over_budget"
    copy.close()


@pytest.mark.parametrize(
    ("how", "names"),
    [({"requests_per_minute": 0}, "requests_per_minute"), ({"max_tokens": 1.5}, "max_tokens"), ({"window_s": 0}, "w")],
)
def test_arguments(make, how, names):
    with pytest.raises(InputError, match=names):
        make(**how)


def test_the_command_lines_options_make_them(database, execute):
    """Two processes' worth of judges of one run, as --store, --run, --max-calls and the rates name them."""
    from rmcore.cli.build_engine import make_judge
    from rmcore.cli.options import Asking
    from rmcore.judge import Pair, RecordedJudge, ReplayServer

    rows = [{"prompt": f"p{k}", "first": "a", "second": "b", "verdict": "win"} for k in range(10)]
    with ReplayServer(RecordedJudge.from_rows(rows, orders="one")) as server:
        asking = Asking(
            judge_url=server.base_url, judge_model="m", judge_key_env="", judge_orders="one", store=database,
            run="r", max_calls=4, judge_requests_per_minute=100,
        )  # fmt: skip
        reasons = []
        for first in (0, 5):
            judge = make_judge(asking)
            verdicts = judge.judge_sync([Pair(f"p{k}", "a", "b") for k in range(first, first + 5)])
            reasons += [verdict.reason for verdict in verdicts]
            judge.close()
            judge.client.options.limits.close()
    assert reasons.count("over_budget") == 6
    assert server.requests == 4
    assert execute(database, "SELECT count(*) FROM calls") == [(4,)]
    assert execute(database, "SELECT requests FROM limits WHERE name = 'run:r'") == [(4,)]


def test_what_is_not_written_yet_is_at_exit(database, execute):
    code = (
        "import asyncio, sys\n"
        "from rmcore.judge.store.shared_limits import SharedLimits\n"
        "limits = SharedLimits(sys.argv[1], 'judge')\n"
        "asyncio.run(limits.acquire(1000)).settle(7)\n"
    )
    subprocess.run([sys.executable, "-c", code, database], check=True, timeout=60)
    assert execute(database, "SELECT requests, tokens FROM limits WHERE name = 'run:judge'") == [(1, 7)]
