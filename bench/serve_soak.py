"""Endurance of the group server: 200 clients for a minute, over real sockets, some of them hanging up.

``rmcore serve`` runs in a process of its own on a tiny model. The clients send whole groups, single members by slot and
OpenRLHF's single calls; a group's members come from different clients. One call in twenty is dropped and made again.
Every answer is compared with the engine's own score of the same texts, made before in this process, so a lost, mixed
or mistaken group shows. Before that, batching is measured against one group at a time. Writes ``serve_soak.json``;
exits 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmcore import RewardEngine
from rmcore.backbone import Backbone, BackboneConfig
from rmcore.batching import BatchScorer
from rmcore.model import Preference, RewardModel

from .harness import environment

__all__ = ["Soak", "main", "run"]

PRAISE = ["good", "clear", "right", "exact", "helpful", "kind"]
BLAME = ["bad", "vague", "wrong", "rude", "lazy", "odd"]
NEUTRAL = ["red", "blue", "green", "tree", "house", "river", "stone", "cloud"]

TOLERANCE = 1e-3
"""Of preferences, logits: what is computed together may show in the last bits; groups differ by far more."""

WANTED_RATIO = 3.0


@dataclass
class Soak:
    """What to run."""

    clients: int = 200
    seconds: float = 60.0
    group: int = 4
    hang_up: float = 0.05
    pool: int = 200
    time_limit_s: float = 10.0
    ratio_seconds: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class Group:
    """Texts and the engine's own preferences of them, (K, K) as nested lists."""

    prompt: str
    responses: list[str]
    preference: list[list[float]]
    rewards: list[float]


@dataclass
class Outcome:
    """What the clients saw."""

    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


# -- the model -------------------------------------------------------------------------------------------------------


def tiny_model(seed: int) -> RewardModel:
    """A random encoder with a head that likes praise; unknown words are all the same to it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *PRAISE, *BLAME, *NEUTRAL])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - no secret
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        eos_token="[EOS]",  # noqa: S106
    )
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    encoder = transformers.BertModel(config).eval()
    backbone = Backbone(encoder, wrapped, BackboneConfig(pooling="mean", max_length=128))
    rng = random.Random(seed)
    items = [
        Preference(
            " ".join(rng.sample(NEUTRAL, 3)),
            " ".join([*rng.sample(PRAISE, 3), *rng.sample(NEUTRAL, 3)]),
            " ".join([*rng.sample(BLAME, 3), *rng.sample(NEUTRAL, 3)]),
        )
        for _ in range(100)
    ]
    model, _ = RewardModel.fit(backbone, items, mode="difference", num_features=128, kernel_scale=3.0)
    return model


def make_pool(engine: RewardEngine, soak: Soak) -> list[Group]:
    """Groups with their scores. ``# n`` in a prompt are two unknown words whatever n is, so the scores do not change."""
    rng = random.Random(soak.seed)
    words = PRAISE + BLAME + NEUTRAL
    prompts = [" ".join(rng.choices(NEUTRAL, k=6)) + " #" for _ in range(soak.pool)]
    responses = [[" ".join(rng.choices(words, k=rng.randrange(6, 16))) for _ in range(soak.group)] for _ in prompts]
    scores = engine.score([f"{prompt} 0" for prompt in prompts], responses)
    return [
        Group(prompt, texts, score.preference.tolist(), score.rewards.tolist())
        for prompt, texts, score in zip(prompts, responses, scores, strict=True)
    ]


# -- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def server(model: Path, soak: Soak, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``rmcore serve`` on a free port."""
    command = [sys.executable, "-m", "rmcore.cli", "serve", str(model), "--port", "0", "--device", "cpu"]
    command += ["--group-size", str(soak.group), "--time-limit", str(soak.time_limit_s), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            yield process, _url(process, log)
        finally:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen[bytes], log: Any) -> str:
    for _ in range(1200):
        log.seek(0)
        told = log.read()
        if found := re.search(r"serving (\S+)", told):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{told}")


