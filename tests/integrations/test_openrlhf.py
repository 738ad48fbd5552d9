"""OpenRLHF's contract, against stand-ins of its executor and of its advantages, and against OpenRLHF's own executor
where it is installed (the tests at the end; written with 0.11.2, whose executor needs no GPU to import)."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.engine import RewardEngine
from rmcore.integrations import openrlhf
from rmcore.integrations.client import ServerError
from rmcore.integrations.openrlhf import agent_executor, make_reward_func
from rmcore.integrations.server.settings import ServeSettings

PROMPT = "<|user|>red tree house<|assistant|>"
TEXTS = ["good clear", "bad rude", "odd right red", "good clear"]
SETTINGS = ServeSettings(group_size=4, prompt_prefix="<|user|>", prompt_suffix="<|assistant|>")


@pytest.fixture(scope="module")
def engine(reward_model) -> RewardEngine:
    return RewardEngine(reward_model)


@pytest.fixture
def exact(engine) -> torch.Tensor:
    return engine.score(["red tree house"], [TEXTS])[0].advantages


@pytest.fixture
def through(monkeypatch, group_client):
    """Has the module's clients use a transport."""

    def use(transport: httpx.AsyncBaseTransport) -> None:
        monkeypatch.setattr(openrlhf, "GroupClient", lambda url, **options: group_client(transport, **options))

    return use


def rloo(rewards: list[float]) -> torch.Tensor:
    """OpenRLHF's ``rloo``, as ``compute_advantages_and_returns`` writes it."""
    value = torch.tensor(rewards, dtype=torch.float32)
    return value - (value.sum() - value) / (len(rewards) - 1)


class SingleTurnAgentExecutor:
    """OpenRLHF's, without the generation: it swallows what the reward call raises and goes on without a reward."""

    def __init__(self, remote_rm_url: str | list[str] | None = None) -> None:
        endpoints = [remote_rm_url] if isinstance(remote_rm_url, str) else remote_rm_url
        self.reward_endpoints = endpoints or []
        self.reward_func = None

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        text = await llm_engine.generate(prompt)
        output = {"reward": None, "scores": None, "extra_logs": {}}
        try:
            replies = await self._fetch_rewards_via_http([prompt + text], [prompt], [label])
            info = replies[0] if replies else None
            if info:
                output.update(reward=info.get("rewards"), scores=info.get("scores"), extra_logs=info["extra_logs"])
        except Exception:
            pass
        return output

    async def _fetch_rewards_via_http(self, queries_list, prompts_list, labels_list):
        raise AssertionError("replaced")


