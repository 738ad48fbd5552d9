"""Runs that are killed, and runs side by side: nothing is bought twice, and the result is that of one quiet run.

The children are processes of their own that score 500 pairs; the endpoint is a replay server in this process, over
HTTP. It writes down every question, so "not bought twice" is counted where money would be taken.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from support.warm import WarmProcess, WarmPython

from rmcore.judge import Outcome, Pair, RecordedJudge, ReplayServer, Verdict, pair_key
from rmcore.judge.store.location import is_url

GROUPS, K = 50, 5
PAIRS = GROUPS * K * (K - 1) // 2
QUESTIONS = 2 * PAIRS
CONCURRENCY = 8

MODULES = ("torch", "rmcore.engine.engine", "rmcore.engine.routing", "rmcore.head.fit", "rmcore.judge")
CHILD = """
import sys
import torch
from rmcore.engine import RewardEngine
from rmcore.head.fit import fit
from rmcore.head import HeadConfig, SNGPHead
from rmcore.judge import ChatJudge, ClientOptions
from rmcore.engine.routing import AlwaysRoute

url, store, out, groups, k, concurrency = sys.argv[1:4] + [int(n) for n in sys.argv[4:]]
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(groups * k, 8, generator=generator)
pairs = torch.randint(groups * k, (200, 2), generator=generator)
labels = torch.randint(2, (200,), generator=generator).float()
head = SNGPHead(HeadConfig(8, num_features=16))
head = fit(head, hidden, labels, pairs=pairs, dtype=torch.float32, backend="torch")[0]
options = ClientOptions(concurrency=concurrency)
judge = ChatJudge(url, "judge", None, judge_id="replayed", client=options, store=store or None)
engine = RewardEngine(head, judge, AlwaysRoute(), backend="torch")
prompts = [f"prompt {g}" for g in range(groups)]
responses = [[f"response {g}.{i}" for i in range(k)] for g in range(groups)]
scores = engine.score_hidden(hidden, [k] * groups, prompts=prompts, responses=responses)
usage = scores.judge_usage
with open(out, "wb") as file:
    file.write(scores.advantages.numpy().tobytes())