def _resident_mib(pid: int) -> float | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


# -- clients ---------------------------------------------------------------------------------------------------------


class Client:
    """One keep-alive connection: as little as HTTP/1.1 needs, so that the clients leave the machine to the server."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self.host, self.port = host, int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, path: str, body: object) -> None:
        """Write a request."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, self.port)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._streams[1].write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await self._streams[1].drain()

    async def receive(self) -> tuple[int, Any]:
        """Read an answer: status and JSON."""
        assert self._streams is not None
        head = await self._streams[0].readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        assert length is not None
        content = await self._streams[0].readexactly(int(length[1]))
        return int(head.split(b" ", 2)[1]), json.loads(content)

    def hang_up(self) -> None:
        """Close the socket, whatever is on the way."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None


@dataclass(frozen=True)
class Call:
    """One request, and what must come back."""

    kind: str
    path: str
    body: object
    group: Group
    slot: int = 0

    def right(self, reply: Any) -> bool:
        """Whether the answer is this call's own."""
        if self.kind == "groups":
            return bool(reply["id"] == self.body["id"] and _near(reply["preference"], self.group.preference))  # type: ignore[index]
        if self.kind == "rendezvous":
            whole = reply["complete"] and reply["slot"] == self.slot
            return bool(whole and _near(reply["preference"], self.group.preference[self.slot]))
        return _near(reply["rewards"], [self.group.rewards[self.slot]])


def _near(got: Any, expected: Any) -> bool:
    return np.shape(got) == np.shape(expected) and bool(np.allclose(got, expected, atol=TOLERANCE))


class Work:
    """Calls to be made: whole groups, and members of groups in an order of no group's own."""

    def __init__(self, pool: Sequence[Group], seed: int) -> None:
        self._pool, self._rng, self._ready = pool, random.Random(seed), deque[Call]()
        self._numbers = itertools.count(1)
        self.groups = 0

    def next(self, *, more: bool) -> Call | None:
        """The next call; None if there is none and no ``more`` are to be made."""
        if not self._ready:
            if not more:
                return None
            calls = [call for _ in range(16) for call in self._make()]
            self._rng.shuffle(calls)
            self._ready.extend(calls)
        return self._ready.popleft()

    def _make(self) -> list[Call]:
        group, number = self._rng.choice(self._pool), next(self._numbers)
        kind = self._rng.choices(("groups", "rendezvous", "openrlhf"), (4, 3, 3))[0]
        self.groups += 1
        prompt, size = f"{group.prompt} {number}", len(group.responses)
        if kind == "groups":
            return [Call(kind, "/v1/groups", {"prompt": prompt, "responses": group.responses, "id": number}, group)]
        if kind == "openrlhf":
            queries = [[f"{prompt}</s>"[: len(prompt)] + text + "</s>"] for text in group.responses]
            return [
                Call(kind, "/get_reward", {"query": query, "prompts": [prompt], "labels": [None]}, group, slot)
                for slot, query in enumerate(queries)
            ]
        common = {"group_id": number, "k": size, "prompt": prompt}
        return [
            Call(kind, "/v1/rendezvous", {**common, "slot": slot, "response": text}, group, slot)
            for slot, text in enumerate(group.responses)
        ]