@pytest.fixture
def executor_module(monkeypatch) -> None:
    for name in ("openrlhf", "openrlhf.utils", "openrlhf.utils.agent"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["openrlhf.utils.agent"].SingleTurnAgentExecutor = SingleTurnAgentExecutor


class Engine:
    """Instead of vLLM: the prepared texts, one a call."""

    def __init__(self) -> None:
        self.left = list(TEXTS)

    async def generate(self, *_: object, **__: object) -> str:
        return self.left.pop(0) + "<|im_end|>"


def execute(executor: Any, **replaced: Any) -> list[dict[str, Any]]:
    """A prompt's four samples at once, as ``generate_responses`` runs them."""
    call = {
        "prompt": PROMPT, "label": "x", "sampling_params": None, "max_length": 64, "hf_tokenizer": None,
        "llm_engine": Engine(), "images": None,
    } | replaced  # fmt: skip

    async def gathered() -> list[dict[str, Any]]:
        return await asyncio.gather(*(executor.execute(**call) for _ in TEXTS))

    return asyncio.run(gathered())


def test_the_executors_rewards_give_the_engines_advantages(executor_module, through, served, engine, exact):
    transport = served(engine, SETTINGS)
    through(transport)
    outputs = execute(agent_executor("http://127.0.0.1:8400")())
    rewards = [output["reward"] for output in outputs]
    torch.testing.assert_close(rloo(rewards).double(), exact, rtol=0, atol=1e-6)
    assert all(isinstance(reward, float) for reward in rewards)
    assert all(0 < output["scores"] < 1 for output in outputs), "win rates, fit for dynamic filtering"
    assert {path for path, _, _ in transport.requests} == {"/get_reward"}


def test_a_reward_that_cannot_be_had_raises_its_cause(executor_module, through):
    error = {"error": {"type": "internal", "message": "broken"}}
    through(httpx.MockTransport(lambda _: httpx.Response(500, json=error)))
    with pytest.raises(ServerError, match="broken"):
        execute(agent_executor("http://127.0.0.1:8400")())


def test_a_reward_func_called_from_threads_gives_the_engines_advantages(through, served, engine, exact):
    through(served(engine, SETTINGS))

    async def as_openrlhf_does() -> list[dict[str, Any]]:
        reward_func = make_reward_func("http://127.0.0.1:8400/get_reward", threads=4)
        calls = [asyncio.to_thread(reward_func, [PROMPT + text], [PROMPT], ["x"]) for text in TEXTS]
        return await asyncio.gather(*calls)

    rewards = [reply["rewards"] for reply in asyncio.run(as_openrlhf_does())]
    torch.testing.assert_close(rloo(rewards).double(), exact, rtol=0, atol=1e-6)


def test_a_reward_func_takes_whole_batches_too(through, served, engine, exact):
    through(served(engine, SETTINGS))
    reply = make_reward_func("http://127.0.0.1:8400")([PROMPT + text for text in TEXTS], [PROMPT] * 4, ["x"] * 4)
    torch.testing.assert_close(rloo(reply["rewards"]).double(), exact, rtol=0, atol=1e-6)


def test_more_responses_than_the_loops_own_threads_do_not_stall(through, served, engine):
    """Each waiting call keeps a thread: 40 siblings need 40, more than a loop has by itself."""
    through(served(engine, ServeSettings(group_size=40, time_limit_s=20.0)))

    async def run() -> list[dict[str, Any]]:
        reward_func = make_reward_func("http://127.0.0.1:8400", threads=40)
        calls = [asyncio.to_thread(reward_func, [f"red{' tree' * k}"], ["red"]) for k in range(40)]
        return await asyncio.gather(*calls)

    replies = asyncio.run(run())
    assert abs(sum(reply["rewards"] for reply in replies)) < 1e-6


@pytest.mark.parametrize("baseline", ["leave-one-out", "group-mean"])
def test_the_servers_rewards_may_be_weighted_by_their_reliability(baseline, through, served, engine):
    scores = engine.score(["red tree house"], [TEXTS])[0]
    weighted = scores.advantages / (1 + scores.advantage_variance / 0.2)
    through(served(engine, replace(SETTINGS, reliability_tau=0.2, baseline=baseline)))
    reply = make_reward_func("http://127.0.0.1:8400")([PROMPT + text for text in TEXTS], [PROMPT] * 4)
    rewards = torch.tensor(reply["rewards"], dtype=torch.float64)
    found = rloo(reply["rewards"]).double() if baseline == "leave-one-out" else rewards - rewards.mean()
    torch.testing.assert_close(found, weighted - weighted.mean(), rtol=0, atol=1e-6)
    assert float((found - scores.advantages).abs().max()) > 1e-3


def test_a_server_that_cannot_weigh_does_not_start(reward_model, served):
    with pytest.raises(InputError, match="reliability_tau"):
        served(RewardEngine(reward_model, design="circular"), replace(SETTINGS, reliability_tau=0.2))
    with pytest.raises(InputError, match="reliability_tau"):
        ServeSettings(reliability_tau=0.0)


def test_without_an_address_the_variable_is_named(monkeypatch, executor_module):
    monkeypatch.delenv("RMCORE_SERVE_URL", raising=False)
    for make in (agent_executor, make_reward_func):
        with pytest.raises(InputError, match="RMCORE_SERVE_URL"):
            make()
    with pytest.raises(InputError, match="threads"):
        make_reward_func("http://127.0.0.1:1", threads=0)


# -- OpenRLHF itself -------------------------------------------------------------------------------------------------


class Tokenizer:
    """Words; the executor encodes the prompt and decodes the whole."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def ids(self, text: str) -> list[int]:
        self.words += [word for word in text.split(" ") if word not in self.words]
        return [self.words.index(word) for word in text.split(" ")]

    def __call__(self, *, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([self.ids(text)])}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return " ".join(self.words[k] for k in ids)


class TokenEngine(Engine):
    """vLLM's reply as the executor reads it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    async def generate(self, prompt_ids: list[int], sampling_params: object, **_: object) -> Any:
        ids = self.tokenizer.ids(self.left.pop(0) + " </s>")
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])


