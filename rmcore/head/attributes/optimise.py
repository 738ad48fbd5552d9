"""How attribute heads are optimised: the options, AdamW's loop over mini-batches, and the rows kept out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError
from rmcore._base.numbers import COUNT, SEED, Within, check_numbers
from rmcore.head.adam import Adam, cosine_rate

__all__ = ["FitOptions", "Steps", "finite_loss", "seeded_dropout", "split_rows", "train"]

_CHECKS = 20

Steps: TypeAlias = Callable[[int, int], None]
"""Told (steps done, steps in all)."""


@dataclass(frozen=True)
class FitOptions:
    """AdamW over mini-batches, its learning rate falling to 0 by a cosine.

    Attributes:
        steps: of the optimiser.
        batch_size: rows a step, drawn without repetition until all have been seen.
        lr: the first learning rate. Normals' means start at a ridge regression, so steps are for σ and the rest.
        weight_decay: AdamW's; of the value head in whitened coordinates.
        spread_prior: variance over the states that the prior of log σ gives it, for ``mle`` and from pairs alone; inf
            for none.
        mean_prior: likewise of the reward, from pairs alone.
        holdout: share of the rows kept out of training; of the weights at each twentieth of the steps those with the
            least loss on them are kept. 0 trains on all rows and keeps the last weights.
        seed: of the rows kept out, the mini-batches and sampled rewards.
    """

    steps: int = 1000
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.0
    spread_prior: float = 0.1
    mean_prior: float = 1.0
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, COUNT, "steps", "batch_size", expected="a positive whole number")
        check_numbers(self, Within(above=0), "lr", expected="a positive finite number")
        check_numbers(self, Within(least=0), "weight_decay")
        unbounded = Within(above=0, finite=False)
        check_numbers(self, unbounded, "spread_prior", "mean_prior", expected="a positive number, or inf")
        check_numbers(self, Within(least=0, below=1), "holdout", expected="a number in [0, 1)")
        check_numbers(self, SEED, "seed")


def train(
    parameters: Iterable[Tensor],
    count: int,
    loss: Callable[[Tensor], Tensor],
    options: FitOptions,
    progress: Steps | None = None,
    group: Tensor | None = None,
) -> None:
    """Train parameters in place by AdamW over mini-batches of ``count`` rows.

    Args:
        parameters: on one device.
        count: of the rows.
        loss: of rows, given by their numbers.
        options: of the steps; with a ``holdout`` the weights of least loss on the rows kept out are what stays.
        progress: called with (steps done, steps in all), a twentieth of them at a time.
        group: (count,) of each row; rows of one group are kept out together.

    Raises:
        NonFiniteError: the loss on the rows kept out was finite at no check.
    """
    parameters = list(parameters)
    device = parameters[0].device
    # With β₂ = 0.999 the first gradients, which go as exp(−2 log σ), would set the pace of all that follow.
    adam = Adam(parameters, options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay)
    generator = torch.Generator().manual_seed(options.seed + 1)
    held, rows = split_rows(count, options, group)
    held, split = held.to(device), len(held)
    batch, every = min(options.batch_size, len(rows)), max(options.steps // _CHECKS, 1)
    order, best, kept = torch.empty(0, dtype=torch.long), math.inf, [p.detach().clone() for p in parameters]
    for step in range(1, options.steps + 1):
        if len(order) < batch:
            order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
        at, order = order[:batch].to(device), order[batch:]
        gradients = torch.autograd.grad(loss(at), parameters)
        adam.step(gradients, cosine_rate(options.lr, step - 1, options.steps))
        told = step % every == 0 or step == options.steps
        if told and progress is not None:
            progress(step, options.steps)
        if split and told:
            with torch.no_grad():
                value = float(loss(held))
            if value < best:
                best, kept = value, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, one in zip(parameters, kept, strict=True):
            if split:
                parameter.copy_(one)
    if split:
        finite_loss(best)


def split_rows(count: int, options: FitOptions, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rows kept out, rows to train on), by the seed; whole groups, as many as stay within the share."""
    generator = torch.Generator().manual_seed(options.seed)
    if group is None:
        rows = torch.randperm(count, generator=generator)
        split = int(options.holdout * count)
        return rows[:split], rows[split:]
    _, number, sizes = group.cpu().unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(sizes), generator=generator)
    out = order[sizes[order].cumsum(0) <= options.holdout * count]
    held = torch.isin(number, out)
    mixed = torch.randperm(count, generator=generator)
    return mixed[held[mixed]], mixed[~held[mixed]]


class seeded_dropout:  # noqa: N801
    """Torch's global generator seeded inside, and as it was behind: dropout takes no generator of its own."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=[])
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        self._fork.__exit__(None, None, None)


def finite_loss(value: float) -> float:
    """A loss; raises NonFiniteError where training diverged."""
    if not math.isfinite(value):
        raise NonFiniteError(f"training: got a loss of {value}, expected a finite one. Lower lr, or set weight_decay")
    return value
