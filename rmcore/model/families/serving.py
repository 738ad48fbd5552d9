"""A published gated head as :func:`rmcore.ops.score_attributes` takes it, where its layout allows.

The kernel computes attributes o = V x and weights w from a gate of SELU layers, or of ReLU layers before a softmax.
That is URM's gated head, ArmoRM's and QRM's: of ArmoRM's and QRM's the transform matrix is multiplied behind, and QRM's
batch normalisation, which after training is z ↦ a∘z + c, is folded into the layer that follows,

    W (a∘z + c) + b = (W diag a) z + (b + W c),

in float64. LDL's bins and leaky ReLU, and value heads with layers of their own, have no kernel; a head without a gate
is linear in the states and needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rmcore.model.families.spec import Gate, Head
from rmcore.ops.attribute_weights import AttributeWeights

__all__ = ["Layer", "no_kernel", "serving_weights"]


class Layer(Protocol):
    """A linear layer and what is behind it."""

    weight: Tensor
    bias: Tensor | None
    activation: str
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None


def no_kernel(spec: Head, values: Sequence[Layer], last: Layer, gate: Sequence[Layer], *, softmax: bool) -> str | None:
    """Why no kernel computes this head; None where one does.

    Args:
        spec: the family's head.
        values: the layers before the value head's last.
        last: that one.
        gate: the gate's layers.
        softmax: whether its weights are a softmax.
    """
    if not isinstance(spec.weights, Gate):
        return "the head is linear in its last layer's input" if spec.linear else "the head has no gate"
    if values or len(spec.terms) != 1 or len(spec.terms[0][1]) != 1 or spec.terms[0][0] != 1:
        return "attributes are not linear in one state"
    if last.bias is not None:
        return "the attributes' layer has a bias"
    if spec.attributes == "bins":
        return "attributes are distributions over bins"
    wanted = "relu" if softmax else "selu"
    if len(gate) < 2 or any(layer.activation != wanted for layer in gate[:-1]):
        return f"a gate {'with' if softmax else 'without'} softmax has {wanted} in the kernel"
    return None


def serving_weights(
    spec: Head, last: Layer, gate: Sequence[Layer], *, per: int, softmax: bool, temperature: float,
    scale: Tensor | None, eps: float, dtype: torch.dtype,
) -> AttributeWeights:  # fmt: skip
    """The head's weights, large ones in ``dtype``, of a head for which :func:`no_kernel` gave None.

    Args:
        spec: the family's head.
        last: the value head's layer.
        gate: the gate's layers.
        softmax: whether its weights are a softmax.
        per: outputs an attribute.
        temperature: of the softmax.
        scale: (1,) behind it, or None.
        eps: of the batch normalisation.
        dtype: of the body's states.
    """
    layers = _without_norms(gate, eps)
    biases = [torch.zeros(len(weight)) if bias is None else bias for weight, bias in layers]
    normal = spec.attributes == "normal"
    more: dict[str, Any] = {"scale": scale.reshape(1)} if scale is not None else {}
    return AttributeWeights.build(
        last.weight[None],
        spread="normal" if normal else "quantiles",
        per=per,
        dtype=dtype,
        layers=tuple(weight[None] for weight, _ in layers[:-1]),
        biases=tuple(bias[None].to(last.weight.device) for bias in biases[:-1]),
        last=layers[-1][0][None],
        last_bias=biases[-1][None].to(last.weight.device),
        softmax=softmax,
        temperature=temperature if softmax else 1.0,
        **more,
    )


def _without_norms(gate: Sequence[Layer], eps: float) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of each layer, with the normalisation before it folded in."""
    found: list[tuple[Tensor, Tensor | None]] = []
    behind: tuple[Tensor, Tensor] | None = None
    for layer in gate:
        weight, bias = layer.weight, layer.bias
        if behind is not None:
            a, c = behind
            wide = weight.double()
            bias = (wide @ c + (0.0 if bias is None else bias.double())).float()
            weight = (wide * a).to(torch.promote_types(weight.dtype, torch.float32))
        found.append((weight, bias))
        behind = None
        if layer.norm is not None:
            gamma, beta, mean, variance = (part.double() for part in layer.norm)
            a = gamma / (variance + eps).sqrt()
            behind = a, beta - a * mean
    return found
