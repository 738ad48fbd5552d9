"""The ``torch`` backend: the formulas of ``rmcore.ops.reference`` with ordinary operations. The truth, everywhere.

Weights are upcast to float32 (float64 for float64 rows); nothing is rounded beyond what the stored weights already are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.attribute_weights import AttributeWeights, reference_scores
from rmcore.ops.pair_layout import PairLayout
from rmcore.ops.tasks import AccumulateTask
from rmcore.ops.weights import HeadWeights

__all__ = ["accumulate", "pair_variance", "power_iteration", "score", "score_attributes", "unavailable"]

_CHUNK_ROWS = 4096
"""Rows taken at a time: bounds the (rows, D) temporaries to 64 MB at D = 4096."""


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Always None: this backend runs everything, everywhere."""
    return None


def score(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    """Fill ``out`` (4, B) with g, v, u, p. See :func:`rmcore.ops.score`."""
    for start in range(0, hidden.shape[0], _CHUNK_ROWS):
        c = weights.map(hidden[start : start + _CHUNK_ROWS])
        stop = start + c.shape[0]
        out[0, start:stop] = reference.logit(c, weights.beta.to(c.dtype), weights.beta0)
        out[1, start:stop] = reference.variance(c, weights.dense_factor.to(c.dtype))
    torch.sqrt(1 + weights.amplitude * out[1], out=out[2])
    torch.div(out[0], out[2], out=out[3])


def accumulate(task: AccumulateTask) -> Tensor:
    """Add ΦᵀWΦ (lower triangle) and Φᵀ(y−p) in place, return Σ log-likelihood. See :func:`rmcore.ops.accumulate`."""
    feature_map, pairs = task.feature_map, task.pairs
    total = torch.zeros((), dtype=torch.float64, device=task.hidden.device)
    rows = None if pairs is None else feature_map(task.hidden)
    for start in range(0, task.data, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        if pairs is None or rows is None:
            c = feature_map(task.hidden[chunk])
        else:
            c = rows[pairs[chunk, 0]] - rows[pairs[chunk, 1]]
        gram, slope, likelihood_sum = reference.accumulate(
            c * feature_map.feature_scale,
            task.labels[chunk].to(c.dtype),
            task.beta.to(c.dtype),
            beta0=task.beta0,
            likelihood=task.likelihood,
            sample_weight=None if task.sample_weight is None else task.sample_weight[chunk].to(c.dtype),
        )
        task.precision.add_(gram.tril_().to(task.precision.dtype))
        task.gradient.add_(slope.to(task.gradient.dtype))
        total += likelihood_sum.double()
    return total


def pair_variance(hidden: Tensor, group_sizes: Tensor, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """Logits and variances of all pairs i < j of every group. See :func:`rmcore.ops.pair_variance`."""
    g = torch.empty(PairLayout(group_sizes).pairs, dtype=torch.float32, device=hidden.device)
    v = torch.empty_like(g)
    row = pair = 0
    for sizes in _group_chunks(group_sizes.tolist()):
        rows = hidden[row : row + sum(sizes)]
        layout = PairLayout(sizes)
        first = torch.repeat_interleave(layout.starts, layout.sizes).to(hidden.device)
        i, j = layout.first.to(hidden.device), layout.second.to(hidden.device)
        # Taking each group's first row away before the products leaves only the group's own spread to round, and
        # changes no difference.
        c = weights.map(rows)
        c = c - c[first]
        y = c @ weights.dense_factor.to(c.dtype).mT
        s = c @ weights.beta.to(c.dtype)
        # A matrix product may round equal rows differently by where they stand; equal rows differ by exactly zero.
        equal = (rows[i] == rows[j]).all(dim=-1)
        count = slice(pair, pair + len(i))
        g[count] = (s[i] - s[j]).float().masked_fill_(equal, 0.0)
        v[count] = (y[i] - y[j]).square().sum(-1).float().masked_fill_(equal, 0.0)
        row, pair = row + len(rows), pair + len(i)
    return g, v


def _group_chunks(sizes: list[int]) -> Iterator[list[int]]:
    """Whole groups in runs of about _CHUNK_ROWS pair rows, so that the (pairs, D) differences stay bounded."""
    chunk: list[int] = []
    held = 0
    for k in sizes:
        if chunk and held + k * k > _CHUNK_ROWS:
            yield chunk
            chunk, held = [], 0
        chunk.append(k)
        held += k * k
    if chunk:
        yield chunk


def power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """σ(W) and the new right vector. See :func:`rmcore.ops.power_iteration`."""
    return reference.power_iteration(weight, vector, iterations)


def score_attributes(
    hidden: Tensor, weights: AttributeWeights, gate_hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(5, N) summary, (N, M, A · per) outputs, (N, M, A) weights. See :func:`rmcore.ops.score_attributes`."""
    gates = [None] if gate_hidden is None else gate_hidden.split(_CHUNK_ROWS)
    chunks = hidden.split(_CHUNK_ROWS)
    gates = [None] * len(chunks) if gate_hidden is None else gate_hidden.split(_CHUNK_ROWS)
    parts = [reference_scores(x, weights, gate) for x, gate in zip(chunks, gates, strict=True)]
    if len(parts) == 1:
        return parts[0]
    summary, outputs, attribute_weights = zip(*parts, strict=True)
    return torch.cat(summary, 1), torch.cat(outputs), torch.cat(attribute_weights)
