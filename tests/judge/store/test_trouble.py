"""A store that others keep locked, or whose file is removed in the middle: bounded, said, and nothing paid for lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rmcore.judge import ChatJudge, JudgeUsage, Pair, Verdict, VerdictStore, chat
from rmcore.judge.store import database as database_module
from rmcore.judge.store import writer
from rmcore.judge.store.database import SCHEMA_VERSION, StoreError, open_database
from rmcore.judge.store.protocol import Find
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


def test_a_locked_file_costs_a_batch_one_moment_and_not_one_a_question(store, path, monkeypatch):
    """Two at a time, 60 questions: a second for each two of them would be half a minute."""
    monkeypatch.setattr("rmcore.judge.store.sqlite._BUSY_S", 1.0)

    async def run() -> list[Reply | BaseException | None]:
        gate = asyncio.Semaphore(2)

        async def one(k: int) -> Reply | None:
            async with gate:
                return await store.once(question(str(k)), never, timeout_s=0.02)

        async def never() -> Reply:
            raise AssertionError("asked, though what it brings could not be kept")

        return await asyncio.gather(*(one(k) for k in range(60)), return_exceptions=True)

    with locked(path):
        began = time.monotonic()
        found = asyncio.run(run())
        assert time.monotonic() - began < 20.0
    assert all(isinstance(one, StoreError) for one in found)
    assert asyncio.run(store.once(question("after"), asked_at_once, timeout_s=5.0)) == reply()
    assert store._silent is False


async def asked_at_once() -> Reply:
    return reply()


def test_closing_waits_for_what_was_paid_for_and_for_nothing_else(path):
    path.parent.mkdir()
    store = VerdictStore(path)
    store.put(question("first"), reply())
    with locked(path):
        waiting = store._submit(writer.Claim("a question that nobody has asked yet"))
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 3.0, "five seconds are for replies that would be lost"
        with pytest.raises(StoreError, match="locked"):
            waiting.result(timeout=1)
    assert stored(path) == 1


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


@pytest.mark.parametrize("what", ["a link to nowhere", "a folder", "the folder is a file", "two folders up is a file"])
def test_verdicts_whose_place_is_gone_are_kept_nearby(store, path, tmp_path, caplog, what):
    caplog.set_level(logging.WARNING)
    for k in range(5):
        store.put(question(f"before {k}"), reply())
    if "is a file" in what:
        folder = path.parent
        if what.startswith("two"):
            store.close()
            folder, path = path.parent, path.parent / "deeper" / path.name
            path.parent.mkdir()
            shutil.copy(folder / path.name, path)
            store = VerdictStore(path)
            store.put(question("before"), reply())
        shutil.rmtree(folder)
        folder.touch()
    else:
        for file in path.parent.iterdir():
            file.unlink()
        path.mkdir() if what == "a folder" else path.symlink_to(tmp_path / "nowhere" / "v.db")
    store.close()
    (kept,) = tmp_path.glob("**/verdicts.db.kept-*")
    assert stored(kept) == (6 if what.startswith("two") else 5)
    assert f"its verdicts are kept in {kept}" in caplog.text


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


# -- who may not write -------------------------------------------------------------------------------------------------


@pytest.fixture
def another_user():
    """A folder of another user's, and who runs the test as that user."""
    if not hasattr(os, "seteuid") or os.geteuid() != 0:
        yield contextlib.nullcontext
    else:

        @contextlib.contextmanager
        def become():
            os.seteuid(65534)
            try:
                yield
            finally:
                os.seteuid(0)

        yield become


@pytest.mark.parametrize("what", ["folder", "file", "log"])
def test_a_store_that_cannot_be_written_to_is_told_before_anything_is_asked(another_user, what):
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        stack.enter_context(another_user())
        path = folder / "v.db"
        store = VerdictStore(path)
        if what == "folder":
            store.close()
            protected = folder
        else:
            store.get(question("p"))  # the log is there
            protected = path if what == "file" else Path(f"{path}-wal")
        mode = protected.stat().st_mode
        protected.chmod(0o555 if what == "folder" else 0o444)
        with pytest.raises(StoreError, match="must be able to write"):
            VerdictStore(path)
        if what == "folder":
            with pytest.raises(StoreError, match=r"must be able to write|Permission denied"):
                VerdictStore(folder / "new.db")
        protected.chmod(mode)
        store.close()
        VerdictStore(path).close()


def test_a_store_that_another_process_is_making_is_not_taken_for_a_strangers(tmp_path, monkeypatch):
    path, connect = tmp_path / "v.db", database_module._connect

    def traced(*given):
        connection, done = connect(*given), []

        def another(statement):
            if statement == "PRAGMA user_version" and not done:
                done.append(1)
                with monkeypatch.context() as patch, contextlib.suppress(StoreError):
                    patch.setattr(database_module, "_connect", connect)
                    open_database(path, busy_s=0.05).close()

        connection.set_trace_callback(another)
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(database_module, "_connect", traced)
        with contextlib.closing(open_database(path, busy_s=5)) as database:
            assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
def test_no_file_left_to_open_is_waited_for(path):
    import resource

    path.parent.mkdir()
    store, limits = VerdictStore(path), resource.getrlimit(resource.RLIMIT_NOFILE)
    question_asked = question("p")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        job = store._submit(Find(question_asked.key))  # the first: it opens the file
        time.sleep(0.1)
        assert not job.done()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert job.result(5) is None
    store.close()
