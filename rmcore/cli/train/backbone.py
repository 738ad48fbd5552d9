"""The part of ``rmcore train`` that trains a backbone: the trainer from a configuration, alone or on one of many."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from rmcore._base.errors import InputError, reject
from rmcore.cli.console import notes, training_progress
from rmcore.cli.ranks import main_process, many_processes
from rmcore.cli.train.config import RunSettings
from rmcore.cli.train.data import TrainingData, tell_data
from rmcore.cli.train.options import HeadOptions, RecipeOptions

if TYPE_CHECKING:
    from rmcore.head.sngp import SNGPHead
    from rmcore.integrations.training import PairwiseRewardConfig, PairwiseRewardTrainer
    from rmcore.model.backbone import Backbone
    from rmcore.model.data.mixture import DataReport

__all__ = [
    "save_from_all",
    "train_backbone",
    "trainer_process",
    "trains_backbone",
]

_DEFAULTS = {
    "per_device_train_batch_size": 16,
    "weight_decay": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # a share of the steps
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


@contextmanager
def trainer_process() -> Iterator[None]:
    """One of the processes that accelerate or torchrun started: a GPU of its own, and quiet unless the main one."""
    if not many_processes():
        yield
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    quiet, notes.quiet = notes.quiet, notes.quiet or not main_process()
    try:
        yield
    finally:
        notes.quiet = quiet


def trains_backbone(settings: RunSettings, finetune_epochs: int) -> bool:
    """Whether there is a backbone to train: epochs or steps are given."""
    return finetune_epochs > 0 or any(name in settings.arguments for name in ("num_train_epochs", "max_steps"))


def train_backbone(
    spine: Backbone,
    head: SNGPHead,
    data: TrainingData,
    settings: RunSettings,
    bar: Progress,
    *,
    out: Path,
    options: HeadOptions,
    recipe: RecipeOptions,
) -> PairwiseRewardTrainer:
    """Train, and leave the posterior to the caller unless there are several ranks.

    Args:
        spine: trained in place.
        head: likewise.
        data: training pairs, and those held out for evaluations, where ``eval_strategy`` asks for any. What the model
            can learn nothing from is added to its report, which is told.
        settings: of the configuration.
        bar: shows how far it has got.
        out: the model's folder; checkpoints go beside it unless ``output_dir`` says where.
        options: of the head.
        recipe: what else the command was told.
    """
    from transformers import PrinterCallback

    from rmcore.integrations.training import PairwiseRewardTrainer

    args = _arguments(spine, settings, out, options, recipe, evaluates=bool(data.held_out))
    trainer = PairwiseRewardTrainer(
        spine,
        args,
        head=head,
        train_dataset=_streamed(spine, settings, options, recipe, data.report) if settings.streaming else data.items,
        eval_dataset=data.held_out or None,
        peft_config=_adapters(settings.lora),
        callbacks=[_bar_callback(bar)] if main_process() else [],
    )
    trainer.remove_callback(PrinterCallback)
    if data.report is not None and not settings.streaming:
        data.report.leave_out(trainer.train_dataset.left_out)
        tell_data(data.report, settings)
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True", True) else resume or None)
    return trainer


def save_from_all(trainer: PairwiseRewardTrainer, data: TrainingData, out: Path, settings: RunSettings) -> str:
    """Calibrate and write the model from all ranks; what to say of it, after what a stream's last pass read."""
    told, report = "", data.report
    if data.held_out and not trainer.args.critique_sft:
        trainer.calibrate(data.held_out)
        assert trainer.frozen is not None
        told = f"amplitude {trainer.frozen.config.resolved_amplitude:.3g}; "
    trainer.save_model(str(out))
    if report is not None and settings.streaming:
        report.left_out = Counter(trainer.train_dataset.left_out)
        report.trained -= report.left_out.total()
        tell_data(report, settings)
    trained, ranks = trainer.train_dataset, trainer.accelerator.num_processes
    pairs = f"{len(trained)} pairs" if hasattr(trained, "__len__") else f"a stream ({trained.dropped} pairs left out)"
    return f"{pairs} on {ranks} processes, {trainer.state.global_step} steps; {told}wrote {out}"


def _streamed(
    spine: Backbone, settings: RunSettings, options: HeadOptions, recipe: RecipeOptions, report: DataReport | None
) -> Any:
    from rmcore.integrations.training import StreamedPairs
    from rmcore.model.data.mixture import sources_of
    from rmcore.model.data.stream import stream

    sources = sources_of(settings.datasets)
    share, critiques = settings.held_out or 0.0, recipe.critiques
    again = partial(
        stream,
        sources,
        seed=options.seed,
        held_out=share,
        remembered=settings.remembered,
        report=report,
        critiques=critiques,
    )
    return StreamedPairs(spine, again, options.mode, critiques=critiques)


def _arguments(
    spine: Backbone,
    settings: RunSettings,
    out: Path,
    options: HeadOptions,
    recipe: RecipeOptions,
    *,
    evaluates: bool,
) -> PairwiseRewardConfig:
    from rmcore.integrations.training import PairwiseRewardConfig

    known = {f.name for f in fields(PairwiseRewardConfig)}
    unknown = sorted(set(settings.arguments) - known)
    if unknown:
        reject("--config", f"unknown keys {unknown}", "options of rmcore train, or fields of TrainingArguments")
    own = {"learning_rate": recipe.lr_backbone, "seed": options.seed, "head_dtype": options.dtype}
    values = {**_DEFAULTS, **own, **settings.arguments, "critiques": recipe.critiques}
    values["use_cpu"] = values.get("use_cpu", spine.device.type == "cpu")
    values.setdefault("posterior", "pass" if many_processes() or settings.streaming or recipe.critiques else "none")
    values.setdefault("head_weight_decay", values["weight_decay"])
    if recipe.finetune_epochs and "num_train_epochs" not in settings.arguments:
        values["num_train_epochs"] = recipe.finetune_epochs
    values.setdefault("output_dir", str(out.with_name(f"{out.name}.run")))
    if values.get("eval_strategy", "no") != "no" and not evaluates:
        reject(
            "eval_strategy", values["eval_strategy"], "held-out pairs: --calibrate, or held_out in the configuration"
        )
    try:
        return PairwiseRewardConfig(**values)
    except InputError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"--config: {error}") from error


def _adapters(lora: dict[str, Any] | None) -> Any:
    if lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("use_peft: got true, expected peft to be installed: pip install 'rmcore[train]'") from error
    own = {name.removeprefix("lora_") if name != "lora_alpha" else name: value for name, value in lora.items()}
    return LoraConfig(
        r=own["r"], lora_alpha=own["lora_alpha"], lora_dropout=own["dropout"], target_modules=own["target_modules"]
    )


def _bar_callback(bar: Progress) -> Any:
    from transformers import TrainerCallback

    watch, report = training_progress(bar, "training")

    class Bar(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                report(logs["loss"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch("training", state.global_step, state.max_steps)

    return Bar()
