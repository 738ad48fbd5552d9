"""Real TRL trainers on a tiny policy: their advantages are the engine's, to rounding."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.engine import RewardEngine
from rmcore.engine.routing import BudgetRouter
from rmcore.integrations.monitor import RewardMonitor
from rmcore.integrations.rows import GroupingError
from rmcore.integrations.trl import PairwiseReward, check_trl_config
from rmcore.judge.base import Verdict
from rmcore.model.reward_model import RewardModel

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'rmcore[trl]')")
datasets = pytest.importorskip("datasets")

METRICS = ["judge_failed", "judge_flips", "judge_calls", "judge_cache_hits", "judge_cost", "judge_hidden_s"]
METRICS += ["uncertainty_p50", "uncertainty_p90", "uncertainty_p99", "judged", "judge_disagreement"]
METRICS += ["judge_disagreement_expected"]
PROMPTS = ["red tree house", "blue river stone", "green cloud", "house river red tree"]


def rows(conversational: bool, count: int = 8) -> Any:
    texts = [PROMPTS[k % len(PROMPTS)] for k in range(count)]
    prompts = [[{"role": "user", "content": t}] for t in texts] if conversational else texts
    return datasets.Dataset.from_dict({"prompt": prompts, "prompt_id": list(range(count))})


def config(kind: str, out, *, k: int = 4, **more: Any):
    common = {
        "output_dir": str(out), "per_device_train_batch_size": 8, "num_generations": k, "max_completion_length": 6,
        "max_steps": 2, "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 3,
        "learning_rate": 1e-3, "beta": 0.0, "temperature": 1.0, "disable_tqdm": True, "bf16": False,
    }  # fmt: skip
    if kind == "grpo":
        return trl.GRPOConfig(**common | {"scale_rewards": "none"} | more)
    return trl.RLOOConfig(**common | more)


class Spy:
    """Keeps every result of the engine and every advantage the trainer computed, step by step."""

    def __init__(self, trainer: Any, reward: PairwiseReward) -> None:
        self.ours: list[torch.Tensor] = []
        self.theirs: list[torch.Tensor] = []
        generate = trainer._generate_and_score_completions

        def spied(inputs):
            out = generate(inputs)
            self.theirs.append(out["advantages"].double())
            self.ours.append(reward.last.advantages.clone())
            return out

        trainer._generate_and_score_completions = spied


def train(kind, policy, tokenizer, reward, args, data) -> tuple[Any, Spy]:
    trainer_class = trl.GRPOTrainer if kind == "grpo" else trl.RLOOTrainer
    trainer = trainer_class(
        model=str(policy), reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer,
        callbacks=[RewardMonitor()],
    )  # fmt: skip
    spy = Spy(trainer, reward)
    trainer.train()
    return trainer, spy


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.parametrize(
    ("policy", "conversational", "fail_every"), [("llama", False, 0), ("qwen2", True, 3)], ids=["plain", "chat"]
)
def test_a_trainers_advantages_are_the_engines(
    kind, policy, conversational, fail_every, policy_path, tokenizer_of, reward_model, merit_judge, tmp_path
):
    judge = merit_judge(fail_every)
    reward = PairwiseReward(RewardEngine(reward_model, judge, BudgetRouter(0.5)), mode=kind)
    trainer, spy = train(
        kind, policy_path(policy), tokenizer_of(chat=conversational), reward, config(kind, tmp_path),
        rows(conversational),
    )  # fmt: skip
    assert len(spy.ours) == 2
    for ours, theirs in zip(spy.ours, spy.theirs, strict=True):
        assert ours.shape == (8,)
        assert float(ours.abs().max()) > 0.01, "a run without a signal shows nothing"
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert judge.asked > 0
    decided = reward.last.summary()["decided_by"]
    assert decided["judge"] > 0
    assert (decided["judge_failed"] > 0) == bool(fail_every)
    logged = [entry for entry in trainer.state.log_history if "rmcore/judge_rate" in entry]
    assert logged
    assert 0 < logged[0]["rmcore/judge_rate"] <= 0.5
    assert logged[0]["rmcore/uncertainty"] >= 1
    assert {f"rmcore/{name}" for name in METRICS} <= logged[0].keys()
    kept = [json.loads(line) for line in (tmp_path / "rmcore_monitor.jsonl").read_text().splitlines()]
    assert [row["rmcore/judged"] for row in kept] == [entry["rmcore/judged"] for entry in logged]
    assert (tmp_path / "rmcore_monitor.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_trainers_advantages_may_be_weighted_by_their_reliability(
    kind, policy_path, tokenizer_of, reward_model, tmp_path
):
    reward = PairwiseReward(RewardEngine(reward_model), mode=kind, reliability_tau=0.1)
    args = config(kind, tmp_path, max_steps=1)
    trainer, spy = train(kind, policy_path("llama"), tokenizer_of(chat=False), reward, args, rows(False))
    weights = 1 / (1 + reward.last.advantage_variance / 0.1)
    weighted = (spy.ours[-1] * weights).view(-1, 4)
    wanted = (weighted - weighted.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(spy.theirs[-1], wanted, rtol=0, atol=1e-6)
    assert float((wanted - spy.ours[-1]).abs().max()) > 1e-3
    logged = [entry["rmcore/reliability"] for entry in trainer.state.log_history if "rmcore/reliability" in entry]
    assert logged[-1] == pytest.approx(float(weights.mean()), rel=1e-4)


def test_weighting_is_refused_where_no_variance_is_known(reward_model, reward_model_path):
    with pytest.raises(InputError, match="reliability_tau: got given beside design='circular'"):
        PairwiseReward(RewardEngine(reward_model, design="circular"), reliability_tau=1.0)
    later = PairwiseReward(reward_model_path, design="circular", reliability_tau=1.0)
    with pytest.raises(InputError, match="reliability_tau: got given beside design='circular'"):
        _ = later.engine
    with pytest.raises(InputError, match="reliability_tau: got nan"):
        PairwiseReward(reward_model_path, reliability_tau=math.nan)


def test_a_synchronous_wrapper_gives_the_same(policy_path, tokenizer_of, reward_model, tmp_path):
    reward = PairwiseReward(RewardEngine(reward_model))

    def synchronous(**kwargs):
        return asyncio.run(reward(**kwargs))

    trainer = trl.RLOOTrainer(
        model=str(policy_path("llama")), reward_funcs=synchronous, args=config("rloo", tmp_path),
        train_dataset=rows(False), processing_class=tokenizer_of(),
    )  # fmt: skip
    spy = Spy(trainer, reward)
    trainer.train()
    assert len(spy.ours) == 2
    for ours, theirs in zip(spy.ours, spy.theirs, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_evaluation_may_have_one_generation(policy_path, tokenizer_of, reward_model, tmp_path):
    reward = PairwiseReward(RewardEngine(reward_model))
    args = config("rloo", tmp_path, num_generations_eval=1, per_device_eval_batch_size=4)
    trainer = trl.RLOOTrainer(
        model=str(policy_path("llama")), reward_funcs=reward, args=args, train_dataset=rows(False),
        eval_dataset=rows(False, 4), processing_class=tokenizer_of(),
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert reward.last is not None
    assert [group.size for group in reward.last] == [1, 1, 1, 1]
    assert metrics["eval_reward"] == 0.0
    trainer.train()
    assert [group.size for group in reward.last] == [4, 4]


def test_interleaved_rows_are_refused_not_scored_as_groups_of_one(reward_model):
    reward = PairwiseReward(RewardEngine(reward_model))
    with pytest.raises(GroupingError, match="the prompt of row 0 again in row 2"):
        asyncio.run(reward(["p", "r", "p", "r"], list("abcd")))


def test_rows_of_all_distinct_prompts_are_refused_unless_that_is_what_was_asked_for(reward_model, caplog):
    reward = PairwiseReward(RewardEngine(reward_model))
    with pytest.raises(GroupingError, match=r"2 rows of as many prompts.*num_generations"):
        call(reward, ["p", "r"], ["a", "b"])
    with pytest.raises(GroupingError, match="2 rows of as many prompts"):
        call(reward, ["p", "p"], ["a", "b"], prompt_id=[0, 1])
    assert not caplog.records
    asked = PairwiseReward(RewardEngine(reward_model), num_generations=1)
    for _ in range(2):
        assert call(asked, ["p", "r"], ["a", "b"]) == [0.0, 0.0]
    assert [r.message for r in caplog.records] == [
        "num_generations is 1, so there is nothing to compare and every reward is 0; set at least 2"
    ]


def test_groups_that_straddle_ranks_are_refused_by_name(policy_path, tokenizer_of, reward_model, tmp_path):
    reward = PairwiseReward(RewardEngine(reward_model))
    # One rank's view of two: 6 rows a rank are one and a half groups of 4.
    args = config("rloo", tmp_path, per_device_train_batch_size=8)
    trainer = trl.RLOOTrainer(
        model=str(policy_path("llama")), reward_funcs=reward, args=args, train_dataset=rows(False),
        processing_class=tokenizer_of(),
    )  # fmt: skip
    args.per_device_train_batch_size = 6
    with pytest.raises(GroupingError, match=r"per_device_train_batch_size.*steps_per_generation.*num_generations"):
        trainer.train()


def test_check_names_every_setting_that_breaks_exactness(tmp_path):
    assert check_trl_config(config("rloo", tmp_path)) == []
    assert check_trl_config(config("grpo", tmp_path)) == []
    bad = config(
        "rloo", tmp_path, beta=0.05, reward_clip_range=(-1.0, 1.0), normalize_advantages=True, reward_weights=[2.0]
    )
    bad.per_device_train_batch_size = 6
    found = check_trl_config(bad, reward_funcs=2)
    assert {issue.setting for issue in found} == {
        "beta", "reward_clip_range", "normalize_advantages", "reward_weights", "reward_funcs",
        "per_device_train_batch_size",
    }  # fmt: skip
    assert all(issue.fix and issue.why for issue in found)
    assert "beta: got 0.05" in str(found[0])
    grpo = config("grpo", tmp_path, scale_rewards="group", multi_objective_aggregation="normalize_then_sum")
    assert {issue.setting for issue in check_trl_config(grpo)} == {"scale_rewards", "multi_objective_aggregation"}
    with pytest.raises(InputError, match="args: got SimpleNamespace"):
        check_trl_config(SimpleNamespace())


@pytest.mark.parametrize(
    ("setting", "value"), [("beta", 0.05), ("reward_clip_range", (-0.2, 0.2)), ("normalize_advantages", True)]
)
def test_what_the_check_names_does_break_exactness(
    setting, value, policy_path, tokenizer_of, reward_model, tmp_path, caplog
):
    reward = PairwiseReward(RewardEngine(reward_model))
    args = config("rloo", tmp_path, max_steps=3, **{setting: value})
    _, spy = train("rloo", policy_path("llama"), tokenizer_of(), reward, args, rows(False))
    worst = max(float((a - b).abs().max()) for a, b in zip(spy.ours, spy.theirs, strict=True))
    assert worst > 1e-4
    assert setting in caplog.text
    strict = PairwiseReward(RewardEngine(reward_model), strict=True)
    with pytest.raises(InputError, match=setting):
        train("rloo", policy_path("llama"), tokenizer_of(), strict, args, rows(False))


# -- without a trainer -----------------------------------------------------------------------------------------------


def call(reward: PairwiseReward, prompts, completions, **columns) -> list[float | None]:
    return asyncio.run(reward(prompts=prompts, completions=completions, completion_ids=[], **columns))


def test_group_size_from_runs_and_from_an_id_column(reward_model):
    reward = PairwiseReward(RewardEngine(reward_model))
    completions = ["good clear", "bad", "right kind", "odd rude"]
    rewards = call(reward, ["red", "red", "blue", "blue"], completions)
    assert [group.size for group in reward.last] == [2, 2]
    assert rewards[0] > 0 > rewards[1]
    call(reward, ["red"] * 4, completions, prompt_id=[0, 0, 1, 1])  # the same prompt twice: the column tells
    assert [group.size for group in reward.last] == [2, 2]
    call(reward, ["red"] * 4, completions)
    assert [group.size for group in reward.last] == [4]


def test_rows_without_an_id_belong_with_their_prompts(reward_model):
    """A column of nulls made one group of all rows, scored against the first row's prompt."""
    reward = PairwiseReward(RewardEngine(reward_model))
    completions = ["good clear", "bad", "right kind", "odd rude"]
    for nothing in (None, math.nan):
        call(reward, ["red", "red", "blue", "blue"], completions, prompt_id=[nothing] * 4)
        assert [group.size for group in reward.last] == [2, 2]
        with pytest.raises(GroupingError, match="the prompt of row 0 again in row 2"):
            call(reward, ["red", "blue", "red", "blue"], completions, prompt_id=[nothing] * 4)


