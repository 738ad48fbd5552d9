"""What an int8 head is to the ``cuda`` backend: one launch of the streamed kernel, up to 16 rows, Hopper and later.

:mod:`rmcore.ops.backends.cuda` asks it and launches; csrc/cuda/int8_stream.h has the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rmcore.ops.weights import HeadWeights

__all__ = ["MAX_ROWS", "Prepared", "aligned", "declines", "prepare", "unavailable"]

MAX_ROWS = 16
"""Rows of one call."""
_CAPABILITY = (9, 0)
_CACHE = "cuda_int8"


def aligned(matrix: Tensor) -> Tensor:
    """``matrix`` with rows that begin at multiples of 16 bytes and end in zeros up to the next; a copy if need be."""
    unit = 16 // matrix.element_size()
    rows, columns = matrix.shape
    in_rows = columns % unit == 0 and (rows <= 1 or matrix.stride(0) % unit == 0) and matrix.stride(1) == 1
    if in_rows and matrix.data_ptr() % 16 == 0 and (rows <= 1 or matrix.stride(0) >= columns):
        return matrix
    copy = matrix.new_zeros(rows, -(-columns // unit) * unit)
    copy[:, :columns] = matrix
    return copy


@dataclass
class Prepared:
    """A head as the native module sees it, the tensors that must live as long, and plans by padded rows."""

    head: Any
    tensors: tuple[Tensor | None, ...]
    plans: dict[int, Any] = field(default_factory=dict)

    def layout(self, native: Any, rows: int, index: int) -> Any:
        """The native plan of a batch; its ``slots`` are 0 where the shared memory does not hold it."""
        padded = 8 if rows <= 8 else 16
        found = self.plans.get(padded)
        if found is None:
            found = self.plans[padded] = native.Int8Plan(self.head, padded, index)
        return found


def unavailable(native: Any, index: int) -> str | None:
    """Why int8 heads cannot be served on device ``index``, on which 16-bit ones can, or None."""
    if not hasattr(native, "score_int8"):
        return "rmcore._cuda is from an older build; install again"
    if native.properties(index)["capability"] < _CAPABILITY:
        return "int8 heads need compute capability 9.0"
    return None


def declines(native: Any, rows: int, weights: HeadWeights) -> str | None:
    """Why a call should go elsewhere for its shape, or None."""
    if rows > MAX_ROWS:
        return f"batch of {rows} rows: of int8 heads the latency kernel serves up to {MAX_ROWS}"
    if rows and weights.device.type == "cuda" and native is not None and not torch.cuda.is_current_stream_capturing():
        index = weights.device.index or 0
        if prepare(native, weights).layout(native, rows, index).slots == 0:
            return f"h = {weights.hidden_size}, D = {weights.num_features}: no room for {rows} rows beside the weights"
    return None


def prepare(native: Any, weights: HeadWeights) -> Prepared:
    """The head in ``weights.cache``, made by its first call. The native module's errors are passed on."""
    found = weights.cache.get(_CACHE)
    if isinstance(found, Prepared):
        return found
    m = weights.map
    assert m.projection is not None
    projection, factor = aligned(m.projection), weights.factor.contiguous()
    factor = factor if factor.data_ptr() % 16 == 0 else factor.clone()
    vectors = (
        m.projection_scale, m.phase, weights.beta, weights.factor_row_scale, weights.factor_diagonal, m.hidden_shift,
        m.hidden_scale,
    )  # fmt: skip
    kept = [None if t is None else t.float().contiguous() for t in vectors]
    address = [0 if t is None else t.data_ptr() for t in kept]
    head = native.Int8Head(
        hidden_size=m.hidden_size,
        num_features=m.num_features,
        projection=projection.data_ptr(),
        projection_pitch=projection.stride(0),
        projection_scale=address[0],
        phase=address[1],
        beta=address[2],
        factor=factor.data_ptr(),
        factor_scales=address[3],
        diagonal=address[4],
        hidden_shift=address[5],
        hidden_balance=address[6],
        input_scale=m.input_scale,
        beta0=weights.beta0,
        factor_scale=weights.factor_scale,
        amplitude=weights.amplitude,
    )
    # Of threads that meet at a new head the first one's copy stays, and is what all of them use.
    made = weights.cache.setdefault(_CACHE, Prepared(head, (projection, factor, *kept)))
    assert isinstance(made, Prepared)
    return made
