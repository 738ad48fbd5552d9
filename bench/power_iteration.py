"""power_iteration: one step of σ(W), beside two matrix-vector products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from rmcore import ops
from rmcore.ops import reference

from .harness import relative_error, rotations, time_calls
from .peers import TOLERANCE
from .rows import (
    backends,
    dtype_name,
    floating,
    timed_row,
)
from .setup import Row, Setup

__all__ = ["power_iteration"]


def power_iteration(setup: Setup) -> Iterator[Row]:
    """One step of power iteration, against two matrix-vector products."""
    for h, _ in setup.sizes:
        for dtype in dict.fromkeys((torch.float32, *floating(setup.dtypes))):
            weight = torch.randn(h, h, device=setup.device).to(dtype)
            vector = torch.randn(h, device=setup.device)
            copies = [weight.clone() for _ in range(rotations(weight.numel() * weight.element_size(), setup.device))]
            floor = setup.limits.floor(weight.numel() * weight.element_size(), 4.0 * h * h, "float32")
            sigma = reference.power_iteration(weight.double(), vector.double(), 1)[0]
            for backend in backends("power_iteration", setup, dtype, h, None):
                setup.note(f"power_iteration {h} rmcore {backend} {dtype_name(dtype)}")
                calls = [partial(ops.power_iteration, w, vector, 1, backend=backend) for w in copies]
                try:
                    error = relative_error(ops.power_iteration(weight, vector, 1, backend=backend)[0], sigma)
                    timing = time_calls(calls, setup.device, budget_s=setup.budget_s / 2)
                except RuntimeError as failure:
                    yield {"suite": "power_iteration", "variant": f"rmcore {backend}", "failed": str(failure)[:200]}
                    continue
                name = "torch, two products" if backend == "torch" else f"rmcore {backend}"
                right = {"error_v": error, "right": error < TOLERANCE[dtype]}
                yield timed_row("power_iteration", name, dtype, timing, floor, h=h, d=h, rows=1, **right)
