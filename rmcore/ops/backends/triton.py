"""The ``triton`` backend: the kernels of ``rmcore.kernels`` on any GPU Triton compiles for, or in its interpreter.

Outputs and workspaces are torch tensors, launches go to the current stream of the tensors' device, nothing waits for
the GPU and no shape decides anything after the launch: a captured CUDA graph replays it. Triton is imported by the
first call. Rows are taken in chunks, so a workspace stays below :data:`WORKSPACE` bytes whatever B is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rmcore.ops import plans
from rmcore.ops.attribute_weights import SUMMARY, AttributeWeights
from rmcore.ops.backends import triton_tma
from rmcore.ops.pair_layout import PairLayout
from rmcore.ops.tasks import AccumulateTask
from rmcore.ops.weights import SERVING_DTYPES, HeadWeights

if TYPE_CHECKING:
    from rmcore.kernels.heuristics import Device
    from rmcore.kernels.pair_variance import Rows

__all__ = [
    "accumulate",
    "declines",
    "form_kernel",
    "give_up",
    "pair_variance",
    "plan",
    "power_iteration",
    "score",
    "score_attributes",
    "unavailable",
]

WORKSPACE = 256 << 20
"""Bytes of features held at a time. 32,768 rows at D = 4096 in 16 bits: thousands of tiles, so chunks cost nothing."""
GRAM_WORKSPACE = 128 << 20
"""The same for ``accumulate``: 16,384 rows at D = 4096 in 16 bits."""
GRAM_ROWS = 16384
"""Rows of a chunk of ``accumulate`` at most, however small D is: float32 sums on tensor cores lose 5e-9 of themselves a
term (kernels/gram.py). An H100 without this bound lost 3.9e-4 of P's diagonal over 65,536 rows at D = 1024, cuBLAS
0.9e-4."""
PAIR_WORKSPACE = 2 << 30
"""Bytes of float32 features up to which ``accumulate`` computes every row once, however many pairs share it."""
_MIN_CAPABILITY = (8, 0)
_MAX_RUNS = 4

PLAN_WORKSPACE = 64 << 20
"""Bytes of workspaces up to which a call's launches are kept: beyond it kernels take longer than launching them."""
_arenas: dict[tuple[torch.device, int], Tensor] = {}


# -- what can run ----------------------------------------------------------------------------------------------------


