"""memory: bytes of weights, build time and first call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmcore import ops

from .harness import synchronize
from .peers import PEERS, Peer, Problem, make_problem, ours
from .rows import (
    backends,
    dtype_name,
    free,
    random_rows,
)
from .setup import Row, Setup

__all__ = ["memory"]


def memory(setup: Setup) -> Iterator[Row]:
    """Bytes each variant keeps, and seconds to build it and to make its first call."""
    h, d = setup.sizes[0]
    for dtype in setup.dtypes:
        problem = make_problem(h, d, setup.device, dtype)
        x = random_rows(1, h, setup.device, dtype)
        for backend in backends("score", setup, dtype, 1, ours(problem)):
            built, weights = _timed(partial(ours, problem), setup.device)
            weights = weights.clone()  # its map is the problem's, which keeps what other backends made of it
            first, _ = _timed(partial(ops.score, x, weights, backend=backend), setup.device)
            held = sum(t.numel() * t.element_size() for t in _tensors(weights))
            yield {
                "suite": "memory",
                "variant": f"rmcore {backend}",
                "dtype": dtype_name(dtype),
                "h": h,
                "d": d,
                "bytes": weights.nbytes(),
                "repacked_bytes": held - weights.nbytes(),
                "build_s": built,
                "first_call_s": first,
            }
        if dtype == setup.dtypes[0]:
            for peer in PEERS:
                if peer.compiled and not setup.compiled:
                    continue
                built, kept = _timed(partial(_cloned, peer, problem), setup.device)
                run = torch.compile(peer.run) if peer.compiled else peer.run
                first, _ = _timed(partial(run, x, *kept), setup.device)
                nbytes = sum(t.numel() * t.element_size() for t in kept)
                row = {"suite": "memory", "variant": peer.name, "dtype": dtype_name(peer.dtype), "h": h, "d": d}
                yield {**row, "bytes": nbytes, "build_s": built, "first_call_s": first}
        del problem
        free(setup.device)


def _tensors(value: Any) -> set[Tensor]:
    """Every tensor an object holds, caches included, however it nests them."""
    if isinstance(value, Tensor):
        return {value}
    if isinstance(value, dict):
        items: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple, set)):
        items = value
    elif hasattr(value, "__dict__"):
        items = vars(value).values()
    else:
        return set()
    return {tensor for item in items for tensor in _tensors(item)}


def _cloned(peer: Peer, problem: Problem) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in peer.weights(problem))


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result
