"""The tensors a frozen head serves with, and their layout: what every backend of ``rmcore.ops`` reads.

Two parts, because the posterior is fitted with the *frozen, rounded* features so that it is exact for what serves:
:class:`FeatureMap` exists first (design sections 2.1 and 2.2), :class:`HeadWeights` adds β and the triangular factor.

Serving features are the unscaled ``c``: ``cos(2π t)`` with the phase t in turns, or z itself for linear features;
``φ = feature_scale · c``. β and U are stored for ``c``, so no kernel multiplies by κ √(2/D). ``hidden`` is multiplied
by ``input_scale`` (a power of two, undone in the weights) before it is rounded to 16 bits, so massive activations fit.

int8 maps hold whole numbers and a factor for each row of projection and U (:mod:`rmcore.ops.quantize`), and take
``hidden`` through ``(x − hidden_shift) · hidden_scale`` first.

The tensors are never written after construction; ``cache`` is where a backend keeps its own re-packed form of them.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from rmcore._base.errors import FactorizationError, reject
from rmcore.ops import reference
from rmcore.ops.quantize import dequantize_rows, quantize_rows
from rmcore.ops.reference import TILE, Activation

__all__ = [
    "SERVING_DTYPES",
    "FeatureMap",
    "HeadWeights",
    "default_dtype",
    "from_handle",
    "power_of_two_scale",
    "register",
]

_handles: weakref.WeakValueDictionary[int, Handled] = weakref.WeakValueDictionary()
_next_handle = itertools.count(1)


class Handled(Protocol):
    """Weights that a compiled graph can name."""

    @property
    def handle(self) -> int: ...


def register(weights: Handled) -> None:
    """Give new weights a handle, and keep it as long as they live."""
    handle = next(_next_handle)
    object.__setattr__(weights, "handle", handle)
    _handles[handle] = weights


def from_handle(handle: int) -> Handled:
    """The live weights with this handle: how registered operators name weights in a compiled graph.

    Raises InputError where they are gone: a compiled function must not outlive the head it was compiled with.
    """
    weights = _handles.get(handle)
    if weights is None:
        reject("handle", handle, "the handle of weights that are still alive")
    return weights


SERVING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The serving dtype of a device: fp16 on GPUs and on CPUs with fp16 arithmetic, bf16 on CPUs with only bf16 dots.

    fp16 is several times more accurate at the same size, since features and factor are bounded; a CPU that multiplies
    bf16 but not fp16 natively is twice as fast in bf16, which is accurate enough (relative error of u below 1e-3).
    """
    if torch.device(device).type != "cpu":
        return torch.float16
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capability.get("avx512_fp16") or capability.get("amx_fp16"):
        return torch.float16
    return torch.bfloat16 if capability.get("avx512_bf16") or capability.get("amx_bf16") else torch.float16


