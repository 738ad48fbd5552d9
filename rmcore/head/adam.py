"""Adam and AdamW by torch's functional form, which is the same arithmetic to the bit.

``torch.optim``'s classes bring torch's compiler along at their first step: 1.9 of the 3.1 processor-seconds of training
three small heads from a fresh process. Training on cached states takes about a second, so that would be most of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

__all__ = ["Adam", "cosine_rate"]


class Adam:
    """Steps of Adam (Kingma & Ba 2015), or with weight decay of AdamW (Loshchilov & Hutter 2019).

    Args:
        trained: changed in place; floats.
        rate: learning rate of steps that are not given one.
        betas: decay of the two moments.
        weight_decay: decoupled: the share of a weight, times the rate, that each step takes away.
        eps: beside the root of the second moment.
    """

    def __init__(
        self,
        trained: Iterable[Tensor],
        rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        self.trained, self.rate = list(trained), rate
        self.first = [torch.zeros_like(tensor) for tensor in self.trained]
        self.second = [torch.zeros_like(tensor) for tensor in self.trained]
        self.steps = [torch.zeros(()) for _ in self.trained]
        self._how: dict[str, Any] = {"amsgrad": False, "maximize": False, "foreach": False, "eps": eps}
        self._how |= {"beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float | None = None) -> None:
        """One step down, at ``rate`` where it is given."""
        moved = adamw if self._how["weight_decay"] else adam
        moments: Any = (self.first, self.second, [], self.steps)
        moved(self.trained, list(gradients), *moments, lr=self.rate if rate is None else rate, **self._how)


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """The learning rate of a step, from 0, of ``steps``: from ``rate`` to 0 along half a cosine."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2
