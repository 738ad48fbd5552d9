"""How much a judge's labels should count beside people's: what each weight would have given on people's pairs.

People's pairs are cut in folds by prompt. For each weight a head is fitted on people's other folds and the judge's
pairs at that weight, and asked about the fold; judge's pairs on the fold's prompts are left out with it, or a label of
the very pair that is asked about would count as generalisation. The curve over weights is for choosing one; what that
choice is worth is for :mod:`rmcore.evaluation.ai_weight`, which does not choose and measure on the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.config import HeadConfig
from rmcore.head.fit import FitReport, fit
from rmcore.head.frozen import FrozenHead
from rmcore.head.sngp import SNGPHead
from rmcore.model.error_prior_fit import asked_about, part_of_pairs
from rmcore.ops import reference

__all__ = ["WEIGHTS", "EncodedPairs", "HeldOutLosses", "fit_mixed", "held_out_losses"]

WEIGHTS = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
"""Of a judge's pair, where one of people's counts 1."""


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as :func:`rmcore.model.training_pairs.encode_preferences` gives them, none left out, and their prompts.

    Attributes:
        hidden: (R, h) rows.
        labels: (N,) in [0, 1]; (2N,) in concat mode, both orders of a pair one after the other.
        pairs: (N, 2) rows; None in concat mode.
        prompts: N, equal for equal prompts.
    """

    hidden: Tensor
    labels: Tensor
    pairs: Tensor | None
    prompts: Sequence[Hashable]

    def __post_init__(self) -> None:
        if len(self) != len(self.prompts):
            reject("prompts", len(self.prompts), f"{len(self)}, one a pair")

    def __len__(self) -> int:
        return len(self.labels) if self.pairs is not None else len(self.labels) // 2

    def part(self, index: Tensor) -> EncodedPairs:
        """Those of ``index``."""
        rows, labels, pairs = part_of_pairs(self.hidden, self.labels, self.pairs, index)
        return EncodedPairs(rows, labels, pairs, [self.prompts[k] for k in index.tolist()])


@dataclass(frozen=True)
class HeldOutLosses:
    """What heads that had not seen a pair said of it, for each weight.

    Attributes:
        weights: W of them, the first 0: people's pairs alone.
        loss: (W, N) float64, cross-entropy with people's label, nats.
        right: (W, N) float64, 1 where the order is people's, ½ without a preference; NaN for people's ties.
        fold: (N,) which part each pair was in.
    """

    weights: tuple[float, ...]
    loss: Tensor
    right: Tensor
    fold: Tensor


def fit_mixed(
    head: SNGPHead,
    human: tuple[Tensor, Tensor, Tensor | None],
    ai: EncodedPairs,
    weight: float,
    *,
    dtype: torch.dtype | None = None,
    max_passes: int = 30,
) -> tuple[FrozenHead, FitReport]:
    """:func:`rmcore.head.fit.fit` on people's (hidden, labels, pairs) and on a judge's pairs at ``weight`` each.

    The length-scale, if unset, is of people's rows whatever the weight, so that weights alone differ.
    """
    hidden, labels, pairs = human
    if head.config.features == "rff" and not math.isfinite(float(head.length_scale)):
        head.set_length_scale(hidden)
    if weight == 0:
        return fit(head, hidden, labels, pairs=pairs, dtype=dtype, max_passes=max_passes)
    counts = torch.cat([torch.ones(len(labels)), torch.full((len(ai.labels),), float(weight))])
    together = None if pairs is None or ai.pairs is None else torch.cat([pairs, ai.pairs + len(hidden)])
    return fit(
        head,
        torch.cat([hidden, ai.hidden]),
        torch.cat([labels, ai.labels]),
        pairs=together,
        sample_weight=counts.to(hidden.device),
        dtype=dtype,
        max_passes=max_passes,
    )


def held_out_losses(
    config: HeadConfig,
    human: EncodedPairs,
    ai: EncodedPairs,
    *,
    weights: Sequence[float] = WEIGHTS,
    folds: int = 5,
    seed: int = 0,
) -> HeldOutLosses:
    """Fit ``folds`` heads for each weight and ask each about the pairs it has not seen.

    Args:
        config: of the heads.
        human: people's pairs, of ``folds`` prompts or more.
        ai: the judge's, in the same mode.
        weights: to try; 0 is put first if it is not there.
        folds: parts.
        seed: which prompt is in which.

    Raises:
        InputError: fewer prompts than folds, a weight below 0, or modes that differ.
    """
    tried = (0.0, *(w for w in dict.fromkeys(float(w) for w in weights) if w != 0))
    if not all(w >= 0 and w < float("inf") for w in tried):
        reject("weights", tuple(weights), "finite numbers, 0 or more")
    if (human.pairs is None) != (ai.pairs is None):
        reject("ai", "pairs of another mode", "those of people's")
    names = list(dict.fromkeys(human.prompts))
    if len(names) < folds:
        reject("human", f"pairs of {len(names)} prompts", f"of {folds} or more, a part for each of {folds} folds")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    part = {names[k]: position % folds for position, k in enumerate(order)}
    fold = torch.tensor([part[prompt] for prompt in human.prompts])
    ai_fold = torch.tensor([part.get(prompt, -1) for prompt in ai.prompts])
    truth = (human.labels if human.pairs is not None else human.labels[::2]).cpu().double()
    config = replace(config, row_ridge=None)  # nobody asks these heads for novelty
    loss = torch.zeros(len(tried), len(human), dtype=torch.float64)
    logit = torch.zeros_like(loss)
    for k in range(folds):
        asked = (fold == k).nonzero()[:, 0]
        seen, judged = human.part((fold != k).nonzero()[:, 0]), ai.part((ai_fold != k).nonzero()[:, 0])
        for n, weight in enumerate(tried):
            head = SNGPHead(config).to(seen.hidden.device)
            frozen, _ = fit_mixed(head, (seen.hidden, seen.labels, seen.pairs), judged, weight, max_passes=12)
            found = asked_about(frozen, human.hidden, human.pairs, asked)[2].cpu().double()
            loss[n, asked] = -reference.log_likelihood(found, truth[asked])
            logit[n, asked] = found
    right = 0.5 + 0.5 * logit.sign() * (2 * truth - 1).sign()
    return HeldOutLosses(tried, loss, right.masked_fill(truth == 0.5, float("nan")), fold)
