"""A policy, a reward model and a judge over a vocabulary of forty words, all made on the spot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from tokenizers import processors

from rmcore.bench.serve_model import BLAME, PRAISE, TinySize, liking_praise, tiny_encoder, word_tokenizer
from rmcore.judge.base import Pair, Verdict
from rmcore.model import RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

NEUTRAL = ["red", "blue", "green", "tree", "house", "river", "user", "assistant", "stone", "cloud"]
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def policy_tokenizer(*, chat: bool = False) -> Any:
    tokenizer = word_tokenizer(PRAISE + BLAME + NEUTRAL, SPECIAL, bos_token="[BOS]", padding_side="left")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    return policy_tokenizer


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tiny random policy, ``llama`` or ``qwen2``, without a tokenizer."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            common = {"vocab_size": 26, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
            common |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
            if kind == "llama":
                model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
            else:
                model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
        return made[kind]

    return get


@pytest.fixture(scope="session")
def reward_model() -> RewardModel:
    """Difference mode on a random encoder: likes praise."""
    size = TinySize(hidden=32, layers=2, heads=2, filler=2, features=64)
    config = BackboneConfig(pooling="mean", append_eos=False)
    return liking_praise(Backbone(tiny_encoder(1, 26, size), policy_tokenizer(), config), 1, size, NEUTRAL)


@pytest.fixture(scope="session")
def reward_model_path(reward_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward model") / "model"
    reward_model.save_pretrained(folder, backbone="embed")
    return folder


@pytest.fixture(scope="session")
def two_ranks(policy_path, reward_model_path, tmp_path_factory) -> Path:
    """The folder with what two_ranks.py writes: one launch under torchrun for all runs, the failing one last."""
    from support.shared import made_once  # here, as the ranks import this file too

    def launch(out: Path) -> None:
        script = Path(__file__).with_name("two_ranks.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script)]
        command += [str(policy_path("llama")), str(reward_model_path), str(out)]
        command += ["8,raise", "6,gather", "8,raise,served", "6,gather,served", "8,raise,resumed", "6,gather,resumed"]
        command += ["6,raise"]
        env = {**os.environ, "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
        assert len(list(out.glob("*.json"))) == 14, done.stderr[-3000:]

    return made_once(tmp_path_factory, "two ranks", launch)


def merit(text: str) -> int:
    words = text.split()
    return sum(word in PRAISE for word in words) - sum(word in BLAME for word in words)


class MeritJudge:
    """Counts praise and blame; fails on every ``fail_every``-th pair it is asked."""

    def __init__(self, fail_every: int = 0) -> None:
        self.fail_every = fail_every
        self.asked = 0

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        verdicts = []
        for pair in pairs:
            self.asked += 1
            if self.fail_every and self.asked % self.fail_every == 0:
                verdicts.append(Verdict.none("http_500"))
                continue
            difference = merit(pair.first) - merit(pair.second)
            verdicts.append(Verdict.of("win" if difference > 0 else "loss" if difference < 0 else "tie"))
        return verdicts


@pytest.fixture
def merit_judge() -> type[MeritJudge]:
    return MeritJudge


class SteppingClock:
    """Waits take no time but are noted, and move the clock."""

    def __init__(self) -> None:
        self.time, self.waits = 0.0, list[float]()

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1.7e9 + self.time

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds


class Served(httpx.AsyncBaseTransport):
    """Hands requests to the real application of ``rmcore serve``; the first ``lost`` answers get lost on their way.

    Attributes:
        requests: (path, headers, body) of each.
    """

    def __init__(self, engine: Any, settings: Any = None, *, lost: int = 0) -> None:
        from rmcore.integrations.server import create_app

        app = create_app(engine, settings)
        self.service = app.state.service
        self.inner = httpx.ASGITransport(app)
        self.lost = lost
        self.requests: list[tuple[str, httpx.Headers, bytes]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append((request.url.path, request.headers, await request.aread()))
        response = await self.inner.handle_async_request(request)
        if self.lost:
            self.lost -= 1
            raise httpx.ReadError("lost")
        return response


@pytest.fixture
def stepping_clock() -> type[SteppingClock]:
    return SteppingClock


@pytest.fixture
def served() -> type[Served]:
    pytest.importorskip("fastapi", reason="FastAPI is not installed (pip install 'rmcore[serve]')")
    return Served


@pytest.fixture
def group_client() -> Callable[..., Any]:
    """A client of ``http://127.0.0.1:8400`` over the given transport."""
    from rmcore.integrations.client import GroupClient

    def make(transport: httpx.AsyncBaseTransport, **options: Any) -> Any:
        return GroupClient("http://127.0.0.1:8400", transport=transport, **options)

    return make
