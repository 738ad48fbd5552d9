"""The operations of ``rmcore.ops`` as ``torch.library`` operators ``rmcore::*``, for ``torch.compile``.

A head's weights are named by an integer handle (:func:`rmcore.ops.weights.from_handle`), so that a graph neither copies
them nor loses the re-packed form a backend keeps beside them; a compiled function is guarded on the handle and must not
outlive its head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.ops.dispatch import check_group_sizes, check_pairs, select
from rmcore.ops.weights import FeatureMap, HeadWeights, from_handle

__all__: list[str] = []


def _head(handle: int) -> HeadWeights:
    weights = from_handle(handle)
    if not isinstance(weights, HeadWeights):
        reject("handle", f"{handle}, of a FeatureMap", "the handle of HeadWeights")
    return weights


def _features(handle: int) -> FeatureMap:
    weights = from_handle(handle)
    return weights.map if isinstance(weights, HeadWeights) else weights


@torch.library.custom_op("rmcore::score_out", mutates_args=("out",))
def score_out(hidden: Tensor, handle: int, backend: str, out: Tensor) -> None:
    """Fill ``out`` (4, B) with g, v, u, p; see :func:`rmcore.ops.score`."""
    weights = _head(handle)
    name: Any = backend
    select("score", hidden, weights.dtype, name, weights).score(hidden, weights, out)


@score_out.register_fake
def _(hidden: Tensor, handle: int, backend: str, out: Tensor) -> None:
    return None


@torch.library.custom_op("rmcore::accumulate", mutates_args=("precision", "gradient"))
def accumulate(
    hidden: Tensor,
    labels: Tensor,
    handle: int,
    beta: Tensor,
    precision: Tensor,
    gradient: Tensor,
    pairs: Tensor | None,
    sample_weight: Tensor | None,
    beta0: float,
    likelihood: str,
    backend: str,
) -> Tensor:
    """Add one pass over the data; see :func:`rmcore.ops.accumulate`."""
    check_pairs(pairs, hidden.shape[0])
    feature_map = _features(handle).dequantized()
    name: Any = backend
    kind: Any = likelihood
    module = select("accumulate", hidden, feature_map.dtype, name, feature_map)
    return module.accumulate(hidden, labels, feature_map, beta, precision, gradient, pairs, sample_weight, beta0, kind)


@accumulate.register_fake
def _(
    hidden: Tensor,
    labels: Tensor,
    handle: int,
    beta: Tensor,
    precision: Tensor,
    gradient: Tensor,
    pairs: Tensor | None,
    sample_weight: Tensor | None,
    beta0: float,
    likelihood: str,
    backend: str,
) -> Tensor:
    return hidden.new_empty((), dtype=torch.float64)


@torch.library.custom_op("rmcore::pair_variance", mutates_args=())
def pair_variance(hidden: Tensor, group_sizes: Tensor, handle: int, backend: str) -> tuple[Tensor, Tensor]:
    """All pairs of every group; see :func:`rmcore.ops.pair_variance`."""
    check_group_sizes(group_sizes, hidden.shape[0])
    weights = _head(handle)
    name: Any = backend
    return select("pair_variance", hidden, weights.dtype, name, weights).pair_variance(hidden, group_sizes, weights)


@pair_variance.register_fake
def _(hidden: Tensor, group_sizes: Tensor, handle: int, backend: str) -> tuple[Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()  # depends on the sizes' values
    return hidden.new_empty(pairs, dtype=torch.float32), hidden.new_empty(pairs, dtype=torch.float32)


@torch.library.custom_op("rmcore::power_iteration", mutates_args=())
def power_iteration(weight: Tensor, vector: Tensor, iterations: int, backend: str) -> tuple[Tensor, Tensor]:
    """σ(W) and the new right vector; see :func:`rmcore.ops.power_iteration`."""
    name: Any = backend
    module = select("power_iteration", weight, weight.dtype, name, weight)
    sigma, right = module.power_iteration(weight, vector, iterations)
    return sigma, right.clone() if right is vector else right


@power_iteration.register_fake
def _(weight: Tensor, vector: Tensor, iterations: int, backend: str) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(torch.promote_types(weight.dtype, vector.dtype), torch.float32)
    return weight.new_empty((), dtype=kind), vector.new_empty(vector.shape, dtype=kind)
