"""verl's own reward loop on Ray: its manager, workers as actors, its router, its configuration, our rewards.

Only what needs a GPU is a stand-in: the servers of the generative reward model, of which a replayed judge answers two,
behind verl's own router. ``make test-trainers`` installs verl for it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.groups import verdicts_of
from support.verl_samples import GROUPS, batch_of, exact

from rmcore.engine import RewardEngine
from rmcore.engine.routing import AlwaysRoute
from rmcore.judge import RecordedJudge
from rmcore.judge.testing import ReplayServer

pytestmark = pytest.mark.trainers


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="ray is not installed (make test-trainers)")
    pytest.importorskip("verl", reason="verl is not installed (make test-trainers)")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def policy(policy_path, tokenizer_of) -> Path:
    folder: Path = policy_path("llama")
    tokenizer_of(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def verdicts() -> RecordedJudge:
    """On every pair, by the words of the responses."""
    return RecordedJudge(verdicts_of([{"prompt": prompt, "responses": texts} for prompt, texts in GROUPS]))


@pytest.fixture(scope="module")
def genrm(verdicts) -> Iterator[list[ReplayServer]]:
    """Two servers of one generative reward model."""
    servers = [ReplayServer(verdicts, latency_s=0.002).start() for _ in range(2)]
    yield servers
    for server in servers:
        server.stop()


def composed(policy: Path, *overrides: str) -> Any:
    """verl's own configuration with the overrides of docs/adapters/verl.md."""
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose(
            "ppo_trainer",
            [
                f"actor_rollout_ref.model.path={policy}",
                "actor_rollout_ref.rollout.n=4",
                "actor_rollout_ref.rollout.val_kwargs.n=4",
                "algorithm.adv_estimator=rmcore",
                "algorithm.use_kl_in_reward=False",
                "reward.num_workers=3",
                "reward.reward_manager.source=importlib",
                "reward.reward_manager.name=PairwiseRewardManager",
                "reward.reward_manager.module.path=pkg://rmcore.integrations.verl",
                *overrides,
            ],
        )


@pytest.fixture
def reward_loop(ray, genrm, policy, reward_model_path, monkeypatch) -> Any:
    """``reward_loop(*overrides)``: verl's manager of reward workers, behind it its router, behind that the judge."""
    module = pytest.importorskip("verl.experimental.reward_loop.reward_loop")
    router = pytest.importorskip("verl.experimental.reward_loop.router.naive_router")
    started: list[Any] = []

    class Served:
        """verl's RewardModelManager without vLLM."""

        def __init__(self, config: Any, resource_pool: Any = None) -> None:
            urls = [server.base_url.removesuffix("/v1") for server in genrm]
            self.address, process = router.launch_router_process(worker_urls=urls)
            started.append(process)
            self.calls: list[str] = []

        def get_router_address(self) -> str:
            return str(self.address)

        def wake_up(self) -> None:
            self.calls.append("wake_up")

        def sleep(self) -> None:
            self.calls.append("sleep")

    managers: list[Any] = []

    def start(*overrides: str) -> Any:
        monkeypatch.setattr(module, "RewardModelManager", Served)
        managers.append(module.RewardLoopManager(composed(policy, *overrides)))
        return managers[-1]

    yield start
    for manager in managers:
        for worker in manager.reward_loop_workers:
            ray.kill(worker)
    for process in started:
        process.terminate()
        process.join(10)


def served_model(policy: Path, reward_model_path: Path, *more: str) -> list[str]:
    """A generative reward model that verl serves, which judges every pair."""
    return [
        "reward.reward_model.enable=True",
        f"reward.reward_model.model_path={policy}",
        "reward.reward_model.rollout.name=vllm",
        "reward.custom_reward_function.path=pkg://rmcore.integrations.verl",
        f"+reward.reward_kwargs.rmcore.model={reward_model_path}",
        "+reward.reward_kwargs.rmcore.judge_fraction=1.0",
        *more,
    ]


def proto(batch: dict[str, torch.Tensor], about: dict[str, np.ndarray]) -> Any:
    data = pytest.importorskip("verl.protocol").DataProto
    tensordict = pytest.importorskip("tensordict")
    rows = len(batch["responses"])
    return data(batch=tensordict.TensorDict(batch, batch_size=rows), non_tensor_batch=about)


def judged(reward_model: Any, verdicts: RecordedJudge) -> torch.Tensor:
    """What an engine in this process gives whose judge says the same on every pair."""
    return exact(RewardEngine(reward_model, verdicts, AlwaysRoute()))


