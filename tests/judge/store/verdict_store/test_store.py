"""The verdict store: what it keeps, who may share it, and who pays once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import sqlite3
import stat
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.judge_calls import HIT, PAID, never, question, reply

from rmcore._base.errors import InputError
from rmcore.judge import JudgeUsage, Verdict, VerdictStore, call_key, pair_key
from rmcore.judge.store.database import SCHEMA_VERSION, StoreError, open_database
from rmcore.judge.store.records import MAX_REPLY, Reply, reply_text, without_secrets

REFUSAL = reply(None, "refusal")
TIMEOUT = reply(None, "timeout", replied=False)


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
