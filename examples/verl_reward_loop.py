"""verl's own reward loop on Ray, on a CPU: rewards of whole groups from workers that are each given single samples.

    python examples/verl_reward_loop.py [--workers 2] [--groups 4]

verl's configuration, its ``RewardLoopManager`` and its workers, which are Ray actors; the reward model, made on the
spot, is in an actor of the same cluster, where the samples of a group meet. A generative reward model as judge would
stand behind verl's router; it needs a GPU, so here the head decides alone. Printed: verl's advantages beside
``GroupScores.advantages``. Ends with a word where verl or Ray is not installed (``make test-trainers`` shows how).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from trl_rloo import KIND, NEUTRAL, UNKIND, make_policy, make_reward_model, make_tokenizer

from rmcore import RewardEngine

K, LENGTH = 4, 6


def configured(policy: Path, model: Path, workers: int) -> Any:
    """What ``python -m verl.trainer.main_ppo`` would be told."""
    import hydra

    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose(
            "ppo_trainer",
            [
                f"actor_rollout_ref.model.path={policy}",
                f"actor_rollout_ref.rollout.n={K}",
                f"actor_rollout_ref.rollout.val_kwargs.n={K}",
                f"reward.num_workers={workers}",
                "reward.reward_manager.source=importlib",
                "reward.reward_manager.name=PairwiseRewardManager",
                "reward.reward_manager.module.path=pkg://rmcore.integrations.verl",
                f"+reward.reward_kwargs.rmcore.model={model}",
                "algorithm.adv_estimator=rmcore",
                "algorithm.use_kl_in_reward=False",
            ],
        )


def batch(tokenizer: Any, groups: list[tuple[str, list[str]]]) -> Any:
    """verl's DataProto of all samples, a group after the other."""
    import numpy as np
    from tensordict import TensorDict
    from verl.protocol import DataProto

    rows = [(k, slot, prompt, text) for k, (prompt, texts) in enumerate(groups) for slot, text in enumerate(texts)]
    responses = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    for row, (*_, text) in enumerate(rows):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        responses[row, : len(ids)] = torch.tensor(ids)
    prompts = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"] for *_, prompt, _ in rows])
    mask = torch.cat([torch.ones_like(prompts), (responses != tokenizer.pad_token_id).long()], dim=1)
    messages = np.empty(len(rows), dtype=object)
    messages[:] = [[{"role": "user", "content": prompt}] for *_, prompt, _ in rows]
    about = {
        "raw_prompt": messages,
        "uid": np.array([f"uid-{k}" for k, *_ in rows], dtype=object),
        "session_id": np.array([slot for _, slot, *_ in rows]),
        "extra_info": np.array([{"split": "train"}] * len(rows), dtype=object),
    }
    tensors = TensorDict({"prompts": prompts, "responses": responses, "attention_mask": mask}, batch_size=len(rows))
    return DataProto(batch=tensors, non_tensor_batch=about)


def run(workers: int, groups: int) -> float:
    """The largest difference between verl's advantages and the engine's."""
    import ray
    from verl.experimental.reward_loop.reward_loop import RewardLoopManager
    from verl.trainer.ppo.ray_trainer import compute_advantage

    rng = random.Random(0)
    tokenizer, reward_model = make_tokenizer(), make_reward_model(rng)
    some = [
        (" ".join(rng.choices(NEUTRAL, k=3)), [" ".join(rng.choices(KIND + UNKIND, k=4)) for _ in range(K)])
        for _ in range(groups)
    ]
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The workers find rmcore, and this file's neighbours, where this process does.
    ray.init("local", num_cpus=workers + 1, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            policy, model = make_policy(Path(folder, "policy")), Path(folder, "model")
            tokenizer.save_pretrained(policy)
            reward_model.save_pretrained(model, backbone="embed")
            config = configured(policy, model, workers)
            data = batch(tokenizer, some)
            scored = RewardLoopManager(config).compute_rm_score(data)
        data.batch["token_level_rewards"] = scored.batch["rm_scores"]
        data.batch["response_mask"] = mask = data.batch["attention_mask"][:, data.batch["prompts"].size(1) :]
        done = compute_advantage(data, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm)
        theirs = (done.batch["advantages"] * mask).sum(1) / mask.sum(1)
    finally:
        ray.shutdown()
    asked = [[{"role": "user", "content": prompt}] for prompt, _ in some]
    ours = RewardEngine(reward_model).score(asked, [texts for _, texts in some]).advantages
    worst = float((theirs.double() - ours).abs().max())
    print(f"verl   {[round(value, 4) for value in theirs[:K].tolist()]}")
    print(f"rmcore {[round(value, 4) for value in ours[:K].tolist()]}")
    print(f"largest difference over {groups} groups and {workers} workers: {worst:.1e}")
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--groups", type=int, default=4)
    args = parser.parse_args()
    try:
        import ray  # noqa: F401
        import verl.experimental.reward_loop.reward_loop  # noqa: F401
    except ImportError as error:
        print(
            f"{error.name} is not installed, so there is nothing to show: make test-trainers says how it is",
            file=sys.stderr,
        )
        return 0
    return 0 if run(args.workers, args.groups) < 1e-2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
