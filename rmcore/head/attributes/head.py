"""The multi-attribute head: a probabilistic value head and the weights that make one reward of it (URM, QRM, PURM)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, check_numbers
from rmcore.head.attributes.gating import GateConfig, GatingNetwork
from rmcore.head.attributes.losses import quantile_levels
from rmcore.head.attributes.scores import AttributeScores
from rmcore.head.attributes.serving import weights_of
from rmcore.ops import score_attributes

__all__ = ["HELPSTEER2", "URM_WEIGHTS", "AttributeConfig", "AttributeHead"]

HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""The attributes of HelpSteer2, in the order of its columns and of URM's outputs."""
URM_WEIGHTS = (0.3, 0.74, 0.46, 0.47, -0.33)
"""The fixed weights of LxzGordon/URM-LLaMa-3-8B."""

_LOG_STD_START = 0.25


@dataclass(frozen=True)
class AttributeConfig:
    """What an attribute head is made of. PURM is one ``normal`` attribute with the weight 1.

    Attributes:
        hidden_size: h.
        names: of the A attributes.
        spread: ``normal``: a mean and a log σ an attribute (URM, PURM); ``quantiles``: ``quantiles`` an attribute,
            whose mean counts (QRM).
        quantiles: Q.
        weights: A numbers: the reward's fixed weights, or where a gate starts. None: 1/A each for a head without gate,
            a random start for a gate.
        gate: weights that the state decides; None for fixed ones.
    """

    hidden_size: int
    names: tuple[str, ...] = HELPSTEER2
    spread: Literal["normal", "quantiles"] = "normal"
    quantiles: int = 19
    weights: tuple[float, ...] | None = None
    gate: GateConfig | None = None

    def __post_init__(self) -> None:
        check_numbers(self, COUNT, "hidden_size", "quantiles", expected="a positive whole number")
        if not self.names or len(set(self.names)) != len(self.names) or not all(self.names):
            reject("names", list(self.names), "at least one name, each once")
        if self.spread not in ("normal", "quantiles"):
            reject("spread", repr(self.spread), "'normal' or 'quantiles'")
        if self.spread == "quantiles":
            quantile_levels(self.quantiles)
        count = len(self.names)
        if self.weights is not None and (len(self.weights) != count or not all(math.isfinite(w) for w in self.weights)):
            reject("weights", list(self.weights), f"{count} finite numbers, or None")

    @property
    def per(self) -> int:
        """Outputs an attribute."""
        return 2 if self.spread == "normal" else self.quantiles

    def to_dict(self) -> dict[str, Any]:
        """JSON values that :meth:`from_dict` reads."""
        gate = None if self.gate is None else dict(vars(self.gate))
        weights = None if self.weights is None else list(self.weights)
        return {**vars(self), "names": list(self.names), "weights": weights, "gate": gate}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AttributeConfig:
        """The inverse of :meth:`to_dict`. Raises InputError or TypeError for other values."""
        gate, weights = values.get("gate"), values.get("weights")
        changes = {
            "names": tuple(values["names"]),
            "weights": None if weights is None else tuple(map(float, weights)),
            "gate": None if gate is None else GateConfig(**gate),
        }
        return cls(**{**values, **changes})


