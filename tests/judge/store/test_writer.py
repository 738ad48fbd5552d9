"""The writer over a database that comes and goes: nothing that was paid for is forgotten, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from rmcore.judge import JudgeUsage, Verdict, VerdictStore
from rmcore.judge.store import writer as module
from rmcore.judge.store.protocol import BUSY, Claim, Find, Record, Release, StoreError, UnreachableStoreError
from rmcore.judge.store.records import Question, Reply
from rmcore.judge.store.rows import standing
from rmcore.judge.store.writer import Writer

PAID = JudgeUsage(calls=1, attempts=1)


def question(k: int) -> Question:
    return Question.of("j", "m", {}, "t", f"p{k}", "a", "b")


def reply() -> Reply:
    return Reply(Verdict(1.0, usage=PAID), replied=True, text="r")


class Memory:
    """A database in memory that can be out of reach, or lose the answer to a commit."""

    def __init__(self) -> None:
        self.calls: dict[str, Record] = {}
        self.claims: set[str] = set()
        self.beats = 0
        self.closed = False
        self.down = False
        self.forgets = 0
        self.changed = threading.Condition()

    def _reach(self) -> None:
        with self.changed:
            self.changed.notify_all()
        if self.down:
            raise UnreachableStoreError("out of reach")

    def find(self, keys, reuse):
        self._reach()
        return {call.key: call.reply.as_hit() for call in self.calls.values() if call.key in keys}

    def write(self, jobs, reuse):
        self._reach()
        results = [self._one(job, reuse) for job in jobs]
        if self.forgets:
            self.forgets -= 1
            raise UnreachableStoreError("lost in the middle of its commit")
        return results

    def _one(self, job, reuse):
        if isinstance(job, Claim):
            if job.key == "taken":
                return BUSY
            self.claims.add(job.key)
            return None
        if isinstance(job, Record):
            self.calls.setdefault(job.id, job)
            self.claims.discard(job.key)
            return standing(job.reply, self.find([job.key], reuse).get(job.key))
        self.claims.discard(job.key)
        return None

    def beat(self):
        self._reach()
        self.beats += 1

    def close(self):
        self.closed = True


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def made(memory, monkeypatch) -> Iterator[Writer]:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(module, "_CLOSE_S", 0.2)
    made = Writer("place", lambda: memory, "replies", 0.2)
    yield made
    made.stop()


def test_jobs_come_to_what_the_database_says(made, memory):
    one, other = question(1), question(2)
    assert made.submit(Claim(one.key)).result(5) is None
    assert made.submit(Claim("taken")).result(5) is BUSY
    assert made.submit(Record(one, reply())).result(5) == reply()
    assert made.submit(Claim(one.key)).result(5).verdict.usage == JudgeUsage(cache_hits=1)
    assert made.submit(Find(other.key)).result(5) is None
    made.submit(Release(other.key)).result(5)
    made.stop()
    assert memory.closed
    assert memory.claims == set()
    with pytest.raises(StoreError, match="was closed"):
        made.submit(Find(one.key)).result(5)


def test_a_claim_that_is_held_is_kept_alive_and_one_given_up_is_not(made, memory):
    key = question(1).key
    made.submit(Claim(key)).result(5)
    with memory.changed:
        assert memory.changed.wait_for(lambda: memory.beats > 1, 5)
    made.submit(Release(key)).result(5)
    assert made._held == set()


def test_what_is_paid_for_outlives_an_outage_and_is_written_once(made, memory, caplog):
    asked = question(1)
    made.submit(Claim(asked.key)).result(5)
    memory.down = True
    jobs = [made.submit(Record(asked, reply())), made.submit(Claim(question(2).key))]
    for job in jobs:  # nobody waits longer than the writer's patience
        with pytest.raises(UnreachableStoreError):
            job.result(5)
    assert "1 replies that were paid for are not stored yet" in caplog.text
    memory.down, memory.forgets = False, 1
    with memory.changed:
        assert memory.changed.wait_for(lambda: memory.calls and not memory.forgets, 5)
    made.stop()
    assert [call.question for call in memory.calls.values()] == [asked]
    assert memory.claims == set()  # the claim went with its record, or it would be held for ever


def test_what_cannot_be_written_by_the_end_is_said_to_be_lost(made, memory, caplog):
    memory.down = True
    job = made.submit(Record(question(1), reply()))
    made.stop()
    with pytest.raises(StoreError):
        job.result(5)
    assert "1 replies that were paid for are not stored" in caplog.text
    assert not made._thread.is_alive()


def test_any_other_error_ends_its_batch_only(made, memory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(memory, "find", lambda keys, reuse: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.submit(Find("k")).result(5)
    assert made.submit(Find("k")).result(5) is None


def test_a_thread_that_ends_tells_all_who_wait_and_says_so(memory, monkeypatch, caplog):
    made = Writer("place", lambda: memory, "replies", 0.2)
    waiting = threading.Event()

    def broken(self):
        waiting.wait(5)
        raise MemoryError

    monkeypatch.setattr(Writer, "_next", broken)
    first = made.submit(Find("k"))  # the thread is in the real one
    jobs = [made.submit(Find("k")) for _ in range(3)]
    waiting.set()
    for job in [first, *jobs]:
        try:
            job.result(5)
        except StoreError as error:
            assert "MemoryError" in str(error)  # noqa: PT017
    made._thread.join(5)
    assert "the store's thread ended" in caplog.text
    assert made.ended
    with pytest.raises(StoreError, match="closed"):
        made.submit(Find("k")).result(5)


def test_a_store_whose_thread_ended_has_another(tmp_path, monkeypatch):
    with VerdictStore(tmp_path / "v.db") as store:
        assert store.get(question(1)) is None
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "_next", lambda self: 1 / 0)
            with contextlib.suppress(StoreError):
                store.get(question(1))
            store._writer._thread.join(5)
        assert store.get(question(1)) is None
