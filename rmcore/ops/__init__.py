"""The head's kernels as functions, on whichever backend fits.

- ``functional``: ``score``, ``accumulate``, ``pair_variance``, ``power_iteration``.
- ``dispatch``: which backend runs an operation; ``explain`` tells without running.
- ``library``: the same as ``torch.library`` operators ``rmcore::*``, for ``torch.compile``.
- ``reference``: the formulas in plain torch, the truth that every backend is held against.
- ``weights``, ``quantize``: a frozen head's tensors as the kernels take them.
- ``backends``: torch, cpu, triton, cuda.
"""

from __future__ import annotations

from rmcore.ops import library as library  # registers the operators
from rmcore.ops.dispatch import OPS, Backend, Explanation, explain, select
from rmcore.ops.functional import Scores, accumulate, pair_variance, power_iteration, score
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = [
    "OPS",
    "Backend",
    "Explanation",
    "FeatureMap",
    "HeadWeights",
    "Scores",
    "accumulate",
    "explain",
    "pair_variance",
    "power_iteration",
    "score",
    "select",
]
