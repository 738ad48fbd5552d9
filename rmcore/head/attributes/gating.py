"""Attribute weights w(x) from a state: URM's network (Eq. 6) and ArmoRM's softmax gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_numbers

__all__ = ["GateConfig", "GatingNetwork"]


@dataclass(frozen=True)
class GateConfig:
    """What a gating network is made of.

    Attributes:
        kind: ``selu`` is URM's, whose outputs are the weights; ``softmax`` ArmoRM's: ReLU, softmax(outputs /
            temperature) · scale with a learned scale.
        depth: hidden layers; None for the authors' 2 and 3.
        width: of the hidden layers; None for the states' width (URM) or 1,024 (ArmoRM).
        temperature: of the softmax.
        dropout: behind hidden layers while training.
    """

    kind: Literal["selu", "softmax"] = "selu"
    depth: int | None = None
    width: int | None = None
    temperature: float = 10.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("selu", "softmax"):
            reject("kind", repr(self.kind), "'selu' or 'softmax'")
        check_numbers(self, COUNT, "depth", "width", expected="a positive whole number, or None")
        check_numbers(self, Within(above=0), "temperature", expected="a positive finite number")
        check_numbers(self, Within(least=0, below=1), "dropout", expected="a number in [0, 1)")


class GatingNetwork(nn.Module):
    """Linear layers with an activation between them: (N, h) states to (N, A) weights.

    Args:
        config: what it is made of.
        hidden_size: h.
        attributes: A.
        prior: A weights that every state has before training: the last layer starts at a weight of 0 and a bias that
            gives them. None leaves the usual random start.
        generator: of the random start, on the CPU; None takes torch's global one.

    Raises InputError for a prior of another length, not finite, or, for a softmax, not positive.
    """

    def __init__(
        self,
        config: GateConfig,
        hidden_size: int,
        attributes: int,
        *,
        prior: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        softmax = config.kind == "softmax"
        width = config.width or (1024 if softmax else hidden_size)
        widths = [hidden_size, *[width] * (config.depth or (3 if softmax else 2)), attributes]
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, n, m) for n, m in pairwise(widths))
        self.scale = nn.Parameter(torch.ones(1)) if softmax else None
        self._initialise(generator)
        if prior is not None:
            self._start_at(prior, attributes)

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        for layer in self.linear_layers:
            bound = layer.in_features**-0.5  # as torch has it
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def _start_at(self, prior: Sequence[float], attributes: int) -> None:
        if len(prior) != attributes or not all(math.isfinite(w) for w in prior):
            reject("prior", list(prior), f"{attributes} finite weights")
        last = self.linear_layers[-1]
        last.weight.zero_()
        start = torch.tensor(prior, dtype=torch.float64)
        if self.scale is not None:
            if min(prior) <= 0:
                reject("prior", list(prior), "positive weights: a softmax has no others")
            self.scale.fill_(float(start.sum()))
            start = self.config.temperature * (start / start.sum()).log()
        last.bias.copy_(start)

    def forward(self, states: Tensor) -> Tensor:
        """(N, A) weights of (N, h) states."""
        for layer in self.layers[:-1]:
            states = layer(states)
            states = states.relu() if self.scale is not None else nn.functional.selu(states)
            states = nn.functional.dropout(states, self.config.dropout, self.training)
        outputs: Tensor = self.layers[-1](states)
        return outputs if self.scale is None else (outputs / self.config.temperature).softmax(-1) * self.scale
