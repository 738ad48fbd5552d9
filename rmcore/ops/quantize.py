"""int8 serving: whole numbers −127 … 127 with one factor a row, of weights once and of activations at every call.

Half the bytes of 16-bit weights, and twice the multiplications a cycle where the machine has 8-bit dot products. The
projection's rounding is not an error: the posterior is fitted with the rounded projection, whose Ω is random anyway.
What is rounded behind the posterior's back are hidden rows, c and U. Hidden rows are first centred and balanced by
column, since a few large columns would otherwise leave whole numbers too coarse for all others
(SmoothQuant, Xiao et al. 2023, arXiv:2211.10438, equation 4 with α = ½, for weights whose columns are alike); both are
folded into the projection exactly. What still stands out of a row by far is left out of its whole numbers and
multiplied in float32, on the fly (``csrc/cpu/outliers.h``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MAX_DEPTH",
    "WHOLE",
    "ColumnRange",
    "balance_columns",
    "dequantize_rows",
    "quantize_projection",
    "quantize_rows",
]

WHOLE = 127
"""The largest whole number used; −128 is not."""
_MOST_TO_WEIGHTS = -3
"""Weights of a column are made larger by 2³ at most, or those of all others would be left no digits. Values that stand
out further than that are outliers of their rows, which the kernel keeps apart in float32 (csrc/cpu/outliers.h)."""
MAX_DEPTH = 65_536
"""Sums of more products than this (255 · 127 each) could leave 32-bit integers."""


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) → int8 (N, K) and float32 factors (N,): each row's largest magnitude becomes ±127. Zero rows get 1."""
    # The factor that is kept, in float32, is the one divided by: no second rounding.
    scale = (matrix.double().abs().amax(dim=1) / WHOLE).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # zero, or below what float32 holds
    whole = (matrix.double() / scale.double()[:, None]).round_().clamp_(-WHOLE, WHOLE)
    return whole.to(torch.int8), scale


def dequantize_rows(whole: Tensor, scale: Tensor) -> Tensor:
    """The float32 (N, K) matrix that int8 rows and their factors stand for."""
    return whole.float() * scale[:, None]


class ColumnRange(NamedTuple):
    """What of hidden rows (N, h) their rounding goes by, each (h,)."""

    mean: Tensor
    """float64."""
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> ColumnRange:
        """Of (N, h) finite rows, N ≥ 1."""
        return cls(rows.mean(dim=0, dtype=torch.float64), rows.amin(dim=0), rows.amax(dim=0))


def balance_columns(calibration: Tensor | ColumnRange) -> tuple[Tensor, Tensor]:
    """What to take from hidden rows and then multiply into them, by column, before they are rounded.

    Args:
        calibration: (N, h) finite rows like those to come, or the range of their columns.

    Returns:
        shift (h,) float32, the mean; scale (h,) float32, the power of two nearest to √(typical spread / spread): exact
        to multiply by and to undo. Columns that never vary are left as they are.
    """
    columns = calibration if isinstance(calibration, ColumnRange) else ColumnRange.of(calibration)
    shift = columns.mean.float()
    spread = torch.maximum(columns.high - shift, shift - columns.low).double()
    varies = spread > 0
    if not bool(varies.any()):
        return shift, torch.ones_like(shift)
    typical = spread[varies].median()
    exponent = torch.where(varies, 0.5 * torch.log2(typical / spread.clamp_min(1e-300)), torch.zeros_like(spread))
    return shift, torch.ldexp(torch.ones_like(shift), exponent.round().clamp(_MOST_TO_WEIGHTS, 24).to(torch.int32))


def quantize_projection(
    projection: Tensor, phase: Tensor, calibration: Tensor | ColumnRange | None
) -> dict[str, Tensor]:
    """A folded projection (D, h) and its phase (D,) in turns, float64, as the int8 fields of a ``FeatureMap``.

    ``calibration`` (N, h) are rows to centre and balance columns by, or the range of their columns; without them hidden
    rows are taken as they are.
    """
    fields: dict[str, Tensor] = {}
    if calibration is not None and (isinstance(calibration, ColumnRange) or calibration.numel()):
        shift, balance = balance_columns(calibration)
        phase, projection = phase + projection @ shift.double(), projection / balance.double()
        fields = {"hidden_shift": shift, "hidden_scale": balance}
    whole, scale = quantize_rows(projection)
    return {**fields, "projection": whole, "projection_scale": scale, "phase": (phase - phase.floor()).float()}