@contextmanager
def listening(engine: RewardEngine, settings: ServeSettings, listener: socket.socket | None = None) -> Iterator[str]:
    """The application on a socket of its own."""
    uvicorn = pytest.importorskip("uvicorn")
    from rmcore.integrations.server import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(engine, settings), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, args=(listener and [listener],), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("way", ["remote_url", "agent_func_path", "reward.py"])
def test_openrlhfs_own_executor_gets_the_engines_advantages(way, engine, tmp_path, monkeypatch):
    agent = pytest.importorskip("openrlhf.utils.agent", reason="OpenRLHF is not installed")
    tokenizer = Tokenizer()
    params = SimpleNamespace(max_tokens=8, logprobs=None)
    exact = engine.score(["red tree house "], [TEXTS])[0].advantages
    with listening(engine, ServeSettings(group_size=4)) as url:
        if way == "remote_url":
            executor = agent.SingleTurnAgentExecutor([f"{url}/get_reward"])
        elif way == "agent_func_path":
            executor = agent_executor(url)()
        else:
            file = tmp_path / "reward.py"
            file.write_text(
                f"from rmcore.integrations.openrlhf import make_reward_func\nreward_func = make_reward_func({url!r})\n"
            )
            executor = agent.SingleTurnAgentExecutor([str(file)])
        outputs = execute(
            executor, prompt="red tree house ", sampling_params=params, hf_tokenizer=tokenizer,
            llm_engine=TokenEngine(tokenizer),
        )  # fmt: skip
    # As SamplesGenerator._process_response_into_experience and the experience maker flatten them.
    rewards = torch.cat([torch.tensor([output["reward"]]).reshape(-1) for output in outputs])
    torch.testing.assert_close(rloo(rewards.tolist()).double(), exact, rtol=0, atol=1e-6)


def test_openrlhfs_own_rotation_over_a_list_of_urls_still_makes_whole_groups(engine):
    """Each call of its executor goes to the next URL; three servers that know each other put the siblings together."""
    agent = pytest.importorskip("openrlhf.utils.agent", reason="OpenRLHF is not installed")
    tokenizer = Tokenizer()
    params = SimpleNamespace(max_tokens=8, logprobs=None)
    prompts = ["red tree house ", "blue river ", "green stone cloud "]
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        urls = tuple(f"http://127.0.0.1:{one.getsockname()[1]}" for one in listeners)
        for url, listener in zip(urls, listeners, strict=True):
            stack.enter_context(listening(engine, ServeSettings(group_size=4, peers=urls, advertise=url), listener))
        executor = agent.SingleTurnAgentExecutor([f"{url}/get_reward" for url in urls])
        for prompt in prompts:
            exact = engine.score([prompt], [TEXTS])[0].advantages
            outputs = execute(
                executor, prompt=prompt, sampling_params=params, hf_tokenizer=tokenizer,
                llm_engine=TokenEngine(tokenizer),
            )  # fmt: skip
            rewards = torch.cat([torch.tensor([output["reward"]]).reshape(-1) for output in outputs])
            # Siblings come in any order, and a text's row changes what float32 makes of it: up to 7e-4 here.
            torch.testing.assert_close(rloo(rewards.tolist()).double(), exact, rtol=0, atol=2e-3)
