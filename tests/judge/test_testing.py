"""The replay server by itself: routes, faults, stopping, the command."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from rmcore._base.client.exchange import finished
from rmcore._base.errors import InputError
from rmcore.judge import Fault, JudgePrompt, JudgeUsage, Pair, RecordedJudge, ReplayServer, pair_key, parse_verdict
from rmcore.judge.client.reply import read_completion
from rmcore.judge.testing import FAULTS, FaultMix, Storm


@pytest.fixture
def post(recorded):
    """Post one rendered question; the reply and the question."""

    def run(server, prompt="p-win", first="a", second="b", template=None, **kwargs):
        question = (template or JudgePrompt()).render(prompt, first, second)
        with httpx.Client(trust_env=False) as client:
            url = server.base_url + "/chat/completions"
            return client.post(url, json={"model": "m", "messages": question.messages}, **kwargs), question

    return run


def test_it_answers_in_the_order_shown_with_the_labels_asked_for(recorded, post):
    with ReplayServer(recorded) as server:
        for first, second in (("a", "b"), ("b", "a")):
            reply, question = post(server, "p-flip", first, second)
            assert parse_verdict(reply.json()["choices"][0], question.labels).outcome == "win"
        reply, question = post(server, "p-one", "b", "a")
        assert parse_verdict(reply.json()["choices"][0], question.labels).outcome == "loss"
    assert server.requests == 3
    assert server.statuses == {200: 3}


def test_it_reads_any_template(recorded, post):
    template = JudgePrompt(system="", user="$contract Second: $second First: $first. They were asked: $prompt")
    with ReplayServer(recorded) as server:
        reply, question = post(server, "p-loss", template=template)
    assert parse_verdict(reply.json()["choices"][0], question.labels).outcome == "loss"


def test_a_mapping_will_do(post):
    with ReplayServer({pair_key("p", "x", "y"): "tie"}) as server:
        reply, question = post(server, "p", "x", "y")
    assert question.labels.tie in reply.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"3",
        b"{}",
        b'{"messages": 3}',
        b'{"messages": [3]}',
        b'{"messages": [{"content": "hi"}]}',
    ],
)
def test_what_is_no_question_is_refused(recorded, body):
    with ReplayServer(recorded) as server:
        reply = httpx.post(server.base_url + "/chat/completions", content=body, trust_env=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "not_a_question")


def test_routes(recorded):
    with ReplayServer(recorded) as server:
        assert httpx.get(server.base_url + "/models", trust_env=False).json()["data"][0]["id"] == "replay"
        assert httpx.get(server.base_url + "/other", trust_env=False).status_code == 404
        assert httpx.post(server.base_url + "/other", content=b"{}", trust_env=False).status_code == 404
        assert (
            httpx.post(server.base_url + "/chat/completions", content=iter([b"{}"]), trust_env=False).status_code == 411
        )
    assert server.requests == 0


def test_it_listens_on_this_machine_only(recorded):
    with ReplayServer(recorded) as server:
        assert server.base_url.startswith("http://127.0.0.1:")


def test_faults_in_order_and_then_none(recorded, post):
    with ReplayServer(recorded, faults=[Fault(503, headers={"Retry-After": "2"}), None, Fault(body=b"x")]) as server:
        replies = [post(server)[0] for _ in range(4)]
    assert [r.status_code for r in replies] == [503, 200, 200, 200]
    assert replies[0].headers["retry-after"] == "2"
    assert replies[0].json()["error"]["code"] == "injected"
    assert replies[2].content == b"x"
    assert replies[3].json()["usage"]["prompt_tokens"] > 0


def test_no_kind_of_fault_is_a_verdict(recorded):
    """Every named kind, so that one added later is tried too; those that only end with a timeout are left out."""
    kinds = [kind for kind in FAULTS if kind not in ("hang", "stall", "drip", "half_close")]
    plan = [fault for kind in kinds for fault in (FAULTS[kind], None)]
    question = JudgePrompt().render("p-win", "a", "b")
    asked = {"model": "m", "messages": question.messages}
    with ReplayServer(recorded, faults=plan) as server, httpx.Client(trust_env=False, timeout=20) as client:
        for kind in kinds:
            try:
                with client.stream("POST", server.base_url + "/chat/completions", json=asked) as reply:
                    content = b"".join(reply.iter_raw())
            except httpx.TransportError:
                content = b""
            next_one = client.post(server.base_url + "/chat/completions", json=asked)
            assert next_one.status_code == 200, f"the request after {kind} is answered as ever"
            if content and reply.status_code == 200:
                attempt = finished(content, "", {})
                read = None if attempt.body is None else read_completion(content, JudgeUsage(calls=1), "")
                if read is not None and read.choice is not None:
                    assert parse_verdict(read.choice, question.labels).outcome is None, kind
    assert server.answers == {**dict.fromkeys(kinds, 1), "good": len(kinds)}


def test_a_mix_meets_every_kind_equally_often_and_storms_refuse_all():
    time_now = [0.0]
    mix = FaultMix(0.5, storms=[Storm(100, 5.0, "429")], clock=lambda: time_now[0])
    before = [mix(number) for number in range(100)]
    storm = {mix(number).status for number in range(100, 150)}
    time_now[0] = 6.0
    after = [mix(number) for number in range(150, 5000)]
    assert storm == {429}
    met = Counter(fault.kind for fault in before + after if fault is not None)
    assert set(met) == set(FAULTS)
    assert max(met.values()) - min(met.values()) <= 1
    assert 0.45 < met.total() / 4950 < 0.55
    again = FaultMix(0.5, clock=lambda: 0.0)
    assert [again(number) for number in range(100)] == before, "the same seed, the same faults"


def test_bad_mixes_and_storms():
    with pytest.raises(InputError, match="share"):
        FaultMix(1.5)
    with pytest.raises(InputError, match="kind: got 'hail'"):
        Storm(0, 1.0, "hail")


def test_hundreds_of_connections_on_one_thread(recorded):
    """Concurrency is the client's to bound; the server bears what comes, and counts it."""
    question = JudgePrompt().render("p-win", "a", "b")

    async def run(server):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(trust_env=False, limits=limits, timeout=60) as client:
            asked = {"model": "m", "messages": question.messages}
            posts = (client.post(server.base_url + "/chat/completions", json=asked) for _ in range(300))
            return {reply.status_code for reply in await asyncio.gather(*posts)}

    threads = threading.active_count()
    with ReplayServer(recorded, latency_s=(0.5, 0.6)) as server:
        assert asyncio.run(run(server)) == {200}
        assert threading.active_count() <= threads + 1
        stats = httpx.get(server.base_url + "/stats", trust_env=False).json()
    assert stats["requests"] == stats["answers"]["good"] == 300
    assert stats["peak_in_flight"] > 100
    assert stats["in_flight"] == 0


