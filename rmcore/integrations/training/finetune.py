"""A backbone and a head trained together in one call, in one process: :func:`finetune`."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from rmcore._base.errors import NonFiniteError, reject
from rmcore._base.progress import Progress
from rmcore.head.sngp import SNGPHead
from rmcore.integrations.training.config import PairwiseRewardConfig
from rmcore.integrations.training.dataset import PairDataset
from rmcore.integrations.training.trainer import PairwiseRewardTrainer
from rmcore.model.backbone import Backbone
from rmcore.model.training import RunRecord, TrainReport
from rmcore.model.training_pairs import Preference

__all__ = ["finetune"]

_Report: TypeAlias = Callable[[float], None]


def finetune(
    backbone: Backbone,
    head: SNGPHead,
    preferences: Sequence[Preference],
    *,
    epochs: int = 1,
    batch_pairs: int = 16,
    accumulation: int = 1,
    lr_backbone: float = 2e-5,
    lr_head: float = 1e-3,
    weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
    warmup: float = 0.1,
    autocast: torch.dtype | None = None,
    validation: Sequence[Preference] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    report_loss: _Report | None = None,
) -> TrainReport:
    """Train a backbone and a head together on preferences; fit the head on the new hidden states afterwards.

    :class:`~rmcore.integrations.training.trainer.PairwiseRewardTrainer` without checkpoints and logs. Whatever of
    ``backbone.model`` requires grad is trained, so frozen layers and adapters work by themselves. Both are changed in
    place; the backbone is in eval mode at the end, whatever happens. The head's length-scale is set by the median rule
    on the first states, if still unset, and stays. The learning rate rises over ``warmup`` and then falls linearly to
    zero. ``model.gradient_checkpointing_enable()`` beforehand saves memory.

    Args:
        backbone: a backbone on the head's device, its trainable parameters in float32 (bfloat16 loses small updates
            and is warned about; float16 is refused).
        head: a head as wide as the backbone's states. Its own layer is optional here.
        preferences: training pairs; in concat mode each is used in both orders.
        epochs: passes over the data.
        batch_pairs: pairs of one forward pass.
        accumulation: forward passes of one optimiser step.
        lr_backbone: learning rate of the backbone at its peak.
        lr_head: learning rate of W, b_s and β at its peak.
        weight_decay: of the matrices of backbone and W; β has its prior, vectors have none.
        max_grad_norm: gradients are scaled down to this norm, the backbone's and the head's each by itself.
        warmup: share of the steps over which the learning rate rises.
        autocast: arithmetic of the backbone's forward pass: None leaves it alone, or ``torch.bfloat16``. The head runs
            in float32 in any case.
        validation: held-out pairs; the weights of the epoch with the least loss there are kept.
        seed: of the order of the data and of dropout. The global random state is left as it was.
        progress: called with ("finetuning", done, in all).
        report_loss: called after each step, before ``progress``, with the mean loss of the epoch so far.

    Returns:
        A :class:`~rmcore.model.training.TrainReport`.

    Raises:
        InputError: no preferences, a text too long, or settings that do not fit.
        NonFiniteError: loss or gradient became NaN or Inf; the weights are the best so far where there is validation
            data, else those of the step before.
    """
    positive: dict[str, float] = {"epochs": epochs, "batch_pairs": batch_pairs, "accumulation": accumulation}
    positive |= {"lr_backbone": lr_backbone, "lr_head": lr_head, "max_grad_norm": max_grad_norm}
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            reject(name, value, "a positive number")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        reject("weight_decay", weight_decay, "a non-negative number")
    if not 0 <= warmup < 1:
        reject("warmup", warmup, "a share of the steps in [0, 1)")
    if autocast not in (None, torch.bfloat16):
        reject("autocast", autocast, "None or torch.bfloat16")
    if head.beta.device != backbone.device:
        reject("head", f"device {head.beta.device}", f"the backbone's device {backbone.device}")
    mode = head.training
    try:
        with _random_state_kept(backbone.device), tempfile.TemporaryDirectory() as folder:
            data = PairDataset(backbone, preferences, head.config.mode)
            steps = epochs * math.ceil(math.ceil(len(data) / batch_pairs) / accumulation)
            args = PairwiseRewardConfig(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_pairs,
                per_device_eval_batch_size=batch_pairs,
                gradient_accumulation_steps=accumulation,
                learning_rate=lr_backbone,
                head_learning_rate=lr_head,
                weight_decay=weight_decay,
                head_weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                lr_scheduler_type="linear",
                warmup_steps=round(steps * warmup),
                bf16=autocast is not None,
                seed=seed,
                posterior="none",
                eval_strategy="no" if validation is None else "epoch",
                eval_on_start=validation is not None,
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                use_cpu=backbone.device.type == "cpu",
            )
            run = RunRecord([backbone.model, head], keep=validation is not None)
            watch = _Watch(run, len(data), batch_pairs * accumulation, progress, report_loss)
            trainer = PairwiseRewardTrainer(
                backbone, args, head=head, train_dataset=data, eval_dataset=validation, callbacks=[watch]
            )
            trainer.remove_callback(PrinterCallback)
            try:
                trainer.train()
            except NonFiniteError:
                run.restore()
                raise
            return run.report()
    finally:
        backbone.model.eval()
        head.train(mode)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps the record of a run, and tells of it."""

    def __init__(
        self, run: RunRecord, pairs: int, per_step: int, progress: Progress | None, report_loss: _Report | None
    ) -> None:
        self.run, self.pairs, self.per_step = run, pairs, per_step
        self.progress, self.report_loss = progress, report_loss
        self.seen, self.loss = 0, 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen, self.loss = 0, 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        count = min(self.per_step, self.pairs - self.seen)  # the last step of an epoch may have fewer
        self.seen += count
        self.loss += logs["loss"] * count
        self.run.steps = state.global_step
        if self.report_loss is not None:
            self.report_loss(self.loss / self.seen)
        if self.progress is not None:
            self.progress("finetuning", state.global_step, state.max_steps)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.finish_epoch(self.loss / self.seen)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.run.validate(metrics["eval_log_loss"])


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """The global random states, which ``Trainer`` seeds, as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
