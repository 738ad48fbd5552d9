"""A tiny reward model made on the spot, a judge that counts words, and servers around them."""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from support.assemblies import Scorer
from support.clocks import settle, virtual
from support.warm import MODEL

from rmcore.bench.serve_model import BLAME, PRAISE, TinySize, liking_praise, tiny_encoder, word_tokenizer
from rmcore.engine import RewardEngine
from rmcore.engine.groups import GroupScore, GroupScores
from rmcore.engine.routing import AlwaysRoute
from rmcore.integrations.server import ServeSettings, create_app
from rmcore.integrations.server.assembly import GroupAssembly
from rmcore.judge.base import JudgeUsage, Pair, Verdict
from rmcore.model import RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

__all__ = ["virtual"]

NEUTRAL = ["red", "blue", "green", "tree", "house", "river", "user", "assistant", "stone", "cloud"]


@pytest.fixture(scope="session")
def reward_model() -> RewardModel:
    """Difference mode on a random encoder that takes 64 tokens: likes praise."""
    size = TinySize(hidden=32, layers=2, heads=2, positions=64, pairs=60, filler=2, features=64)
    tokenizer = word_tokenizer(PRAISE + BLAME + NEUTRAL)
    config = BackboneConfig(pooling="mean", append_eos=True, max_length=64)
    return liking_praise(Backbone(tiny_encoder(1, 32, size), tokenizer, config), 0, size, NEUTRAL)


@pytest.fixture(scope="session")
def reward_model_path(reward_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward model") / "tiny-rm"
    reward_model.save_pretrained(folder, backbone="embed")
    return folder


@pytest.fixture
def engine(reward_model) -> RewardEngine:
    return RewardEngine(reward_model)


class MeritJudge:
    """Counts praise and blame; each answer costs 2."""

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        verdicts = []
        for pair in pairs:
            if "stone" in pair.first:
                verdicts.append(Verdict.none("refusal"))
                continue
            first, second = (
                sum(w in PRAISE for w in text.split()) - sum(w in BLAME for w in text.split())
                for text in (pair.first, pair.second)
            )
            usage = JudgeUsage(calls=1, attempts=1, prompt_tokens=10, cost=2.0)
            verdicts.append(Verdict.of("win" if first > second else "loss" if second > first else "tie", usage=usage))
        return verdicts


@pytest.fixture
def judged_engine(reward_model) -> RewardEngine:
    """Every pair goes to the judge."""
    return RewardEngine(reward_model, MeritJudge(), AlwaysRoute())


def texts(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(PRAISE + BLAME + NEUTRAL, k=rng.randrange(3, 12))) for _ in range(count)]


@pytest.fixture
def some_texts() -> Callable[[random.Random, int], list[str]]:
    return texts


@pytest.fixture
def make_app(engine) -> Callable[..., Any]:
    """An application around the engine; ``make_app(judged_engine, group_size=3)``."""

    def make(given: RewardEngine | None = None, clock: Any = None, **options: Any) -> Any:
        settings = ServeSettings(**{"time_limit_s": 20.0, "batch_wait_s": 0.0, **options})
        return create_app(given or engine, settings, model="tiny", clock=clock)

    return make


@pytest.fixture
def talk() -> Callable[..., Any]:
    """Run ``main(client)`` against an application, in process."""

    def run(app: Any, main: Callable[[httpx.AsyncClient], Any], **options: Any) -> Any:
        async def go() -> Any:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", **options) as client:
                return await asyncio.wait_for(main(client), 60)

        return asyncio.run(go())

    return run


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The application behind a real socket, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio does this for sockets that it makes itself; else every answer waits 40 ms for a delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    port = listener.getsockname()[1]
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def serve_app() -> Callable[[Any], Any]:
    return serving


@pytest.fixture
def server(reward_model_path, tmp_path, warm_python):
    """``rmcore serve`` with the arguments given; (process, URL, its log's file). Killed at the end if it still runs."""
    running = []

    def start(*arguments: str, **environment: str) -> tuple[Any, str, Path]:
        command = ["-v", "serve", reward_model_path, "--port", "0", *arguments]
        path = tmp_path / f"server {len(running)}.log"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        with path.open("w") as log:
            process = warm_python.start(
                "", *command, module="rmcore.cli", modules=MODEL, stderr=log, stdout=subprocess.DEVNULL, env=env
            )
        running.append(process)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"serving (\S+)", path.read_text())):
            assert process.poll() is None, path.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process, found[1], path

    yield start
    for process in running:
        process.kill()
        process.wait()


class ManualClock:
    """Sleepers wake when the test says what time it is."""

    def __init__(self) -> None:
        self.time = 0.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        awake = asyncio.Event()
        self._sleepers.append((self.time + seconds, awake))
        await awake.wait()

    async def advance(self, seconds: float) -> None:
        await settle()
        self.time += seconds
        for at, awake in self._sleepers:
            if at <= self.time:
                awake.set()
        await settle()


@pytest.fixture
def manual_clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(scope="session")
def new_manual_clock() -> type[ManualClock]:
    return ManualClock


class EchoEngine:
    """p̃_ij = number in response i minus number in response j, so every member can tell whether its row is its own.

    ``gate`` holds scoring; texts with ``crash`` raise what no input should, ``nan`` have no preference.
    """

    judge = None

    def __init__(self) -> None:
        self.scored: list[tuple[object, list[str]]] = []
        self.open = True

    async def score_async(
        self, prompts: Any, responses: Any, *, on_error: str = "raise", progress: Any = None
    ) -> GroupScores:
        while not self.open:
            await asyncio.sleep(0.001)
        assert on_error == "return", "a server never lets one group end the others' call"
        crashed = [k for k, texts in enumerate(responses) if any("crash" in text for text in texts)]
        good = [(p, list(r)) for k, (p, r) in enumerate(zip(prompts, responses, strict=True)) if k not in crashed]
        self.scored += good
        errors = {k: ZeroDivisionError("secret detail") for k in crashed}
        return GroupScores((echo(texts) for _, texts in good), errors=errors)


def echo(responses: Sequence[str]) -> GroupScore:
    numbers = [float(word) if (word := text.split()[0]).isdigit() else 0.0 for text in responses]
    values = torch.tensor(numbers, dtype=torch.float64)
    p = values[:, None] - values[None, :]
    for k, text in enumerate(responses):
        if "nan" in text:
            p[k, :] = p[:, k] = torch.nan
    u = torch.ones_like(p)
    return GroupScore(p, u, p.clone(), torch.zeros_like(p), torch.zeros_like(p, dtype=torch.bool))


@pytest.fixture
def echo_engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def echoed() -> Callable[[Sequence[str]], GroupScore]:
    return echo


@pytest.fixture
def new_echo_engine() -> type[EchoEngine]:
    return EchoEngine


@pytest.fixture(scope="session")
def make(new_manual_clock):
    """An assembly, its scorer and its clock. Of the session, since it keeps nothing: Hypothesis asks for that."""

    def build(**options):
        scorer, clock = Scorer(), new_manual_clock()
        return GroupAssembly(scorer, clock=clock, **{"time_limit_s": 100.0, "keep_s": 500.0, **options}), scorer, clock

    return build
