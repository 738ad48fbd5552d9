r"""Attribute heads as the kernels take them, and the formula of ``score_attributes`` in plain torch (design 6).

M heads over the same states x (N, h); each has A attributes and, where there is a gate, its network of L hidden layers:

    o = V x                       (A, per)   normal: mean μ_k and log σ_k; quantiles: q_k1 … q_kQ, μ_k their mean
    z = x;   z ← act(W_l z + b_l),  l = 1 … L      act = SELU, or ReLU before a softmax
    w = W z + b                   SELU;        softmax((W z + b) / temperature) · scale        ReLU
    w fixed                       without a gate
    r = Σ_k w_k μ_k               s = Σ_k w_k² σ_k²  (quantiles: the variance of Σ_k w_k q_kj over j)

and of the M heads together: mean r, mean s, the variance of r (over M − 1; 0 for one head), the gap max r − min r, and
max ‖Σ‖_F = max √(Σ_k σ_k⁴) (NaN for quantiles, which have no covariance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.ops.weights import register

__all__ = ["SUMMARY", "AttributeWeights", "reference_scores", "summarize"]

SUMMARY = ("mean", "variance", "epistemic", "gap", "norm")
"""The rows of the (5, N) result."""


@dataclass(frozen=True, eq=False)
class AttributeWeights:
    """M heads, frozen.

    Attributes:
        value: (M, A · per, h) in the serving dtype, the outputs of an attribute side by side.
        spread: ``normal`` (per = 2) or ``quantiles``.
        per: outputs an attribute.
        fixed: (M, A) weights where there is no gate, or None.
        layers: of the gates, (M, n_l, n_{l−1}) each, n_0 = h, in the serving dtype.
        biases: (M, n_l) each.
        last: (M, A, n_L), the gates' output layer; not rounded, since it is a thousandth of the rest.
        last_bias: (M, A).
        softmax: ReLU between the layers and a softmax behind them, not SELU.
        temperature: of the softmax.
        scale: (M,) behind the softmax, or None.
        input_scale: a power of two that hidden rows are multiplied with, undone in ``value`` and the first layer, to
            bring massive activations into fp16's range.
    """

    value: Tensor
    spread: Literal["normal", "quantiles"]
    per: int
    fixed: Tensor | None = None
    layers: tuple[Tensor, ...] = ()
    biases: tuple[Tensor, ...] = ()
    last: Tensor | None = None
    last_bias: Tensor | None = None
    softmax: bool = False
    temperature: float = 1.0
    scale: Tensor | None = None
    input_scale: float = 1.0
    cache: dict[str, object] = field(default_factory=dict, init=False, repr=False)
    handle: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        register(self)

    def _check(self) -> None:
        if self.spread not in ("normal", "quantiles") or self.per < 1 or (self.spread == "normal" and self.per != 2):
            reject("spread", f"{self.spread!r} with {self.per} outputs", "'normal' with 2, or 'quantiles'")
        if self.value.dim() != 3 or not self.value.shape[1] or self.value.shape[1] % self.per:
            reject("value", f"shape {tuple(self.value.shape)}", f"(M, A · {self.per}, h)")
        m, a = self.members, self.attributes
        if (self.fixed is None) == (self.last is None):
            reject("fixed", "weights beside a gate, or neither", "one of them")
        shapes: list[tuple[str, Tensor | None, tuple[int, ...]]] = [("fixed", self.fixed, (m, a))]
        width = self.hidden_size
        if self.last is not None:
            if not self.layers or len(self.layers) != len(self.biases):
                reject("layers", f"{len(self.layers)} beside {len(self.biases)} biases", "as many, at least one")
            for k, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
                shapes.append((f"layers[{k}]", layer, (m, layer.shape[1] if layer.dim() == 3 else 0, width)))
                shapes.append((f"biases[{k}]", bias, (m, layer.shape[1])))
                width = layer.shape[1]
            shapes += [("last", self.last, (m, a, width)), ("last_bias", self.last_bias, (m, a))]
            shapes.append(("scale", self.scale, (m,)))
        for name, tensor, shape in shapes:
            if tensor is None and name in ("fixed", "scale"):
                continue
            if tensor is None or tensor.shape != shape or not tensor.is_contiguous():
                reject(name, None if tensor is None else tuple(tensor.shape), f"contiguous {shape}")

    @classmethod
    def build(
        cls,
        value: Tensor,
        *,
        spread: Literal["normal", "quantiles"] = "normal",
        per: int = 2,
        dtype: torch.dtype | None = None,
        fixed: Tensor | None = None,
        layers: tuple[Tensor, ...] = (),
        biases: tuple[Tensor, ...] = (),
        last: Tensor | None = None,
        last_bias: Tensor | None = None,
        softmax: bool = False,
        temperature: float = 1.0,
        scale: Tensor | None = None,
        input_scale: float = 1.0,
    ) -> AttributeWeights:
        """Of tensors in any dtype: large ones rounded to ``dtype`` (None: the value's own), small ones in float32.

        Raises InputError for shapes that do not fit, or a weight that leaves the dtype's range.
        """
        dtype = value.dtype if dtype is None else dtype
        small = torch.promote_types(dtype, torch.float32)

        def kept(tensor: Tensor, kind: torch.dtype, name: str, undone: float = 1.0) -> Tensor:
            made = (tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) / undone).to(kind).contiguous()
            if not bool(made.isfinite().all()):
                reject(name, f"a value that {kind} cannot hold, or that is not finite", "finite weights")
            return made

        def optional(tensor: Tensor | None, name: str) -> Tensor | None:
            return None if tensor is None else kept(tensor, small, name)

        scales = [input_scale, *[1.0] * len(layers)]
        return cls(
            kept(value, dtype, "value", input_scale),
            spread,
            per,
            optional(fixed, "fixed"),
            tuple(kept(w, dtype, f"layers[{k}]", s) for k, (w, s) in enumerate(zip(layers, scales, strict=False))),
            tuple(kept(b, small, f"biases[{k}]") for k, b in enumerate(biases)),
            optional(last, "last"),
            optional(last_bias, "last_bias"),
            softmax,
            float(temperature),
            optional(scale, "scale"),
            float(input_scale),
        )

    @property
    def members(self) -> int:
        """M."""
        return self.value.shape[0]

    @property
    def attributes(self) -> int:
        """A."""
        return self.value.shape[1] // self.per

    @property
    def hidden_size(self) -> int:
        """h."""
        return self.value.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The serving dtype."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.value.device

    @property
    def empty(self) -> bool:
        """Never: there is always a value head."""
        return False

    def to(self, device: torch.device | str) -> AttributeWeights:
        """The same heads on another device."""
        return self._with(lambda tensor: tensor.to(device))

    def clone(self) -> AttributeWeights:
        """The same heads in memory of their own."""
        return self._with(Tensor.clone)

    def _with(self, change: Callable[[Tensor], Tensor]) -> AttributeWeights:
        optional = {
            name: change(t)
            for name in ("fixed", "last", "last_bias", "scale")
            if (t := getattr(self, name)) is not None
        }
        layers, biases = (tuple(map(change, tensors)) for tensors in (self.layers, self.biases))
        return replace(self, value=change(self.value), layers=layers, biases=biases, **optional)  # type: ignore[arg-type]

    def widened(self, dtype: torch.dtype) -> AttributeWeights:
        """The same with large tensors in ``dtype`` too; kept for float32, which the torch backend computes in."""
        if self.dtype == dtype:
            return self
        kept = self.cache.get("widened") if dtype == torch.float32 else None
        if isinstance(kept, AttributeWeights):
            return kept
        made = self._with(lambda tensor: tensor.to(dtype))
        if dtype == torch.float32:
            self.cache["widened"] = made
        return made

    def nbytes(self) -> int:
        """Bytes that a scoring pass reads of the weights."""
        small = (t for t in (self.fixed, self.last, self.last_bias, self.scale) if t is not None)
        return sum(t.numel() * t.element_size() for t in (self.value, *self.layers, *self.biases, *small))


# -- the formula -------------------------------------------------------------------------------------------------------


def reference_scores(
    hidden: Tensor, weights: AttributeWeights, gate_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(5, N) :data:`SUMMARY`, (N, M, A · per) outputs of the value heads, (N, M, A) weights.

    In float32, float64 for float64 rows, whatever the weights are stored in.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    weights = weights.widened(compute)
    x = hidden.to(compute) * weights.input_scale
    outputs = torch.einsum("nh,mch->nmc", x, weights.value)
    w = _attribute_weights(x if gate_hidden is None else gate_hidden.to(compute) * weights.input_scale, weights)
    return summarize(outputs, w, weights.spread), outputs, w


def summarize(outputs: Tensor, weights: Tensor, spread: Literal["normal", "quantiles"]) -> Tensor:
    """(5, N) :data:`SUMMARY` of outputs (N, M, A · per) and weights (N, M, A)."""
    n, m, a = weights.shape
    per = outputs.view(n, m, a, -1)
    if spread == "normal":
        mean, sigma = per[..., 0], per[..., 1].exp()
        variance, norm = (weights * sigma).square().sum(-1), sigma.square().square().sum(-1).sqrt().amax(1)
    else:
        mean, variance = per.mean(-1), (weights[..., None] * per).sum(2).var(-1, correction=0)
        norm = torch.full_like(variance[:, 0], torch.nan)
    reward = (weights * mean).sum(-1)
    epistemic = reward.var(1) if m > 1 else reward[:, 0] - reward[:, 0]
    return torch.stack([reward.mean(1), variance.mean(1), epistemic, reward.amax(1) - reward.amin(1), norm])


def _attribute_weights(x: Tensor, weights: AttributeWeights) -> Tensor:
    """(N, M, A) of states (N, h), scaled already."""
    if weights.last is None or weights.last_bias is None:
        assert weights.fixed is not None
        return weights.fixed.expand(len(x), -1, -1).contiguous()
    z = x.expand(weights.members, -1, -1)
    for layer, bias in zip(weights.layers, weights.biases, strict=True):
        z = torch.baddbmm(bias[:, None], z, layer.mT)
        # SELU of −∞ and ReLU of NaN are numbers: what is not finite must not become a confident answer.
        z = (z.relu() if weights.softmax else torch.nn.functional.selu(z)) + (z - z)
    z = torch.baddbmm(weights.last_bias[:, None], z, weights.last.mT).transpose(0, 1)
    if not weights.softmax:
        return z.contiguous()
    z = (z / weights.temperature).softmax(-1)
    return z if weights.scale is None else z * weights.scale[:, None]
