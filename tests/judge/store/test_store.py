"""The verdict store: what it keeps, who may share it, and who pays once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmcore._base.clock import SystemClock
from rmcore._base.errors import InputError
from rmcore.judge import JudgeUsage, Pair, Verdict, VerdictStore, call_key, pair_key
from rmcore.judge.store.database import SCHEMA_VERSION, StoreError, open_database
from rmcore.judge.store.records import MAX_REPLY, Question, Reply, reply_text, without_secrets

PAID = JudgeUsage(calls=1, attempts=1, prompt_tokens=100, completion_tokens=7, seconds=0.5, latencies_s=(0.5,))
HIT = JudgeUsage(cache_hits=1)


def question(text: str = "p", first: str = "a", second: str = "b", **how: object) -> Question:
    given = {"judge": "http://j/v1", "model": "m", "parameters": {"temperature": 0}, "template": "t1"} | how
    return Question.of(**given, prompt=text, first=first, second=second)


def reply(preference: float | None = 1.0, reason: str = "", *, replied: bool = True, **rest: object) -> Reply:
    return Reply(Verdict(preference, reason, critique="because", usage=PAID), replied=replied, **rest)


REFUSAL = reply(None, "refusal")
TIMEOUT = reply(None, "timeout", replied=False)


@pytest.fixture
def rows(execute):
    def rows(place, columns="*", table="calls"):
        return execute(place, f"SELECT {columns} FROM {table} ORDER BY 1")

    return rows


@pytest.fixture
def file_store(path):
    with VerdictStore(path) as store:
        yield store


async def never():
    raise AssertionError("asked again")


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_what_was_put_comes_back_as_a_hit(store):
    told = Reply(Verdict(-0.25, "hard:mass", critique="c", usage=PAID), True, "raw", {"win": "A"}, 3, "detail", "EUR")
    assert store.get(question()) is None
    assert store.put(question(), told) == told
    found = store.get(question())
    assert found.verdict == Verdict(-0.25, "hard:mass", critique="c", usage=HIT)
    assert (found.text, found.labels, found.currency) == ("raw", {"win": "A"}, "EUR")


def test_a_row_can_be_audited(file_store, path):
    asked = question([{"role": "user", "content": "q"}], "x", "y")
    file_store.put(asked, reply(text="raw", labels={"win": "QQ", "loss": "RR", "tie": "SS"}, sanitised=2))
    file_store.close()
    with contextlib.closing(open_database(path, read_only=True)) as database:
        database.row_factory = sqlite3.Row
        row = dict(database.execute("SELECT * FROM calls JOIN judges ON judges.id = calls.judge").fetchone())
        texts = {key: json.loads(body) for key, body in database.execute("SELECT id, body FROM texts")}
    assert texts[row["prompt"]] == [{"role": "user", "content": "q"}]
    assert (texts[row["first"]], texts[row["second"]]) == ("x", "y")
    assert row["key"] == asked.key
    assert row["pair"] == min(pair_key(asked.prompt, "x", "y"), pair_key(asked.prompt, "y", "x"))
    assert (row["model"], json.loads(row["parameters"]), row["template"]) == ("m", {"temperature": 0}, "t1")
    assert (row["attempts"], row["prompt_tokens"], row["completion_tokens"], row["seconds"]) == (1, 100, 7, 0.5)
    assert json.loads(row["reply"]) == "raw"
    assert json.loads(row["labels"])["win"] == "QQ"
    assert (row["neutralised"], row["cost"]) == (2, 0.0)
    assert row["at"].endswith("+00:00")


def test_a_call_without_a_price_has_no_cost(rows, store, place):
    unpriced = Verdict(1.0, usage=JudgeUsage(calls=1, attempts=1, unpriced_calls=1))
    store.put(question(), Reply(unpriced, True))
    assert rows(place, "cost") == [(None,)]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(*[st.text(alphabet=st.characters()) | st.text("\x00\ud800\udfff\x1b'\"\\é🙂")] * 4))
def test_any_text_comes_back_as_it_was(rows, store, texts):
    # Two halves of a surrogate pair are the character they spell, here as in the question on the wire.
    prompt, first, second, said = texts = [json.loads(json.dumps(text)) for text in texts]
    asked = question(prompt, first, second, model=repr(texts))
    store.put(asked, Reply(Verdict(1.0, critique=said, usage=PAID), True, text=said))
    found = store.get(asked)
    assert (found.text, found.verdict.critique) == (said, said)
    assert set(texts[:3]) <= {json.loads(body) for (body,) in rows(store.path, "body", "texts")}


def test_a_long_reply_is_cut_and_the_cut_is_recorded(rows, store, place):
    store.put(question(), reply(text="x" * (MAX_REPLY + 5)))
    assert store.get(question()).text == "x" * MAX_REPLY
    assert rows(place, "reply_cut") == [(5,)]


def test_texts_and_judges_stand_in_the_file_once(rows, file_store, path):
    long = "word " * 20_000
    for k in range(50):
        file_store.put(question(long, long, f"answer {k}"), reply())
    file_store.close()
    assert len(rows(path, "id", "texts")) == 51
    assert len(rows(path, "id", "judges")) == 1
    assert path.stat().st_size < 4 * len(long)


def test_the_file_is_private(path):
    before = os.umask(0)
    try:
        with VerdictStore(path) as store:
            store.put(question(), reply())
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"verdicts.db": 0o600, "verdicts.db-wal": 0o600, "verdicts.db-shm": 0o600}


def test_the_mode_of_a_file_that_was_there_stays(path):
    path.touch(0o644)
    path.chmod(0o644)
    VerdictStore(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"judge": "http://other/v1"},
        {"model": "m2"},
        {"parameters": {"temperature": 1}},
        {"parameters": {}},
        {"template": "t2"},
        {"text": "q"},
        {"first": "b", "second": "a"},
        {"text": [{"role": "user", "content": "p"}]},
    ],
)
def test_whatever_shapes_the_question_is_in_its_key(store, change):
    store.put(question(), reply())
    assert store.get(question(**change)) is None


def test_the_order_of_parameters_is_not_in_the_key():
    assert question(parameters={"a": 1, "b": [2]}).key == question(parameters={"b": [2], "a": 1}).key


def test_call_keys_are_what_they_were():
    """Another key for the same question would buy everything again."""
    shown = pair_key("p", "a", "b")
    key = call_key("http://j/v1", "m", {"temperature": 0}, "t1", shown)
    assert key == "3081faae3616417e9bc5563c6f6ad3bf7f9da24a2878d68853573da000adec43"
    with pytest.raises(InputError, match="parameters"):
        call_key("j", "m", {"x": object()}, "t", shown)


def test_both_orders_share_a_pair():
    there, back = question(first="a", second="b"), question(first="b", second="a")
    assert there.pair == back.pair
    assert {there.shown, back.shown} == {"ab", "ba"}


def test_secrets_among_the_parameters_are_neither_kept_nor_part_of_the_key():
    told = {"api_key": "s1", "x": [{"auth_token": "s2", "max_tokens": 5}], "Authorization": "s3", "seed": 7}
    clean = without_secrets(told)
    assert clean == {"api_key": "***", "x": [{"auth_token": "***", "max_tokens": 5}], "Authorization": "***", "seed": 7}
    assert question(parameters=told).key == question(parameters=told | {"api_key": "new"}).key


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (None, ""),
        ({"message": {"content": "said"}}, "said"),
        ({"message": {"content": None, "refusal": "no"}}, "no"),
        ({"message": {"content": [{"type": "text", "text": "t"}]}}, '[{"type": "text", "text": "t"}]'),
        ({"message": 3}, ""),
        ({}, ""),
    ],
)
def test_reply_text(choice, text):
    assert reply_text(choice) == text


# -- what is reused --------------------------------------------------------------------------------------------------


def test_replies_without_a_verdict_are_reused_unless_told_otherwise(rows, place):
    with VerdictStore(place) as store, VerdictStore(place, reuse="verdicts") as strict:
        store.put(question(), REFUSAL)
        assert store.get(question()).verdict.reason == "refusal"
        assert strict.get(question()) is None
        strict.put(question(), reply(1.0))
        assert store.get(question()).verdict.preference == 1.0
        assert len(rows(place)) == 2


def test_failures_on_the_way_are_logged_and_never_reused(rows, store, place):
    store.put(question(), TIMEOUT)
    assert rows(place, "reason, replied") == [("timeout", 0)]
    assert store.get(question()) is None


def test_the_first_verdict_stands(store):
    """A question that was bought twice after all has one answer, that of a run and of every later one."""
    store.put(question(), REFUSAL)
    store.put(question(), reply(1.0))
    second = store.put(question(), reply(-1.0))
    assert (second.verdict.preference, second.verdict.usage) == (1.0, PAID)
    store.put(question(), REFUSAL)
    assert store.get(question()).verdict.preference == 1.0


def test_nothing_sent_is_no_call(rows, store, place):
    unsent = Reply(Verdict.none("no_api_key"))

    async def ask():
        return unsent

    assert asyncio.run(store.once(question(), ask)) == unsent
    assert rows(place) == []


# -- one flight ------------------------------------------------------------------------------------------------------


class Endpoint:
    """Counts what it is asked and answers when it is let."""

    def __init__(self, answer: Reply | None = None) -> None:
        self.answer = answer or reply()
        self.calls = 0
        self.asked = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self) -> Reply:
        self.calls += 1
        self.asked.set()
        await self.open.wait()
        return self.answer


def test_tasks_share_a_call(store):
    async def run():
        endpoint = Endpoint()
        tasks = [asyncio.create_task(store.once(question(), endpoint)) for _ in range(8)]
        await endpoint.asked.wait()
        endpoint.open.set()
        return endpoint.calls, [found.verdict.usage for found in await asyncio.gather(*tasks)]

    calls, usages = asyncio.run(run())
    assert calls == 1
    assert Counter(usage == PAID for usage in usages) == {True: 1, False: 7}
    assert usages.count(HIT) == 7


def test_a_cancelled_asker_takes_nobody_along(rows, store, place):
    async def run():
        first, second = Endpoint(), Endpoint()
        leader = asyncio.create_task(store.once(question(), first))
        await first.asked.wait()
        followers = [asyncio.create_task(store.once(question(), second)) for _ in range(3)]
        await asyncio.sleep(0.01)
        leader.cancel()
        followers[0].cancel()
        await second.asked.wait()
        second.open.set()
        results = await asyncio.gather(leader, *followers, return_exceptions=True)
        return first.calls, second.calls, results

    first, second, results = asyncio.run(run())
    assert (first, second) == (1, 1)
    assert [type(result).__name__ for result in results] == ["CancelledError", "CancelledError", "Reply", "Reply"]
    assert rows(place, "key", "claims") == []


def test_a_reply_that_came_is_kept_though_its_asker_is_cancelled(store):
    async def run():
        task: asyncio.Task[object]

        async def ask():
            task.cancel()  # arrives at the next await, which is that for the commit
            return reply()

        task = asyncio.create_task(store.once(question(), ask))
        with pytest.raises(asyncio.CancelledError):
            await task
        return await store.once(question(), never)

    assert asyncio.run(run()).verdict.preference == 1.0


@pytest.mark.parametrize(("reason", "calls"), [("timeout", 1), ("http_500", 1), ("deadline", 3)])
def test_a_failure_is_shared_unless_it_was_only_the_askers_own_deadline(store, reason, calls):
    async def run():
        endpoint = Endpoint(reply(None, reason, replied=False))
        tasks = [asyncio.create_task(store.once(question(), endpoint)) for _ in range(3)]
        await endpoint.asked.wait()
        endpoint.open.set()
        return endpoint.calls, {found.verdict.reason for found in await asyncio.gather(*tasks)}, endpoint

    _, reasons, endpoint = asyncio.run(run())
    assert reasons == {reason}
    assert endpoint.calls == calls


def test_an_asker_that_raises_is_replaced(store):
    async def run():
        begun = asyncio.Event()

        async def broken():
            begun.set()
            await asyncio.sleep(0.005)
            raise ZeroDivisionError

        async def works():
            return reply()

        leader = asyncio.create_task(store.once(question(), broken))
        await begun.wait()
        follower = asyncio.create_task(store.once(question(), works))
        return await asyncio.gather(leader, follower, return_exceptions=True)

    error, found = asyncio.run(run())
    assert isinstance(error, ZeroDivisionError)
    assert found.verdict.preference == 1.0


def test_waiting_for_others_has_an_end(store):
    async def run():
        endpoint = Endpoint()
        leader = asyncio.create_task(store.once(question(), endpoint))
        await endpoint.asked.wait()
        late = await store.once(question(), never, timeout_s=0.01)
        endpoint.open.set()
        return late, await leader

    late, found = asyncio.run(run())
    assert late is None
    assert found.verdict.preference == 1.0


def test_threads_and_their_loops_share_calls(rows, store, place):
    asked: Counter[int] = Counter()
    lock = threading.Lock()

    def ask(k):
        async def call():
            with lock:
                asked[k] += 1
            await asyncio.sleep(0.001)
            return reply(1.0 if k % 2 else -1.0)

        return call

    async def everything():
        found = await asyncio.gather(*(store.once(question(f"p{k}"), ask(k)) for k in range(60)))
        return [one.verdict.preference for one in found]

    with ThreadPoolExecutor(4) as pool:
        results = [job.result() for job in [pool.submit(asyncio.run, everything()) for _ in range(4)]]
    assert results == [[-1.0, 1.0] * 30] * 4
    assert asked == Counter(range(60))
    assert len(rows(place)) == 60


# -- several stores of one file --------------------------------------------------------------------------------------


def test_another_store_waits_for_a_claim(place):
    async def run():
        with VerdictStore(place) as one, VerdictStore(place) as other:
            endpoint = Endpoint()
            leader = asyncio.create_task(one.once(question(), endpoint))
            await endpoint.asked.wait()
            assert await other.once(question(), never, timeout_s=0.05) is None
            waiting = asyncio.create_task(other.once(question(), never))
            await asyncio.sleep(0.03)
            endpoint.open.set()
            return [found.verdict.usage for found in await asyncio.gather(leader, waiting)]

    assert asyncio.run(run()) == [PAID, HIT]


def test_a_claim_that_is_given_up_is_free_at_once(place):
    async def run():
        with VerdictStore(place) as one, VerdictStore(place) as other:
            first, second = Endpoint(), Endpoint()
            second.open.set()
            leader = asyncio.create_task(one.once(question(), first))
            await first.asked.wait()
            waiting = asyncio.create_task(other.once(question(), second))
            await asyncio.sleep(0.03)
            leader.cancel()
            return await waiting, second.calls

    found, calls = asyncio.run(run())
    assert (found.verdict.usage, calls) == (PAID, 1)


class Later(SystemClock):
    """A wall clock that is ahead: what others wrote looks old."""

    def wall(self) -> float:
        return super().wall() + 100


def test_the_claim_of_one_who_gives_no_sign_of_life_ends(rows, place):
    # A server has leases by its own clock, which nobody can set here.
    late = {"lease_s": 99, "clock": Later()} if isinstance(place, Path) else {"lease_s": 0.05}

    async def run():
        with VerdictStore(place) as asleep, VerdictStore(place, **late) as other:
            stuck, works = Endpoint(), Endpoint(reply(-1.0))
            works.open.set()
            leader = asyncio.create_task(asleep.once(question(), stuck))
            await stuck.asked.wait()
            await asyncio.sleep(0 if isinstance(place, Path) else 0.1)
            taken = await other.once(question(), works)
            # The sleeper wakes up with an answer of its own: it is logged, and the first one stands.
            stuck.open.set()
            return taken, await leader

    taken, woken = asyncio.run(run())
    assert (taken.verdict.preference, taken.verdict.usage) == (-1.0, PAID)
    assert (woken.verdict.preference, woken.verdict.usage) == (-1.0, PAID)
    assert sorted(rows(place, "preference")) == [(-1.0,), (1.0,)]


def test_a_living_owner_renews_its_lease_while_it_asks(rows, place):
    async def run():
        with VerdictStore(place, lease_s=0.04) as store:
            endpoint = Endpoint()
            leader = asyncio.create_task(store.once(question(), endpoint))
            await endpoint.asked.wait()
            ((begun,),) = rows(place, "beat", "owners")
            while rows(place, "beat", "owners") == [(begun,)]:
                await asyncio.sleep(0.005)
            endpoint.open.set()
            await leader

    asyncio.run(run())


CLAIMER = """
import asyncio, sys
from tests_store import question
from rmcore.judge import VerdictStore

