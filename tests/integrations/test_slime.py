"""slime's contract, against small stand-ins of its ``Sample``, of ``generate_and_rm_group``'s reward step and of
``_post_process_rewards`` (written after THUDM/slime; slime is on no package index, so not against slime itself)."""

from __future__ import annotations

import asyncio
import importlib
import pickle
from argparse import Namespace
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx
import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.engine import RewardEngine
from rmcore.engine.routing import ThresholdRouter
from rmcore.integrations.client import GroupClient, ServerError
from rmcore.integrations.slime import GroupReward

PROMPT = "red tree house"
TEXTS = ["good clear", "bad rude", "odd right red", "red"]


class Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class Sample:
    """The fields of slime's that a reward function reads or writes."""

    prompt: str | list[dict[str, str]] = PROMPT
    response: str = ""
    status: Status = Status.COMPLETED
    reward: float | None = None
    loss_mask: list[int] | None = None
    response_length: int = 2
    remove_sample: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


async def rm_group(args: Namespace, group: list[Any]) -> None:
    """What slime does with ``--group-rm``: load the function by its path and write the rewards into the samples."""
    module, _, name = args.custom_rm_path.rpartition(".")
    rewards = await getattr(importlib.import_module(module), name)(args, group)
    for sample, reward in zip(group, rewards, strict=False):
        sample.reward = reward


def advantages_of(samples: list[Sample], *, normalized: bool, std: bool = False) -> torch.Tensor:
    """slime's advantages of one group: rewards, after its own normalisation, masked where the loss is."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float)
    if normalized:
        rewards = rewards - rewards.mean()
        if std:
            rewards = rewards / (rewards.std() + 1e-6)
    mask = torch.tensor([0.0 if sample.remove_sample else 1.0 for sample in samples])
    return rewards * mask


@pytest.fixture(scope="module")
def engine(reward_model) -> RewardEngine:
    return RewardEngine(reward_model)


def group(**more: Any) -> list[Sample]:
    return [Sample(response=text, **more) for text in TEXTS]


def value_of(sample: Sample, args: Namespace) -> float:
    """slime's ``Sample.get_reward_value``."""
    reward: Any = sample.reward
    return float(reward[args.reward_key] if args.reward_key else reward)


def run(reward: GroupReward, samples: list[Any], **args: Any) -> list[float]:
    return asyncio.run(reward(Namespace(**args), samples))


def same(ours: Any, exact: torch.Tensor) -> None:
    # Two forward passes in float32, of layers 32 wide, agree to some 1e-6 where threads divide the sums differently.
    torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float64), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["server", "process"])
@pytest.mark.parametrize("normalized", [False, True], ids=["as they are", "minus the mean"])
def test_slimes_advantages_are_the_engines(where, normalized, reward_model, merit_judge, served, group_client):
    engine = RewardEngine(reward_model, merit_judge(), ThresholdRouter(1.0))
    exact = engine.score([PROMPT], [TEXTS])[0].advantages
    assert float(exact.abs().max()) > 0.1
    samples = group()
    reward = GroupReward(group_client(served(engine)) if where == "server" else engine)
    for sample, value in zip(samples, run(reward, samples), strict=True):
        sample.reward = value
    same(advantages_of(samples, normalized=normalized), exact)
    divided = advantages_of(samples, normalized=True, std=True)
    assert float((divided - exact).abs().max()) > 0.01, "the std normalisation is what must be off"


@pytest.mark.parametrize("where", ["server", "process"])
def test_rewards_may_be_weighted_by_their_reliability(where, engine, served, group_client):
    scores = engine.score([PROMPT], [TEXTS])[0]
    weighted = scores.advantages / (1 + scores.advantage_variance / 0.2)
    assert float(weighted.sum().abs()) > 1e-4
    source = group_client(served(engine)) if where == "server" else engine
    reward = GroupReward(source, reliability_tau=0.2)
    samples = group()
    for sample, value in zip(samples, run(reward, samples), strict=True):
        sample.reward = value
    same(advantages_of(samples, normalized=False), weighted)
    same(advantages_of(samples, normalized=True), weighted - weighted.mean())
    if where == "process":
        same(run(GroupReward(engine), group(), rmcore_reliability_tau=0.2), weighted)
        return
    assert pickle.loads(pickle.dumps(GroupReward(reliability_tau=0.2))).reliability_tau == 0.2
    with pytest.raises(InputError, match="reliability_tau: got 0"):
        GroupReward(reliability_tau=0.0)


def test_weighting_is_refused_where_no_variance_is_known(reward_model, served, group_client):
    partial = RewardEngine(reward_model, design="circular")
    with pytest.raises(InputError, match="reliability_tau: got given beside design='circular'"):
        GroupReward(partial, reliability_tau=1.0)
    with pytest.raises(InputError, match="reliability_tau: got given, and no variance from the server"):
        run(GroupReward(group_client(served(partial)), reliability_tau=1.0), group())


def test_the_default_function_is_found_by_its_path(engine, served, monkeypatch):
    from rmcore.integrations import slime

    asked = []
    transport = served(engine)

    class Client(GroupClient):
        def __init__(self, url: str) -> None:
            super().__init__(url, transport=transport)
            asked.append(url)

    monkeypatch.setattr(slime, "GroupClient", Client)
    monkeypatch.setattr(slime, "group_rm", GroupReward())
    args = Namespace(custom_rm_path="rmcore.integrations.slime.group_rm", rm_url="http://127.0.0.1:8400")
    for _ in range(2):
        samples = group()
        asyncio.run(rm_group(args, samples))
        same([sample.reward for sample in samples], engine.score([PROMPT], [TEXTS])[0].advantages)
    assert asked == ["http://127.0.0.1:8400"], "one client for the whole run"


