"""What is measured: a file a suite, each with one function that gives rows for the results file.

score            one pass g, v, u, p over B rows, ours and peers, cold
accumulate       the covariance pass over N rows
power_iteration  one step of σ(W)
pair_variance    all pairs of G groups of K
attributes       multi-attribute heads with gates, one and an ensemble of three
eager            the host's time before a score's kernels start
engine           score_hidden(...).rewards beside the kernel it is built on
share            the head's part of a whole scoring step, hidden states at hand and behind a backbone
memory           bytes of weights, build time and first call
encode           whole groups through a backbone: padded rows, sorted rows, packed trees (only when asked for)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .accumulate import accumulate
from .attributes import attributes
from .eager import eager
from .encode import encode
from .engine import engine
from .memory import memory
from .pair_variance import pair_variance
from .power_iteration import power_iteration
from .score import score
from .setup import Row, Setup
from .share import share

__all__ = ["SUITES"]

SUITES: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "score": score,
    "accumulate": accumulate,
    "power_iteration": power_iteration,
    "pair_variance": pair_variance,
    "attributes": attributes,
    "eager": eager,
    "engine": engine,
    "share": share,
    "memory": memory,
    "encode": encode,
}
