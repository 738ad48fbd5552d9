"""One rank of a small training run, under a launcher or alone; started by test_ranks.py, never collected.

    ranks_run.py BASE PREFERENCES OUT RUN...

Of each RUN (``plain``, ``ddp``, ``fsdp``, ...) a rank writes ``OUT/RUN rank N.json`` with its losses and metrics, and
``OUT/RUN rank N.safetensors`` with its head; the run's model is ``OUT/RUN model``. A run that is ``resumed`` ends after
three of its six steps and is begun again from its checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.accelerate_gloo import shard_over_gloo
from transformers import TrainerCallback

from rmcore.integrations.training import PairwiseRewardConfig, TrainingPair, read_training_pairs
from rmcore.integrations.trl import PairwiseRewardTrainer
from rmcore.model.backbone import Backbone, BackboneConfig


def main(base: str, preferences: str, out: str, *runs: str) -> None:
    torch.set_num_threads(1)
    shard_over_gloo()
    for run in runs:
        if "resumed" in run:
            train(base, preferences, Path(out), run, stop=True)
        train(base, preferences, Path(out), run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Stop(TrainerCallback):
    """Ends a run after its first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def train(base: str, preferences: str, out: Path, run: str, *, stop: bool = False) -> None:
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    saves = {"save_strategy": "steps", "save_steps": 3} if "resumed" in run else {"save_strategy": "no"}
    by_accelerate = any(f"ACCELERATE_USE_{name}" in os.environ for name in ("FSDP", "DEEPSPEED"))
    args = PairwiseRewardConfig(
        output_dir=str(out / f"{run} run"), max_steps=6, per_device_train_batch_size=8 // ranks,
        per_device_eval_batch_size=3, gradient_accumulation_steps=2 if "accumulated" in run else 1,
        learning_rate=1e-3, head_learning_rate=2e-2, report_to=[], use_cpu=not by_accelerate,
        ddp_backend="gloo" if by_accelerate else None,
        disable_tqdm=True, logging_steps=1, seed=3, posterior="training" if "covariance" in run else "pass",
        head_dtype="float32", max_grad_norm=1.0,
        share_prefixes="concat" in run,
        adam_epsilon=1e-3,  # Adam divides a gradient by its own size: where that is rounding, so is the step
        **saves,
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
    data = streamed(pairs) if "streamed" in run else pairs
    trainer = PairwiseRewardTrainer(
        backbone(base, sharded=run.startswith("transformers-fsdp") and ranks > 1), args, head=head,
        train_dataset=data, eval_dataset=pairs[:9], callbacks=[Stop()] if stop else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint="resumed" in run and not stop)
    if stop:
        return
    metrics = trainer.evaluate()
    trainer.save_model(str(out / f"{run} model"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = {"losses": losses, "metrics": {k: v for k, v in metrics.items() if "second" not in k and "runtime" not in k}}
    told["count"] = trainer.frozen.posterior.count
    told["sigma"] = float(torch.linalg.matrix_norm(trainer.head.normalized_weight().detach().double(), 2))
    told["sharded"] = sharding(trainer)
    name = f"{run} rank {rank}"
    tensors = {f"head.{key}": t.contiguous() for key, t in trainer.head.state_dict().items() if t.numel()}
    tensors |= {"beta": trainer.frozen.beta, "precision": trainer.frozen.posterior.precision}
    save_file(tensors, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(told))


def streamed(pairs: list[TrainingPair]) -> Any:
    from datasets import IterableDataset

    names = ("prompt", "chosen", "rejected", "label", "margin", "weight")
    return IterableDataset.from_generator(lambda: ({name: getattr(p, name) for name in names} for p in pairs))


def sharding(trainer: PairwiseRewardTrainer) -> str:
    """What holds the backbone's parameters: DTensors of FSDP2, ZeRO-3's partitions, or nothing of the kind."""
    from torch.distributed.tensor import DTensor

    parameters = list(trainer.model.parameters())
    if all(isinstance(p, DTensor) for p in parameters):
        return "fsdp2"
    return "zero3" if all(hasattr(p, "ds_id") and p.numel() == 0 for p in parameters) else "whole"


def backbone(base: str, *, sharded: bool) -> Backbone:
    if not sharded:
        return Backbone.from_pretrained(BackboneConfig(name=base, pooling="last"), device="cpu")
    from transformers import AutoModel, AutoTokenizer
    from transformers.distributed import DistributedConfig

    model = AutoModel.from_pretrained(base, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2))
    return Backbone(model, AutoTokenizer.from_pretrained(base), BackboneConfig(name=base, pooling="last"))


if __name__ == "__main__":
    main(*sys.argv[1:])
