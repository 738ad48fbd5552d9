"""The thread of shared limits without a database: whatever ends it, nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("psycopg")

from rmcore.judge.store import shared_limits as module
from rmcore.judge.store.postgres_url import PostgresUrl


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.setattr(PostgresUrl, "check", lambda self, open_s: None)
    made = module.SharedLimits("postgresql://nowhere/db", "judge")
    yield made
    made.close()


def test_an_unexpected_error_is_told_and_the_next_who_asks_starts_anew(limits, monkeypatch, caplog):
    def one_by_one(asked, orders):
        return [(one, module.SharedAdmission(limits, "id", one.tokens)) for one in asked], 0.0

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(limits, "_step", lambda asked, orders: 1 / 0)
            assert await asyncio.wait_for(asyncio.gather(limits.acquire(1), limits.acquire(1)), 5) == ["limits"] * 2
        assert "whoever asks next starts it again" in caplog.text
        monkeypatch.setattr(limits, "_step", one_by_one)
        assert not isinstance(await asyncio.wait_for(limits.acquire(1), 5), str)

    asyncio.run(main())


def test_a_caller_that_leaves_gives_back_what_it_is_given_meanwhile(limits, monkeypatch):
    given, back = [], []

    def step(asked, orders):
        found = [(one, module.SharedAdmission(limits, str(len(given) + k), one.tokens)) for k, one in enumerate(asked)]
        given.extend(admission for _, admission in found)
        back.extend(orders)
        return found, 0.0

    async def main():
        monkeypatch.setattr(limits, "_step", step)
        for pause in (0, 1, 2, 5):
            task = asyncio.create_task(limits.acquire(1))
            for _ in range(pause):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.result().withdraw()
            stays = await asyncio.wait_for(limits.acquire(1), 5)
            assert not isinstance(stays, str)
            stays.withdraw()
        limits.close()

    asyncio.run(main())
    assert len(back) == len(given)