async def drive(url: str, pool: Sequence[Group], soak: Soak) -> Outcome:
    """All clients, until the time is up and every group they began is answered."""
    outcome, work, rng = Outcome(), Work(pool, soak.seed), random.Random(soak.seed + 1)
    began = time.perf_counter()

    async def client() -> None:
        connection = Client(url)
        while (call := work.next(more=time.perf_counter() - began < soak.seconds)) is not None:
            dropped = rng.random() < soak.hang_up
            try:
                if dropped:
                    await connection.send(call.path, call.body)
                    await asyncio.sleep(rng.random() * 0.2)
                    connection.hang_up()
                    outcome.counts["hung_up"] += 1
                started = time.perf_counter()
                await connection.send(call.path, call.body)
                async with asyncio.timeout(60):
                    status, reply = await connection.receive()
                seconds = time.perf_counter() - started
            except (OSError, EOFError, TimeoutError) as error:
                outcome.counts["lost"] += 1
                outcome.errors.append(f"{call.kind}: {type(error).__name__}")
                connection.hang_up()
                continue
            outcome.counts[f"status_{status}"] += 1
            outcome.counts[f"calls_{call.kind}"] += 1
            if status != 200:
                outcome.errors.append(f"{call.kind}: {status} {reply}"[:300])
            elif not call.right(reply):
                outcome.counts["wrong"] += 1
                outcome.errors.append(f"{call.kind}: {reply}"[:300])
            if not dropped:
                outcome.latencies_s.setdefault(call.kind, []).append(seconds)
        connection.hang_up()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(soak.clients):
            tasks.create_task(client())
    outcome.seconds = time.perf_counter() - began
    outcome.groups = work.groups
    return outcome


# -- batching against one at a time ----------------------------------------------------------------------------------


async def throughput(engine: RewardEngine, pool: Sequence[Group], seconds: float, *, together: int) -> float:
    """Groups a second that 64 callers get out of a scorer with batches of ``together`` groups."""
    scorer = BatchScorer(engine, max_groups=together)
    until = time.perf_counter() + seconds
    done = 0

    async def caller(first: int) -> None:
        nonlocal done
        for number in itertools.count(first):
            if time.perf_counter() >= until:
                return
            group = pool[number % len(pool)]
            await scorer.score(f"{group.prompt} {number}", group.responses)
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(caller(1000 * k) for k in range(64)))
    return done / (time.perf_counter() - began)


async def http_throughput(url: str, pool: Sequence[Group], seconds: float, *, clients: int) -> float:
    """Groups a second that so many clients get out of ``/v1/groups``, each waiting for its answer."""
    until = time.perf_counter() + seconds
    done = 0

    async def client(first: int) -> None:
        nonlocal done
        connection = Client(url)
        for number in itertools.count(first):
            if time.perf_counter() >= until:
                connection.hang_up()
                return
            group = pool[number % len(pool)]
            await connection.send("/v1/groups", {"prompt": f"{group.prompt} {number}", "responses": group.responses})
            status, _ = await connection.receive()
            assert status == 200
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(client(1000 * k) for k in range(clients)))
    return done / (time.perf_counter() - began)


def measure_batching(engine: RewardEngine, url: str, pool: Sequence[Group], soak: Soak) -> dict[str, Any]:
    """Alternating rounds, so that what else the machine does meets both alike."""
    figures: dict[str, list[float]] = {"one": [], "batched": [], "http_one": [], "http_batched": []}
    for _ in range(3):
        figures["one"].append(asyncio.run(throughput(engine, pool, soak.ratio_seconds, together=1)))
        figures["batched"].append(asyncio.run(throughput(engine, pool, soak.ratio_seconds, together=64)))
        figures["http_one"].append(asyncio.run(http_throughput(url, pool, soak.ratio_seconds, clients=1)))
        figures["http_batched"].append(asyncio.run(http_throughput(url, pool, soak.ratio_seconds, clients=64)))
    median = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "groups_per_second": {name: [round(value, 1) for value in values] for name, values in figures.items()},
        "ratio": round(median["batched"] / median["one"], 2),
        "http_ratio": round(median["http_batched"] / median["http_one"], 2),
        "what": {
            "one": "64 callers of a BatchScorer with batches of one group, in this process",
            "batched": "the same with batches of up to 64",
            "http_one": "one client of the server, its next request after its last answer",
            "http_batched": "64 such clients at once",
        },
    }


