"""Everything an endpoint can do wrong, over sockets and through the engine: no exception, no pair lost, all counted.

Each fault comes twice: to every request, and to every third one among good answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from contextlib import ExitStack
from dataclasses import fields
from itertools import combinations

import pytest
import torch

from rmcore import FrozenHead, RewardEngine
from rmcore._base.client.breaker import BreakerPolicy
from rmcore.engine.routing import AlwaysRoute
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.posterior import Posterior
from rmcore.judge import (
    ChatJudge,
    ClientOptions,
    Fault,
    Pair,
    RecordedJudge,
    ReplayServer,
    RetryPolicy,
    Verdict,
    VerdictStore,
)
from rmcore.judge.testing import FAULTS as KINDS

J = math.log(0.88 / 0.12)
QUICK = RetryPolicy(max_attempts=2, base_s=0.01, max_backoff_s=0.02)
OWN = {
    "429 storm": (Fault(429), "http_429"),
    "429 with Retry-After": (Fault(429, headers={"Retry-After": "0.02"}), "http_429"),
    "429 with a hostile Retry-After": (Fault(429, headers={"Retry-After": "-1e999"}), "http_429"),
    "429 that asks for too much": (Fault(429, headers={"Retry-After": "86400"}), "http_429"),
    "used-up quota": (Fault(429, code="insufficient_quota"), "insufficient_quota"),
    "503 with Retry-After": (Fault(503, headers={"Retry-After-Ms": "20"}), "http_503"),
    "expired key": (Fault(401, code="invalid_api_key"), "http_401"),
    "redirect to elsewhere": (Fault(307, headers={"Location": "http://127.0.0.1:9/"}), "http_307"),
    "a million empty lists": (Fault(body=b'{"choices": [' + b"[]," * 1_000_000 + b"[]]}"), "reply_too_large"),
}
THROUGH_THE_ENGINE = (
    *("hang", "stall", "drip", "silent", "close", "half_close", "reset", "http_500", "http_403", "10_mb_error"),
    *("truncated_json", "html", "bad_encoding", "empty_choices", "10_mb_reply", "null_content", "refusal", "http_204"),
    *("content_filter", "length", "both_labels", "quoted_in_reasoning", "unclosed_think", "completions", "not_http"),
)
FAULTS = {name: (KINDS[name], KINDS[name].reason) for name in THROUGH_THE_ENGINE} | OWN
SLOW = ("hang", "stall", "drip")


@pytest.fixture(scope="module")
def head() -> FrozenHead:
    config = HeadConfig(2, mode="difference", features="linear", ridge=1.0, amplitude=3.0)
    features = SNGPHead(config).freeze_features(torch.float32)
    return FrozenHead(config, features, torch.tensor([1.0, 0.0]), 0.0, Posterior(2, ridge=1.0))


@pytest.fixture
def score(head):
    """K responses to one prompt, the earlier the better, and all their pairs judged by a server with these faults."""

    def run(faults, k, orders, **kwargs):
        responses = [f"r{i}" for i in range(k)]
        recorded = RecordedJudge.from_rows(
            {"prompt": "p", "first": a, "second": b, "verdict": "win", "order": order}
            for a, b in combinations(responses, 2)
            for order in ("ab", "ba")
        )
        hidden = torch.arange(2.0 * k).view(k, 2) / k
        alone = RewardEngine(head).score_hidden(hidden, [k])[0]
        with ReplayServer(recorded, faults=faults) as server:
            given = {"timeout_s": 20.0, "retry": QUICK, "random_source": random.Random(0)} | kwargs
            options = {name: given.pop(name) for name in [f.name for f in fields(ClientOptions)] if name in given}
            judge = ChatJudge(server.base_url, "m", None, orders=orders, client=ClientOptions(**options), **given)
            scores = RewardEngine(head, judge, AlwaysRoute()).score_hidden(
                hidden, [k], prompts=["p"], responses=[responses]
            )
            judge.close()
        check(scores, server, judge, alone, k)
        return scores, server

    return run


def check(scores, server, judge, alone, k):
    """Whatever went wrong: each pair is decided once, rightly or not at all, and every total adds up."""
    group, summary = scores[0], scores.summary()
    by = summary["decided_by"]
    assert sum(by.values()) == summary["pairs"] == k * (k - 1) // 2
    assert by["judge"] + by["judge_failed"] == summary["routed"] == summary["pairs"]
    assert sum(summary["judge_failures"].values()) == by["judge_failed"]
    assert "" not in summary["judge_failures"]
    assert [(d.i, d.j) for d in group.decisions] == list(combinations(range(k), 2))
    for d in group.decisions:
        if d.by == "judge":
            assert group.preference[d.i, d.j].item() == pytest.approx(J)
        else:
            assert d.reason == d.verdict.reason
            assert group.preference[d.i, d.j] == alone.preference[d.i, d.j]  # bit for bit
    assert torch.equal(group.preference, -group.preference.T)
    usage = scores.judge_usage
    assert usage.attempts == judge.client.state.attempts >= usage.calls
    # A request that its sender gives up on may be gone before the server has counted it.
    assert server.requests <= usage.attempts
    state = judge.client.state
    assert (state.concurrency.in_flight, state.concurrency.queued, state.limits.queued) == (0, 0, 0)
    json.dumps([summary, scores.to_records()], allow_nan=False)


@pytest.mark.parametrize("kind", FAULTS)
def test_to_every_request(score, kind):
    fault, reason = FAULTS[kind]
    scores, server = score(lambda _: fault, 3, "one", timeout_s=0.25 if kind in SLOW else 20.0)
    assert scores.summary()["judge_failures"] == {reason: 3}
    if kind not in SLOW:
        assert server.requests == scores.judge_usage.attempts


@pytest.mark.parametrize("kind", FAULTS)
def test_to_every_third_request(score, kind):
    fault, reason = FAULTS[kind]
    scores, _ = score(lambda n: fault if n % 3 == 1 else None, 4, "both", timeout_s=0.5 if kind in SLOW else 20.0)
    assert scores.summary()["decided_by"]["judge"] > 0
    reasons = {d.reason for d in scores[0].decisions}
    assert reasons <= {"", reason, f"one_order:{reason}"} | (
        {"one_order:timeout", "timeout"} if kind in SLOW else set()
    )


class Wins(RecordedJudge):
    """Whatever is shown first wins."""

    def lookup(self, prompt, first, second):
        return Verdict.of("win")


def test_each_kind_is_followed_by_what_is_right_and_leaves_what_is_right(tmp_path):
    """Retried or not, stored only where the judge itself answered; what is not stored is bought another day."""
    healthy = False
    with ExitStack() as stack:
        store = stack.enter_context(VerdictStore(tmp_path / "v.db"))

        def served(fault):
            return stack.enter_context(ReplayServer(Wins({}), faults=lambda _: None if healthy else fault))

        servers = {kind: served(fault) for kind, fault in KINDS.items()}

        async def asked(kind):
            options = ClientOptions(timeout_s=0.2 if kind in SLOW and not healthy else 60.0, retry=QUICK)
            before = servers[kind].requests
            async with ChatJudge(
                servers[kind].base_url, "m", None, orders="one", client=options, store=store, judge_id="m"
            ) as judge:
                (verdict,) = await judge.judge([Pair(f"What of {kind}?", "a", "b")])
            return kind, verdict, servers[kind].requests - before

        async def every():  # at once: a commit of the store is for all that have come by then
            quick = await asyncio.gather(*(asked(kind) for kind in KINDS if kind not in SLOW))
            return quick + await asyncio.gather(*map(asked, SLOW))

        for kind, verdict, requests in asyncio.run(every()):
            fault = KINDS[kind]
            assert (kind, verdict.preference, verdict.reason) == (kind, None, fault.reason)
            assert fault.reason, kind
            wanted = {"": [1], "retried": [2], "changed": range(1, 9)}  # short questions have no shorter form
            assert verdict.usage.attempts in wanted[fault.again], kind
            assert requests == verdict.usage.attempts or kind in SLOW  # one that is given up may not have come yet
        healthy = True
        for kind, verdict, requests in asyncio.run(every()):
            if KINDS[kind].answer:
                assert (kind, verdict.reason, verdict.usage.cache_hits) == (kind, KINDS[kind].reason, 1)
                assert requests == 0
            else:
                assert (kind, verdict.failed, verdict.usage.attempts) == (kind, False, 1)
                assert requests == 1 or kind in SLOW  # of those that were given up, some may have come only now


def test_all_kinds_at_once(score):
    kinds = [fault for name, (fault, _) in FAULTS.items() if name not in SLOW]
    scores, _ = score(lambda n: kinds[n // 2 % len(kinds)] if n % 2 else None, 16, "both", concurrency=32)
    assert scores.summary()["pairs"] == 120
    assert scores.summary()["decided_by"]["judge"] >= 60


def test_a_server_that_is_gone(score):
    """The endpoint closes every connection: the breaker opens, and the batch ends with the head's preferences."""
    policy = BreakerPolicy(failures=5, cooldown_s=0.05, max_cooldown_s=0.05, patience_s=0.2)
    scores, server = score(lambda _: Fault(ending="silent"), 20, "one", breaker=policy)
    failures = scores.summary()["judge_failures"]
    assert failures.keys() == {"connection", "breaker_open"}
    assert failures["breaker_open"] > 100
    assert server.requests < 80


