"""Attribute heads as :func:`rmcore.ops.score_attributes` takes them: packed once, and anew where a weight changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rmcore.head.attributes.gating import GatingNetwork
from rmcore.ops.attribute_weights import AttributeWeights

__all__ = ["Head", "alike", "serving_weights", "weights_of"]


class Head(Protocol):
    """What is read of an :class:`~rmcore.head.attributes.AttributeHead`."""

    value: nn.Linear
    weights: Tensor
    gate: GatingNetwork | None

    @property
    def config(self) -> Any:
        """An ``AttributeConfig``."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""


_kept: weakref.WeakKeyDictionary[object, tuple[object, AttributeWeights]] = weakref.WeakKeyDictionary()


def alike(heads: Sequence[Head]) -> bool:
    """Whether heads have tensors of the same shapes, dtypes and devices, so that one call can score them all."""
    first = heads[0]
    return all(
        head.config.spread == first.config.spread
        and _gate_kind(head) == _gate_kind(first)
        and [_form(t) for t in head.parameters()] == [_form(t) for t in first.parameters()]
        for head in heads[1:]
    )


def weights_of(owner: object, heads: Sequence[Head], dtype: torch.dtype | None = None) -> AttributeWeights:
    """:func:`serving_weights`, kept for as long as ``owner`` lives and no weight changes."""
    parts = [t for head in heads for t in (*head.parameters(), head.weights)]
    if any(t.is_inference() for t in parts):  # no version counter would tell of a change
        return serving_weights(heads, dtype)
    key = dtype, [(t.data_ptr(), t._version, _form(t)) for t in parts]
    found = _kept.get(owner)
    if found is None or found[0] != key:
        found = _kept[owner] = key, serving_weights(heads, dtype)
    return found[1]


def serving_weights(heads: Sequence[Head], dtype: torch.dtype | None = None) -> AttributeWeights:
    """Heads of one form (:func:`alike`) as one set of weights.

    Args:
        heads: M.
        dtype: what large weights are rounded to; None keeps theirs.

    Raises InputError for a weight that is not finite, or leaves the dtype's range.
    """

    def stacked(of: Callable[[Head], Tensor]) -> Tensor:
        return torch.stack([of(head).detach() for head in heads])

    config, gate = heads[0].config, heads[0].gate
    parts: dict[str, Any] = {"fixed": stacked(lambda head: head.weights)}
    if gate is not None:
        hidden = range(len(gate.linear_layers) - 1)
        parts = {
            "layers": tuple(stacked(lambda head, k=k: _layer(head, k).weight) for k in hidden),  # type: ignore[misc]
            "biases": tuple(stacked(lambda head, k=k: _layer(head, k).bias) for k in hidden),  # type: ignore[misc]
            "last": stacked(lambda head: _layer(head, -1).weight),
            "last_bias": stacked(lambda head: _layer(head, -1).bias),
        }
        if gate.scale is not None:
            scale = torch.stack(
                [head.gate.scale.detach()[0] for head in heads if head.gate and head.gate.scale is not None]
            )
            parts |= {"softmax": True, "temperature": gate.config.temperature, "scale": scale}
    value = stacked(lambda head: head.value.weight)
    return AttributeWeights.build(value, spread=config.spread, per=config.per, dtype=dtype, **parts)


def _layer(head: Head, k: int) -> torch.nn.Linear:
    assert head.gate is not None
    return head.gate.linear_layers[k]


def _gate_kind(head: Head) -> tuple[str, float] | None:
    return None if head.gate is None else (head.gate.config.kind, head.gate.config.temperature)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device