class AttributeHead(nn.Module):
    """Linear(h, A · per, bias=False), seen as (N, A, per), and the weights of its means.

    Args:
        config: what it is made of.
        seed: of the random start: heads of other seeds are members of an ensemble.
        state_scale: root mean square of the states' entries: means start at a variance of about 1 for
            such states, log σ at 1/16.
    """

    weights: Tensor

    def __init__(self, config: AttributeConfig, *, seed: int = 0, state_scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        if not (math.isfinite(state_scale) and state_scale > 0):
            reject("state_scale", state_scale, "a positive finite number")
        generator = torch.Generator().manual_seed(seed)
        count, h = len(config.names), config.hidden_size
        self.value: nn.Linear = nn.utils.skip_init(nn.Linear, h, count * config.per, bias=False)
        with torch.no_grad():
            self.value.weight.normal_(0.0, h**-0.5 / state_scale, generator=generator)
            if config.spread == "normal":
                self.value.weight[1::2] *= _LOG_STD_START  # σ is the exponential: it would start with heavy tails
        fixed = config.weights or (1 / count,) * count
        self.register_buffer("weights", torch.tensor(fixed, dtype=torch.float32), persistent=False)
        self.gate: GatingNetwork | None = None
        if config.gate is not None:
            self.gate = GatingNetwork(config.gate, h, count, prior=config.weights, generator=generator)

    def outputs(self, hidden: Tensor) -> Tensor:
        """(N, A, per) of states (N, h). Raises InputError for another shape."""
        self.check_states("hidden", hidden)
        outputs: Tensor = self.value(hidden.to(self.value.weight))
        return outputs.view(len(hidden), len(self.config.names), self.config.per)

    def means(self, hidden: Tensor) -> Tensor:
        """(N, A) means."""
        return self.means_of(self.outputs(hidden))

    def means_of(self, outputs: Tensor) -> Tensor:
        """(N, A) of :meth:`outputs`."""
        return outputs[..., 0] if self.config.spread == "normal" else outputs.mean(-1)

    def attribute_weights(self, hidden: Tensor, gate_hidden: Tensor | None = None) -> Tensor:
        """(N, A) weights; ``gate_hidden`` (N, h) are the gate's states where they are others, as a prompt's are."""
        self.check_rows(hidden, gate_hidden)
        if self.gate is None:
            return self.weights.to(self.value.weight).expand(len(hidden), -1)
        weights: Tensor = self.gate((hidden if gate_hidden is None else gate_hidden).to(self.value.weight))
        return weights

    def forward(self, hidden: Tensor, gate_hidden: Tensor | None = None) -> Tensor:
        """(N,) rewards Σ_k w_k(x) μ_k, with their graph."""
        return (self.attribute_weights(hidden, gate_hidden) * self.means(hidden)).sum(1)

    @torch.no_grad()
    def scores(
        self, hidden: Tensor, gate_hidden: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> AttributeScores:
        """All that the head says of states (N, h): means, weights, spread; see :class:`AttributeScores`.

        ``aleatoric`` of it is URM's Σ σ², ``score_variance`` the reward's own Σ w² σ². Computed by
        :func:`rmcore.ops.score_attributes` with large weights in ``dtype``: None keeps the head's own, 16 bits halve
        what is read. A gate's dropout is not applied.
        """
        self.check_rows(hidden, gate_hidden)
        weight = self.value.weight
        found = score_attributes(
            hidden.to(weight), weights_of(self, [self], dtype),
            gate_hidden=None if gate_hidden is None else gate_hidden.to(weight),
        )  # fmt: skip
        return self.scores_of(found.outputs[:, 0], found.weights[:, 0])

    def scores_of(self, outputs: Tensor, weights: Tensor) -> AttributeScores:
        """:meth:`scores` of the value head's outputs (N, A · per) and the weights (N, A)."""
        outputs = outputs.double().view(len(outputs), len(self.config.names), self.config.per)
        means, weights = self.means_of(outputs).cpu(), weights.double().cpu()
        if self.config.spread == "normal":
            return AttributeScores(self.config.names, means, weights, attribute_std=outputs[..., 1].exp().cpu())
        levels = quantile_levels(self.config.quantiles)
        return AttributeScores(self.config.names, means, weights, quantiles=outputs.cpu(), levels=levels)

    def check_states(self, name: str, hidden: Tensor) -> None:
        """Raise InputError for states that are not (N, h)."""
        if hidden.dim() != 2 or hidden.shape[1] != self.config.hidden_size:
            reject(name, f"shape {tuple(hidden.shape)}", f"(N, {self.config.hidden_size})")

    def check_rows(self, hidden: Tensor, gate_hidden: Tensor | None) -> None:
        """Raise InputError for states, or those of a gate, that do not fit the head or one another."""
        self.check_states("hidden", hidden)
        if gate_hidden is None:
            return
        if self.gate is None:
            reject("gate_hidden", "states", "None: the head has no gate")
        self.check_states("gate_hidden", gate_hidden)
        if len(gate_hidden) != len(hidden):
            reject("gate_hidden", f"{len(gate_hidden)} rows", f"{len(hidden)}, one a response")
