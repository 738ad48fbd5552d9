"""pair_variance: all pairs of G groups of K, beside differences through a dense P⁻¹."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from rmcore import ops

from .harness import time_calls
from .peers import Problem, make_problem, ours
from .rows import (
    backends,
    dtype_name,
    error_columns,
    free,
    head_bytes,
    head_flop,
    random_rows,
    timed_row,
)
from .setup import Row, Setup

__all__ = ["pair_variance"]


def pair_variance(setup: Setup) -> Iterator[Row]:
    """All pairs of 64 groups of 4 and of 8, against all pair differences through a dense P⁻¹."""
    h, d = setup.sizes[0]
    for dtype in setup.dtypes:
        problem = make_problem(h, d, setup.device, dtype)
        weights = ours(problem)
        for groups, k in ((64, 4), (64, 8)):
            x = random_rows(groups * k, h, setup.device, dtype)
            sizes = torch.full((groups,), k, dtype=torch.int64)
            g, v = _all_pairs(problem, x.double(), k, problem.precision.inverse())
            shape = {"h": h, "d": d, "rows": groups * k, "k": k}
            floor = setup.limits.floor(
                head_bytes(groups * k, h, d, dtype.itemsize), head_flop(groups * k, h, d), dtype_name(dtype)
            )
            for backend in backends("pair_variance", setup, dtype, groups * k, weights):
                setup.note(f"pair_variance {groups}×{k} rmcore {backend} {dtype_name(dtype)}")
                got = ops.pair_variance(x, sizes, weights, backend=backend)
                call = partial(ops.pair_variance, x, sizes, weights, backend=backend)
                timing = time_calls([call], setup.device, budget_s=setup.budget_s / 2)
                errors = error_columns(got[0], got[1], g, v, dtype)
                yield timed_row("pair_variance", f"rmcore {backend}", dtype, timing, floor, **shape, **errors)
            if dtype == setup.dtypes[0]:
                setup.note(f"pair_variance {groups}×{k} torch dense")
                run = partial(_all_pairs, problem, x.float(), k, problem.inverse)
                timing = time_calls([run], setup.device, budget_s=setup.budget_s / 2)
                yield timed_row(
                    "pair_variance", "torch, differences through P⁻¹", torch.float32, timing, floor, **shape
                )
        del problem, weights
        free(setup.device)


def _all_pairs(problem: Problem, x: Tensor, k: int, inverse: Tensor) -> tuple[Tensor, Tensor]:
    phi = problem.feature_map(x) * problem.scale
    i, j = torch.triu_indices(k, k, 1, device=x.device)
    groups = phi.view(-1, k, phi.shape[1])
    delta = (groups[:, i] - groups[:, j]).flatten(0, 1)
    return delta @ problem.beta.to(delta.dtype), ((delta @ inverse.to(delta.dtype)) * delta).sum(-1)
