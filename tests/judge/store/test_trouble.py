"""A store that others keep locked, or whose file is removed in the middle: bounded, said, and nothing paid for lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sqlite3
import time

import pytest

from rmcore.judge import ChatJudge, JudgeUsage, Pair, Verdict, VerdictStore, chat
from rmcore.judge.store import writer
from rmcore.judge.store.database import StoreError
from rmcore.judge.store.records import Question, Reply

PAID = JudgeUsage(calls=1, attempts=1, seconds=0.5)


def question(text: str) -> Question:
    return Question.of("j", "m", {}, "t", text, "a", "b")


def reply() -> Reply:
    return Reply(Verdict(1.0, usage=PAID), replied=True, text="r")


def stored(path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT count(*) FROM calls").fetchone()[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "verdicts.db"


@pytest.fixture
def store(path):
    path.parent.mkdir()
    with VerdictStore(path) as store:
        yield store


@contextlib.contextmanager
def locked(path):
    """Another program writes and does not end."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other
        if other.in_transaction:
            other.execute("ROLLBACK")


def test_a_locked_file_does_not_hold_a_pair_beyond_its_deadline(store, path):
    asked = []

    async def complete(messages, **parameters):
        asked.append(1)
        return "no"

    async def run() -> list[Verdict]:
        judge = ChatJudge(complete=complete, model="m", store=store, judge_id="j", deadline_s=1.0, orders="one")
        async with judge:
            return await judge.judge([Pair("p", "a", "b"), Pair("q", "a", "b")])

    with locked(path):
        began = time.monotonic()
        verdicts = asyncio.run(run())
        assert time.monotonic() - began < 5.0
    assert {verdict.reason for verdict in verdicts} == {"store"}
    assert not asked


def test_a_reply_that_cannot_be_written_by_the_deadline_is_handed_out_and_written_later(store, path, caplog):
    async def run() -> Reply | None:
        with contextlib.ExitStack() as stack:

            async def ask() -> Reply:
                stack.enter_context(locked(path))
                return reply()

            return await store.once(question("p"), ask, timeout_s=0.5)

    began = time.monotonic()
    found = asyncio.run(run())
    assert time.monotonic() - began < 5.0
    assert found is not None
    assert found.verdict.preference == 1.0
    assert "before its row is written" in caplog.text
    store.close()
    assert stored(path) == 1


def test_closing_a_locked_store_ends_and_says_what_is_lost(store, path, caplog, monkeypatch):
    monkeypatch.setattr(writer, "_CLOSE_S", 0.5)
    store.put(question("first"), reply())
    with locked(path):
        future = store._submit(writer.Record(question("p"), reply()))
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 5.0
        with pytest.raises(StoreError, match="locked"):
            future.result(timeout=5)
    assert "1 replies that were paid for are not stored" in caplog.text
    assert stored(path) == 1


def test_a_lock_that_ends_costs_nothing(store, path):
    store.put(question("first"), reply())
    with locked(path) as other:
        future = store._submit(writer.Record(question("p"), reply()))
        time.sleep(0.6)
        assert not future.done()
        other.execute("ROLLBACK")
        future.result(timeout=10)
    assert stored(path) == 2


@pytest.mark.parametrize("what", ["file", "file and log", "folder"])
def test_a_store_that_is_removed_is_written_again(store, path, caplog, what):
    for k in range(5):
        store.put(question(f"before {k}"), reply())
    if what == "folder":
        shutil.rmtree(path.parent)
    else:
        for file in list(path.parent.iterdir()) if what == "file and log" else [path]:
            file.unlink()
    for k in range(5):
        store.put(question(f"after {k}"), reply())
    assert store.get(question("before 3")) is not None
    store.close()
    assert stored(path) == 10
    assert caplog.text.count("removed while in use") == 1
    assert str(path) in caplog.text
    assert path.stat().st_mode & 0o777 == 0o600
    with VerdictStore(path) as again:
        assert again.get(question("before 0")) is not None


def test_a_store_that_is_removed_after_its_last_verdict_is_written_again(store, path, caplog):
    for k in range(5):
        store.put(question(f"before {k}"), reply())
    path.unlink()
    store.close()
    assert stored(path) == 5
    assert "removed while in use" in caplog.text


def test_a_file_that_took_its_place_is_left_alone_and_the_verdicts_kept_beside_it(store, path, caplog):
    caplog.set_level(logging.WARNING)
    for k in range(5):
        store.put(question(f"before {k}"), reply())
    path.rename(path.with_name("moved"))
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    with VerdictStore(path) as other:
        other.put(question("other"), reply())
    store.put(question("after"), reply())
    store.close()
    (kept,) = path.parent.glob("verdicts.db.kept-*")
    assert stored(kept) == 5
    assert stored(path) == 2
    assert kept.name in caplog.text


def test_opening_a_locked_file_takes_no_longer_than_it_may(tmp_path):
    path = tmp_path / "new.db"
    with locked(path):
        began = time.monotonic()
        with pytest.raises(StoreError, match="locked"):
            VerdictStore(path, open_s=0.3)
        with pytest.raises(StoreError, match="locked"):
            ChatJudge("http://127.0.0.1:9/v1", "m", None, store=path, deadline_s=0.3)
        assert time.monotonic() - began < 10.0
    with pytest.raises(ValueError, match="open_s"):
        VerdictStore(path, open_s=0)


def test_closing_connections_that_do_not_close_is_given_up(make_judge, caplog, monkeypatch):
    monkeypatch.setattr(chat, "_CLOSE_S", 0.1)
    judge = make_judge()

    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(judge.client.exchange, "aclose", never)
    began = time.monotonic()
    asyncio.run(judge.aclose())
    assert time.monotonic() - began < 5.0
    assert "did not close within 0.1 s" in caplog.text
