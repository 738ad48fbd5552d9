"""Many processes, one store, and everything that can happen to either: nothing is bought twice, nothing is lost.

``make test-postgres`` runs these, over both databases. A purchase is a line in a file, written before the answer comes,
so it is counted where the money would be taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import pytest

from rmcore.judge import ChatJudge, JudgeUsage, Pair, StoreError, Verdict, VerdictStore
from rmcore.judge.store.ledger import VerdictLedger
from rmcore.judge.store.records import Question, Reply

pytestmark = pytest.mark.postgres

QUESTIONS, IN_FLIGHT, PROCESSES = 600, 8, 4
WORKER = """
import asyncio, os, random, sys
from rmcore.judge import JudgeUsage, StoreError, Verdict, VerdictStore
from rmcore.judge.store.records import Question, Reply

place, log, seed, questions, in_flight = sys.argv[1:3] + [int(word) for word in sys.argv[3:]]
source = random.Random(seed)
ledger = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

async def one(store, k, slots):
    question = Question.of("j", "m", {}, "t", f"prompt {k}", "a", "b")

    async def ask():
        os.write(ledger, f"{os.getpid()} {k}\\n".encode())
        await asyncio.sleep(source.uniform(0.005, 0.05))
        usage = JudgeUsage(calls=1, attempts=1, prompt_tokens=k + 1)
        return Reply(Verdict(1.0, usage=usage), True, f"reply {k}")

    async with slots:
        while True:
            try:
                reply = await store.once(question, ask)
            except StoreError:  # nothing was asked
                await asyncio.sleep(0.02)
                continue
            assert reply.text == f"reply {k}", reply
            return

async def main():
    slots = asyncio.Semaphore(in_flight)
    order = source.sample(range(questions), questions)
    with VerdictStore(place) as store:
        await asyncio.gather(*(one(store, k, slots) for k in order))