def power_of_two_scale(largest: float, limit: float) -> float:
    """The largest power of two ≤ 1 that brings ``largest`` to at most ``limit``; exact to multiply by and to undo."""
    if not math.isfinite(largest):
        reject("largest", largest, "a finite magnitude")
    return 1.0 if largest <= limit else 2.0 ** -math.ceil(math.log2(largest / limit))


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """x (B, h) → c (B, D), frozen.

    Folded (``layer_weight is None``): t = (s x) projectionᵀ + phase with projection (D, h) = Ω W̄ / (2πℓ s).
    Unfolded (tanh or layer norm between): z = layernorm(act((s x) layer_weightᵀ + layer_bias)), then
    t = z projectionᵀ + phase with projection (D, m). ``projection is None`` (linear features without a layer): c = s x.

    Attributes:
        features: ``rff`` (c = cos 2πt) or ``linear`` (c = t).
        projection: (D, h or m), serving dtype, contiguous.
        phase: (D,) float32, turns for rff, plain bias for linear; None with no projection.
        layer_weight: (m, h) serving dtype, or None.
        layer_bias: (m,) float32, or None.
        hidden_size: h.
        num_features: D.
        dtype: serving dtype; what hidden rows and c are rounded to by the 16-bit backends.
        input_scale: s, a power of two.
        feature_scale: φ = feature_scale · c.
        projection_scale: (D,) float32 factors of an int8 projection's rows.
        hidden_shift: (h,) float32 taken from hidden rows first, int8 only, or None.
        hidden_scale: (h,) float32 powers of two multiplied into them then; goes with ``hidden_shift``.
    """

    features: Literal["rff", "linear"]
    projection: Tensor | None
    phase: Tensor | None
    layer_weight: Tensor | None
    layer_bias: Tensor | None
    activation: Activation
    layernorm: bool
    hidden_size: int
    num_features: int
    dtype: torch.dtype
    input_scale: float = 1.0
    feature_scale: float = 1.0
    projection_scale: Tensor | None = None
    hidden_shift: Tensor | None = None
    hidden_scale: Tensor | None = None
    cache: dict[str, object] = field(default_factory=dict, init=False, repr=False)
    handle: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        register(self)

    @property
    def folded(self) -> bool:
        """True where one product takes hidden rows to phases."""
        return self.layer_weight is None

    @property
    def empty(self) -> bool:
        """True for a map without tensors, which runs on any device."""
        return self.projection is None and self.layer_weight is None

    @property
    def device(self) -> torch.device:
        """Where the tensors live; CPU for a map without tensors."""
        tensor = self.projection if self.projection is not None else self.layer_weight
        return torch.device("cpu") if tensor is None else tensor.device

    @cached_property
    def _float(self) -> tuple[Tensor | None, Tensor | None]:
        # The torch backend multiplies in float32; upcasting 16-bit weights on every call would cost more than the call.
        projection = self.projection
        if projection is not None and self.projection_scale is not None:
            projection = dequantize_rows(projection, self.projection_scale)
        return (
            None if projection is None else projection.float(),
            None if self.layer_weight is None else self.layer_weight.float(),
        )

    def dequantized(self) -> FeatureMap:
        """The float32 map with the same c, for passes without an int8 kernel; itself where it is not int8.

        Not kept: it is four times as large. Who makes several passes holds on to it.
        """
        if self.dtype != torch.int8:
            return self
        assert self.projection is not None
        assert self.projection_scale is not None
        assert self.phase is not None
        projection = self.projection.double() * self.projection_scale.double()[:, None]
        phase = self.phase.double()
        if self.hidden_shift is not None and self.hidden_scale is not None:
            projection = projection * self.hidden_scale.double()
            phase = phase - projection @ (self.hidden_shift.double() * self.input_scale)
        return replace(
            self,
            projection=projection.float(),
            phase=(phase - phase.floor()).float(),
            dtype=torch.float32,
            projection_scale=None,
            hidden_shift=None,
            hidden_scale=None,
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """c (..., D) in float32, or float64 for float64 rows, with ordinary torch operations."""
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        x = hidden.to(compute)
        if self.hidden_shift is not None and self.hidden_scale is not None:
            x = (x - self.hidden_shift.to(compute)) * self.hidden_scale.to(compute)
        x = x * self.input_scale
        projection, layer = (None if t is None else t.to(compute) for t in self._float)
        if layer is not None:
            bias = None if self.layer_bias is None else self.layer_bias.to(compute)
            x = reference.normalized_layer(x, layer, bias, activation=self.activation, layernorm=self.layernorm)
        if projection is None:
            return x
        assert self.phase is not None
        if self.features == "linear":
            return x @ projection.mT + self.phase.to(compute)
        return reference.phase_features(x, projection, self.phase.to(compute))

    def to(self, device: torch.device | str) -> FeatureMap:
        """The same map on another device."""
        return self._with({name: t.to(device) for name, t in self.tensors().items()})

    def clone(self) -> FeatureMap:
        """The same map in memory of its own."""
        return self._with({name: t.clone() for name, t in self.tensors().items()})

    def _with(self, tensors: dict[str, Tensor]) -> FeatureMap:
        return replace(self, **tensors)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it holds, by field name."""
        names = (
            "projection",
            "phase",
            "layer_weight",
            "layer_bias",
            "projection_scale",
            "hidden_shift",
            "hidden_scale",
        )
        return {name: t for name in names if (t := getattr(self, name)) is not None}


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """A feature map with β and the posterior's triangular factor: all that ``score`` reads.

    Attributes:
        map: the :class:`FeatureMap`.
        beta: (D,) float32 for c: g = beta·c + beta0.
        beta0: logit offset.
        factor: packed lower tiles (n(n+1)/2, 128, 128) of U for c, times a power of two, serving dtype.
        factor_scale: v = factor_scale · ‖factor c‖² undoes that power of two.
        amplitude: a of u = √(1 + a v).
        factor_row_scale: (D,) float32 factors of an int8 U's rows; its tiles then leave out the diagonal, which is far
            larger than the rest of a row and would leave it no digits.
        factor_diagonal: (D,) float32 diagonal of an int8 U.
    """

    map: FeatureMap
    beta: Tensor
    beta0: float
    factor: Tensor
    factor_scale: float
    amplitude: float
    factor_row_scale: Tensor | None = None
    factor_diagonal: Tensor | None = None
    cache: dict[str, object] = field(default_factory=dict, init=False, repr=False)
    handle: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        register(self)

    @classmethod
    def build(
        cls, feature_map: FeatureMap, beta: Tensor, beta0: float, factor: Tensor, amplitude: float
    ) -> HeadWeights:
        """From β (D,) and U (D, D) for φ, in float64: folds ``feature_scale`` in, scales, rounds and packs.

        Raises FactorizationError where U does not fit the serving dtype's range.
        """
        s = feature_map.feature_scale
        u = factor.double() * s
        largest = float(u.abs().max())
        # Rows of U hold values across many magnitudes. Centring the largest at 2^10 keeps all that matter out of fp16's
        # subnormals (below 6e-5), and sums of squares of D products stay far inside float32.
        exponent = 10 - math.frexp(largest)[1] if largest > 0 and math.isfinite(largest) else 0
        u = torch.ldexp(u, torch.tensor(exponent, device=u.device))
        row_scale = diagonal = None
        if feature_map.dtype == torch.int8 and math.isfinite(largest):
            diagonal = u.diagonal().float()
            u, row_scale = quantize_rows(u.tril(-1))
        packed = reference.pack_lower(u.to(feature_map.dtype), TILE)
        if not math.isfinite(largest) or not bool(packed.isfinite().all()):
            raise FactorizationError(
                f"factor: got values that {feature_map.dtype} cannot hold (largest {largest:.3g}), expected a finite "
                "triangular factor. Raise the ridge"
            )
        return cls(
            map=feature_map,
            beta=(beta.double() * s).float(),
            beta0=float(beta0),
            factor=packed,
            factor_scale=2.0 ** (-2 * exponent),
            amplitude=float(amplitude),
            factor_row_scale=row_scale,
            factor_diagonal=diagonal,
        )

    @property
    def hidden_size(self) -> int:
        """h."""
        return self.map.hidden_size

    @property
    def num_features(self) -> int:
        """D."""
        return self.map.num_features

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        return self.map.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.beta.device

    @cached_property
    def dense_factor(self) -> Tensor:
        """U for c as a dense float32 (D, D), for the torch backend; made on first use and kept."""
        factor = reference.unpack_lower(self.factor, self.num_features).float()
        if self.factor_row_scale is not None and self.factor_diagonal is not None:
            factor = dequantize_rows(factor, self.factor_row_scale) + torch.diag(self.factor_diagonal)
        return factor * math.sqrt(self.factor_scale)

    def to(self, device: torch.device | str, feature_map: FeatureMap | None = None) -> HeadWeights:
        """The same weights on another device; ``feature_map`` is their map, where it is there already."""
        return self._with(feature_map or self.map.to(device), lambda tensor: tensor.to(device))

    def clone(self) -> HeadWeights:
        """The same weights in memory of their own."""
        return self._with(self.map.clone(), Tensor.clone)

    def _with(self, feature_map: FeatureMap, change: Callable[[Tensor], Tensor]) -> HeadWeights:
        return replace(self, map=feature_map, **{name: change(tensor) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it holds beside its map's, by field name."""
        names = ("beta", "factor", "factor_row_scale", "factor_diagonal")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def stored_tensors(self) -> dict[str, Tensor]:
        """The same by the names they have on disk, where ``beta`` is the posterior's float64 β for φ."""
        return {"serving_beta" if name == "beta" else name: tensor for name, tensor in self.tensors().items()}

    def with_stored(self, tensors: Mapping[str, Tensor], factor_scale: float) -> HeadWeights:
        """The same head with other serving tensors, by the names of :meth:`stored_tensors`."""
        fields = {name: tensors["serving_beta" if name == "beta" else name] for name in self.tensors()}
        return replace(self, factor_scale=factor_scale, **fields)  # type: ignore[arg-type]

    def nbytes(self) -> int:
        """Bytes of the weights a full scoring pass reads."""
        tensors = [*self.map.tensors().values(), *self.tensors().values()]
        return sum(t.numel() * t.element_size() for t in tensors)
