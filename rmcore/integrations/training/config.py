"""What a training run is, beside transformers' own arguments: :class:`PairwiseRewardConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from rmcore._base.errors import InputError, reject

__all__ = ["PairwiseRewardConfig"]


@dataclass
class PairwiseRewardConfig(TrainingArguments):  # type: ignore[misc]
    """transformers' ``TrainingArguments``, and what a head wants besides.

    ``learning_rate``, ``weight_decay`` and ``max_grad_norm`` are the backbone's; the head has its own optimiser, an
    AdamW in float32 with the same betas, epsilon and schedule, clipped to the same norm by itself. ``bf16`` is the
    backbone's arithmetic: the head runs in float32 in any case. ``fp16``, whose loss is scaled, is refused.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of the backbone."})
    head_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of W, b_s and β."})
    head_weight_decay: float = field(
        default=1e-2, metadata={"help": "Weight decay of W alone; β has its prior, biases have none."}
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Adds this times the mean of (s_first + s_second)² to the loss: rewards near zero in difference "
            "mode (TRL's option of that name), and logits of the two orders that sum to zero in concat mode."
        },
    )
    posterior: str = field(
        default="pass",
        metadata={
            "help": "pass: fit β and P on frozen features after training, one more pass over the data. training: P "
            "summed over the last epoch while weights move, as SNGP's authors do. none: leave it to save_model."
        },
    )
    posterior_at_evaluation: bool = field(
        default=False,
        metadata={"help": "Fit β and P before each evaluation too, for u's AUROC (on posterior_pairs pairs)."},
    )
    posterior_pairs: int = field(
        default=2048, metadata={"help": "Training pairs of a posterior at an evaluation; more are sampled down to it."}
    )
    head_dtype: str | None = field(
        default=None, metadata={"help": "Serving dtype of the head: float32, float16, bfloat16 or int8."}
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Texts of a batch in one row, told apart by position, without padding. Decoders of kind base only."
        },
    )
    share_prefixes: bool = field(
        default=False,
        metadata={
            "help": "Texts of a batch as a tree, so that what they begin with is computed once: the prompt of both "
            "orders or responses. Exact, and for causal decoders without attention dropout."
        },
    )
    critiques: bool = field(
        default=False,
        metadata={
            "help": "Train behind the preferences' critiques. Their token loss is logged as critique_nll where "
            "critique_sft or lm_weight asks for it."
        },
    )
    lm_weight: float | None = field(
        default=None,
        metadata={"help": "λ of CLoud's joint loss: Bradley–Terry plus λ times the critiques' token loss."},
    )
    critique_sft: bool = field(
        default=False,
        metadata={
            "help": "CLoud's first stage: train on the critiques' tokens alone; save_model writes a language model."
        },
    )
    covariance_momentum: float | None = field(
        default=None, metadata={"help": "Refused: see the message. P is a sum over data, not an average of batches."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Pairs are encoded here: nothing is removed."})

    def __post_init__(self) -> None:
        """Check what is ours; raises InputError."""
        super().__post_init__()
        self.label_names = ["labels"]
        for name in ("learning_rate", "head_learning_rate"):
            _check(name, getattr(self, name), positive=True)
        for name in ("head_weight_decay", "weight_decay", "center_rewards_coefficient"):
            _check(name, getattr(self, name) or 0.0, positive=False)
        if self.posterior not in ("pass", "training", "none"):
            reject("posterior", repr(self.posterior), "'pass', 'training' or 'none'")
        if self.posterior_pairs < 1:
            reject("posterior_pairs", self.posterior_pairs, "at least 1")
        # One process would read a stream's batches and cut them for the others, texts and pairs at one place.
        if self.accelerator_config.dispatch_batches:
            reject("accelerator_config.dispatch_batches", True, "False: each process takes its own pairs of a stream")
        self.accelerator_config.dispatch_batches = False
        if self.share_prefixes and (self.padding_free or self.critiques):
            other = "padding_free: a tree has no padding either" if self.padding_free else "critiques"
            reject("share_prefixes", True, f"False with {other}")
        if self.fp16:
            reject("fp16", True, "bf16, or float32: a scaled loss would reach the head, which has its own optimiser")
        _check("lm_weight", self.lm_weight or 0.0, positive=False)
        if (self.critique_sft or self.lm_weight is not None) and not self.critiques:
            reject("critiques", False, "True, which critique_sft and lm_weight learn from")
        if self.critique_sft:
            if self.lm_weight is not None:
                reject("lm_weight", f"{self.lm_weight} with critique_sft", "None: the first stage has no reward")
            self.posterior = "none"  # nothing of the head is trained
        if self.covariance_momentum is not None:
            raise InputError(
                f"covariance_momentum: got {self.covariance_momentum}, expected None. An exponential average forgets "
                "the data it began with and depends on batch size and order, so it is no Σ w φφᵀ: it cannot be summed "
                "over ranks, merged with verdicts or learned from. posterior='training' sums over the last epoch"
            )


def _check(name: str, value: Any, *, positive: bool) -> None:
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        reject(name, value, "a positive number" if positive else "a non-negative number")
