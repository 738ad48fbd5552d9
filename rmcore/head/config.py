"""What an SNGP head is made of: :class:`HeadConfig`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, SEED, Within, check_numbers
from rmcore.ops import reference
from rmcore.ops.pair_layout import PairMode
from rmcore.ops.reference import Activation, Likelihood, OrderMean

__all__ = ["HeadConfig", "PairMode"]


@dataclass(frozen=True)
class HeadConfig:
    """What a head is, all of it JSON.

    Attributes:
        hidden_size: h of the hidden states.
        num_features: D. With linear features it is the width of z and may be left at 0.
        mode: ``difference`` (one hidden row a response) or ``concat`` (one a pair).
        features: ``rff`` or ``linear``.
        layer_size: m, the width of the spectral-normalised layer; None for no layer (z = x).
        norm_bound: c, the bound on the layer's spectral norm.
        activation: non-linearity after the layer, ``none`` or ``tanh``.
        layernorm: normalise z.
        orthogonal: draw Ω in orthogonal blocks.
        kernel_scale: κ; the kernel's variance is κ².
        length_scale: ℓ; None takes ``length_scale_factor`` times the median distance when fitting.
        length_scale_factor: multiple of the median distance.
        ridge: s, the prior precision of β.
        likelihood: of the posterior, ``logistic`` or ``gaussian``.
        amplitude: a of u = √(1 + a v); None takes π/8, the mean-field value (κ² is already in v).
        seed: of Ω, b and the layer's initial weights.
        row_ridge: s of the row posterior (:mod:`rmcore.head.rows`), in units of its prior; None for a head without one.
            Difference mode only: None in concat mode, whose v measures distance by itself.
        order_mean: what is averaged over the two orders of a pair in concat mode, ``logits`` or ``probabilities``.

    Raises InputError for a word that is none of these, a size below 1, and a number that is not finite and positive.
    """

    hidden_size: int
    num_features: int = 1024
    mode: PairMode = "difference"
    features: Literal["rff", "linear"] = "rff"
    layer_size: int | None = None
    norm_bound: float = 0.95
    activation: Activation = "none"
    layernorm: bool = False
    orthogonal: bool = False
    kernel_scale: float = 1.0
    length_scale: float | None = None
    length_scale_factor: float = 1.0
    ridge: float = 1.0
    likelihood: Likelihood = "logistic"
    amplitude: float | None = None
    seed: int = 0
    row_ridge: float | None = 1e-2
    order_mean: OrderMean = "logits"

    def __post_init__(self) -> None:
        choices = {
            "mode": ("difference", "concat"),
            "features": ("rff", "linear"),
            "activation": ("none", "tanh"),
            "likelihood": ("logistic", "gaussian"),
            "order_mean": ("logits", "probabilities"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                reject(name, repr(getattr(self, name)), f"one of {', '.join(allowed)}")
        if self.features == "linear":
            object.__setattr__(self, "num_features", self.layer_size or self.hidden_size)
        if self.mode == "concat":
            object.__setattr__(self, "row_ridge", None)
        check_numbers(self, COUNT, "hidden_size", "num_features", "layer_size", expected="a positive integer")
        scales = ("norm_bound", "kernel_scale", "length_scale", "length_scale_factor", "ridge", "row_ridge")
        check_numbers(self, Within(above=0), *scales, expected="a positive finite number")
        check_numbers(self, Within(least=0), "amplitude", expected="a non-negative finite number or None")
        check_numbers(self, SEED, "seed")
        if self.layer_size is None and (self.activation != "none" or self.layernorm):
            reject("activation, layernorm", (self.activation, self.layernorm), "none, False where layer_size is None")

    @property
    def resolved_amplitude(self) -> float:
        """``a`` of u = √(1 + a v), with the default filled in."""
        return reference.mean_field_amplitude() if self.amplitude is None else self.amplitude

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without what older heads did not have, so that those keep their identity."""
        values = asdict(self)
        if self.order_mean == "logits":
            del values["order_mean"]
        if self.row_ridge is None:
            del values["row_ridge"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadConfig:
        """From :meth:`to_dict`; an unknown key is rejected by name. Without ``row_ridge`` there is no row posterior."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            reject("head config", f"unknown keys {sorted(unknown)}", "keys of HeadConfig")
        return cls(**{"row_ridge": None, **values})
