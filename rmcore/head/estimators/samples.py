"""Rewards of M networks, or of one under M masks: what pairs say of them, and how the networks are trained.

All M networks are trained at once, their layers stacked, each on mini-batches of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, SEED, Within, check_numbers
from rmcore.head.adam import Adam
from rmcore.head.estimators.protocol import PairEstimate, row_differences, row_sums
from rmcore.head.estimators.tensors import read_tensors, write_tensors
from rmcore.ops import reference

__all__ = ["RewardNetworks", "Training", "sample_deviations", "sampled_estimate", "train_networks"]


def sampled_estimate(rewards: Tensor, group_sizes: Tensor, noise: Tensor | None = None) -> PairEstimate:
    """Pairs from M samples of each row's reward → columns of (Q,), all moments over the M samples.

    g is the mean of a sample's logits d = r_i − r_j, their variance (of M, not M − 1) the epistemic part. With noise
    the aleatoric part is the mean of a = n_i + n_j, and the variance of the mixture their sum (law of total variance).
    p̃ is the log-odds of the mean of p = σ(d / √(1 + π/8·a)), from log-sigmoids, so that it is right where σ has rounded
    to 0 or 1; information H(mean p) − mean H(p).

    Args:
        rewards: (R, M).
        group_sizes: (G,) summing to R.
        noise: (R, M) the variance that each sample itself sees in a row's reward; None for none known.
    """
    logits = row_differences(rewards.double(), group_sizes)
    aleatoric = None if noise is None else row_sums(noise.double(), group_sizes)
    served = (
        logits if aleatoric is None else logits / reference.uncertainty(aleatoric, reference.mean_field_amplitude())
    )
    log_sigmoid = torch.nn.functional.logsigmoid
    win, loss = log_sigmoid(served), log_sigmoid(-served)
    count = math.log(logits.shape[1])
    mean_win, mean_loss = win.logsumexp(1) - count, loss.logsumexp(1) - count
    information = _entropy(mean_win, mean_loss) - _entropy(win, loss).mean(1)
    epistemic = logits.var(1, correction=0)
    aleatoric = None if aleatoric is None else aleatoric.mean(1)
    return PairEstimate(
        logits.mean(1),
        epistemic if aleatoric is None else epistemic + aleatoric,
        mean_win - mean_loss,
        information.clamp_min(0.0),  # Jensen: below 0 it is rounding
        epistemic,
        aleatoric,
    )


def sample_deviations(rewards: Tensor) -> Tensor:
    """(R, M) samples of rewards → (R, M) y, with ‖y_i − y_j‖² the variance of r_i − r_j over the M."""
    return (rewards.double() - rewards.double().mean(1, keepdim=True)) / math.sqrt(rewards.shape[1])


def _entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -(log_p.exp() * log_p + log_q.exp() * log_q)


@dataclass(frozen=True)
class RewardNetworks:
    """M networks of equal shape over standardised rows: ReLU layers, then a linear one to a reward.

    Attributes:
        weights: of each layer, (M, out, in) float32; the last has out = 1. It has no bias: pairs would not see it.
        biases: of each ReLU layer, (M, out).
        center: (h,) subtracted from rows.
        scale: (h,) by which they are divided then.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    center: Tensor
    scale: Tensor

    @property
    def width(self) -> int:
        """The width of hidden rows, h."""
        return len(self.center)

    def standardised(self, hidden: Tensor) -> Tensor:
        """(..., h) → (..., h) float32."""
        return (hidden.float() - self.center) / self.scale

    def features(self, standardised: Tensor) -> Tensor:
        """(M, R, h), or (R, h) for all alike → (M, R, width) the inputs of the last layer."""
        z = standardised if standardised.dim() == 3 else standardised.expand(len(self.weights[0]), -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases, strict=True):
            z = torch.relu(torch.baddbmm(bias[:, None], z, weight.mT))
        return z

    @torch.no_grad()
    def rewards(self, hidden: Tensor) -> Tensor:
        """(R, h) → (R, M)."""
        return torch.bmm(self.features(self.standardised(hidden)), self.weights[-1].mT)[..., 0].T

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are stored."""
        named = {"center": self.center, "scale": self.scale}
        named |= {f"weight_{k}": weight for k, weight in enumerate(self.weights)}
        return named | {f"bias_{k}": bias for k, bias in enumerate(self.biases)}

    def write(self, folder: Path, **beside: Tensor) -> dict[str, Any]:
        """Write :meth:`tensors` and others ``beside``; returns the JSON values that :meth:`read` wants."""
        return {"layers": len(self.biases), **write_tensors(folder, self.tensors() | beside)}

    @classmethod
    def read(cls, folder: Path, values: dict[str, Any], *beside: str) -> tuple[RewardNetworks, dict[str, Tensor]]:
        """The inverse of :meth:`write`: the networks, and the tensors beside them by their names."""
        layers = int(values["layers"])
        names = ["center", "scale", *(f"weight_{k}" for k in range(layers + 1)), *(f"bias_{k}" for k in range(layers))]
        tensors = read_tensors(folder, values, [*names, *beside])
        weights = tuple(tensors[f"weight_{k}"] for k in range(layers + 1))
        biases = tuple(tensors[f"bias_{k}"] for k in range(layers))
        return cls(weights, biases, tensors["center"], tensors["scale"]), {name: tensors[name] for name in beside}


@dataclass(frozen=True)
class Training:
    """How reward networks are trained: Adam on the Bradley-Terry loss of mini-batches.

    Attributes:
        layers: widths of the ReLU layers; () for a linear reward.
        epochs: passes over the pairs.
        batch_size: pairs of a mini-batch.
        learning_rate: Adam's.
        anchor: λ; λ/N·‖θ − θ₀‖² is added to the mean loss of N pairs, θ₀ a network's own initial weights (Pearce et al.
            2020): where the data say nothing a network keeps its own opinion. 0 for none.
        dropout: share of the last layer's inputs set to 0 in training, afresh for each row.
        seed: of weights, mini-batches and masks.
    """

    layers: tuple[int, ...] = (128, 128)
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-3
    anchor: float = 0.1
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, COUNT, "epochs", "batch_size", expected="at least 1")
        check_numbers(self, SEED, "seed")
        if any(width < 1 for width in self.layers):
            reject("layers", self.layers, "positive widths")
        check_numbers(self, Within(above=0), "learning_rate", expected="a positive finite number")
        check_numbers(self, Within(least=0), "anchor", expected="a finite number from 0")
        check_numbers(self, Within(least=0, below=1), "dropout", expected="a share in [0, 1)")


def train_networks(hidden: Tensor, labels: Tensor, pairs: Tensor, members: int, how: Training) -> RewardNetworks:
    """Train ``members`` networks on labelled pairs (checked by the caller); the same seed gives the same networks."""
    if members < 1:
        reject("members", members, "at least 1")
    generator = torch.Generator().manual_seed(how.seed)
    networks = _initial(hidden[pairs.flatten().unique()], members, how.layers, generator)
    rows, y = networks.standardised(hidden), labels.float()
    trained = [tensor.requires_grad_() for tensor in (*networks.weights, *networks.biases)]
    initial = [tensor.detach().clone() for tensor in trained]
    adam = Adam(trained, how.learning_rate)
    for _ in range(how.epochs):
        order = torch.stack([torch.randperm(len(y), generator=generator) for _ in range(members)])
        for batch in order.split(how.batch_size, dim=1):
            z = networks.features(rows[pairs[batch]].flatten(1, 2))  # (M, 2B, width)
            if how.dropout:
                keep = torch.rand(z.shape, generator=generator) >= how.dropout
                z = z * keep / (1 - how.dropout)
            reward = torch.bmm(z, networks.weights[-1].mT)[..., 0].view(members, -1, 2)
            loss = -reference.log_likelihood(reward[..., 0] - reward[..., 1], y[batch]).mean(1).sum()
            if how.anchor:
                away = [(a - b).square().sum() for a, b in zip(trained, initial, strict=True)]
                loss = loss + how.anchor / len(y) * torch.stack(away).sum()
            adam.step(torch.autograd.grad(loss, trained))
    weights, biases = (tuple(t.detach() for t in some) for some in (networks.weights, networks.biases))
    return RewardNetworks(weights, biases, networks.center, networks.scale)


def _initial(rows: Tensor, members: int, layers: Sequence[int], generator: torch.Generator) -> RewardNetworks:
    """He et al. 2015 for ReLU layers, 1/√width for the last; a column that never changes keeps its scale."""
    center, scale = rows.float().mean(0), rows.float().std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    widths = [rows.shape[1], *layers, 1]
    weights = tuple(
        torch.randn(members, out, into, generator=generator) * math.sqrt((2 if k < len(layers) else 1) / into)
        for k, (into, out) in enumerate(pairwise(widths))
    )
    return RewardNetworks(weights, tuple(torch.zeros(members, width) for width in layers), center, scale)
