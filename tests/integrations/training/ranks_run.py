"""One rank of a small training run, under torchrun or alone; started by test_ranks.py, never collected.

    ranks_run.py BASE PREFERENCES OUT RUN...

Of each RUN (``plain``, ``ddp``, ``fsdp``, ...) a rank writes ``OUT/RUN rank N.json`` with its losses and metrics, and
``OUT/RUN rank N.safetensors`` with its head; the run's model is ``OUT/RUN model``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rmcore.integrations.training import PairwiseRewardConfig, TrainingPair, read_training_pairs
from rmcore.integrations.trl import PairwiseRewardTrainer
from rmcore.model.backbone import Backbone, BackboneConfig


def main(base: str, preferences: str, out: str, *runs: str) -> None:
    torch.set_num_threads(1)
    for run in runs:
        train(base, preferences, Path(out), run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(base: str, preferences: str, out: Path, run: str) -> None:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    args = PairwiseRewardConfig(
        output_dir=str(out / f"{run} run"), max_steps=6, per_device_train_batch_size=8 // ranks,
        per_device_eval_batch_size=3, gradient_accumulation_steps=2 if "accumulated" in run else 1,
        learning_rate=1e-3, head_learning_rate=2e-2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_steps=1, seed=3, posterior="training" if "covariance" in run else "pass",
        head_dtype="float32", max_grad_norm=1.0,
        adam_epsilon=1e-3,  # Adam divides a gradient by its own size: where that is rounding, so is the step
    )  # fmt: skip
    pairs = [
        TrainingPair(p.prompt, p.chosen, p.rejected, p.label, 0.1 * (k % 3), 1 + k % 2)
        for k, p in enumerate(read_training_pairs(preferences))
    ]
    head = {
        "num_features": 64,
        "kernel_scale": 3.0,
        "layer_size": 8,
        "mode": "concat" if "concat" in run else "difference",
    }
    trainer = PairwiseRewardTrainer(
        backbone(base, sharded=run.startswith("fsdp") and ranks > 1), args, head=head,
        train_dataset=pairs, eval_dataset=pairs[:9],
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(out / f"{run} model"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = {"losses": losses, "metrics": {k: v for k, v in metrics.items() if "second" not in k and "runtime" not in k}}
    told["count"] = trainer.frozen.posterior.count
    name = f"{run} rank {rank}"
    tensors = {f"head.{key}": t.contiguous() for key, t in trainer.head.state_dict().items() if t.numel()}
    tensors |= {"beta": trainer.frozen.beta, "precision": trainer.frozen.posterior.precision}
    save_file(tensors, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(told))


def backbone(base: str, *, sharded: bool) -> Backbone:
    if not sharded:
        return Backbone.from_pretrained(BackboneConfig(name=base, pooling="last"), device="cpu")
    from transformers import AutoModel, AutoTokenizer
    from transformers.distributed import DistributedConfig

    model = AutoModel.from_pretrained(base, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2))
    return Backbone(model, AutoTokenizer.from_pretrained(base), BackboneConfig(name=base, pooling="last"))


if __name__ == "__main__":
    main(*sys.argv[1:])
