"""A store damaged from outside: the error names the file and the remedy, nothing is bought, nothing changed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

import pytest
from typer.testing import CliRunner

from rmcore.cli import app
from rmcore.judge import ChatJudge, JudgeUsage, Pair, Verdict, VerdictStore
from rmcore.judge.store.database import StoreError
from rmcore.judge.store.records import Question, Reply

PAID = JudgeUsage(calls=1, attempts=1, seconds=0.5)
PAIR = Pair("p1 " + "text " * 50, "a", "b")


def with_bytes(change):
    """Damage by what ``change`` makes of the file's bytes."""

    def damage(path):
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_sql(*statements):
    """Damage by another program that knows SQL."""

    def damage(path):
        with contextlib.closing(sqlite3.connect(path)) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return damage


DAMAGES = {
    "first bytes": with_bytes(lambda b: b"X" * 16 + b[16:]),
    "header": with_bytes(lambda b: b[:16] + b"\xff" * 24 + b[40:]),
    "half of it": with_bytes(lambda b: b[: len(b) // 2]),
    "half and a bit": with_bytes(lambda b: b[: len(b) // 2 + 777]),
    "header only": with_bytes(lambda b: b[:100]),
    "all pages": with_bytes(lambda b: b[:4096] + b"\x5a" * (len(b) - 4096)),
    "a text": with_bytes(lambda b: b"hello\n" * 100),
    "a table": with_sql("DROP TABLE texts"),
    "another table": with_sql("DROP TABLE calls"),
    "claims": with_sql("DROP TABLE claims"),
    "a column": with_sql("ALTER TABLE calls RENAME COLUMN reply TO answer"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "verdicts.db"
    with VerdictStore(path) as store:
        for k in range(20):
            question = Question.of("j", "m", {}, "t", f"p{k} " + "text " * 50, "a", "b")
            store.put(question, Reply(Verdict(1.0, usage=PAID), replied=True, text="r"))
    return path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_told_of_and_left_as_it_is(damage, whole, tmp_path):
    path = tmp_path / "verdicts.db"
    path.write_bytes(whole)
    DAMAGES[damage](path)
    before, asked = path.read_bytes(), []

    async def complete(messages, **parameters):
        asked.append(1)
        return "no"

    async def judged() -> list[Verdict]:
        async with ChatJudge(complete=complete, model="m", judge_id="j", store=path, orders="one") as judge:
            return await judge.judge([PAIR])

    if damage == "all pages":  # which is seen where they are read
        (verdict,) = asyncio.run(judged())
        assert verdict.reason == "store"
    else:
        with pytest.raises(StoreError, match=r"verdicts\.db: .*name another file for new verdicts"):
            asyncio.run(judged())
    assert not asked, "nothing is bought that cannot be kept"
    for command in ("stats", "show", "export"):
        out = ["-o", str(tmp_path / "rows.jsonl")] if command == "export" else []
        result = CliRunner().invoke(app, ["verdicts", command, str(path), *out])
        assert result.exit_code == 2, result.output
        assert str(path) in result.stderr.replace("\n", "")
        assert "sqlite3 FILE .recover" in " ".join(result.stderr.split())
        assert result.stderr.count("rmcore: ") == 1, "once, not for every call"
    assert path.read_bytes() == before


def test_a_log_of_garbage_and_a_log_that_is_gone_cost_no_committed_verdict(whole, tmp_path):
    path = tmp_path / "verdicts.db"
    path.write_bytes(whole)
    (tmp_path / "verdicts.db-wal").write_bytes(b"\x5a" * 5000)
    (tmp_path / "verdicts.db-shm").write_bytes(b"\x5a" * 32768)
    out = tmp_path / "rows.jsonl"
    assert CliRunner().invoke(app, ["verdicts", "export", str(path), "-o", str(out)]).exit_code == 0
    assert len(out.read_text().splitlines()) == 20
    with VerdictStore(path) as store:
        store.put(Question.of("j", "m", {}, "t", "new", "a", "b"), Reply(Verdict(1.0, usage=PAID), replied=True))
    for ending in ("-wal", "-shm"):
        (tmp_path / f"verdicts.db{ending}").unlink(missing_ok=True)
    again = CliRunner().invoke(app, ["verdicts", "export", str(path), "-o", str(out), "--overwrite"])
    assert again.exit_code == 0, again.stderr
    assert len(out.read_text().splitlines()) == 21


def test_a_store_of_an_older_release_is_whole_as_it_is(tmp_path):
    from rmcore.judge.store import database

    for version in range(1, database.SCHEMA_VERSION + 1):
        path = tmp_path / f"{version}.db"
        with contextlib.closing(sqlite3.connect(path)) as made:
            for step in database._MIGRATIONS[:version]:
                for statement in step.split(";"):
                    made.execute(statement)
            made.execute(f"PRAGMA application_id = {database._APPLICATION_ID}")
            made.execute(f"PRAGMA user_version = {version}")
            made.commit()
        database.open_database(path, read_only=True).close()
        database.open_database(path).close()
