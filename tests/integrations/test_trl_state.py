"""The reward's state in TRL's checkpoints: a run that stops and resumes spends what one run would have spent."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmcore._base.errors import CheckpointError, InputError
from rmcore.engine import RewardEngine
from rmcore.engine.learning import VerdictLearner
from rmcore.engine.routing import AdaptiveRouter, Budget, BudgetRouter
from rmcore.head.checkpoint import load_head
from rmcore.integrations.trl import PairwiseReward
from rmcore.judge.base import JudgeUsage, Verdict

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'rmcore[trl]')")
datasets = pytest.importorskip("datasets")

PROMPTS = ["red tree house", "blue river stone", "green cloud", "house river red tree"]


class CountingJudge:
    """The longer text wins; one call a pair."""

    def __init__(self) -> None:
        self.calls = 0

    async def judge(self, pairs):
        self.calls += len(pairs)
        return [Verdict.of("win" if len(p.first) > len(p.second) else "loss", usage=JudgeUsage(calls=1)) for p in pairs]


def make_reward(reward_model, judge, limit=12, **more) -> PairwiseReward:
    router = AdaptiveRouter(0.5, Budget(limit, "calls", max_per_pair=1), warmup=0)
    return PairwiseReward(RewardEngine(reward_model, judge, router), **more)


@pytest.fixture(scope="module")
def trainer_in(policy_path, tokenizer_of):
    """``trainer_in(folder, reward, steps)``: a trainer of the reward whose checkpoints lie in the folder."""

    def make(folder: Path, reward: Any, steps: int, *, callbacks: Any = None, **more: Any) -> Any:
        args = trl.RLOOConfig(
            output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
            max_steps=steps, save_steps=1, logging_steps=1, report_to=[], use_cpu=True, seed=3, beta=0.0,
            disable_tqdm=True, bf16=False, **more,
        )  # fmt: skip
        data = datasets.Dataset.from_dict({"prompt": PROMPTS * 4, "prompt_id": list(range(16))})
        return trl.RLOOTrainer(
            model=str(policy_path("llama")), reward_funcs=reward, args=args, train_dataset=data,
            processing_class=tokenizer_of(), callbacks=callbacks,
        )  # fmt: skip

    return make


@pytest.fixture
def trainer_of(trainer_in, tmp_path):
    """A trainer of the reward whose checkpoints lie in tmp_path / "run"."""
    return lambda *args, out="run", **more: trainer_in(tmp_path / out, *args, **more)


@pytest.fixture(scope="module")
def three_steps(trainer_in, reward_model, tmp_path_factory):
    """The folder of a run of three steps, in which the budget was spent."""
    folder = tmp_path_factory.mktemp("three steps")
    judge = CountingJudge()
    trainer_in(folder, make_reward(reward_model, judge), 3).train()
    assert judge.calls == 12
    return folder


@pytest.fixture
def after_three_steps(three_steps, tmp_path) -> CountingJudge:
    """The judge of a run of three steps whose checkpoints lie in tmp_path / "run"."""
    shutil.copytree(three_steps, tmp_path / "run")
    judge = CountingJudge()
    judge.calls = 12
    return judge


@pytest.mark.parametrize("attached", ["by itself", "by hand"])
def test_a_hard_budget_holds_over_a_resumed_run(attached, reward_model, trainer_of, tmp_path):
    judge = CountingJudge()
    for steps, resume in ((3, False), (6, True)):
        reward = make_reward(reward_model, judge)  # as in a new process: nothing is spent yet
        callbacks = [reward.callback()] if attached == "by hand" else None
        trainer = trainer_of(reward, steps, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == steps
        assert sum(type(c).__name__ == "RewardStateCallback" for c in trainer.callback_handler.callbacks) == 1
    assert judge.calls == 12
    document = json.loads((tmp_path / "run" / "checkpoint-6" / "rmcore_state.json").read_text())
    assert document["ranks"][0]["router"]["state"]["budgets"][0]["spent"] == 12
    assert reward.engine.router.history[-1].step == 6, "the router's own record goes on too"


def test_without_its_state_a_resumed_run_would_ask_again(reward_model, trainer_of, after_three_steps):
    judge = after_three_steps
    reward = make_reward(reward_model, judge)
    trainer_of(reward, 6, callbacks=[reward.callback(restore=False)]).train(resume_from_checkpoint=True)
    assert judge.calls == 24


def test_a_run_that_resumes_routes_as_if_it_had_never_stopped(reward_model, trainer_of):
    def routed(reward, trainer, resume):
        seen = []
        generate = trainer._generate_and_score_completions

        def spied(inputs):
            out = generate(inputs)
            seen.append((reward.last.advantages.clone(), [group.routed.clone() for group in reward.last]))
            return out

        trainer._generate_and_score_completions = spied
        trainer.train(resume_from_checkpoint=resume)
        return seen

    one = make_reward(reward_model, CountingJudge(), 1000)
    whole = routed(one, trainer_of(one, 4, out="whole"), False)
    first = make_reward(reward_model, CountingJudge(), 1000)
    parts = routed(first, trainer_of(first, 2), False)
    second = make_reward(reward_model, CountingJudge(), 1000)
    parts += routed(second, trainer_of(second, 4), True)
    for (ours, mine), (theirs, other) in zip(whole, parts, strict=True):
        assert torch.equal(ours, theirs)
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_what_was_spent_after_the_checkpoint_is_spent(reward_model, trainer_of, after_three_steps, tmp_path):
    judge = after_three_steps
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")  # as after a crash: the last one is older
    early = json.loads((tmp_path / "run" / "checkpoint-1" / "rmcore_state.json").read_text())
    assert early["ranks"][0]["router"]["state"]["budgets"][0]["spent"] < 12
    trainer_of(make_reward(reward_model, judge), 4).train(resume_from_checkpoint=True)
    assert judge.calls == 12


def test_a_new_run_in_an_old_folder_has_its_own_budget(reward_model, trainer_of, after_three_steps):
    judge = after_three_steps
    trainer_of(make_reward(reward_model, judge), 1).train()
    reward = make_reward(reward_model, judge)
    trainer_of(reward, 3).train(resume_from_checkpoint=True)  # from the newer run's step 1, or the older one's step 3
    assert judge.calls <= 24


def test_an_evaluation_before_resuming_is_not_the_runs_beginning(reward_model, trainer_of, after_three_steps):
    judge = after_three_steps
    reward = make_reward(reward_model, judge)
    trainer = trainer_of(reward, 5, num_generations_eval=1)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    trainer.evaluate()
    trainer.train(resume_from_checkpoint=True)
    assert judge.calls == 12


def test_a_learned_head_rides_along(reward_model_path, trainer_of, tmp_path):
    from rmcore.model import RewardModel

    def reward_of():
        model = RewardModel.from_pretrained(reward_model_path)
        learner = VerdictLearner(model.head, tmp_path / "journal")
        engine = RewardEngine(model, CountingJudge(), BudgetRouter(0.5), learner=learner)
        return PairwiseReward(engine), learner

    reward, learner = reward_of()
    with learner:
        trainer = trainer_of(reward, 2)
        generate = trainer._generate_and_score_completions

        def learning(inputs):
            out = generate(inputs)
            reward.engine.update(reward.last)
            return out

        trainer._generate_and_score_completions = learning
        trainer.train()
        assert learner.version == 2
        served = learner.head.beta.clone()
        reward.engine.update(reward.last)  # learned after the checkpoint, and lost with the policy that came of it
    assert torch.equal(load_head(tmp_path / "run" / "checkpoint-2" / "rmcore_head").beta, served)
    reward, learner = reward_of()
    with learner:
        assert learner.version == 3
        callback = reward.callback()
        trainer = trainer_of(reward, 3, callbacks=[callback])
        trainer.train(resume_from_checkpoint=True)
        assert learner.version == 2
        assert torch.equal(reward.engine.head.beta, served)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_state_is_refused(reward_model, trainer_of, tmp_path):
    judge = CountingJudge()
    trainer_of(make_reward(reward_model, judge), 1).train()
    (tmp_path / "run" / "checkpoint-1" / "rmcore_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"rmcore_state\.json: missing.*restore=False"):
        trainer_of(make_reward(reward_model, judge), 2).train(resume_from_checkpoint=True)


def test_another_router_is_refused_and_named(reward_model, trainer_of):
    trainer_of(make_reward(reward_model, CountingJudge()), 1).train()
    router = AdaptiveRouter(0.5, Budget(100, "tokens"))
    other = PairwiseReward(RewardEngine(reward_model, CountingJudge(), router))
    with pytest.raises(CheckpointError, match=r"router\.budgets\[0\]\.unit: got 'calls', expected 'tokens'.*restore"):
        trainer_of(other, 2).train(resume_from_checkpoint=True)


def test_a_checkpoint_elsewhere_is_found_by_its_name(reward_model, trainer_of, after_three_steps, tmp_path):
    judge = after_three_steps
    moved = tmp_path / "kept" / "best"
    shutil.copytree(tmp_path / "run" / "checkpoint-3", moved)
    with pytest.raises(CheckpointError, match=r"none of .*checkpoint-3.*reward\.callback\(checkpoint="):
        trainer_of(make_reward(reward_model, judge), 4, out="other").train(resume_from_checkpoint=str(moved))
    reward = make_reward(reward_model, judge)
    callbacks = [reward.callback(checkpoint=moved)]
    trainer_of(reward, 4, callbacks=callbacks, out="other").train(resume_from_checkpoint=str(moved))
    reward = make_reward(reward_model, judge)
    trainer = trainer_of(reward, 4, out="third", resume_from_checkpoint=str(moved))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert judge.calls == 12


def test_another_runs_checkpoint_of_the_same_number_is_not_taken(reward_model, trainer_of, tmp_path):
    trainer_of(make_reward(reward_model, CountingJudge()), 2, out="one").train()
    trainer_of(make_reward(reward_model, CountingJudge()), 2, out="two", learning_rate=0.5).train()
    with pytest.raises(CheckpointError, match="a checkpoint that is none of"):
        trainer_of(make_reward(reward_model, CountingJudge()), 3, out="two").train(
            resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2")
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"global_step": 7}, r"state\.global_step: got '7', expected 1"),
        ({"version": 2}, r"state\.version"),
        ({"ranks": []}, r"state\.ranks"),
        ({"more": 1}, r"fields unknown \['more'\]"),
    ],
)
def test_a_damaged_file_is_named(change, named, reward_model, tmp_path):
    reward = make_reward(reward_model, CountingJudge())
    callback = reward.callback()
    callback.save(tmp_path / "checkpoint-1", 1)
    file = tmp_path / "checkpoint-1" / "rmcore_state.json"
    callback.load(file.parent, 1)
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | change))
    with pytest.raises(CheckpointError, match=named):
        callback.load(file.parent, 1)
    file.write_text(json.dumps(document | {"ranks": document["ranks"] * 2}))
    with pytest.raises(CheckpointError, match=r"state\.ranks: got '2 ranks', expected 1: every rank has budgets"):
        callback.load(file.parent, 1)


def test_a_reward_without_state_leaves_checkpoints_alone(reward_model, trainer_of, tmp_path):
    reward = PairwiseReward(RewardEngine(reward_model, CountingJudge(), BudgetRouter(0.5)))
    assert not reward.keeps_state
    trainer_of(reward, 1).train()
    assert not list(tmp_path.rglob("rmcore_*"))
    trainer_of(PairwiseReward(RewardEngine(reward_model)), 2).train(resume_from_checkpoint=True)


def test_a_trainer_that_cannot_be_seen_is_warned_about_once(reward_model, caplog):
    reward = make_reward(reward_model, CountingJudge(), num_generations=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            call = reward(["red"] * 2, ["good", "bad"], trainer_state=SimpleNamespace())
            asyncio.run(call)
    assert sum("reward.callback()" in record.message for record in caplog.records) == 1


def test_reference_every_must_be_positive(reward_model):
    with pytest.raises(InputError, match="reference_every: got 0"):
        PairwiseReward(RewardEngine(reward_model), reference_every=0)
