"""verl's contract, against small stand-ins of its DataProto and configuration, and against verl itself where it is
installed (the tests at the end; written with 0.9.1, which needs no GPU to import)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.verl_samples import GROUPS, batch_of, config, exact, run_all, sample

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine import RewardEngine
from rmcore.engine.routing import ThresholdRouter
from rmcore.integrations.client import ServerError
from rmcore.integrations.server.assembly import LateError
from rmcore.integrations.server.settings import ServeSettings
from rmcore.integrations.verl import PairwiseRewardManager, passthrough_advantages, register


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of()


@pytest.fixture(scope="module")
def engine(reward_model) -> RewardEngine:
    return RewardEngine(reward_model)


@pytest.fixture
def manager_of(engine, tokenizer, served, group_client):
    """A manager whose client talks to the real application."""

    def make(settings: Any = None, *, scorer: RewardEngine | None = None, **options: Any) -> PairwiseRewardManager:
        client = group_client(served(scorer or engine, settings), timeout_s=20.0)
        return PairwiseRewardManager(config(**options), tokenizer, client=client)

    return make


def leave_one_out(scores: torch.Tensor) -> torch.Tensor:
    """verl's ``rloo`` over groups of four, as its formula is written there."""
    groups = scores.view(-1, 4)
    return (groups * 4 / 3 - groups.mean(1, keepdim=True) * 4 / 3).flatten()


def test_scores_are_advantages_and_pass_through_to_every_token(manager_of, engine, tokenizer):
    manager = manager_of()
    results = run_all(manager, tokenizer)
    data = batch_of(tokenizer)
    rewards = manager.assemble_rm_scores(data, [result["reward_score"] for result in results])
    mask = data.batch["attention_mask"][:, 3:]
    advantages, returns = passthrough_advantages(rewards, mask, config=None, index=np.array(list("aaaabbbb")))
    expected = exact(engine)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(advantages.double(), expected[:, None] * mask, rtol=0, atol=1e-6)
    assert torch.equal(returns, advantages)
    infos = [result["reward_extra_info"] for result in results]
    assert len({tuple(info) for info in infos}) == 1, "verl stacks them, so all samples have the same keys"
    assert all(info["rmcore_members"] == 4 and info["rmcore_uncertainty"] >= 1 for info in infos)


@pytest.mark.parametrize("length", [1, 5])
def test_a_sample_without_a_response_token_carries_no_score(length):
    answered = torch.zeros(3, length, dtype=torch.long)
    answered[0, 0] = 1
    answered[2] = 1
    batch = {
        "prompts": torch.zeros(3, 4, dtype=torch.long),
        "responses": torch.zeros(3, length, dtype=torch.long),
        "attention_mask": torch.cat([torch.ones(3, 4, dtype=torch.long), answered], dim=1),
    }
    rewards = PairwiseRewardManager.assemble_rm_scores(SimpleNamespace(batch=batch), [0.5, 7.0, -1.0])
    expected = torch.zeros(3, length)
    expected[0, 0] = 0.5
    expected[2, -1] = -1.0
    assert torch.equal(rewards, expected)
    advantages, _ = passthrough_advantages(rewards, answered)
    assert torch.equal(advantages, torch.tensor([[0.5], [0.0], [-1.0]]) * answered)


@pytest.mark.parametrize("estimator", ["rloo", "rloo_vectorized"])
def test_a_leave_one_out_baseline_makes_the_advantages_of_the_scores(estimator, manager_of, engine, tokenizer):
    scores = torch.tensor([r["reward_score"] for r in run_all(manager_of(estimator=estimator), tokenizer)])
    torch.testing.assert_close(leave_one_out(scores).double(), exact(engine), rtol=0, atol=1e-6)