print(usage.calls, usage.cache_hits, scores.summary()["decided_by"]["judge"])
"""


class Asked(RecordedJudge):
    """Recorded verdicts that remember every question put to them."""

    def __init__(self, verdicts):
        super().__init__(verdicts)
        self.log: list[str] = []
        self.lock = threading.Lock()

    def lookup(self, prompt, first, second) -> Verdict:
        with self.lock:
            self.log.append(pair_key(prompt, first, second))
        return super().lookup(prompt, first, second)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Outcome | None]:
    """Wins, losses and ties at random; the orders of a pair need not agree, and some questions get no verdict."""
    source = random.Random(7)
    verdicts = {}
    for g in range(GROUPS):
        for i in range(K):
            for j in range(K):
                if i != j:
                    key = pair_key(f"prompt {g}", f"response {g}.{i}", f"response {g}.{j}")
                    verdicts[key] = source.choice(["win", "win", "loss", "loss", "tie", None])
    assert len(verdicts) == QUESTIONS
    return verdicts


@pytest.fixture
def asked(verdicts) -> Asked:
    return Asked(verdicts)


class Quiet(NamedTuple):
    """Two processes that score the same groups side by side, with one store, and nobody kills them."""

    log: list[str]
    kept: list[str]
    told: list[tuple[int, int, int]]
    results: list[bytes]


@pytest.fixture(scope="module")
def uninterrupted(verdicts, tmp_path_factory, warm_python) -> Quiet:
    folder, asked = tmp_path_factory.mktemp("quiet"), Asked(verdicts)
    with ReplayServer(asked, latency_s=0.004) as server:
        children = [start(warm_python, server, folder / "verdicts.db", folder / f"out {k}") for k in range(2)]
        told = [finish(child) for child in children]
    results = [(folder / f"out {k}").read_bytes() for k in range(2)]
    return Quiet(asked.log, kept(folder / "verdicts.db"), told, results)


def start(python: WarmPython, server: ReplayServer, store: Path | str, out: Path) -> WarmProcess:
    return python.start(CHILD, server.base_url, store, out, GROUPS, K, CONCURRENCY, modules=MODULES)


def finish(child: WarmProcess) -> tuple[int, int, int]:
    """Calls, cache hits and pairs that the judge decided, as the child tells them."""
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    calls, hits, decided = map(int, out.split())
    return calls, hits, decided


def quiet(server: ReplayServer) -> None:
    """Wait until the server has answered all that it was sent, or noticed that nobody waits for it."""
    seen = -1
    while seen != server.requests or server.in_flight:
        seen = server.requests
        time.sleep(0.05)


def kept(store: Path | str) -> list[str]:
    """The questions of all committed rows, as keys of the order shown; a file must be whole."""
    query = """SELECT p.body, a.body, b.body FROM calls
        JOIN texts p ON p.id = calls.prompt JOIN texts a ON a.id = first JOIN texts b ON b.id = second"""
    if is_url(store):
        import psycopg

        with psycopg.connect(store, options="-c search_path=rmcore") as database:
            there = database.execute("SELECT to_regclass('rmcore.calls')").fetchone() != (None,)
            rows = database.execute(query).fetchall() if there else []
    elif not store.exists():
        return []
    else:
        with contextlib.closing(sqlite3.connect(store)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            rows = database.execute(query).fetchall()
    return [pair_key(*(text.strip('"') for text in row)) for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on_and_buys_nothing_twice(asked, place, tmp_path, uninterrupted, warm_python):
    source, store = random.Random(20), place
    lost: list[str] = []
    # The first kill comes among the very first verdicts, the others anywhere up to near the end.
    moments = [source.randrange(1, 20), *sorted(source.randrange(50, 900) for _ in range(2))]
    with ReplayServer(asked, latency_s=0.004) as server:
        for moment in moments:
            known, logged, before = set(kept(store)), len(asked.log), server.requests
            child = start(warm_python, server, store, tmp_path / "never")
            while len(known) + server.requests - before < moment:
                assert child.poll() is None, child.stderr.read()
                time.sleep(0.001)
            child.send_signal(signal.SIGKILL)
            child.communicate()
            quiet(server)
            now = kept(store)
            questions = asked.log[logged:]
            assert len(now) == len(set(now))
            # What had been committed was not asked again, and what was asked is kept but for calls under way.
            assert not known & set(questions)
            assert set(now) <= known | set(questions)
            assert len(set(questions)) == len(questions)
            missing = set(questions) - set(now)
            assert len(missing) <= CONCURRENCY
            lost += missing
        known, logged = set(kept(store)), len(asked.log)
        assert len(known) >= moments[-1] - CONCURRENCY
        calls, hits, decided = finish(start(warm_python, server, store, tmp_path / "resumed"))
        assert (calls, hits) == (QUESTIONS - len(known), len(known))
        assert not known & set(asked.log[logged:])
        # Every question was paid for once, and once more for each time that a kill met it on its way.
        assert Counter(asked.log) == Counter(dict.fromkeys(kept(store), 1)) + Counter(lost)
        assert len(kept(store)) == QUESTIONS
        assert finish(start(warm_python, server, store, tmp_path / "replayed")) == (0, QUESTIONS, decided)
        assert len(asked.log) == QUESTIONS + len(lost)
    expected = uninterrupted.results[0]
    assert len(expected) == GROUPS * K * 8
    assert (tmp_path / "resumed").read_bytes() == expected
    assert (tmp_path / "replayed").read_bytes() == expected
    assert not (tmp_path / "never").exists()
    assert 0 < decided < PAIRS  # pairs without a verdict in either order were part of it


@pytest.mark.slow
def test_processes_side_by_side_buy_each_verdict_once(uninterrupted):
    assert len(uninterrupted.log) == len(set(uninterrupted.log)) == QUESTIONS
    assert Counter(uninterrupted.kept) == Counter(uninterrupted.log)
    assert sum(calls for calls, _, _ in uninterrupted.told) == QUESTIONS
    assert [calls + hits for calls, hits, _ in uninterrupted.told] == [QUESTIONS] * 2
    assert uninterrupted.results[0] == uninterrupted.results[1]


def test_a_batch_in_a_killed_process_is_not_a_batch_lost(asked, tmp_path, make_judge):
    """The same from inside: a judge with the store of another one answers without a request."""
    pairs = [Pair(f"prompt {g}", f"response {g}.0", f"response {g}.1") for g in range(10)]
    with ReplayServer(asked) as server:
        first = make_judge(server.base_url, store=tmp_path / "v.db", judge_id="replayed").judge_sync(pairs)
        server.stop()
    again = make_judge(store=tmp_path / "v.db", judge_id="replayed").judge_sync(pairs)
    assert [(v.preference, v.reason, v.flipped) for v in again] == [(v.preference, v.reason, v.flipped) for v in first]