def test_latency(recorded, post):
    with ReplayServer(recorded, latency_s=0.1) as server:
        started = time.monotonic()
        post(server)
    assert time.monotonic() - started >= 0.1
    with pytest.raises(InputError, match="latency_s"):
        ReplayServer(recorded, latency_s=-1)


def test_no_answer_waits_for_the_acknowledgement_of_its_head(recorded):
    """On a connection that stays open that was 40 ms for all but the first few answers."""
    took = []
    question = {"model": "m", "messages": JudgePrompt().render("p-win", "a", "b").messages}
    with ReplayServer(recorded) as server, httpx.Client(trust_env=False) as client:
        for _ in range(40):
            started = time.monotonic()
            assert client.post(server.base_url + "/chat/completions", json=question).status_code == 200
            took.append(time.monotonic() - started)
    assert min(took[10:]) < 0.03


def test_stopping_does_not_wait_for_hanging_requests_or_idle_connections(recorded, post):
    server = ReplayServer(recorded, faults=[Fault(delay_s=60)]).start()
    failed = []

    def hang():
        try:
            post(server, timeout=30)
        except httpx.HTTPError as error:
            failed.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    while server.requests == 0:
        time.sleep(0.005)
    port = int(server.base_url.split(":")[2].split("/")[0])
    idle = socket.create_connection(("127.0.0.1", port))
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 2
    thread.join(5)
    assert not thread.is_alive()
    idle.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    server.stop()
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.base_url


def test_it_can_be_started_again(recorded, post):
    server = ReplayServer(recorded)
    for _ in range(2):
        with server:
            assert post(server)[0].status_code == 200
    assert server.requests == 2


def test_the_command(tmp_path, rows, post):
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    process = subprocess.Popen(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "rmcore.judge.testing", str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(url + "/models", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_the_command_with_a_bad_file(tmp_path):
    (tmp_path / "v.jsonl").write_text("nonsense")
    done = subprocess.run(
        [sys.executable, "-m", "rmcore.judge.testing", str(tmp_path / "v.jsonl")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "v.jsonl:1: not JSON" in done.stderr


@pytest.mark.data
def test_recorded_flips_of_a_strong_judge():
    """GPT-4's verdicts on LLMBar, asked without ornament, flip with the order in 30 of 419 pairs."""
    folder = os.environ.get("RMCORE_DATA")
    if not folder or not (path := Path(folder) / "llmbar.jsonl.gz").exists():
        pytest.skip("RMCORE_DATA does not point to a folder with llmbar.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        data = [json.loads(line) for line in lines]
    words = {1: "win", 0: "loss", None: None}
    rows = [
        {"prompt": r["prompt"], "first": r["chosen"], "second": r["rejected"], "order": order}
        | {"verdict": words[r["judges"].get(f"GPT-4/Vanilla/{order}")]}
        for r in data
        for order in ("ab", "ba")
    ]
    judge = RecordedJudge.from_rows(rows)
    verdicts = [judge.verdict(Pair(r["prompt"], r["first"], r["second"])) for r in rows[::2]]
    assert (len(verdicts), sum(verdict.flipped for verdict in verdicts)) == (419, 30)


def test_the_documentation_states_the_number_of_kinds():
    root = Path(__file__).parents[2]
    text = " ".join((root / "docs/judge.md").read_text(encoding="utf-8").split())
    run = json.loads((root / "bench/results/judge_soak.json").read_text(encoding="utf-8"))
    assert f"knows {len(FAULTS)} kinds of fault" in text
    assert f"(bench/results/judge_soak.json) had {run['soak']['evenly_spread_faults']} kinds" in text


def test_a_judge_of_many_servers_ways(recorded, ask, make_judge, secret):
    """An Azure deployment with its key header, no system role, and another model than was asked for."""
    with ReplayServer(recorded, require_key=secret, refuses=["system"], answers_as="other-model") as server:
        azure = server.base_url.removesuffix("/v1") + "/openai/deployments/judge?api-version=2024-10-21"
        for url, sent in ((azure, "api-key"), (server.base_url, "authorization")):
            judge = make_judge(url, api_key_env="RMCORE_TEST_KEY", orders="one")
            verdict = ask(judge)
            assert judge.client.exchange.address.key_header == sent
            assert (verdict.preference, verdict.judge) == (1, "other-model")
            assert "system_role" in judge.dropped
        wrong = make_judge(azure, api_key_env=None, orders="one")
        assert ask(wrong).reason == "http_401"
