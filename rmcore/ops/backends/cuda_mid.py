"""What 65 to 512 rows of a folded 16-bit head are to the ``cuda`` backend: one persistent launch, on Hopper alone.

:mod:`rmcore.ops.backends.cuda` asks it and launches, where its ``MID`` says so; csrc/cuda/mid.h has the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rmcore.ops.backends.cuda_int8 import aligned
from rmcore.ops.weights import HeadWeights

__all__ = ["LEAST_ROWS", "MOST_ROWS", "Prepared", "declines", "in_place", "prepare", "serving_rows"]

LEAST_ROWS, MOST_ROWS = 65, 512
"""Rows of one call. Fewer go to the latency kernels."""
_CAPABILITY = (9, 0)
_CACHE = "cuda_mid"


@dataclass
class Prepared:
    """A head with the tensor maps of its weights, and plans by device and rows."""

    head: Any
    plans: dict[tuple[int, int], Any] = field(default_factory=dict)

    def layout(self, native: Any, rows: int, index: int) -> Any:
        """The native plan of a batch; its ``columns`` are 0 where the device does not hold it."""
        found = self.plans.get((index, rows))
        if found is None:
            found = self.plans[index, rows] = native.MidPlan(self.head, rows, index)
        return found


def prepare(native: Any, weights: HeadWeights, head: Any) -> Prepared:
    """The head in ``weights.cache``; ``head`` is what the latency kernels take. The native module's errors go on."""
    found = weights.cache.get(_CACHE)
    if not isinstance(found, Prepared):
        # Of threads that meet at a new head the first one's maps stay, and are what all of them use.
        found = weights.cache.setdefault(_CACHE, Prepared(native.MidHead(head)))
        assert isinstance(found, Prepared)
    return found


def declines(native: Any, weights: HeadWeights) -> str | None:
    """Why a batch of this head cannot go to the persistent launch whatever its size, or None."""
    if weights.map.layer_weight is not None or weights.map.projection is None:
        return "the launch for 65 to 512 rows starts from a folded projection"
    if native is None or weights.device.type != "cuda":
        return None
    if not hasattr(native, "score_mid"):
        return "rmcore._cuda is from an older build without the launch for 65 to 512 rows; install again"
    index = torch.cuda.current_device() if weights.device.index is None else weights.device.index
    capability = native.properties(index)["capability"]
    if capability != _CAPABILITY:
        return f"compute capability {'.'.join(map(str, capability))}, the launch for 65 to 512 rows is for 9.0 alone"
    return None


def in_place(hidden: Tensor, weights: HeadWeights) -> bool:
    """Whether rows are read where they lie: in the head's dtype, unscaled, from multiples of 16 bytes on."""
    return hidden.dtype == weights.dtype and weights.map.input_scale == 1.0 and aligned(hidden) is hidden


def serving_rows(hidden: Tensor, weights: HeadWeights) -> Tensor:
    """Rows as the launch reads them; others than :func:`in_place` are copied first, which is a launch or two more."""
    if hidden.dtype != weights.dtype or weights.map.input_scale != 1.0:
        hidden = (hidden.float() * weights.map.input_scale).to(weights.dtype)
    return aligned(hidden)
