"""The engine's own part of a call: ``score_hidden(...).rewards`` beside the kernel it is built on.

Rows that a trainer's own forward pass left behind go through checks, the pair table and the advantages. Kernel
(``head.score_pairs``) and call take turns, so that a busy machine slows both alike. At the shape of a small encoder
(h = 385, D = 1024), where the kernel is short and what is around it shows most; on a CPU on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from rmcore.engine import RewardEngine
from rmcore.head import FrozenHead, HeadConfig

from .harness import synchronize
from .peers import make_problem, ours
from .rows import dtype_name
from .setup import Row, Setup

__all__ = ["MOST", "engine"]

HIDDEN_SIZE, FEATURES = 385, 1024
SHAPES = ((256, 2), (64, 4), (256, 8))
MOST = 1.3
"""The call may take at most this many times the kernel's time."""


def engine(setup: Setup) -> Iterator[Row]:
    """Kernel and call at each shape: their times and the ratio of their medians."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        problem = make_problem(HIDDEN_SIZE, FEATURES, setup.device, setup.dtypes[0])
        config = HeadConfig(HIDDEN_SIZE, num_features=FEATURES)
        head = FrozenHead(config, problem.feature_map, problem.beta, weights=ours(problem))
        for groups, k in SHAPES:
            setup.note(f"engine {groups}x{k}")
            yield _measure(setup, head, groups, k)
    finally:
        torch.set_num_threads(threads)


def _measure(setup: Setup, head: FrozenHead, groups: int, k: int) -> Row:
    hidden = torch.randn(groups * k, HIDDEN_SIZE, generator=torch.Generator().manual_seed(k)).to(setup.device)
    counts, sizes, scorer = torch.full((groups,), k), [k] * groups, RewardEngine(head)
    kernel, call = _in_turns(
        lambda: head.score_pairs(hidden, counts),
        lambda: scorer.score_hidden(hidden, sizes).rewards,
        setup,
    )
    return {
        "suite": "engine",
        "variant": f"{groups} groups of {k}",
        "dtype": dtype_name(setup.dtypes[0]),
        "h": HIDDEN_SIZE,
        "d": FEATURES,
        "rows": groups * k,
        "groups": groups,
        "k": k,
        "kernel_s": kernel,
        "median_s": call,
        "ratio": call / kernel,
        "within_bound": call / kernel <= MOST,
    }


def _in_turns(one: Callable[[], object], other: Callable[[], object], setup: Setup) -> tuple[float, float]:
    """Median seconds of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (one, other):
        call()
    until = time.perf_counter() + 2 * setup.budget_s
    while time.perf_counter() < until or len(times[0]) < 7:
        for call, taken in zip((one, other), times, strict=True):
            synchronize(setup.device)
            began = time.perf_counter()
            call()
            synchronize(setup.device)
            taken.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])