async def ask():
    print("asking", flush=True)
    await asyncio.Event().wait()

asyncio.run(VerdictStore(sys.argv[1]).once(question(), ask))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a dead owner's claim ends with its lease")
def test_the_claim_of_a_killed_process_ends_at_once(place, tmp_path):
    (tmp_path / "tests_store.py").write_text(
        "from rmcore.judge.store.records import Question\n"
        "def question():\n"
        "    return Question.of('http://j/v1', 'm', {'temperature': 0}, 't1', 'p', 'a', 'b')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", CLAIMER, str(place)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout.readline() == "asking\n"

        async def run():
            with VerdictStore(place) as store:
                assert await store.once(question(), never, timeout_s=0.05) is None
                child.send_signal(signal.SIGKILL)
                child.wait()
                endpoint = Endpoint()
                endpoint.open.set()
                return await store.once(question(), endpoint, timeout_s=5)

        assert asyncio.run(run()).verdict.usage == PAID


def test_the_loop_runs_on_while_another_process_holds_the_file(file_store, path):
    async def run():
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        endpoint = Endpoint()
        endpoint.open.set()
        task = asyncio.create_task(file_store.once(question(), endpoint))
        for _ in range(20):  # the loop turns, the answer waits
            await asyncio.sleep(0.001)
        assert not task.done()
        holder.execute("ROLLBACK")
        holder.close()
        return await task

    assert asyncio.run(run()).verdict.preference == 1.0


# -- the file --------------------------------------------------------------------------------------------------------


def _foreign(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE recipes (dish TEXT)")


def _later(path):
    VerdictStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_foreign, "another program's database"),
        (_later, f"got version {SCHEMA_VERSION + 1}, expected at most {SCHEMA_VERSION}"),
        (lambda path: path.write_bytes(b"no database at all" * 100), "not a database"),
        (lambda path: path.write_bytes(b"SQLite format 3\x00" + b"\xff" * 4000), "no usable verdict store"),
        (lambda path: path.mkdir(), "no usable verdict store"),
    ],
)
def test_a_file_that_is_no_store_is_refused_and_left_alone(path, spoil, says):
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError, match=says) as caught:
        VerdictStore(path)
    assert path.name in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        VerdictStore(tmp_path / "none" / "v.db")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((3,), "path"), (("",), "path"), (("v", "all"), "reuse"), (("v", "replies", 0), "lease_s")],
)
def test_arguments(tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    path, *rest = arguments
    with pytest.raises(InputError, match=name):
        VerdictStore(path, **dict(zip(("reuse", "lease_s"), rest, strict=False)))


def test_a_full_disk_costs_no_verdict(file_store, monkeypatch, caplog):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    async def ask():
        return reply()

    with monkeypatch.context() as patch:
        patch.setattr("rmcore.judge.store.sqlite.insert_call", full)
        assert asyncio.run(file_store.once(question(), ask)).verdict.preference == 1.0
        assert "disk is full" in caplog.text
    assert file_store.get(question()) is None
    assert asyncio.run(file_store.once(question(), ask)).verdict.usage == PAID
    assert asyncio.run(file_store.once(question(), never)).verdict.usage == HIT


def test_a_row_that_cannot_be_read_harms_nobody_else(execute, store, place):
    store.put(question("p"), reply())
    store.put(question("q"), reply())
    execute(place, f"UPDATE calls SET critique = 'no json' WHERE key = '{question('p').key}'")

    async def both():
        return await asyncio.gather(
            store.once(question("p"), never), store.once(question("q"), never), return_exceptions=True
        )

    bad, good = asyncio.run(both())
    assert isinstance(bad, StoreError)
    assert good.verdict.preference == 1.0


def test_a_closed_store_can_be_used_again(store):
    store.put(question(), reply())
    store.close()
    store.close()
    assert store.get(question()).verdict.preference == 1.0


def test_what_is_queued_is_committed_at_exit(rows, place):
    code = (
        "import sys\n"
        "from rmcore.judge import VerdictStore, Verdict, JudgeUsage\n"
        "from rmcore.judge.store.records import Question, Reply\n"
        "from rmcore.judge.store.writer import Record\n"
        "store = VerdictStore(sys.argv[1])\n"
        "for k in range(300):\n"
        "    q = Question.of('j', 'm', {}, 't', f'p{k}', 'a', 'b')\n"
        "    store._submit(Record(q, Reply(Verdict(1.0, usage=JudgeUsage(calls=1, attempts=1)), True)))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(place)], check=True)
    assert len(rows(place)) == 300
    assert rows(place, "id", "owners") == []


def test_a_copy_in_another_process_opens_the_file_for_itself(store):
    store.put(question(), reply())
    with pickle.loads(pickle.dumps(store)) as copy:
        assert (copy.path, copy.reuse) == (store.path, store.reuse)
        assert copy.get(question()).verdict.preference == 1.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_connection_of_its_own(rows, store, place):
    store.put(question("parent"), reply())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = store.get(question("parent"))
            store.put(question("child"), reply())
            store.close()
            code = 0 if found is not None else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert store.get(question("child")) is not None
    store.put(question("after"), reply())
    assert rows(place, "count(*)") == [(3,)]


# -- behind a judge --------------------------------------------------------------------------------------------------


def test_a_judge_asks_what_the_store_does_not_know(ask, mock_judge, chat_reply, place):
    requests = []

    def handler(request):
        requests.append(request)
        return chat_reply(request, "fine\n<verdict>$win</verdict>")

    pair = Pair("p", "a", "b")
    first = ask(mock_judge(handler, store=place), pair, Pair("p", "b", "a"))
    again = ask(mock_judge(handler, store=place), pair, Pair("p", "b", "a"))
    assert len(requests) == 2  # both pairs are the same two questions
    assert [v.preference for v in first] == [v.preference for v in again] == [0, 0]
    assert sum(v.usage.calls for v in first) == 2
    assert [v.usage for v in again] == [JudgeUsage(cache_hits=2)] * 2
    assert again[0].critique == first[0].critique
    assert {v.judge for v in again} == {"judge-model"}
    ask(mock_judge(handler, store=place, temperature=0.5), pair)
    assert len(requests) == 4


def test_a_judge_that_moved_keeps_its_verdicts_under_its_name(ask, mock_judge, chat_reply, place):
    requests = []

    def handler(request):
        requests.append(request)
        return chat_reply(request, "<verdict>$win</verdict>")

    for port in (1, 2):
        ask(mock_judge(handler, base_url=f"http://127.0.0.1:{port}/v1", judge_id="local", store=place))
    assert len(requests) == 2
    ask(mock_judge(handler, base_url="http://127.0.0.1:2/v1", store=place))
    assert len(requests) == 4


def test_canaries_are_marked(rows, ask, mock_judge, chat_reply, place):
    judge = mock_judge(lambda request: chat_reply(request, "<verdict>$win</verdict>"), store=place, orders="one")
    ask(judge, Pair("p", "a", "b", id="canary:constant:1"), Pair("q", "a", "b", id="mine"))
    assert sorted(rows(place, "canary")) == [(0,), (1,)]


def test_a_pickled_judge_takes_its_store_along(mock_judge, make_judge, place):
    judge = pickle.loads(pickle.dumps(make_judge(store=place, clock=SystemClock())))
    assert judge.store.path == place
    judge.close()


def test_bad_pairs_and_broken_stores_have_reasons(ask, mock_judge, chat_reply, path):
    judge = mock_judge(lambda request: chat_reply(request, "<verdict>$win</verdict>"), store=path)
    assert ask(judge, Pair(None, "a", "b"))[0].reason == "bad_pair"
    for file in path.parent.iterdir():
        file.unlink()
    path.write_bytes(b"no database " * 100)
    assert [v.reason for v in ask(judge, Pair("p", "a", "b"))] == ["store"]


def test_no_key_gets_into_the_file(ask, mock_judge, chat_reply, path, secret):
    judge = mock_judge(
        lambda request: chat_reply(request, f"You said {secret}.\n<verdict>$win</verdict>"),
        api_key_env="RMCORE_TEST_KEY",
        extra_body={"provider": {"api_key": secret}},
        store=path,
    )
    verdict = ask(judge)
    assert not verdict.failed
    assert secret not in verdict.critique
    assert all(secret.encode() not in file.read_bytes() for file in path.parent.iterdir())


def test_finished_verdicts_outlive_a_cancelled_batch(rows, mock_judge, chat_reply, place):
    async def handler(request):
        if "slow" in request.content.decode():
            await asyncio.Event().wait()
        return chat_reply(request, "<verdict>$win</verdict>")

    judge = mock_judge(handler, store=VerdictStore(place))

    async def run():
        batch = asyncio.create_task(judge.judge([Pair("quick", "a", "b"), Pair("slow", "a", "b")]))
        while len(rows(place)) < 2:
            await asyncio.sleep(0.005)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        return await judge.judge([Pair("quick", "a", "b")])

    (verdict,) = asyncio.run(run())
    assert verdict.usage == JudgeUsage(cache_hits=2)
