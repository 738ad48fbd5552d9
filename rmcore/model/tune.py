"""Choosing a head's configuration by held-out log-loss on states that are already encoded: seconds on a CPU.

The pairs are cut in folds; a head is fitted on all but one and asked about the last. One setting is changed at a time,
and what is best of it kept before the next: length-scale, kernel scale, ridge, number of features.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from rmcore._base.errors import FactorizationError, reject
from rmcore.head.config import HeadConfig
from rmcore.head.fit import fit
from rmcore.head.ranks import Ranks
from rmcore.head.shards import sampled_pairs
from rmcore.head.sngp import SNGPHead
from rmcore.model.error_prior_fit import asked_about, part_of_pairs
from rmcore.ops import reference

__all__ = ["Trial", "tune"]

log = logging.getLogger(__name__)

GRID: dict[str, tuple[float, ...]] = {
    "length_scale_factor": (0.5, 1.0, 2.0, 4.0),
    "kernel_scale": (1.0, 3.0, 10.0),
    "ridge": (0.1, 1.0, 10.0),
    "num_features": (256, 1024, 2048),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration tried.

    Attributes:
        setting, value: what was changed of the best so far; empty and 0 for the configuration that was given.
        loss: mean log-loss of the served P(first is better) on pairs left out, in nats; NaN where no fit was possible.
        accuracy: share of them ordered as labelled, no preference counts half.
    """

    setting: str
    value: float
    loss: float
    accuracy: float


def tune(
    config: HeadConfig,
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    *,
    folds: int = 3,
    most_pairs: int = 1500,
    seed: int | None = 0,
    ranks: Ranks | None = None,
) -> tuple[HeadConfig, list[Trial]]:
    """The best configuration found, and all that were tried, in order.

    Args:
        config: where to begin; with linear features only the ridge is tuned.
        hidden: (R, h) as :func:`rmcore.head.fit.fit` takes them, as are the next two. In concat mode rows 2k and 2k + 1
            are the two orders of pair k.
        labels: (N,), or (2N,) in concat mode.
        pairs: (N, 2); None in concat mode.
        folds: parts that are left out in turn.
        most_pairs: a sample of that many is taken where there are more.
        seed: of the folds; None for pairs that are in random order already.
        ranks: each of which gives its part of the data; rank 0 tries, and all get what it found.

    Raises:
        InputError: fewer than ten pairs a fold.
    """
    count = len(labels) if pairs is not None else len(labels) // 2
    if ranks is not None:
        with ranks.work("tuning"):
            nothing = torch.empty(count, 0)
            sample = sampled_pairs(hidden, labels, pairs, nothing, most_pairs, ranks, seed=seed or 0)[:3]
            found = tune(config, *sample, folds=folds, most_pairs=most_pairs, seed=None) if ranks.rank == 0 else None
            told = ranks.share(values=found and {"config": found[0].to_dict(), "trials": [asdict(t) for t in found[1]]})
            return HeadConfig.from_dict(told.values["config"]), [Trial(**trial) for trial in told.values["trials"]]
    if count < 10 * folds:
        reject("pairs", f"{count} pairs", f"at least {10 * folds}, ten for each of {folds} folds")
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = order[:most_pairs]

    def tried(candidate: HeadConfig, setting: str = "", value: float = 0.0) -> Trial:
        try:
            return Trial(setting, value, *_held_out(candidate, hidden, labels, pairs, order, folds))
        except FactorizationError as error:
            log.warning("%s=%g cannot be fitted: %s", setting, value, error)
            return Trial(setting, value, float("nan"), float("nan"))

    best, trials = replace(config, row_ridge=None), [tried(replace(config, row_ridge=None))]
    lowest = trials[0].loss
    for setting, values in GRID.items():
        if config.features == "linear" and setting != "ridge":
            continue
        begun = best
        for value in values:
            given = int(value) if setting == "num_features" else value
            if given == getattr(begun, setting):
                continue
            changed: dict[str, float] = {setting: given}
            trial = tried(replace(begun, **changed), setting, value)  # type: ignore[arg-type]
            trials.append(trial)
            if trial.loss < lowest:
                lowest, best = trial.loss, replace(begun, **changed)  # type: ignore[arg-type]
    return replace(best, row_ridge=config.row_ridge), trials


def _held_out(
    config: HeadConfig, hidden: Tensor, labels: Tensor, pairs: Tensor | None, order: Tensor, folds: int
) -> tuple[float, float]:
    losses, right = [], []
    truth = (labels if pairs is not None else labels[::2]).cpu().double()
    for fold in range(folds):
        asked = order[fold::folds]
        kept = torch.cat([order[other::folds] for other in range(folds) if other != fold])
        rows, own_labels, own_pairs = part_of_pairs(hidden, labels, pairs, kept)
        head, _ = fit(SNGPHead(config).to(hidden.device), rows, own_labels, pairs=own_pairs, max_passes=12)
        p = asked_about(head, hidden, pairs, asked)[2]
        losses.append(-reference.log_likelihood(p, truth[asked]))
        right.append(0.5 + 0.5 * p.sign() * (2 * truth[asked] - 1))
    return float(torch.cat(losses).mean()), float(torch.cat(right).mean())
