"""The head's kernels as functions, on whichever backend fits.

- ``functional``: ``score``, ``accumulate``, ``pair_variance``, ``power_iteration``, ``score_attributes``.
- ``tensors``: the same as functions of plain tensors, ``score_tensors`` and so on, and ``prepare``.
- ``dispatch``: which backend runs an operation; ``explain`` tells without running.
- ``tasks``, ``library``: what each operation is, declared once, and its ``torch.library`` operator ``rmcore::*``.
- ``pair_layout``: where the pairs of groups, their responses and their hidden rows are.
- ``reference``: the formulas in plain torch, the truth that every backend is held against.
- ``weights``, ``quantize``: a frozen head's tensors as the kernels take them; ``attribute_weights``: attribute heads'.
- ``backends``: torch, cpu, triton, cuda.
"""

from __future__ import annotations

from rmcore.ops.attribute_weights import AttributeWeights
from rmcore.ops.dispatch import OPS, Backend, Explanation, explain, select
from rmcore.ops.functional import (
    AttributeOutputs,
    Scores,
    accumulate,
    pair_variance,
    power_iteration,
    score,
    score_attributes,
)
from rmcore.ops.tensors import (
    Accumulated,
    accumulate_tensors,
    pair_variance_tensors,
    prepare,
    prepare_features,
    score_tensors,
)
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = [
    "OPS",
    "Accumulated",
    "AttributeOutputs",
    "AttributeWeights",
    "Backend",
    "Explanation",
    "FeatureMap",
    "HeadWeights",
    "Scores",
    "accumulate",
    "accumulate_tensors",
    "explain",
    "pair_variance",
    "pair_variance_tensors",
    "power_iteration",
    "prepare",
    "prepare_features",
    "score",
    "score_attributes",
    "score_tensors",
    "select",
]