def test_a_response_without_a_preference_is_none(reward_model):
    class Failing:
        async def judge(self, pairs):
            return [Verdict.none("timeout") for _ in pairs]

    engine = RewardEngine(reward_model, Failing(), BudgetRouter(0.0), nonfinite="route")
    hidden_rows = engine.model.hidden_rows

    def spoiled(groups, **kwargs):
        hidden = hidden_rows(groups, **kwargs).clone()
        hidden[1] = math.nan
        return hidden

    engine.model = _with(engine.model, hidden_rows=spoiled)
    reward = PairwiseReward(engine, num_generations=3)
    rewards = call(reward, ["red"] * 3, ["good", "bad", "clear"])
    assert rewards[1] is None
    assert rewards[0] == pytest.approx(-rewards[2])


def _with(model, **methods):
    import copy

    other = copy.copy(model)
    for name, value in methods.items():
        object.__setattr__(other, name, value)
    return other


def test_pickles_from_a_path_only(reward_model, reward_model_path, merit_judge):
    reward = PairwiseReward(reward_model_path, merit_judge(), BudgetRouter(0.5), num_generations=2)
    first = call(reward, ["red", "red"], ["good clear", "bad"])
    again = pickle.loads(pickle.dumps(reward))
    assert again._engine is None
    assert call(again, ["red", "red"], ["good clear", "bad"]) == first
    with pytest.raises(TypeError, match="model folder"):
        pickle.dumps(PairwiseReward(RewardEngine(reward_model)))


