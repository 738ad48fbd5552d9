"""The URL of a store in PostgreSQL: it holds no password, and no error repeats one. None of this needs a server."""

from __future__ import annotations

import importlib.util

import pytest

from rmcore._base.errors import InputError, MissingPackageError
from rmcore.judge import VerdictStore
from rmcore.judge.store.location import is_url, locate
from rmcore.judge.store.protocol import Claim, Record, Release, StoreError, UnreachableStoreError
from rmcore.judge.store.records import Question, Reply

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _psycopg():
    pytest.importorskip("psycopg")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@host/db",
        f"postgres://user:{SECRET}@host:1/db?sslmode=require",
        f"postgresql://host/db?user=u&password={SECRET}",
        f"postgresql://host/db?PASSWORD={SECRET}",
        f"postgresql://host/db?sslpassword={SECRET}",
        f"postgresql://user:pa@{SECRET}@host/db",
        f"postgresql://host/db?nonsense={SECRET}",
        f"postgresql://[{SECRET}/db",
        f"mysql://user:{SECRET}@host/db",
    ],
)
def test_a_url_with_a_password_or_that_cannot_be_read_is_refused_without_repeating_it(url):
    with pytest.raises(InputError) as caught:
        VerdictStore(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_is_a_url_and_what_a_file(tmp_path):
    assert str(locate("postgresql://u@h:5/d?sslmode=require")) == "postgresql://u@h:5/d?sslmode=require"
    assert is_url("postgres:///d")
    assert not is_url(tmp_path / "postgresql")
    assert locate(tmp_path / "v.db").path == tmp_path / "v.db"


def test_a_server_that_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(StoreError, match="No such file or directory") as caught:
        VerdictStore(f"postgresql:///d?host={tmp_path}")
    assert str(caught.value).startswith("postgresql:///d?host=")


def test_without_psycopg_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "psycopg" else find(name))
    with pytest.raises(MissingPackageError, match=r"rmcore\[postgres\]"):
        locate("postgresql://h/d")


def test_errors_that_pass_and_errors_that_do_not():
    import psycopg
    from psycopg import errors

    from rmcore.judge.store.postgres_connection import meaning

    passing = [psycopg.OperationalError("connection lost"), errors.AdminShutdown("x"), errors.DeadlockDetected("x")]
    passing += [errors.DiskFull("x"), errors.LockNotAvailable("x"), errors.CannotConnectNow("x")]
    lasting = [errors.UndefinedTable("x"), errors.InsufficientPrivilege("x"), psycopg.DataError("x")]
    lasting += [errors.ReadOnlySqlTransaction("x")]
    assert {type(meaning(error, "u")) for error in passing} == {UnreachableStoreError}
    assert {type(meaning(error, "u")) for error in lasting} == {StoreError}
    told = meaning(psycopg.DataError(f"invalid\nDETAIL: {SECRET}"), "u")
    assert str(told) == "u: invalid"


def test_jobs_of_one_key_keep_their_order():
    from rmcore.judge.store.postgres import _waves

    asked = Question.of("j", "m", {}, "t", "p", "a", "b")
    record, reply = Record, Reply
    jobs = [Claim("a"), Claim("b"), Release("a"), record(asked, reply(None)), Claim("a"), Claim("c"), Claim("a")]
    waves = list(_waves(jobs))
    assert [job for wave in waves for job in wave] == jobs
    assert [len(wave) for wave in waves] == [2, 2, 2, 1]
