"""The posterior behind a trained model: β and P fitted on the frozen features of all ranks' pairs.

Each rank has the states of its own block of the data; :func:`rmcore.head.fit.fit` sums over ranks in their order, and
gives all of them one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.amplitude import fit_amplitude
from rmcore.head.config import HeadConfig, PairMode
from rmcore.head.fit import FitReport, fit
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import Posterior
from rmcore.head.ranks import Ranks
from rmcore.head.shards import one_length_scale
from rmcore.head.sngp import SNGPHead
from rmcore.ops.weights import FeatureMap

__all__ = ["EpochCovariance", "PairRows", "calibrated", "fit_pairs", "scored", "set_length_scale"]


@dataclass(frozen=True)
class PairRows:
    """States of N pairs: ``states`` (N, 2, h) float32, ``labels`` and ``weights`` (N,), on the CPU."""

    states: Tensor
    labels: Tensor
    weights: Tensor

    def data(self, mode: PairMode) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(hidden, labels, pairs, sample weights) as :func:`rmcore.head.fit.fit` takes them."""
        hidden = self.states.flatten(0, 1)
        equal = bool((self.weights == 1).all())
        if mode == "difference":
            pairs = torch.arange(len(hidden)).view(-1, 2)
            return hidden, self.labels, pairs, None if equal else self.weights
        both = torch.stack([self.labels, 1 - self.labels], 1).flatten()
        return hidden, both, None, None if equal else self.weights.repeat_interleave(2)


def fit_pairs(head: SNGPHead, rows: PairRows, dtype: torch.dtype | None = None) -> tuple[FrozenHead, FitReport]:
    """β and the posterior on all ranks' rows; ``head`` takes the β. Called by every rank."""
    device = head.beta.device
    hidden, labels, pairs, weights = (None if t is None else t.to(device) for t in rows.data(head.config.mode))
    assert hidden is not None
    assert labels is not None
    with every_rank() as ranks:
        if ranks is not None and weights is None:  # on another rank they may not be equal
            weights = torch.ones_like(labels)
        return fit(head, hidden, labels, pairs=pairs, sample_weight=weights, dtype=dtype, ranks=ranks)


def calibrated(head: FrozenHead, rows: PairRows) -> FrozenHead:
    """The head with the amplitude that all ranks' rows want; as it was where they want none. Called by every rank."""
    hidden, labels, pairs, _ = rows.data(head.config.mode)
    if pairs is None:
        single = head.score(hidden.to(head.device))
        found = torch.stack([single.logit.cpu(), single.variance.cpu(), labels], 1).double()
    else:
        both = head.score_pairs(hidden.to(head.device), torch.full((len(pairs),), 2, dtype=torch.int64))
        found = torch.stack([both.logit.cpu(), both.variance.cpu(), labels], 1).double()
    with every_rank() as ranks:
        if ranks is not None:
            counts = ranks.counts(len(found))
            at = torch.arange(len(found)) + sum(counts[: ranks.rank])
            found = ranks.rows(found, at, sum(counts))
    logit, variance, labels = found.unbind(1)
    new = fit_amplitude(head, logit, variance, labels)
    return head if new.config.resolved_amplitude == 0 else new


def set_length_scale(head: SNGPHead, rows: PairRows) -> None:
    """ℓ by the median rule on all ranks' rows, the same on every rank."""
    hidden = rows.states.flatten(0, 1).to(head.beta.device)
    with every_rank() as ranks:
        one_length_scale(head, hidden, ranks)


@contextmanager
def every_rank() -> Iterator[Ranks | None]:
    """All processes of the job, None where there is one."""
    ranks = Ranks.here()
    with nullcontext() if ranks is None else ranks:
        yield ranks


def scored(head: FrozenHead, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(g, p, u) (N,) of pairs' states (N, 2, h), of both orders in concat mode as the engine takes them together."""
    rows = states.flatten(0, 1).to(head.device)
    if head.config.mode == "difference":
        found = head.score_pairs(rows, torch.full((len(states),), 2, dtype=torch.int64))
        return found.logit.cpu(), found.preference.cpu(), found.uncertainty.cpu()
    single = head.score(rows)
    u = (1 + head.weights.amplitude * single.variance).sqrt().view(-1, 2).cpu()
    g = single.logit.view(-1, 2).cpu()
    p = g / u
    return (g[:, 0] - g[:, 1]) / 2, (p[:, 0] - p[:, 1]) / 2, u.mean(1)


class EpochCovariance:
    """P summed while the weights move, as SNGP's authors do (Liu et al. 2020): anew each epoch, the last is kept.

    Features are those of the step at which a pair was seen, so P belongs to no single model; it costs no further pass.

    Args:
        config: of the head.
        device: where P lives.
    """

    def __init__(self, config: HeadConfig, device: torch.device) -> None:
        if config.mode == "difference" and config.row_ridge is not None:
            config = replace(config, row_ridge=None)  # a row's novelty needs frozen rows: posterior="pass"
        self.config, self.device = config, device
        self.reset()

    def reset(self) -> None:
        """Forget everything: an epoch begins."""
        own = self.config
        self.posterior = Posterior(own.num_features, ridge=own.ridge, likelihood=own.likelihood, device=self.device)

    @torch.no_grad()
    def add(self, head: SNGPHead, feature_map: FeatureMap, states: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add pairs' states (B, 2, h) at the β they were seen with."""
        hidden, y, pairs, sample = PairRows(states.detach().cpu(), labels.cpu(), weights.cpu()).data(self.config.mode)
        self.posterior.accumulate(
            hidden.to(self.device),
            y.to(self.device),
            feature_map,
            head.beta.detach(),
            pairs=None if pairs is None else pairs.to(self.device),
            sample_weight=None if sample is None else sample.to(self.device),
            beta0=float(head.beta0.detach()),
        )

    def frozen(self, head: SNGPHead, dtype: torch.dtype | None) -> FrozenHead:
        """The head with the sum over all ranks; raises InputError where nothing was added. Called by every rank."""
        with every_rank() as ranks:
            posterior = self.posterior if ranks is None else self.posterior.summed(ranks)[0]
        if not posterior.count:
            reject("posterior", "'training' before an epoch was trained", "'pass'")
        config = self.config
        if config.features == "rff":
            config = replace(config, length_scale=float(head.length_scale))
        beta0 = float(head.beta0.detach())
        return FrozenHead(config, head.freeze_features(dtype), head.beta.detach().double(), beta0, posterior)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"gram": self.posterior.gram, "count": torch.tensor(self.posterior.count)}

    def load(self, tensors: dict[str, Any]) -> None:
        """Go on from a checkpoint's sum."""
        own = self.config
        self.posterior = Posterior.from_gram(
            tensors["gram"].to(self.device), int(tensors["count"]), ridge=own.ridge, likelihood=own.likelihood
        )