def test_a_deadline_ends_a_batch_that_hangs(score):
    scores, _ = score(lambda n: Fault(delay_s=60) if n % 2 else None, 5, "one", deadline_s=0.6)
    assert scores.summary()["judge_failures"].keys() <= {"deadline"}
    assert scores.summary()["decided_by"]["judge_failed"] > 0


def test_an_expired_key_is_named_in_no_result(score, secret, caplog):
    scores, _ = score(
        lambda _: Fault(401, body=json.dumps({"error": {"message": f"key {secret} expired"}}).encode()),
        3,
        "one",
    )
    assert secret not in repr(scores) + json.dumps(scores.summary()) + caplog.text
    assert scores.summary()["judge_failures"] == {"http_401": 3}


def test_cancelling_a_score_ends_its_requests(head):
    """The rest of the batch is not bought, and the client is as good as new."""
    release = threading.Event()
    recorded = RecordedJudge.from_rows([{"prompt": "p", "first": "r0", "second": "r1", "verdict": "win"}])

    async def run(server):
        judge = ChatJudge(server.base_url, "m", None, orders="one", client=ClientOptions(concurrency=4))
        async with judge:
            task = asyncio.create_task(judge.judge([Pair("p", "r0", "r1")] * 200))
            while judge.client.state.concurrency.in_flight < 4:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            release.set()
            assert judge.client.state.concurrency.in_flight == 0
            assert server.requests <= 8
            (verdict,) = await judge.judge([Pair("p", "r0", "r1")])
            assert verdict.preference == 1

    with ReplayServer(recorded, faults=lambda n: None if release.is_set() else Fault(delay_s=60)) as server:
        asyncio.run(run(server))
