"""A backbone and an SNGP head trained end to end on transformers' ``Trainer``: :class:`PairwiseRewardTrainer`.

**Why not TRL's RewardTrainer.** It is ``Trainer`` with four things of its own: a tokeniser call, a collator, a scalar
head that it demands of the model (``AutoModelForSequenceClassification`` with one label), and a loss. All four would be
replaced here: texts come from the backbone's encoder, whose tokens the fitted model serves, and whose states any head
reads. On ``Trainer`` there is nothing to undo; arguments and data columns keep TRL's names.

**What is whose.** ``Trainer`` has the backbone: accelerate, DDP, FSDP, DeepSpeed, adapters, checkpointing of
activations, schedule, logging, checkpoints. The head stands beside it, whole on every rank
(:mod:`rmcore.integrations.training.replicated_head`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import EvalPrediction, TrainerCallback

from rmcore._base.errors import NonFiniteError
from rmcore.head.config import HeadConfig
from rmcore.head.frozen import FrozenHead
from rmcore.head.sngp import SNGPHead
from rmcore.integrations.training.cloud import CRITIQUE_NLL, loss_of
from rmcore.integrations.training.collator import BatchForm, PairCollator, check_batch_form
from rmcore.integrations.training.config import PairwiseRewardConfig
from rmcore.integrations.training.critique_tokens import CritiqueTokens
from rmcore.integrations.training.dataset import StreamedPairs, encoded, endless
from rmcore.integrations.training.losses import PairBatch, PairLoss, bradley_terry, centred
from rmcore.integrations.training.metrics import pair_metrics
from rmcore.integrations.training.posterior import (
    EpochCovariance,
    PairRows,
    calibrated,
    fit_pairs,
    scored,
    set_length_scale,
)
from rmcore.integrations.training.prepare import (
    check_sharding,
    check_trainable,
    freeze_unread,
    head_for,
    with_adapters,
)
from rmcore.integrations.training.replicated_head import HeadCallback, ReplicatedHead
from rmcore.integrations.training.saving import SavesRewardModel
from rmcore.integrations.training.states import BatchStates, block_rows
from rmcore.model.backbone import Backbone

__all__ = ["PairwiseRewardTrainer"]

log = logging.getLogger(__name__)

_LENGTH_SCALE_PAIRS = 1024


class PairwiseRewardTrainer(SavesRewardModel):
    """Trains a backbone and a head together on preferences, and fits the posterior behind them.

    Args:
        model: a backbone, or the name of one, which is loaded in float32.
        args: what a run is.
        head: a head, its configuration, or fields of one (``hidden_size`` is the backbone's).
        train_dataset: preferences, rows of a data set, a file's name; or pairs that are encoded already, or streamed.
        eval_dataset: held-out pairs, likewise; or several by name.
        loss: of a pair; :func:`~rmcore.integrations.training.losses.bradley_terry` by default. A module's parameters
            are trained with the head's.
        peft_config: puts PEFT adapters on the backbone, which alone are trained, and saved.
        compute_metrics: further metrics, of an ``EvalPrediction`` whose predictions are the pairs' logits (N,).
        callbacks: of transformers.
        optimizers: (optimiser, schedule) of the backbone.

    Attributes:
        backbone: what was given, with adapters on it if there are any.
        head: the head that is trained.
        frozen: the head with its posterior, after :meth:`train` or :meth:`fit_posterior`.

    Under FSDP and DeepSpeed's ZeRO-3 the backbone's parameters are sharded, the head is whole on every process. Raises
    InputError where backbone, head, data and arguments do not fit.
    """

    _tag_names = ("rmcore", "reward-trainer")

    def __init__(
        self,
        model: Backbone | str,
        args: PairwiseRewardConfig,
        *,
        head: SNGPHead | HeadConfig | dict[str, Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: PairLoss | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if isinstance(model, str):
            model = Backbone.from_pretrained(model, dtype=torch.float32, device=args.device)
        self.backbone = model
        self.head = head_for(head, model)
        form: BatchForm = "shared-prefix" if args.share_prefixes else "padding-free" if args.padding_free else "padded"
        check_batch_form(model, form)
        if peft_config is not None:
            model.model = with_adapters(model, peft_config)
        freeze_unread(model)
        check_trainable(model)
        loss = loss_of(args, loss)
        collator = PairCollator(model, form)
        self.batch_states = BatchStates(model)
        self.mode = self.head.config.mode
        self.critiques = args.critiques
        self._own_metrics = compute_metrics
        self.frozen: FrozenHead | None = None
        self._judging: FrozenHead | None = None  # what gives u in the evaluation that is going on
        super().__init__(
            model.model,
            args,
            data_collator=collator,
            train_dataset=endless(self._pairs(train_dataset), args.posterior),
            eval_dataset=self._pairs(eval_dataset),
            compute_metrics=self._metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_sharding(args, fsdp=self.is_fsdp_enabled)
        # Losses are sums over the pairs of an optimiser step, which Trainer counts over micro-batches and ranks.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.head.to(self.args.device)
        learns_tokens = args.critique_sft or args.lm_weight is not None
        self._tokens = CritiqueTokens(model, self.accelerator) if learns_tokens else None
        self.loss: PairLoss = loss or bradley_terry
        if isinstance(loss, nn.Module):
            loss.to(self.args.device)
        self._replicated = ReplicatedHead(
            self.head,
            loss,
            lr=args.head_learning_rate,
            weight_decay=args.head_weight_decay,
            max_grad_norm=args.max_grad_norm,
            accelerator=self.accelerator,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        self._covariance = EpochCovariance(self.head.config, self.args.device) if args.posterior == "training" else None
        self._feature_map: Any = None
        self._resuming = False
        self.add_callback(HeadCallback(self))

    # -- data ----------------------------------------------------------------------------------------------------------

    def _pairs(self, source: Any) -> Any:
        return encoded(source, self.backbone, self.mode, critiques=self.critiques)

    @property
    def _data_count(self) -> float:
        """Data of the fit that follows, over which β's prior is spread: two a pair in concat mode."""
        try:
            pairs = len(self.train_dataset)
        except TypeError:
            pairs = self.state.max_steps * self.get_total_train_batch_size(self.args)
        return float(pairs * (2 if self.mode == "concat" else 1))

    # -- loss ----------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the pairs' weighted losses over the pairs of the optimiser step, all micro-batches and ranks.

        With ``return_outputs`` also the states.
        """
        every = self.batch_states.tokens(model, inputs)
        states = self.batch_states.pooled(every, inputs)
        columns = {name.removeprefix("column_"): t for name, t in inputs.items() if name.startswith("column_")}
        if self._tokens is not None:
            columns[CRITIQUE_NLL] = self._tokens.nll(every, inputs, training=model.training)
        with torch.autocast(states.device.type, enabled=False):
            batch = PairBatch(
                states,
                states.new_zeros(states.shape[:2]) if self.args.critique_sft else self.head(states),
                inputs["labels"],
                inputs["margins"],
                self.mode,
                columns,
            )
            losses = self.loss(batch)
            if self.args.center_rewards_coefficient:
                losses = losses + self.args.center_rewards_coefficient * centred(batch)
            total = (losses * inputs["weights"]).sum()
        if self._covariance is not None and model.training and self._in_last_epoch:
            self._covariance.add(self.head, self._features(), states, inputs["labels"], inputs["weights"])
        if num_items_in_batch is None or not model.training:
            loss = total / len(losses)
        else:
            # Ranks average their gradients; the count is of all ranks where Trainer was told to count so.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = total * ranks / num_items_in_batch
        return (loss, {"states": states}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``Trainer.training_step``, the attention of shared prefixes in place for the backward pass too."""
        with self.batch_states.step():
            return super().training_step(*args, **kwargs)

    # -- one optimiser step --------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"loss: got a gradient of norm {float(norm)} after {self.state.global_step} steps, expected finite "
                "values. Lower the learning rate"
            )
        return norm

    def step_head(self) -> None:
        """The head's part of an optimiser step; before the backbone's, once that gradient is known to be finite."""
        if self.args.critique_sft:
            return
        schedule = self._get_learning_rate() / self.args.learning_rate
        self._replicated.step(schedule, self._data_count, self.state.global_step)
        self._feature_map = None

    def begin_epoch(self) -> None:
        """Covariance in training is summed anew; called at the beginning of each epoch."""
        if self._covariance is not None and not self._resuming:
            self._covariance.reset()
        self._resuming = False

    @property
    def _in_last_epoch(self) -> bool:
        return (self.state.epoch or 0) >= self.state.num_train_epochs - 1

    def _features(self) -> Any:
        # One freezing an optimiser step: σ converged, folded, rounded as it would serve.
        if self._feature_map is None:
            self._feature_map = self.head.freeze_features(self._dtype)
        return self._feature_map

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._resuming = resume_from_checkpoint is not None
        if self._resuming:
            more = self._replicated.load(resume_from_checkpoint)
            if self._covariance is not None and more:
                self._covariance.load(more)
        else:
            self._begin_head(prepared[0])
        return prepared

    def _begin_head(self, model: nn.Module) -> None:
        """ℓ by the median rule on the first states, if unset, and power iteration settled: on every rank alike."""
        if self.args.critique_sft:
            return  # no head is trained
        if self.head.config.features == "rff" and not math.isfinite(float(self.head.length_scale)):
            set_length_scale(self.head, self.rows(model, _LENGTH_SCALE_PAIRS))
        self._replicated.begin()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; afterwards the posterior, unless ``args.posterior`` is ``none``.

        Raises NonFiniteError where loss or gradient became NaN or Inf, before the weights take it.
        """
        self.frozen = None
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.backbone.model.eval()
        if self.args.posterior == "pass":
            self.fit_posterior()
        elif self._covariance is not None:
            self.frozen = self._covariance.frozen(self.head, self._dtype)
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As ``Trainer.log``; beside the loss the mean token loss of the critiques since the last time."""
        if self._tokens is not None and "loss" in logs:
            found = self._tokens.mean(training=True)
            if found is not None:
                logs[CRITIQUE_NLL] = round(found, 6)
        super().log(logs, *args, **kwargs)

    # -- the posterior -------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype | None:
        found: torch.dtype | None = getattr(torch, self.args.head_dtype) if self.args.head_dtype else None
        return found

    @torch.no_grad()
    def rows(self, model: nn.Module | None = None, most: int | None = None, *, of: Any = None) -> PairRows:
        """States of this rank's block of the training pairs, in their order, on the CPU; called by every rank.

        ``most`` is for a sample of the pairs. Of a stream those are the first, by default as many as are trained on.
        ``of`` is for other pairs than those of training.
        """
        model = self.model_wrapped if model is None else model

        def states_of(inputs: dict[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                return self.batch_states(model, self._prepare_inputs(inputs))

        return block_rows(
            states_of,
            model,
            self._sample(most) if of is None else self._pairs(of),
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            batch_pairs=self.args.per_device_eval_batch_size,
            collator=self.data_collator,
        )

    def _sample(self, most: int | None) -> Any:
        data = self.train_dataset
        if not hasattr(data, "__len__"):
            if most is None:
                most = self.state.max_steps * self.get_total_train_batch_size(self.args)
            return list(islice(data.once() if isinstance(data, StreamedPairs) else data, most))
        if most is None or len(data) <= most:
            return data
        return Subset(data, range(0, len(data), math.ceil(len(data) / most)))

    def fit_posterior(self, *, most: int | None = None) -> FrozenHead:
        """β and P on frozen features, in one pass of the backbone over the training pairs, over all ranks.

        ``head`` takes the β. ``most`` is for a sample of the pairs.
        """
        self.frozen, report = fit_pairs(self.head, self.rows(most=most), self._dtype)
        log.info("Newton %s after %d passes", "converged" if report.converged else "stopped", report.passes)
        return self.frozen

    def calibrate(self, held_out: Any) -> FrozenHead:
        """The amplitude of u = √(1 + a v) on pairs that were not trained on (:func:`~rmcore.head.fit.fit_amplitude`).

        It stays as it was, with a warning, where they want none. Called by every rank.
        """
        frozen = self.frozen or self.fit_posterior()
        self.frozen = calibrated(frozen, self.rows(of=held_out))
        return self.frozen

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``Trainer.evaluate``: loss, accuracy, log_loss, ece, and with a posterior log_loss_u, ece_u, auroc_u."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._pairs(eval_dataset)
        self._judging = self.frozen
        if self.args.posterior_at_evaluation and self.is_in_train:
            # On a copy: training goes on from the β it has.
            copy = SNGPHead(self.head.config).to(self.args.device)
            copy.load_state_dict(self.head.state_dict())
            self._judging, _ = fit_pairs(copy, self.rows(most=self.args.posterior_pairs), self._dtype)
        try:
            found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._judging = None
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(loss, states (B, 2, h), labels (B,)): metrics are computed from the states of all ranks."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["states"].detach(), inputs["labels"]

    @torch.no_grad()
    def _metrics(self, found: EvalPrediction) -> dict[str, float]:
        states, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
        nll = None if self._tokens is None else self._tokens.mean(training=False)
        told = {} if nll is None else {CRITIQUE_NLL: nll}
        if self.args.critique_sft:
            return told
        if self._judging is None:
            scores = self.head(states.to(self.args.device)).cpu()
            logit = (scores[:, 0] - scores[:, 1]) / (1 if self.mode == "difference" else 2)
            metrics = pair_metrics(logit, labels)
        else:
            logit, preference, uncertainty = scored(self._judging, states)
            metrics = pair_metrics(logit, labels, preference, uncertainty)
        if self._own_metrics is not None:
            metrics |= self._own_metrics(EvalPrediction(predictions=logit.numpy(), label_ids=labels.numpy()))
        return metrics | told