def test_grpo_without_std_takes_nothing_away(manager_of, engine, tokenizer):
    manager = manager_of(estimator="grpo", norm_adv_by_std_in_grpo=False)
    scores = torch.tensor([r["reward_score"] for r in run_all(manager, tokenizer)], dtype=torch.float64)
    centred = (scores.view(-1, 4) - scores.view(-1, 4).mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(centred, exact(engine), rtol=0, atol=1e-6)


def test_scores_may_be_weighted_by_their_reliability(manager_of, engine, tokenizer):
    """``rmcore`` hands w·A through; the baselines of rloo and grpo take its group's mean away."""
    scores = engine.score([prompt for prompt, _ in GROUPS], [texts for _, texts in GROUPS])
    weights = 1 / (1 + scores.advantage_variance / 0.2)
    weighted = scores.advantages * weights
    centred = (weighted.view(-1, 4) - weighted.view(-1, 4).mean(1, keepdim=True)).flatten()
    assert float((weighted - centred).abs().max()) > 1e-4
    settings = {"rmcore": {"url": "http://127.0.0.1:8400", "reliability_tau": 0.2}}
    results = run_all(manager_of(**settings), tokenizer)
    got = torch.tensor([result["reward_score"] for result in results], dtype=torch.float64)
    torch.testing.assert_close(got, weighted, rtol=0, atol=1e-6)
    told = torch.tensor([r["reward_extra_info"]["rmcore_reliability"] for r in results], dtype=torch.float64)
    torch.testing.assert_close(told, weights, rtol=0, atol=1e-6)
    rewards = [r["reward_score"] for r in run_all(manager_of(estimator="rloo", **settings), tokenizer)]
    torch.testing.assert_close(leave_one_out(torch.tensor(rewards)).double(), centred, rtol=0, atol=1e-6)


def test_weighting_is_refused_where_the_server_tells_no_variance(manager_of, reward_model, tokenizer):
    settings = {"rmcore": {"url": "http://127.0.0.1:8400", "reliability_tau": 0.2}}
    manager = manager_of(scorer=RewardEngine(reward_model, design="circular"), **settings)
    with pytest.raises(InputError, match="reliability_tau: got given, and no variance from the server"):
        run_all(manager, tokenizer)
    with pytest.raises(InputError, match=r"rmcore\.reliability_tau: got -1"):
        manager_of(rmcore={"url": "http://127.0.0.1:8400", "reliability_tau": -1})


def test_judged_pairs_count_as_they_do_in_the_engine(manager_of, reward_model, merit_judge, tokenizer):
    scorer = RewardEngine(reward_model, merit_judge(), ThresholdRouter(1.0))
    results = run_all(manager_of(scorer=scorer), tokenizer)
    scores = torch.tensor([r["reward_score"] for r in results], dtype=torch.float64)
    torch.testing.assert_close(scores, exact(scorer), rtol=0, atol=1e-6)
    assert results[0]["reward_extra_info"]["rmcore_judge_rate"] == 1.0


def test_the_last_output_counts_and_special_tokens_do_not(manager_of, tokenizer):
    manager = manager_of()
    seen = []

    async def rendezvous(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        raise ServerError("enough seen")

    manager.client.rendezvous = rendezvous
    data = sample(tokenizer, GROUPS[0][0], "good clear", rows=3, uid="u", session_id=2)
    with pytest.raises(ServerError, match="enough"):
        asyncio.run(manager.run_single(data))
    assert seen == [(("u", 2, 4, GROUPS[0][0], "good clear"), {"attempt": 7})]


def test_text_parts_of_a_prompt_are_joined_and_images_refused(manager_of, engine, tokenizer):
    parts = [{"type": "text", "text": "red "}, {"type": "text", "text": "tree"}]
    manager = manager_of(n=1, val_n=1)
    data = sample(tokenizer, [{"role": "user", "content": parts}], "good", uid="u", session_id=0)
    assert asyncio.run(manager.run_single(data))["reward_score"] == 0.0, "one alone by design has nothing to gain"
    data = sample(tokenizer, [{"role": "user", "content": [{"type": "image"}]}], "good", uid="u", session_id=0)
    with pytest.raises(InputError, match="raw_prompt"):
        asyncio.run(manager.run_single(data))


@pytest.mark.parametrize("missing", ["uid", "session_id", "raw_prompt"])
def test_a_missing_field_is_named_with_the_setting(missing, manager_of, tokenizer):
    data = sample(tokenizer, GROUPS[0][0], "good", uid="u", session_id=0)
    del data.non_tensor_batch[missing]
    with pytest.raises(InputError, match=missing):
        asyncio.run(manager_of().run_single(data))


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_an_id_that_is_nothing_is_a_missing_one(nothing, manager_of, tokenizer):
    """As text it would be one name for every sample without."""
    for name in ("uid", "session_id"):
        data = sample(tokenizer, GROUPS[0][0], "good", uid="u", session_id=0)
        data.non_tensor_batch[name] = np.array([nothing], dtype=object)
        with pytest.raises(InputError, match=rf"non_tensor_batch\['{name}'\]"):
            asyncio.run(manager_of().run_single(data))


def test_validation_with_another_n_needs_a_split(manager_of, tokenizer):
    manager = manager_of(n=4, val_n=1)
    prompt = GROUPS[0][0]
    data = sample(tokenizer, prompt, "good", uid="v", session_id=0, extra_info={"split": "test"})
    assert asyncio.run(manager.run_single(data))["reward_extra_info"]["rmcore_members"] == 1
    data = sample(tokenizer, prompt, "good", uid="w", session_id=0, extra_info={"index": 3})
    with pytest.raises(InputError, match=r"val_kwargs\.n"):
        asyncio.run(manager.run_single(data))


def test_a_group_that_stays_incomplete_is_scored_without_the_missing_and_never_as_zero(manager_of, engine, tokenizer):
    manager = manager_of(ServeSettings(time_limit_s=0.3, first_start=True))
    prompt, texts = GROUPS[0]

    async def run() -> list[Any]:
        calls = [manager.run_single(sample(tokenizer, prompt, texts[k], uid="u", session_id=k)) for k in (0, 2, 3)]
        present = await asyncio.gather(*calls)
        with pytest.raises(LateError):
            await manager.run_single(sample(tokenizer, prompt, texts[1], uid="u", session_id=1))
        with pytest.raises(ServerError, match="no preference"):
            await manager.run_single(sample(tokenizer, prompt, texts[1], uid="alone", session_id=1))
        return present

    present = asyncio.run(run())
    expected = engine.score([prompt], [[texts[k] for k in (0, 2, 3)]]).advantages
    scores = torch.tensor([result["reward_score"] for result in present], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"estimator": "gae"}, "adv_estimator"),
        ({"estimator": "grpo"}, "norm_adv_by_std_in_grpo=False"),
        ({"n": 0}, "rollout.n"),
        ({"rmcore": {"url": "http://h:1", "return": "advantage"}}, r"keys \['return'\]"),
        ({"rmcore": {"url": "http://h:1", "returns": "zero"}}, "returns"),
        ({"rmcore": {"url": "http://h:1", "returns": "advantage"}, "estimator": "rloo"}, "leave-one-out for"),
        ({"rmcore": {}}, "reward_kwargs.rmcore.url"),
        ({"rmcore": {"url": "h:1"}}, "url"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_verls_names(options, says, tokenizer, monkeypatch):
    monkeypatch.delenv("RMCORE_SERVE_URL", raising=False)
    with pytest.raises(InputError, match=says):
        PairwiseRewardManager(config(**options), tokenizer)


def test_what_keeps_advantages_from_being_exact_is_logged(tokenizer, caplog):
    PairwiseRewardManager(config(use_kl_in_reward=True), tokenizer)
    PairwiseRewardManager(config("gae", rmcore={"url": "http://127.0.0.1:1", "returns": "advantage"}), tokenizer)
    assert "use_kl_in_reward" in caplog.text
    assert "adv_estimator=gae" in caplog.text


def test_a_score_that_is_no_number_is_named_by_row():
    rewards = torch.zeros(3, 4)
    rewards[1, 2] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        passthrough_advantages(rewards, torch.ones(3, 4))
    assert caught.value.rows == (1,)


def test_the_module_loads_without_verl():
    code = (
        "import sys, rmcore.integrations.verl; assert not any(m.split('.')[0] in ('verl', 'ray') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- verl itself -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verl() -> SimpleNamespace:
    reason = "verl is not installed"
    core = pytest.importorskip("verl.trainer.ppo.core_algos", reason=reason)
    register()  # this process has loaded our module first
    return SimpleNamespace(
        core=core,
        proto=pytest.importorskip("verl.protocol", reason=reason).DataProto,
        reward=pytest.importorskip("verl.trainer.ppo.reward", reason=reason),
        trainer=pytest.importorskip("verl.trainer.ppo.ray_trainer", reason=reason),
        omegaconf=pytest.importorskip("omegaconf", reason=reason),
        tensordict=pytest.importorskip("tensordict", reason=reason),
    )


def full_config(verl: Any, estimator: str) -> Any:
    module = {"path": "pkg://rmcore.integrations.verl", "name": "custom_reward_manager"}
    manager = {"source": "importlib", "name": "PairwiseRewardManager", "module": module}
    own = config(estimator, norm_adv_by_std_in_grpo=False)
    own["reward"] |= {"reward_manager": manager, "custom_reward_function": {"path": None}, "sandbox_fusion": None}
    return verl.omegaconf.OmegaConf.create(own)


@pytest.mark.parametrize("estimator", ["rmcore", "rloo", "rloo_vectorized", "grpo"])
def test_verl_loads_it_and_computes_the_engines_advantages(
    estimator, verl, engine, tokenizer, served, group_client, monkeypatch
):
    """Its own loading, DataProto, ``assemble_rm_scores`` of the base class and ``compute_advantage``."""
    settings = full_config(verl, estimator)
    manager = verl.reward.load_reward_manager(settings, tokenizer, reward_router_address=None)
    assert isinstance(manager, PairwiseRewardManager)
    manager.client = group_client(served(engine), timeout_s=20.0)

    def proto(batch: dict[str, torch.Tensor], about: dict[str, np.ndarray]) -> Any:
        rows = len(batch["responses"])
        return verl.proto(batch=verl.tensordict.TensorDict(batch, batch_size=rows), non_tensor_batch=about)

    results = run_all(manager, tokenizer, kind=proto)
    rows = batch_of(tokenizer)
    uids = np.array([f"uid-{u}" for u in range(2) for _ in range(4)], dtype=object)
    data = proto(rows.batch, {"uid": uids})
    base = pytest.importorskip("verl.experimental.reward_loop.reward_manager.base").RewardManagerBase
    scores = [result["reward_score"] for result in results]
    rewards = manager.assemble_rm_scores(data, scores)
    assert torch.equal(rewards, base.assemble_rm_scores(data, scores))
    data.batch["token_level_rewards"] = rewards
    mask = data.batch["attention_mask"][:, 3:]
    data.batch["response_mask"] = mask
    done = verl.trainer.compute_advantage(
        data, adv_estimator=estimator, norm_adv_by_std_in_grpo=False, config=settings.algorithm
    )
    torch.testing.assert_close(done.batch["advantages"].double(), exact(engine)[:, None] * mask, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["looking for the manager", "an external module"])
def test_verls_trainer_knows_the_estimator_without_being_told(way, verl):
    code = "from verl.trainer.ppo import core_algos, reward\nfrom omegaconf import OmegaConf\n"
    environment = dict(os.environ)
    if way == "an external module":
        environment["VERL_USE_EXTERNAL_MODULES"] = "rmcore.integrations.verl"
    else:
        made = verl.omegaconf.OmegaConf.to_container(full_config(verl, "rmcore"))
        code += f"reward.resolve_reward_manager_cls(OmegaConf.create({made!r}))\n"
    code += "print(core_algos.get_adv_estimator_fn('rmcore').__name__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert "passthrough_advantages" in done.stdout, done.stderr[-2000:]


def test_verls_own_agent_loop_hands_over_what_the_manager_reads(verl, engine, tokenizer, served, group_client):
    """Its agent loop makes the DataProto, its reward worker calls the manager; Ray and the rollout are left out."""
    loop = pytest.importorskip("verl.experimental.agent_loop.agent_loop", reason="verl is not installed")
    worker_of = pytest.importorskip("verl.experimental.reward_loop.reward_loop", reason="verl is not installed")
    settings = full_config(verl, "rmcore")
    settings.reward.reward_model = {"enable": False}
    worker = object.__new__(worker_of.RewardLoopWorker)
    worker.config = settings
    worker.reward_manager = verl.reward.load_reward_manager(settings, tokenizer)
    worker.reward_manager.client = group_client(served(engine), timeout_s=20.0)
    agent = object.__new__(loop.AgentLoopWorker)
    agent.reward_loop_worker_handles = [SimpleNamespace(compute_score=SimpleNamespace(remote=worker.compute_score))]
    agent.processor = agent.mm_processor_kwargs = None
    agent.config = settings

    async def one(prompt: Any, text: str, slot: int) -> Any:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        output = loop.AgentLoopOutput(
            prompt_ids=[5, 6, 7], response_ids=ids, response_mask=[1] * len(ids), num_turns=2, metrics={}
        )
        # what agent_loop_tq's _run_prompt passes on, with the columns of verl's own data sets
        kwargs = {
            "session_id": slot, "uid": f"uid-{prompt[0]['content']}", "raw_prompt": prompt, "global_steps": 3,
            "index": 0, "data_source": "x", "reward_model": {"ground_truth": "", "style": "model"},
            "extra_info": {"split": "train", "index": 0},
        }  # fmt: skip
        await agent._compute_score([output], kwargs=kwargs)
        return output

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(one(p, text, k) for p, texts in GROUPS for k, text in enumerate(texts)))

    outputs = asyncio.run(gathered())
    scores = torch.tensor([output.reward_score for output in outputs], dtype=torch.float64)
    torch.testing.assert_close(scores, exact(engine), rtol=0, atol=1e-6)
    assert outputs[0].extra_fields["reward_extra_info"]["rmcore_members"] == 4