def test_a_call_keeps_its_deadline(reward_model):
    class Stuck:
        async def judge(self, pairs):
            await asyncio.sleep(3600)

    reward = PairwiseReward(RewardEngine(reward_model, Stuck(), BudgetRouter(1.0)), num_generations=2, deadline_s=0.3)
    with pytest.raises(TimeoutError):
        call(reward, ["red", "red"], ["good", "bad"])


def test_the_deadline_must_be_below_the_trainers(reward_model, tmp_path):
    reward = PairwiseReward(RewardEngine(reward_model), deadline_s=1e6)
    trainer = SimpleNamespace(args=config("rloo", tmp_path), model=torch.nn.Linear(1, 1))

    class Metric:
        def log(self, name, value): ...

    log = Metric.log.__get__(trainer)
    with pytest.raises(InputError, match="ddp_timeout"):
        call(reward, ["red", "red"], ["good", "bad"], log_metric=log)


def test_the_wrong_mode_is_refused(reward_model, tmp_path):
    reward = PairwiseReward(RewardEngine(reward_model), mode="grpo")
    trainer = SimpleNamespace(args=config("rloo", tmp_path), model=torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="mode: got 'grpo', expected 'rloo'"):
        call(reward, ["red", "red"], ["good", "bad"], log_metric=(lambda self, n, v: None).__get__(trainer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model: got int"),
        ({"judge": object()}, "judge, router: got given beside an engine"),
        ({"num_generations": 0}, "num_generations: got 0"),
        ({"mode": "ppo"}, "mode: got 'ppo'"),
        ({"partial_groups": "drop"}, "partial_groups: got 'drop'"),
        ({"deadline_s": 0}, "deadline_s: got 0"),
    ],
)
def test_bad_arguments_are_named(reward_model, arguments, message):
    with pytest.raises(InputError, match=message):
        PairwiseReward(**{"model": RewardEngine(reward_model), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"judge": object()}, "judge: got object"),
        ({"router": BudgetRouter(0.5)}, "judge: got None, expected a judge, since BudgetRouter may route"),
        ({"router": 3}, "router: got int"),
        ({"epsilon": 0.5}, "epsilon: got 0.5"),
        ({"nonfinite": "route"}, "nonfinite: got 'route'"),
        ({"orders": "two"}, "orders: got 'two'"),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
        ({"judge_deadline_s": 0}, "judge_deadline_s: got 0"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens: got 0"),
        ({"learner": "journal"}, "learner: got str"),
        ({"epsilom": 0.1}, "engine_options: .*epsilom"),
    ],
)
def test_engine_options_are_checked_before_a_model_loads(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=message):
        PairwiseReward(tmp_path, **arguments)


def test_a_rank_that_is_out_of_time_tells_the_others(reward_model, monkeypatch):
    """Or they would wait for it in the second collective until ddp_timeout."""
    import accelerate.utils

    class Stuck:
        async def judge(self, pairs):
            await asyncio.sleep(3600)

    told = []

    def gather_object(mine):
        told.append(mine)
        return mine

    monkeypatch.setattr(accelerate.utils, "gather_object", gather_object)
    engine = RewardEngine(reward_model, Stuck(), BudgetRouter(1.0))
    reward = PairwiseReward(engine, num_generations=2, deadline_s=0.3, partial_groups="gather")
    with pytest.raises(TimeoutError):
        call(reward, ["red", "red"], ["good", "bad"])
    assert len(told) == 2
    assert told[1][0][1].startswith("TimeoutError")