asyncio.run(main())
"""


class Workers:
    """Four processes that ask the same questions in orders of their own; one that is killed is replaced."""

    def __init__(self, place, folder: Path) -> None:
        self.place, self.log = place, folder / "bought"
        self.killed: set[int] = set()
        self.running: list[subprocess.Popen[str]] = []
        self.started = 0

    def start(self) -> None:
        self.started += 1
        words = [str(word) for word in (self.place, self.log, self.started, QUESTIONS, IN_FLIGHT)]
        self.running.append(subprocess.Popen([sys.executable, "-c", WORKER, *words], stderr=subprocess.PIPE, text=True))

    def bought(self) -> list[tuple[int, int]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [tuple(map(int, line.split())) for line in lines]

    def kill(self, source: random.Random) -> None:
        child = self.running.pop(source.randrange(len(self.running)))
        child.kill()
        child.communicate()
        if child.returncode == -signal.SIGKILL:
            self.killed.add(child.pid)
        self.start()

    def finish(self) -> None:
        for child in self.running:
            _, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors


@pytest.fixture
def workers(place, tmp_path):
    workers = Workers(place, tmp_path)
    for _ in range(PROCESSES):
        workers.start()
    yield workers
    for child in workers.running:
        child.kill()


def database_name(url: str) -> str:
    return urllib.parse.urlsplit(url).path[1:]


def wait_for(workers: Workers, bought: int) -> None:
    until = time.monotonic() + 60
    while len(workers.bought()) < bought:
        assert time.monotonic() < until
        time.sleep(0.005)


def check(workers: Workers, place, execute) -> None:
    """Every purchase is one row, but for those whose buyer was killed while they were under way."""
    bought = workers.bought()
    kept = Counter(int(tokens) - 1 for (tokens,) in execute(place, "SELECT prompt_tokens FROM calls"))
    assert kept == Counter(range(QUESTIONS))
    lost = Counter(k for _, k in bought) - kept
    by_the_dead = Counter(k for pid, k in bought if pid in workers.killed)
    assert lost <= by_the_dead
    assert lost.total() <= IN_FLIGHT * len(workers.killed)
    assert execute(place, "SELECT * FROM claims") == []


def test_processes_that_are_killed_at_random_buy_nothing_twice(workers, place, execute):
    source = random.Random(5)
    for moment in sorted(source.sample(range(20, QUESTIONS - 50), 6)):
        wait_for(workers, moment)
        workers.kill(source)
    workers.finish()
    assert len(workers.killed) >= 5
    check(workers, place, execute)


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
def test_sessions_that_are_cut_off_cost_nothing(workers, place, execute, server):
    ended = 0
    for moment in range(40, QUESTIONS - 40, 80):
        wait_for(workers, moment)
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = "
        ended += len(server.execute(f"{query}'{database_name(place)}'"))
    workers.finish()
    assert ended > PROCESSES
    check(workers, place, execute)
    assert len(workers.bought()) == QUESTIONS


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
def test_a_server_that_is_restarted_and_crashes_costs_nothing(workers, place, execute, server):
    for moment, how in ((100, signal.SIGINT), (250, signal.SIGQUIT), (400, signal.SIGINT)):
        wait_for(workers, moment)
        server.stop(how)
        time.sleep(0.5)
        server.start()
    workers.finish()
    check(workers, place, execute)
    assert len(workers.bought()) == QUESTIONS


# -- a database that hangs --------------------------------------------------------------------------------------------


PAID = JudgeUsage(calls=1, attempts=1)


def question(text: str) -> Question:
    return Question.of("j", "m", {}, "t", text, "a", "b")


def reply() -> Reply:
    return Reply(Verdict(1.0, usage=PAID), replied=True, text="r")


@pytest.mark.parametrize("how", ["frozen", "gone"])
def test_a_database_that_hangs_or_is_gone_holds_no_pair_beyond_its_deadline(database, server, how):
    asked = []

    async def complete(messages, **parameters):
        asked.append(1)
        return "no"

    async def run() -> tuple[list[Verdict], float]:
        judge = ChatJudge(complete=complete, model="m", store=database, judge_id="j", deadline_s=1.0, orders="one")
        await asyncio.to_thread(judge.store.get, question("connected"))
        with getattr(server, how)():
            began = time.monotonic()
            verdicts = await judge.judge([Pair(f"p{k}", "a", "b") for k in range(20)])
            seconds = time.monotonic() - began
        await judge.aclose()
        return verdicts, seconds

    verdicts, seconds = asyncio.run(run())
    assert seconds < 4.0
    assert {verdict.reason for verdict in verdicts} <= {"store", "deadline"}
    assert not asked


def test_opening_a_store_ends_though_the_database_hangs(database, server):
    VerdictStore(database).close()
    began = time.monotonic()
    with server.frozen(), pytest.raises(StoreError, match="t"):
        VerdictStore(database, open_s=0.5)
    assert time.monotonic() - began < 10


def test_a_reply_that_comes_while_the_server_hangs_is_handed_out_and_written_later(database, server, execute):
    async def run(store: VerdictStore):
        with contextlib.ExitStack() as stack:

            async def ask() -> Reply:
                stack.enter_context(server.frozen())
                return reply()

            began = time.monotonic()
            found = await store.once(question("p"), ask, timeout_s=0.5)
            return found, time.monotonic() - began

    with VerdictStore(database) as store:
        found, seconds = asyncio.run(run(store))
        assert found == reply()
        assert seconds < 3.0
    assert execute(database, "SELECT count(*) FROM calls") == [(1,)]


def test_a_commit_whose_answer_is_lost_is_one_row(database, execute, monkeypatch):
    import psycopg

    from rmcore.judge.store import postgres

    commit, lost = postgres.in_transaction, []

    @contextlib.contextmanager
    def forgetful(connection):
        with commit(connection):
            yield
        if not lost:
            lost.append(1)
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    with VerdictStore(database) as store:
        monkeypatch.setattr(postgres, "in_transaction", forgetful)
        assert store.put(question("p"), reply()) == reply()
    assert lost
    assert execute(database, "SELECT count(*) FROM calls") == [(1,)]


def test_a_process_that_is_stopped_in_the_middle_holds_nobody_up(database, execute):
    """It keeps locks of an open transaction; the server ends that after three seconds."""
    import psycopg

    with VerdictStore(database) as store:
        store.put(question("before"), reply())
        stopped = psycopg.connect(database)
        stopped.execute("SET idle_in_transaction_session_timeout = '3s'")  # as every transaction of ours does
        stopped.execute("INSERT INTO rmcore.claims (key, owner) VALUES (%s, 'x')", (question("p").key,))
        began = time.monotonic()

        async def ask() -> Reply:
            return reply()

        assert asyncio.run(store.once(question("p"), ask)) == reply()
        assert time.monotonic() - began < 15
        with pytest.raises(psycopg.Error):
            stopped.execute("SELECT 1")
        stopped.close()


# -- a full disk, passwords, reading ----------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_that_can_still_be_handed_out(path, monkeypatch, caplog):
    from rmcore.judge.store import sqlite

    opened = sqlite.open_database

    def small(*args, **how):
        connection = opened(*args, **how)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {max(pages, 24)}")
        return connection

    async def run(store):
        async def ask() -> Reply:
            return reply()

        return [await store.once(question(f"{k} " + "word " * 2000), ask) for k in range(20)]

    with monkeypatch.context() as patch:
        patch.setattr(sqlite, "open_database", small)
        with VerdictStore(path) as store:
            assert [found.verdict.preference for found in asyncio.run(run(store))] == [1.0] * 20
    assert "disk is full" in caplog.text
    with VerdictStore(path) as store:  # room again: what was kept is found, the rest is bought
        usages = [found.verdict.usage.calls for found in asyncio.run(run(store))]
    assert 0 < sum(usages) < 20
    assert usages == sorted(usages)


def test_passwords_come_from_the_environment_and_are_nowhere_else(server, database, monkeypatch, caplog, tmp_path):
    server.execute("DROP ROLE IF EXISTS secretive")
    server.execute("CREATE ROLE secretive LOGIN PASSWORD 'hunter2hunter2'")
    server.execute(f"ALTER DATABASE {database_name(database)} OWNER TO secretive")
    url = database.replace("admin@", "secretive@")
    caplog.set_level("DEBUG")
    for password in (None, "wrong-wrong"):
        if password:
            monkeypatch.setenv("PGPASSWORD", password)
        with pytest.raises(StoreError) as caught:
            VerdictStore(url)
        assert "wrong-wrong" not in str(caught.value)
    pgpass = tmp_path / "pgpass"
    pgpass.write_text("*:*:*:secretive:hunter2hunter2\n")
    pgpass.chmod(0o600)
    for name, value in (("PGPASSWORD", "hunter2hunter2"), ("PGPASSFILE", str(pgpass))):
        monkeypatch.delenv("PGPASSWORD", raising=False)
        monkeypatch.setenv(name, value)
        with VerdictStore(url) as store:
            store.put(question(name), reply())
            assert "hunter2" not in repr(store) + str(store.__getstate__())
    assert "hunter2" not in caplog.text


def test_the_ledger_tells_the_same_of_both(database, path):
    source = random.Random(3)
    rows = []
    for k in range(40):
        first, second = source.choice([("a", "b"), ("b", "a")])
        asked = Question.of("j", "m", {"seed": 1}, "t", f"p{k % 9}", first, second, canary=k % 7 == 0)
        reason = source.choice(["", "refusal", "cut:3"])
        preference = None if reason == "refusal" else source.choice([1.0, -1.0, 0.0, 0.5])
        usage = JudgeUsage(calls=1, attempts=2, prompt_tokens=k, completion_tokens=3, seconds=0.5, cost=0.25)
        rows.append((asked, Reply(Verdict(preference, reason, usage=usage), True, "said \ud800", {"win": "X"})))
    told = []
    for place in (database, path):
        with VerdictStore(place) as store:
            for asked, given in rows:
                store.put(asked, given)
        with VerdictLedger(place) as ledger:
            stats = ledger.stats()
            assert stats["file"].pop("bytes") > 0
            for name in ("first", "last"):
                stats["file"].pop(name)
            calls = ledger.calls(limit=30)
            pairs = [pair.to_row() for pair in ledger.pairs(canaries=True) if not pair.verdict.failed]
            begun = ledger.calls(key=calls[0].key[:6], model="m")
            refused = [call.key for call in ledger.calls(reason="cut")]
            texts = [ledger.texts(call) for call in calls]
            told.append((stats, [call.key for call in calls], pairs, [call.key for call in begun], refused, texts))
    assert told[0] == told[1]
    assert told[0][4]


def test_odd_words_in_plain_columns_harm_nobody(database, execute):
    odd = Reply(Verdict(1.0, "odd\x00 \ud800", usage=PAID), True, "r", model="m\x00")
    with VerdictStore(database) as store:
        store.put(question("odd"), odd)
        assert store.get(question("odd")).verdict.reason == "odd\\x00 \\ud800"


def test_what_is_no_store_is_refused_and_left_alone(server, execute):
    url = server.new_database()
    with pytest.raises(StoreError, match="expected a verdict store"):
        VerdictLedger(url)
    execute(url, "CREATE SCHEMA rmcore")
    execute(url, "CREATE TABLE recipes (dish TEXT)")
    with pytest.raises(StoreError, match="another program's schema"):
        VerdictStore(url)
    later = server.new_database()
    VerdictStore(later).close()
    execute(later, "UPDATE store SET version = 99")
    with pytest.raises(StoreError, match="got version 99, expected at most 2"):
        VerdictStore(later)
    server.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(StoreError, match="LATIN1, expected one in UTF8"):
        VerdictStore(server.url("latin"))
    with pytest.raises(StoreError, match="does not exist"):
        VerdictStore(server.url("nowhere"))


def test_processes_that_open_a_new_database_together_make_it_once(server, execute):
    url = server.new_database()
    errors = []

    def make() -> None:
        try:
            VerdictStore(url).close()
        except StoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert execute(url, "SELECT version FROM store") == [(2,)]


def test_the_commands_read_a_url(database):
    from typer.testing import CliRunner

    from rmcore.cli import app

    with VerdictStore(database) as store:
        store.put(question("p"), reply())
    shown = CliRunner().invoke(app, ["verdicts", "stats", database, "--json"])
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["calls"] == 1
    exported = CliRunner().invoke(app, ["verdicts", "export", database])
    assert json.loads(exported.stdout.splitlines()[0])["chosen"] == "a"