def unavailable(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``op`` cannot run here, or None."""
    if dtype not in SERVING_DTYPES:
        return f"it computes in float16, bfloat16 and float32, not {dtype}"
    if dtype == torch.int8 and op != "score":
        return f"of int8 heads it has score alone, no {op}"
    if not _installed():
        return "triton is not installed"
    if device.type == "cpu" and _interpreted():
        return "the interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"it needs a GPU and the tensors are on {device.type}"
    if _interpreted():
        return "TRITON_INTERPRET=1 is set"
    try:
        capability = (9, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):  # a build without CUDA, no driver, no such device
        return "torch sees no such GPU here"
    if capability < _MIN_CAPABILITY:
        return f"it needs compute capability 8.0 and the device has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _device(device: torch.device) -> Device:
    from rmcore.kernels import heuristics

    return heuristics.device(device)


def _chunk(budget: int, columns: int, element: int) -> int:
    """Rows of ``columns`` elements that fit the budget, a multiple of 256."""
    return max(256, budget // (columns * element) // 256 * 256)


def declines(op: str, rows: int, weights: object) -> str | None:
    """Why a call that :func:`unavailable` allows should go elsewhere for its shape, or None."""
    if op == "score" and isinstance(weights, HeadWeights) and weights.dtype == torch.int8:
        from rmcore.kernels import features_int8

        return features_int8.refusal(weights.map)
    return None


form_kernel, give_up = triton_tma.kernel_of_form, triton_tma.give_up


# -- score -----------------------------------------------------------------------------------------------------------


def score(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    """Fill ``out`` (4, B) with g, v, u, p. See :func:`rmcore.ops.score`."""
    chunk = _chunk(WORKSPACE, weights.num_features, weights.dtype.itemsize)
    with _on(hidden):
        for start in range(0, hidden.shape[0], chunk):
            _score_rows(hidden[start : start + chunk], weights, out[:, start : start + chunk])


def _score_rows(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    if weights.dtype == torch.int8:
        _score_int8(hidden, weights, out)
        return
    device, d = _device(hidden.device), weights.num_features
    form = triton_tma.form_of("score", hidden.shape[0], weights.map, device, hidden.device)
    if form != "plain":
        triton_tma.score(hidden, weights, out, device, form)
        return
    from rmcore.kernels import features, heuristics, score_tail, variance

    ends = {"beta0": weights.beta0, "factor_scale": weights.factor_scale, "amplitude": weights.amplitude}
    if heuristics.FORMS["tail"] == "last" and features.multiplies(weights.map):
        tail = score_tail.plan(hidden.shape[0], d, weights.dtype, device, hidden.device)
        c, logits = features.features(hidden, weights.map, device, beta=weights.beta, counters=tail.counters)
        assert logits is not None
        score_tail.score(tail, c, logits, weights.factor, out, device, **ends)
        return
    c, logits = features.features(hidden, weights.map, device, beta=weights.beta)
    assert logits is not None
    variance.score(logits, variance.squares(c, weights.factor, d, device), out, **ends)


def _score_int8(hidden: Tensor, weights: HeadWeights, out: Tensor) -> None:
    from rmcore.kernels import score_int8

    score_int8.score(hidden, weights, out, _device(hidden.device))


class _Plan:
    """The launches of one shape of call, by stream: the arena they work in, and the steps.

    ``memory`` runs a function in such a way that its launches may have descriptors; None where none has.
    """

    def __init__(self, index: int, hooked: Callable[[], bool], memory: Callable[..., None] | None) -> None:
        self.index, self.hooked, self.memory = index, hooked, memory
        self.streams: dict[int, tuple[Tensor, list[Any]]] = {}

    def __call__(self, hidden: Tensor, weights: HeadWeights, out: Tensor) -> bool:
        """See :data:`rmcore.ops.plans.Launch`."""
        stream = plans.stream_of(self.index)
        # The kernels were compiled for an ``out`` at a multiple of 16 bytes, where torch puts all it makes.
        if stream is None or self.hooked() or out.data_ptr() % 16:
            return False
        found = self.streams.get(stream)
        if found is None and not self.record(stream, hidden, weights, out):
            return False
        if self.memory is None:
            self.steps(stream, hidden, out)
        else:
            self.memory(self.steps, stream, hidden, out)
        return True

    def steps(self, stream: int, hidden: Tensor, out: Tensor) -> None:
        """Make the launches of a stream."""
        for step in self.streams[stream][1]:
            step(stream, hidden, out)

    def record(self, stream: int, hidden: Tensor, weights: HeadWeights, out: Tensor) -> bool:
        """Keep what ``_score_rows`` would launch on this stream; False where its workspaces are too large for that."""
        from rmcore.kernels import launches

        with launches.recording(None) as counted:
            _score_rows(hidden, weights, out)
        if counted.used > PLAN_WORKSPACE:
            return False
        arena = _arenas.get((hidden.device, stream))
        if arena is None or arena.numel() < counted.used:  # plans made with the smaller one keep it
            size = 1 << max(20, (counted.used - 1).bit_length())
            arena = _arenas[hidden.device, stream] = torch.empty(size, dtype=torch.uint8, device=hidden.device)
        with launches.recording(arena) as recorder:
            _score_rows(hidden, weights, out)
        kept = (*weights.tensors().values(), *weights.map.tensors().values(), *weights.map.cache.values())
        fixed = {t.data_ptr() for t in kept if isinstance(t, Tensor)}
        steps = launches.steps(recorder.calls, hidden, out, fixed, arena)
        if steps is None:
            return False
        self.streams[stream] = arena, steps
        return True


def plan(hidden: Tensor, weights: HeadWeights) -> plans.Launch | None:
    """The launches of such a call, to be made without Triton's and our own bookkeeping; None where that cannot be."""
    from rmcore.kernels import launches

    rows, index = hidden.shape[0], hidden.device.index or 0
    stream = plans.stream_of(index)
    if stream is None or not rows or 4 * rows * weights.num_features > PLAN_WORKSPACE:
        return None
    form = triton_tma.form_of("score", rows, weights.map, _device(hidden.device), hidden.device)
    made = _Plan(index, launches.hooked, triton_tma.memory(form))
    out = torch.empty(4, rows, dtype=torch.float32, device=hidden.device)
    return made if made.record(stream, hidden, weights, out) else None


# -- accumulate ------------------------------------------------------------------------------------------------------


def accumulate(task: AccumulateTask) -> Tensor:
    """Add ΦᵀWΦ (lower triangle) and Φᵀ(y−p) in place, return Σ log-likelihood. See :func:`rmcore.ops.accumulate`."""
    from rmcore.kernels import gram

    hidden, feature_map, gradient = task.hidden, task.feature_map, task.gradient
    device = _device(hidden.device)
    d, serving, scale = feature_map.num_features, feature_map.dtype, feature_map.feature_scale
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    labels = task.labels.to(torch.float32).contiguous()
    sample_weight = None if task.sample_weight is None else task.sample_weight.to(torch.float32).contiguous()
    target = task.precision.contiguous()
    chunk = min(_chunk(GRAM_WORKSPACE, d, serving.itemsize if task.pairs is None else 8), GRAM_ROWS)
    form = triton_tma.form_of("accumulate", task.data, feature_map, device, hidden.device)
    with _on(hidden):
        for part, c, logits, index in _feature_chunks(task, chunk, device, form):
            weighed = gram.weigh(
                c,
                logits,
                labels[part],
                dtype=serving,
                feature_scale=scale,
                beta0=task.beta0,
                logistic=task.logistic,
                pairs=index,
                sample_weight=None if sample_weight is None else sample_weight[part],
            )
            if form == "plain":
                gram.gram(weighed.weighted, target, device, scale=scale * scale)
            else:
                triton_tma.gram(weighed.weighted, target, device, form, scale=scale * scale)
            gradient += (weighed.gradient[:, :d].sum(0, dtype=torch.float64) * scale).to(gradient.dtype)
            total += weighed.likelihood.sum(dtype=torch.float64)
    if target is not task.precision:
        task.precision.copy_(target)
    return total


def _feature_chunks(
    task: AccumulateTask, chunk: int, device: Device, form: str
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Data in runs of ``chunk``: which, the features of their rows, logit parts, and the pairs' rows among those.

    In difference mode the rows' features are kept in float32 until they are subtracted: all of them where they fit, so
    that rows shared by many pairs are computed once, or else those of a chunk's pairs.
    """
    from rmcore.kernels import features

    hidden, feature_map, n = task.hidden, task.feature_map, task.data
    beta = task.beta.to(torch.float32).contiguous()
    pairs = None if task.pairs is None else task.pairs.contiguous()
    shared = None
    if pairs is not None and n and hidden.shape[0] * feature_map.num_features * 4 <= PAIR_WORKSPACE:
        shared = features.features(hidden, feature_map, device, beta=beta, dtype=torch.float32)
    for start in range(0, n, chunk):
        part = slice(start, min(start + chunk, n))
        index = None if pairs is None else pairs[part]
        if index is None and form != "plain":
            c, logits = triton_tma.features(hidden[part], feature_map, device, form, beta)
        elif index is None:
            c, logits = features.features(hidden[part], feature_map, device, beta=beta)
        elif shared is not None:
            c, logits = shared
        else:
            rows = hidden.index_select(0, index.flatten())
            c, logits = features.features(rows, feature_map, device, beta=beta, dtype=torch.float32)
            index = torch.arange(rows.shape[0], device=hidden.device).reshape(-1, 2)
        assert logits is not None
        yield part, c, logits, index


# -- pair_variance ---------------------------------------------------------------------------------------------------


def pair_variance(hidden: Tensor, group_sizes: Tensor, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """Logits and variances of all pairs i < j of every group. See :func:`rmcore.ops.pair_variance`."""
    from rmcore.kernels import features, heuristics, pair_tail, pair_variance, variance

    device = _device(hidden.device)
    d = weights.num_features
    sizes: list[int] = group_sizes.tolist()
    count = PairLayout(group_sizes).pairs
    g = torch.empty(count, dtype=torch.float32, device=hidden.device)
    v = torch.empty_like(g)
    chunk = _chunk(WORKSPACE, d, 8 + weights.dtype.itemsize)
    row = pair = 0
    with _on(hidden):
        for groups in _chunks(sizes, chunk):
            rows, taken = sum(groups), sum(k * (k - 1) // 2 for k in groups)
            form = heuristics.FORMS["pairs"]
            if form == "in the product" and weights.map.projection is not None and pair_tail.serves(groups):
                counters = pair_tail.counters(rows, weights.dtype.itemsize, device, hidden.device)
                c, logits = features.features(
                    hidden[row : row + rows], weights.map, device,
                    beta=weights.beta, counters=counters, centre=groups[0],
                )  # fmt: skip
                assert logits is not None
                out = slice(pair, pair + taken)
                pair_tail.pairs(
                    c, logits, counters, weights.factor, d, groups[0], g[out], v[out], device, weights.factor_scale
                )
            elif taken:
                which = _pair_rows(groups, hidden.device)
                c = features.features(hidden[row : row + rows], weights.map, device, dtype=torch.float32).c
                centred, logits = pair_variance.centre(c, which, weights.beta, weights.dtype)
                y = variance.product(centred, weights.factor, d, device)
                out = slice(pair, pair + taken)
                if form == "by groups" and pair_variance.by_groups(groups):
                    pair_variance.groups(y, logits, groups[0], g[out], v[out], weights.factor_scale)
                else:
                    pair_variance.pairs(y, logits, which, g[out], v[out], weights.factor_scale)
            row, pair = row + rows, pair + taken
    return g, v


def _chunks(sizes: list[int], limit: int) -> list[list[int]]:
    """Whole groups, together at most ``limit`` rows or a single group."""
    chunks: list[list[int]] = []
    rows = 0
    for k in sizes:
        if not chunks or (rows and rows + k > limit):
            chunks.append([])
            rows = 0
        chunks[-1].append(k)
        rows += k
    return chunks


def _pair_rows(sizes: list[int], device: torch.device) -> Rows:
    """Each row's first row of its group (R,), and the rows i < j of every pair (Q,).

    Groups of one size need no lists. Runs of them are made on the device from numbers alone, which a graph can capture.
    Where sizes keep changing that is a launch or ten a group, so they are made on the host and copied, unless a graph
    is being captured.
    """
    from rmcore.kernels.pair_variance import Rows

    runs = [(k, len(list(same))) for k, same in itertools.groupby(sizes)]
    if len(runs) == 1:
        return Rows(runs[0][0])
    if len(runs) > _MAX_RUNS and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        layout = PairLayout(sizes)
        made: tuple[Tensor, ...]
        made = torch.repeat_interleave(layout.starts, layout.sizes), layout.first, layout.second
        if device.type == "cuda":
            made = tuple(t.pin_memory() for t in made)
        first, left, right = (t.to(device, non_blocking=True) for t in made)
        return Rows(0, first, left, right)
    firsts, lefts, rights = [], [], []
    start = 0
    for k, count in runs:
        heads = torch.arange(count, device=device)[:, None] * k + start
        i, j = torch.triu_indices(k, k, 1, device=device)
        firsts.append(heads.expand(-1, k).reshape(-1))
        lefts.append((heads + i).reshape(-1))
        rights.append((heads + j).reshape(-1))
        start += count * k
    return Rows(0, torch.cat(firsts), torch.cat(lefts), torch.cat(rights))


# -- power_iteration -------------------------------------------------------------------------------------------------


def power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """σ(W) and the new right vector, in the vector's dtype. See :func:`rmcore.ops.power_iteration`."""
    from rmcore.kernels import power_iteration
    from rmcore.ops import reference

    if weight.shape[1] > power_iteration.MAX_COLUMNS or weight.shape[0] == 0:
        return reference.power_iteration(weight, vector, iterations)
    with _on(weight):
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        sigma, v = power_iteration.power_iteration(weight, vector, iterations, _device(weight.device))
    return sigma.to(vector.dtype), v.to(vector.dtype)


# -- score_attributes ------------------------------------------------------------------------------------------------


def score_attributes(
    hidden: Tensor, weights: AttributeWeights, gate_hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(5, N) summary, (N, M, A · per) outputs, (N, M, A) weights. See :func:`rmcore.ops.score_attributes`."""
    from rmcore.kernels import score_attributes as kernels

    n, m, a, device = hidden.shape[0], weights.members, weights.attributes, hidden.device
    widest = max([layer.shape[1] for layer in weights.layers], default=1)
    parts = list(hidden.split(_chunk(WORKSPACE, m * widest, 2 * weights.dtype.itemsize))) if n else []
    summaries = [torch.empty(len(SUMMARY), len(part), dtype=torch.float32, device=device) for part in parts]
    outputs = torch.empty(n, m, a * weights.per, dtype=torch.float32, device=device)
    attribute_weights = torch.empty(n, m, a, dtype=torch.float32, device=device)
    start = 0
    with _on(hidden):
        for part, summary in zip(parts, summaries, strict=True):
            rows = slice(start, start + len(part))
            gate = None if gate_hidden is None else gate_hidden[rows]
            kernels.score(part, gate, weights, summary, outputs[rows], attribute_weights[rows], _device(device))
            start += len(part)
    if len(summaries) == 1:
        return summaries[0], outputs, attribute_weights
    return (
        torch.cat([hidden.new_empty(len(SUMMARY), 0, dtype=torch.float32), *summaries], 1),
        outputs,
        attribute_weights,
    )