# -- the run ---------------------------------------------------------------------------------------------------------


def run(soak: Soak) -> dict[str, Any]:
    """One run; all figures and checks as JSON values."""
    model = tiny_model(soak.seed)
    engine = RewardEngine(model)
    pool = make_pool(engine, soak)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny-rm"
        model.save_pretrained(path, backbone="embed")
        with server(path, soak) as (process, url):
            batching = measure_batching(engine, url, pool, soak)
            before = _resident_mib(process.pid)
            scraped = _metrics(url)
            outcome = asyncio.run(drive(url, pool, soak))
            after = _resident_mib(process.pid)
            figures = _metrics(url)
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    told = {name: value - scraped.get(name, 0.0) for name, value in figures.items()}
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu")),
        "soak": asdict(soak),
        "seconds": round(outcome.seconds, 1),
        "groups": outcome.groups,
        "groups_per_second": round(outcome.groups / outcome.seconds, 1),
        "calls": dict(sorted(outcome.counts.items())),
        "latency_s": {kind: _quantiles(values) for kind, values in sorted(outcome.latencies_s.items())},
        "errors": outcome.errors[:10],
        "server": {
            "batches": told.get("rmcore_batches_total"),
            "groups_scored": told.get('rmcore_groups_total{outcome="scored"}'),
            "assembled_whole": told.get('rmcore_assembled_groups_total{outcome="whole"}'),
            "assembled_partial": told.get('rmcore_assembled_groups_total{outcome="partial"}'),
            "members_late": told.get('rmcore_members_total{outcome="late"}'),
            "members_retried": told.get('rmcore_members_total{outcome="retried"}'),
            "members_recovered": told.get('rmcore_members_total{outcome="recovered"}'),
            "resident_mib": {"before": before, "after": after},
            "exit_status": status,
        },
        "batching": batching,
    }
    result["checks"] = _checks(result, outcome)
    return result


def _metrics(url: str) -> dict[str, float]:
    import httpx

    lines = httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99))
    return {"p50": round(p50, 4), "p95": round(p95, 4), "p99": round(p99, 4), "max": round(max(values), 4)}


def _checks(figures: dict[str, Any], outcome: Outcome) -> dict[str, bool]:
    told = figures["server"]
    answered = outcome.counts["status_200"]
    return {
        "no call was lost": outcome.counts["lost"] == 0,
        "every call was answered with 200": answered == sum(outcome.counts[f"calls_{k}"] for k in outcome.latencies_s),
        "no answer was mixed or wrong": outcome.counts["wrong"] == 0,
        "no group was scored without a member": told["assembled_partial"] == told["members_late"] == 0,
        "some clients hung up": outcome.counts["hung_up"] > 0,
        "the server ended cleanly": told["exit_status"] == 0,
        f"batching is worth {WANTED_RATIO:g} times one at a time": figures["batching"]["ratio"] >= WANTED_RATIO,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Soak()
    parser.add_argument("--clients", type=int, default=default.clients)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--hang-up", type=float, default=default.hang_up, help="share of calls dropped and made again")
    parser.add_argument("--ratio-seconds", type=float, default=default.ratio_seconds, help="of each batching round")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    a = parser.parse_args(argv)
    soak = Soak(a.clients, a.seconds, hang_up=a.hang_up, ratio_seconds=a.ratio_seconds, seed=a.seed)
    figures = run(soak)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "serve_soak.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(f"{figures['groups']} groups in {figures['seconds']} s, {figures['groups_per_second']} a second")
    for kind, latency in figures["latency_s"].items():
        print(f"{kind}: p50 {latency['p50']} s, p95 {latency['p95']} s, p99 {latency['p99']} s")
    batching = figures["batching"]
    print(f"batching: {batching['ratio']} times one at a time, {batching['http_ratio']} times over HTTP")
    for name, passed in figures["checks"].items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    return 0 if all(figures["checks"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
