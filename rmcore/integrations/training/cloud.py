"""CLoud's joint loss (Ankner et al. 2024, arXiv:2408.11791): Bradley–Terry behind a critique, and its tokens.

    loss = −log σ(r_chosen − r_rejected) + λ · mean over both of the critique's mean −log p(token)

Its recipe: fine-tune the language model on an oracle's critiques (``rmcore critique`` with a strong ``--judge-url``;
:func:`critique_losses`), have it write its own (``--generate``), then train body and head on those with this loss. λ is
1.25 for their 8B model. The trainer computes the token losses (``critiques`` in its configuration).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from rmcore._base.errors import reject
from rmcore.integrations.training.losses import PairBatch, PairLoss, bradley_terry

if TYPE_CHECKING:
    from rmcore.integrations.training.config import PairwiseRewardConfig

__all__ = ["CRITIQUE_NLL", "CloudLoss", "critique_losses", "critique_nll", "loss_of"]

CRITIQUE_NLL = "critique_nll"
"""The column of :class:`~rmcore.integrations.training.losses.PairBatch` with (B, 2) :func:`critique_nll`."""

_CHUNK = 1024


def critique_nll(
    hidden: Tensor,
    lm_head: Tensor,
    input_ids: Tensor,
    critique: Tensor,
    *,
    bias: Tensor | None = None,
    owner: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """(N,) float32, mean −log p of the critique's tokens of each text, each given all before it; 0 without any.

    Logits are made for the critique's tokens alone, a thousand at a time, and not for whole texts over the vocabulary.

    Args:
        hidden: (N, T, h) last hidden states, of the forward pass that the rewards come from too.
        lm_head: (V, h) the language model's output weights; taken in the states' dtype.
        input_ids: (N, T) int64.
        critique: (N, T) bool, which tokens are a critique's. The first token of a text has nothing before it.
        bias: (V,) of the output, if it has one.
        owner: (T,) int64 whose tokens these are, where ``hidden`` is one row of several texts (N = 1), and
        count: how many texts they are: the result's length.

    Raises InputError for shapes that do not fit, or a critique that begins a text.
    """
    if hidden.dim() != 3 or input_ids.shape != hidden.shape[:2] or critique.shape != input_ids.shape:
        reject("hidden", f"shape {tuple(hidden.shape)}", f"(N, T, h) for ids {tuple(input_ids.shape)}")
    if lm_head.dim() != 2 or lm_head.shape[1] != hidden.shape[2]:
        reject("lm_head", f"shape {tuple(lm_head.shape)}", f"(V, {hidden.shape[2]})")
    if (owner is None) != (count is None) or (owner is not None and owner.shape != hidden.shape[1:2]):
        reject("owner", "one that does not fit", "(T,) numbers and count, for one row of several texts")
    text, place = critique.nonzero(as_tuple=True)
    begins = place == 0 if owner is None else (place == 0) | (owner[place] != owner[(place - 1).clamp_min(0)])
    if bool(begins.any()):
        reject("critique", "a text's first token", "tokens that have one before them")
    texts = len(hidden) if count is None else count
    of = text if owner is None else owner[place]
    weight, more = lm_head.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    total = torch.zeros(texts, device=hidden.device)
    for rows, at, whose in zip(text.split(_CHUNK), place.split(_CHUNK), of.split(_CHUNK), strict=True):
        logits = linear(hidden[rows, at - 1], weight, more).float()
        total = total.index_add(0, whose, cross_entropy(logits, input_ids[rows, at], reduction="none"))
    return total / torch.bincount(of, minlength=texts).clamp_min(1)


def critique_losses(batch: PairBatch) -> Tensor:
    """(B,) mean token loss of a pair's critiques alone, CLoud's first stage: a loss as the trainers take them.

    A response without a critique is left out of its pair's mean. Raises InputError without :data:`CRITIQUE_NLL`.
    """
    nll = _column(batch)
    return nll.sum(1) / (nll != 0).sum(1).clamp_min(1)


class CloudLoss:
    """Bradley–Terry plus λ times the critiques' own loss, a number a pair; a loss as the trainers take them.

    Args:
        lm_weight: λ ≥ 0.

    The column :data:`CRITIQUE_NLL` holds the critiques' losses; without it a call raises InputError.
    """

    def __init__(self, lm_weight: float = 1.25) -> None:
        if not (math.isfinite(lm_weight) and lm_weight >= 0):
            reject("lm_weight", lm_weight, "a finite number, 0 or more")
        self.lm_weight = lm_weight

    def __call__(self, batch: PairBatch) -> Tensor:
        """(B,) losses."""
        nll = _column(batch)
        return bradley_terry(batch) + self.lm_weight * nll.mean(1)


def _column(batch: PairBatch) -> Tensor:
    nll = batch.columns.get(CRITIQUE_NLL)
    if nll is None or nll.shape != (len(batch.labels), 2):
        got = "no column" if nll is None else f"shape {tuple(nll.shape)}"
        reject(CRITIQUE_NLL, got, f"({len(batch.labels)}, 2)")
    return nll


def loss_of(args: PairwiseRewardConfig, given: PairLoss | None) -> PairLoss | None:
    """The loss that the configuration names, or what was given; raises InputError for both."""
    named: PairLoss | None = critique_losses if args.critique_sft else None
    if args.lm_weight is not None:
        named = CloudLoss(args.lm_weight)
    if named is not None and given is not None:
        reject("loss", "one beside critique_sft or lm_weight", "one of the two")
    return named or given
