"""What the suites' rows are made of: what a row says, the hidden rows they score, bytes and FLOP of a pass."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rmcore import ops
from rmcore.ops import Backend

from .harness import Floor, Timing, as_dict, relative_error
from .peers import TOLERANCE
from .setup import Row, Setup

__all__ = [
    "absent_row",
    "backends",
    "dtype_name",
    "error_columns",
    "floating",
    "free",
    "head_bytes",
    "head_flop",
    "random_rows",
    "time_columns",
    "timed_row",
]


def timed_row(suite: str, variant: str, dtype: torch.dtype, timing: Timing, floor: Floor, **more: Any) -> Row:
    """One variant at one size: its times, what else is known of it, and the machine's limit beside it."""
    return {
        "suite": suite,
        "variant": variant,
        "dtype": dtype_name(dtype),
        **more,
        **time_columns(timing),
        **floor.beside(timing.median),
    }


def time_columns(timing: Timing) -> Row:
    """A timing as columns: ``median_s``, ``low_s``, ``high_s`` and how they were taken."""
    return {f"{name}_s" if name in ("median", "low", "high") else name: v for name, v in as_dict(timing).items()}


def absent_row(variant: str, dtype: torch.dtype, why: str, h: int, d: int, rows: int, suite: str = "score") -> Row:
    """A variant that is too slow here to be timed: said, never silently missing."""
    return {
        "suite": suite,
        "variant": variant,
        "dtype": dtype_name(dtype),
        "h": h,
        "d": d,
        "rows": rows,
        "left_out": why,
    }


def error_columns(g: Tensor, v: Tensor, true_g: Tensor, true_v: Tensor, dtype: torch.dtype) -> Row:
    """Largest errors of g and v over the largest g and v, and whether that of v is within the dtype's tolerance."""
    error = relative_error(v, true_v)
    return {"error_v": error, "error_g": relative_error(g, true_g), "right": error <= TOLERANCE[dtype]}


def dtype_name(dtype: torch.dtype) -> str:
    """As torch prints it, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def backends(op: str, setup: Setup, dtype: torch.dtype, rows: int, weights: Any) -> list[Backend]:
    """Those that run an operation here, ours and torch's."""
    names: tuple[Backend, ...] = ("cuda", "triton", "cpu", "torch")
    told = (ops.explain(op, setup.device, dtype, name, rows=rows, weights=weights) for name in names)
    return [name for name, explanation in zip(names, told, strict=True) if explanation.backend != "none"]


def floating(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """Without int8."""
    return [dtype for dtype in dtypes if dtype.is_floating_point]


def random_rows(rows: int, h: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows, h) hidden rows, the same for the same number of rows."""
    dtype = torch.bfloat16 if dtype == torch.int8 else dtype  # int8 heads take rows as a model gives them
    return torch.randn(rows, h, generator=torch.Generator().manual_seed(rows)).to(dtype).to(device)


def free(device: torch.device) -> None:
    """Give back what was just deleted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def head_bytes(rows: int, h: int, d: int, width: int) -> float:
    """Folded projection and half of U, each read once, hidden rows in and four floats a row out."""
    return width * (h * d + d * (d + 1) / 2) + rows * (h * width + 16)


def head_flop(rows: int, h: int, d: int) -> float:
    """Multiply-adds of the folded projection and of the lower triangle."""
    return 2.0 * rows * (h * d + d * (d + 1) / 2)