def test_a_model_named_by_the_environment_scores_in_process(reward_model_path, engine, monkeypatch):
    monkeypatch.delenv("RMCORE_SERVE_URL", raising=False)
    monkeypatch.setenv("RMCORE_MODEL", str(reward_model_path))
    same(run(GroupReward(), group(), rm_url=None), engine.score([PROMPT], [TEXTS])[0].advantages)


@pytest.mark.parametrize("status", [Status.ABORTED, Status.FAILED, Status.PENDING])
def test_unfinished_samples_are_left_out_and_masked(status, engine):
    samples = group()
    samples[1].status, samples[2].status = status, Status.TRUNCATED
    rewards = run(GroupReward(engine), samples)
    exact = engine.score([PROMPT], [[TEXTS[k] for k in (0, 2, 3)]])[0].advantages
    same([rewards[k] for k in (0, 2, 3)], exact)
    assert [sample.remove_sample for sample in samples] == [False, True, False, False]
    for sample, value in zip(samples, rewards, strict=True):
        sample.reward = value
    for normalized in (False, True):
        kept = advantages_of(samples, normalized=normalized)
        assert kept[1] == 0
        same(kept[[0, 2, 3]], exact)


@pytest.mark.parametrize("finished", [0, 1])
def test_one_alone_has_no_advantage(finished, engine, caplog):
    samples = group(status=Status.ABORTED)
    for sample in samples[:finished]:
        sample.status = Status.COMPLETED
    assert run(GroupReward(engine), samples) == [0.0] * 4
    assert all(sample.remove_sample for sample in samples)
    assert "4 of 4 samples" in caplog.text


def test_one_sample_by_design_has_an_advantage_of_zero(engine, caplog):
    samples = group()[:1]
    reward = GroupReward(engine)
    assert run(reward, samples) == [0.0]
    assert not samples[0].remove_sample
    run(reward, samples)
    assert [r.message for r in caplog.records] == [
        "--n-samples-per-prompt is 1, so there is nothing to compare and every reward is 0; set at least 2"
    ]


def test_limits_that_a_server_would_not_see_are_refused(monkeypatch):
    monkeypatch.setenv("RMCORE_SERVE_URL", "http://127.0.0.1:8400")
    with pytest.raises(InputError, match=r"max_length, overlong: got given beside --rm-url.*rmcore serve takes"):
        run(GroupReward(max_length=64), group(), rm_url=None)


def test_a_server_that_fails_raises_and_is_no_reward(group_client):
    transport = httpx.MockTransport(lambda _: httpx.Response(500, json={"error": {"type": "internal", "message": "x"}}))
    with pytest.raises(ServerError, match="500"):
        run(GroupReward(group_client(transport)), group())


def test_the_prompt_may_come_from_metadata(engine):
    messages = [{"role": "user", "content": PROMPT, "name": None}]
    samples = [Sample("<|user|> templated <|assistant|>", text, metadata={"messages": messages}) for text in TEXTS]
    exact = engine.score([[{"role": "user", "content": PROMPT}]], [TEXTS])[0].advantages
    same(run(GroupReward(engine, prompt_key="messages"), samples), exact)
    same(run(GroupReward(engine), samples, rmcore_prompt_key="messages"), exact)
    samples[2].metadata = {}
    with pytest.raises(InputError, match=r"samples\[2\]\.metadata: got no key 'messages'"):
        run(GroupReward(engine, prompt_key="messages"), samples)


def test_mixed_prompts_and_fanned_out_samples_are_refused(engine):
    samples = group()
    samples[3].prompt = "blue river"
    with pytest.raises(InputError, match=r"samples\[3\].*--group-rm"):
        run(GroupReward(engine), samples)
    with pytest.raises(InputError, match=r"samples\[0\].*fan out"):
        run(GroupReward(engine), [group(), group()])


def test_a_single_sample_names_the_option_that_hands_over_groups(engine):
    with pytest.raises(InputError, match="--group-rm"):
        run(GroupReward(engine), group()[0])


def test_without_a_source_the_setting_is_named(monkeypatch):
    monkeypatch.delenv("RMCORE_SERVE_URL", raising=False)
    monkeypatch.delenv("RMCORE_MODEL", raising=False)
    with pytest.raises(InputError, match=r"--rm-url.*RMCORE_MODEL"):
        run(GroupReward(), group(), rm_url=None)
    with pytest.raises(InputError, match="source"):
        GroupReward("http://127.0.0.1:8400")  # type: ignore[arg-type]


def test_it_pickles():
    copy = pickle.loads(pickle.dumps(GroupReward(GroupClient("http://127.0.0.1:1"), prompt_key="p")))
    assert copy.prompt_key == "p"


def test_a_key_of_rewards_that_have_none_is_refused_before_they_are_made(engine):
    samples = group()
    args = Namespace(reward_key=None)
    for sample, reward in zip(samples, run(GroupReward(engine), samples, reward_key=None), strict=True):
        sample.reward = reward
    assert sum(value_of(sample, args) for sample in samples) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(TypeError):
        value_of(samples[0], Namespace(reward_key="score"))
    with pytest.raises(InputError, match="--reward-key: got 'score', expected none"):
        run(GroupReward(engine), samples, reward_key="score")
