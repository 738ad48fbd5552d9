"""One rank of a two-rank run that stops and resumes: a run of two_ranks.py, never collected."""

from __future__ import annotations

import os

import datasets
import trl
from conftest import policy_tokenizer

from rmcore.engine import RewardEngine
from rmcore.engine.routing import AdaptiveRouter, Budget
from rmcore.integrations.trl import PairwiseReward
from rmcore.judge.base import JudgeUsage, Verdict
from rmcore.model import RewardModel


class CountingJudge:
    def __init__(self) -> None:
        self.calls = 0

    async def judge(self, pairs):
        self.calls += len(pairs)
        return [Verdict.of("tie", usage=JudgeUsage(calls=1)) for _ in pairs]


def train(policy: str, model: str, out: str, rows: int, partial_groups: str) -> dict[str, object]:
    """The judge's calls after each part and the win rates of each step, or the error; checkpoints lie in ``out``."""
    rank = int(os.environ["RANK"])
    judge, calls, metrics = CountingJudge(), [], []
    # One long run's worth of data; each part is a trainer and an engine of its own, as in a new process.
    prompts = ["red tree house", "blue river stone", "green cloud", "house river red tree"] * 6
    data = datasets.Dataset.from_dict(
        {"prompt": prompts, "prompt_id": list(range(len(prompts))), "reference_completion": ["odd"] * len(prompts)}
    )
    try:
        for steps in (2, 4):
            limit = 5 + 4 * rank  # so that the ranks' states differ and must not be mixed up
            router = AdaptiveRouter(1.0, Budget(limit, "calls", max_per_pair=1), warmup=0)
            reward = PairwiseReward(
                RewardEngine(RewardModel.from_pretrained(model), judge, router),
                partial_groups=partial_groups,  # type: ignore[arg-type]
            )
            args = trl.RLOOConfig(
                output_dir=out, per_device_train_batch_size=rows, num_generations=4, max_completion_length=6,
                max_steps=steps, save_steps=1, report_to=[], use_cpu=True, seed=3, beta=0.0, disable_tqdm=True,
                bf16=False, ddp_timeout=1000, logging_steps=1,
            )  # fmt: skip
            trainer = trl.RLOOTrainer(
                model=policy, reward_funcs=reward, args=args, train_dataset=data, processing_class=policy_tokenizer()
            )
            trainer.train(resume_from_checkpoint=steps > 2)
            calls.append(judge.calls)
            metrics = [e["rmcore/win_rate_over_reference"] for e in trainer.state.log_history if "loss" in e]
        return {"calls": calls, "win_rates": metrics}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
