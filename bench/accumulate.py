"""accumulate: the covariance pass over N rows, beside torch features and one dense product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from rmcore import ops
from rmcore.ops import Backend
from rmcore.ops.weights import FeatureMap

from .harness import relative_error, time_calls
from .peers import Problem, make_problem
from .rows import (
    backends,
    dtype_name,
    floating,
    free,
    random_rows,
    timed_row,
)
from .setup import Row, Setup

__all__ = ["accumulate"]


def accumulate(setup: Setup) -> Iterator[Row]:
    """The covariance pass, against torch features and one dense product."""
    count = 8192 if setup.device.type == "cpu" else 65536
    if setup.budget_s < 0.5:
        count //= 8
    for h, d in setup.sizes:
        for dtype in floating(setup.dtypes):  # int8 maps are accumulated as float32 ones
            problem = make_problem(h, d, setup.device, dtype)
            yield from _accumulate(setup, problem, dtype, count)
            del problem
            free(setup.device)


def _accumulate(setup: Setup, problem: Problem, dtype: torch.dtype, count: int) -> Iterator[Row]:
    h, d, feature_map, device = problem.hidden_size, problem.num_features, problem.feature_map, setup.device
    x = random_rows(count, h, device, dtype)
    labels, beta = torch.ones(count, device=device), torch.zeros(d, device=device)
    precision, gradient = torch.zeros(d, d, device=device), torch.zeros(d, device=device)
    flop = 2.0 * count * (h * d + d * (d + 1) / 2)
    sizes = {"h": h, "d": d, "rows": count, "flop": flop}
    floor = setup.limits.floor(0.0, flop, dtype_name(dtype))
    expected = _gram_diagonal(feature_map, x)
    for backend in backends("accumulate", setup, dtype, count, feature_map):
        if backend == "torch":
            continue
        setup.note(f"accumulate {h}×{d} N={count} rmcore {backend} {dtype_name(dtype)}")

        def run(name: Backend = backend) -> None:
            ops.accumulate(
                x,
                labels,
                feature_map,
                beta,
                precision=precision,
                gradient=gradient,
                backend=name,
            )

        precision.zero_()
        run()
        error = relative_error(precision.diagonal(), expected / 4)  # p(1−p) = ¼ at β = 0
        timing = time_calls([run], device, budget_s=setup.budget_s, min_samples=3)
        yield timed_row(
            "accumulate", f"rmcore {backend}", dtype, timing, floor, **sizes, error_v=error, right=error < 1e-2
        )
    if dtype != setup.dtypes[0]:
        return
    for kind in (torch.float32, dtype):
        setup.note(f"accumulate {h}×{d} N={count} torch {dtype_name(kind)}")
        assert feature_map.projection is not None
        projection, phase = feature_map.projection.to(kind), problem.phase
        rows, gram = x.to(kind), torch.zeros(d, d, dtype=kind, device=device)

        dense = partial(_dense_accumulate, rows, projection, phase, gram)
        timing = time_calls([dense], device, budget_s=setup.budget_s, min_samples=3)
        floor = setup.limits.floor(0.0, 2.0 * count * (h * d + d * d), dtype_name(kind))
        name = f"torch features + P.addmm_ {dtype_name(kind)}"
        yield timed_row("accumulate", name, kind, timing, floor, **sizes)


def _dense_accumulate(rows: Tensor, projection: Tensor, phase: Tensor, gram: Tensor) -> None:
    phi = torch.cos(2 * torch.pi * ((rows @ projection.mT).float() + phase)).to(gram.dtype)
    gram.addmm_(phi.mT, phi)


def _gram_diagonal(feature_map: FeatureMap, x: Tensor) -> Tensor:
    total = torch.zeros(feature_map.num_features, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), 4096):
        phi = feature_map(x[start : start + 4096].float()) * feature_map.feature_scale
        total += phi.double().square().sum(0)
    return total