def through_agents(manager: Any, tokenizer: Any) -> list[Any]:
    """All samples as verl's agent loop scores them: each at a worker by chance, all at once."""
    loop = pytest.importorskip("verl.experimental.agent_loop.agent_loop")
    agent = object.__new__(loop.AgentLoopWorker)
    agent.reward_loop_worker_handles = manager.reward_loop_worker_handles
    assert len(agent.reward_loop_worker_handles) == 3
    agent.processor = agent.mm_processor_kwargs = None
    agent.config = manager.config

    async def one(prompt: Any, text: str, slot: int) -> Any:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        output = loop.AgentLoopOutput(
            prompt_ids=[5, 6, 7], response_ids=ids, response_mask=[1] * len(ids), num_turns=2, metrics={}
        )
        about = {
            "session_id": slot, "uid": f"uid-{prompt[0]['content']}", "raw_prompt": prompt, "global_steps": 3,
            "index": 0, "data_source": "x", "reward_model": {"ground_truth": "", "style": "model"},
            "extra_info": {"split": "train", "index": 0, "prompt": prompt},
        }  # fmt: skip
        await agent._compute_score([output], kwargs=about)
        return output

    async def gathered() -> list[Any]:
        return await asyncio.wait_for(
            asyncio.gather(*(one(p, text, k) for p, texts in GROUPS for k, text in enumerate(texts))), 280
        )

    return asyncio.run(gathered())


def close(scores: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(scores, dtype=torch.float64), expected, rtol=0, atol=2e-3)


def test_verls_generative_reward_model_judges_groups_of_its_own_reward_loop(
    reward_loop, policy, reward_model_path, reward_model, tokenizer_of, verdicts, genrm
):
    """Named samples over three workers meet in one actor; their pairs go through verl's router to its two servers."""
    before = [server.stats()["requests"] for server in genrm]
    manager = reward_loop(
        *served_model(policy, reward_model_path),
        "reward.reward_model.enable_resource_pool=True",
        "reward.reward_model.n_gpus_per_node=1",
        "reward.reward_model.nnodes=1",
    )
    outputs = through_agents(manager, tokenizer_of())
    close([output.reward_score for output in outputs], judged(reward_model, verdicts))
    told = outputs[0].extra_fields["reward_extra_info"]
    assert told["rmcore_members"] == 4
    assert told["rmcore_judge_rate"] == 1.0
    asked = [server.stats()["requests"] - count for server, count in zip(genrm, before, strict=True)]
    assert sum(asked) == 24, "6 pairs of 2 groups in both orders, each asked once although three workers scored"
    assert min(asked) > 0, "the router shares them out"


def test_a_reward_model_that_shares_the_policys_gpus_scores_the_batch_at_once(
    ray, reward_loop, policy, reward_model_path, reward_model, tokenizer_of, verdicts
):
    """verl then tells the workers the messages and nothing else; it pads the batch of 8 to 9 for three workers."""
    manager = reward_loop(*served_model(policy, reward_model_path), "+reward.reward_kwargs.rmcore.time_limit_s=15.0")
    assert manager.reward_loop_worker_handles is None
    # Members meet within the limit that the ninth waits for its siblings; their workers may take longer to start.
    ray.get([worker.__ray_ready__.remote() for worker in manager.reward_loop_workers])
    rows = batch_of(tokenizer_of())
    prompts = np.empty(8, dtype=object)
    prompts[:] = [prompt for prompt, texts in GROUPS for _ in texts]
    found = manager.compute_rm_score(proto(rows.batch, {"raw_prompt": prompts}))
    assert manager.reward_model_manager.calls == ["wake_up", "sleep"]
    close(found.batch["rm_scores"].sum(1), judged(reward_model, verdicts))
    assert found.meta_info["reward_extra_keys"] == [
        "rmcore_advantage", "rmcore_uncertainty", "rmcore_judge_rate", "rmcore_members",
    ]  # fmt: skip


def test_the_custom_function_behind_verls_own_manager(
    reward_loop, policy, reward_model_path, reward_model, tokenizer_of, verdicts
):
    where = "reward.custom_reward_function.reward_kwargs"
    manager = reward_loop(
        "reward.reward_manager.source=register",
        "reward.reward_manager.name=naive",
        "reward.reward_model.enable=True",
        f"reward.reward_model.model_path={policy}",
        "reward.reward_model.rollout.name=vllm",
        "reward.reward_model.enable_resource_pool=True",
        "reward.custom_reward_function.path=pkg://rmcore.integrations.verl",
        f"+{where}.n=4",
        f"+{where}.model={reward_model_path}",
        f"+{where}.judge_model={policy}",
        f"+{where}.judge_fraction=1.0",
    )
    outputs = through_agents(manager, tokenizer_of())
    close([output.reward_score for output in outputs], judged(reward_model, verdicts))


def test_without_a_judge_the_head_scores_in_the_actor(
    reward_loop, reward_model_path, reward_model, tokenizer_of, monkeypatch
):
    monkeypatch.delenv("RMCORE_SERVE_URL", raising=False)
    manager = reward_loop(f"+reward.reward_kwargs.rmcore.model={reward_model_path}")
    outputs = through_agents(manager, tokenizer_of())
    close([output.reward_score for output in outputs], exact(RewardEngine(reward_model)))
