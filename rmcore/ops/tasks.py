"""What an operation is, said once: its arguments, what they must be, what it returns, and how a backend is called.

A task is a tuple of one call's arguments. :mod:`rmcore.ops.library` makes a ``torch.library`` operator of each class
(its fields are the operator's signature, with a head's weights as an integer handle), :mod:`rmcore.ops.functional`
builds one from the public arguments, and a backend gets it, whole (``accumulate``) or unpacked.

Every task has the methods of :class:`Task`. ``check`` looks at shapes, dtypes and devices and is traced by
``torch.compile``; ``check_values`` looks into small index tensors and runs with the call itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.ops.attribute_weights import SUMMARY, AttributeWeights
from rmcore.ops.reference import Likelihood
from rmcore.ops.weights import FeatureMap, HeadWeights, from_handle

__all__ = [
    "AccumulateTask",
    "PairVarianceTask",
    "PowerIterationTask",
    "ScoreAttributesTask",
    "ScoreTask",
    "Served",
    "Task",
    "check_hidden",
    "check_out",
]


class Served(NamedTuple):
    """What decides the backend: a tensor of the call (its device and rows), the weights' dtype, the weights."""

    tensor: Tensor
    dtype: torch.dtype
    weights: FeatureMap | HeadWeights | AttributeWeights | Tensor


Result: TypeAlias = Tensor | tuple[Tensor, ...] | None


class Task(Protocol):
    """One call of an operation, a named tuple."""

    def __iter__(self) -> Iterator[Any]:
        """Its arguments in order."""

    def check(self) -> None:
        """Raise InputError where a shape, dtype or device does not fit."""

    def check_values(self) -> None:
        """Raise InputError where an index is out of range."""

    def ready(self) -> Any:
        """The task as backends take it."""

    def served(self) -> Served:
        """What decides the backend."""

    def run(self, backend: Any) -> Any:
        """The result, computed by this backend module."""

    def fake(self) -> Any:
        """A result of the right shapes and dtypes from tensors without data; weights are handles here."""


def check_hidden(hidden: Tensor, feature_map: FeatureMap | AttributeWeights, name: str = "hidden") -> None:
    """Raise InputError unless ``hidden`` is (rows, h), floating-point, on the weights' device."""
    if not isinstance(hidden, Tensor):
        reject(name, type(hidden).__name__, "a torch.Tensor")
    if hidden.dim() != 2 or hidden.shape[1] != feature_map.hidden_size:
        reject(name, f"shape {tuple(hidden.shape)}", f"(rows, {feature_map.hidden_size})")
    if not hidden.dtype.is_floating_point:
        reject(name, hidden.dtype, "a floating-point dtype")
    if not feature_map.empty and hidden.device != feature_map.device:
        reject(name, f"device {hidden.device}", f"the head's device {feature_map.device}")


def check_out(out: Tensor, hidden: Tensor) -> None:
    """Raise InputError unless ``out`` can hold the scores of ``hidden``."""
    rows = hidden.shape[0]
    if out.shape != (4, rows) or out.dtype != torch.float32 or not out.is_contiguous():
        reject("out", f"{tuple(out.shape)} {out.dtype}", f"contiguous (4, {rows}) float32")
    if out.device != hidden.device:
        reject("out", f"device {out.device}", f"the device of hidden, {hidden.device}")


def _check_vector(name: str, tensor: Tensor, length: int) -> None:
    if tensor.shape != (length,):
        reject(name, f"shape {tuple(tensor.shape)}", f"({length},)")


def guarded_pairs(pairs: Tensor, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Indices that are safe to read with, and labels that are NaN if any of the given ones was not.

    On a GPU nothing can be raised without waiting for it, which would also forbid CUDA graphs: instead a wrong index
    makes the log-likelihood and the gradient NaN, so that no fit takes the result for a number.
    """
    wrong = ((pairs < 0) | (pairs >= rows)).any()
    labels = labels.to(torch.promote_types(labels.dtype, torch.float32))
    return pairs.clamp(0, rows - 1), torch.where(wrong, torch.nan, labels)


class ScoreTask(NamedTuple):
    """hidden (B, h) → ``out`` (4, B): g, v, u, p."""

    hidden: Tensor
    weights: HeadWeights
    out: Tensor

    def check(self) -> None:
        """Raise InputError where a shape, dtype or device does not fit."""
        check_hidden(self.hidden, self.weights.map)
        check_out(self.out, self.hidden)

    def check_values(self) -> None:
        """Nothing to look at."""

    def ready(self) -> ScoreTask:
        """The task as backends take it."""
        return self

    def served(self) -> Served:
        """What decides the backend."""
        return Served(self.hidden, self.weights.dtype, self.weights)

    def run(self, backend: Any) -> None:
        """The result, computed by this backend module."""
        backend.score(*self)

    def fake(self) -> None:
        """Nothing: ``out`` is the result."""


class AccumulateTask(NamedTuple):
    """One pass over data: P += ΦᵀWΦ (lower triangle), gradient += Φᵀ(y − p) in place; returns Σ log-likelihood."""

    hidden: Tensor
    labels: Tensor
    feature_map: FeatureMap
    beta: Tensor
    precision: Tensor
    gradient: Tensor
    pairs: Tensor | None = None
    sample_weight: Tensor | None = None
    beta0: float = 0.0
    likelihood: Likelihood = "logistic"

    @property
    def data(self) -> int:
        """N: rows, or pairs where there are any."""
        return self.hidden.shape[0] if self.pairs is None else self.pairs.shape[0]

    @property
    def logistic(self) -> bool:
        """w = p(1−p), not 1."""
        return self.likelihood == "logistic"

    def check(self) -> None:
        """Raise InputError where a shape, dtype or device does not fit."""
        check_hidden(self.hidden, self.feature_map)
        d, n, precision, pairs = self.feature_map.num_features, self.data, self.precision, self.pairs
        if pairs is not None and (pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64):
            reject("pairs", f"{tuple(pairs.shape)} {pairs.dtype}", "(N, 2) int64")
        _check_vector("labels", self.labels, n)
        _check_vector("beta", self.beta, d)
        _check_vector("gradient", self.gradient, d)
        if self.sample_weight is not None:
            _check_vector("sample_weight", self.sample_weight, n)
        if precision.shape != (d, d) or precision.dtype not in (torch.float32, torch.float64):
            reject("precision", f"{tuple(precision.shape)} {precision.dtype}", f"({d}, {d}) float32 or float64")
        if not precision.is_contiguous():
            reject("precision", f"strides {precision.stride()}", "a contiguous tensor")
        if pairs is not None and n and not self.hidden.shape[0]:
            reject("pairs", f"{n} pairs of rows", "none, since hidden has no rows")

    def check_values(self) -> None:
        """Raise InputError where an index is out of range; on a GPU ``ready`` sees to it, without asking the device."""
        if self.pairs is not None and self.pairs.device.type == "cpu" and self.pairs.numel():
            low, high, rows = int(self.pairs.min()), int(self.pairs.max()), self.hidden.shape[0]
            if low < 0 or high >= rows:
                reject("pairs", f"indices {low}..{high}", f"row indices 0..{rows - 1}")

    def ready(self) -> AccumulateTask:
        """With an int8 map's features in float32, and no pair index that points outside the rows."""
        task = self
        if task.feature_map.dtype == torch.int8:
            # No backend sums int8 features: their float32 form is made once for the pass.
            task = task._replace(feature_map=task.feature_map.dequantized())
        if task.pairs is not None and task.pairs.device.type != "cpu" and task.data:
            pairs, labels = guarded_pairs(task.pairs, task.labels, task.hidden.shape[0])
            task = task._replace(pairs=pairs, labels=labels)
        return task

    def served(self) -> Served:
        """What decides the backend."""
        return Served(self.hidden, self.feature_map.dtype, self.feature_map)

    def run(self, backend: Any) -> Tensor:
        """The result, computed by this backend module."""
        total: Tensor = backend.accumulate(self)
        return total

    def fake(self) -> Tensor:
        """The result without data."""
        return self.hidden.new_empty((), dtype=torch.float64)


class PairVarianceTask(NamedTuple):
    """hidden (ΣK, h), group_sizes (G,) → g, v (Q,) of all pairs i < j of every group."""

    hidden: Tensor
    group_sizes: Tensor
    weights: HeadWeights

    def check(self) -> None:
        """Raise InputError where a shape, dtype or device does not fit."""
        check_hidden(self.hidden, self.weights.map)
        sizes = self.group_sizes
        if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu":
            reject("group_sizes", f"{tuple(sizes.shape)} {sizes.dtype}", "(G,) int64 on the CPU")

    def check_values(self) -> None:
        """Raise InputError where an index is out of range."""
        sizes, rows = self.group_sizes, self.hidden.shape[0]
        if int(sizes.sum()) != rows or (len(sizes) and int(sizes.min()) < 0):
            shown = sizes.tolist() if len(sizes) <= 8 else f"{sizes[:8].tolist()}..."
            reject("group_sizes", f"{shown} (sum {int(sizes.sum())})", f"non-negative sizes that sum to {rows} rows")

    def ready(self) -> PairVarianceTask:
        """The task as backends take it."""
        return self

    def served(self) -> Served:
        """What decides the backend."""
        return Served(self.hidden, self.weights.dtype, self.weights)

    def run(self, backend: Any) -> tuple[Tensor, Tensor]:
        """The result, computed by this backend module."""
        g, v = backend.pair_variance(*self)
        return g, v

    def fake(self) -> tuple[Tensor, Tensor]:
        """The result without data."""
        pairs = torch.library.get_ctx().new_dynamic_size()  # depends on the sizes' values
        return (
            self.hidden.new_empty(pairs, dtype=torch.float32),
            self.hidden.new_empty(pairs, dtype=torch.float32),
        )


class PowerIterationTask(NamedTuple):
    """weight (m, h), vector (h,) → σ () and the new vector (h,)."""

    weight: Tensor
    vector: Tensor
    iterations: int = 1

    def check(self) -> None:
        """Raise InputError where a shape, dtype or device does not fit."""
        if self.weight.dim() != 2:
            reject("weight", f"shape {tuple(self.weight.shape)}", "(m, h)")
        _check_vector("vector", self.vector, self.weight.shape[1])
        if self.iterations < 1:
            reject("iterations", self.iterations, "at least 1")

    def check_values(self) -> None:
        """Nothing to look at."""

    def ready(self) -> PowerIterationTask:
        """The task as backends take it."""
        return self

    def served(self) -> Served:
        """What decides the backend."""
        return Served(self.weight, self.weight.dtype, self.weight)

    def run(self, backend: Any) -> tuple[Tensor, Tensor]:
        """The result, computed by this backend module."""
        sigma, vector = backend.power_iteration(*self)
        return sigma, vector

    def fake(self) -> tuple[Tensor, Tensor]:
        """The result without data."""
        kind = torch.promote_types(torch.promote_types(self.weight.dtype, self.vector.dtype), torch.float32)
        return self.weight.new_empty((), dtype=kind), self.vector.new_empty(self.vector.shape, dtype=kind)


class ScoreAttributesTask(NamedTuple):
    """hidden (N, h) → a summary (5, N), outputs of the value heads (N, M, A · per), weights (N, M, A)."""

    hidden: Tensor
    weights: AttributeWeights
    gate_hidden: Tensor | None = None

    def check(self) -> None:
        """Raise InputError where a shape, dtype or device does not fit."""
        check_hidden(self.hidden, self.weights)
        if self.gate_hidden is None:
            return
        if self.weights.fixed is not None:
            reject("gate_hidden", "states", "None: the heads have no gate")
        check_hidden(self.gate_hidden, self.weights, "gate_hidden")
        if len(self.gate_hidden) != len(self.hidden) or self.gate_hidden.dtype != self.hidden.dtype:
            got = f"{len(self.gate_hidden)} rows of {self.gate_hidden.dtype}"
            reject("gate_hidden", got, f"{len(self.hidden)} of {self.hidden.dtype}, one a row of hidden")

    def check_values(self) -> None:
        """Nothing to look at."""

    def ready(self) -> ScoreAttributesTask:
        """The task as backends take it."""
        return self

    def served(self) -> Served:
        """What decides the backend."""
        return Served(self.hidden, self.weights.dtype, self.weights)

    def run(self, backend: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The result, computed by this backend module."""
        summary, outputs, weights = backend.score_attributes(*self)
        return summary, outputs, weights

    def fake(self) -> tuple[Tensor, Tensor, Tensor]:
        """The result without data."""
        heads = self.weights if isinstance(self.weights, AttributeWeights) else from_handle(self.weights)
        assert isinstance(heads, AttributeWeights)
        n, m = self.hidden.shape[0], heads.members
        kind = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        sizes = ((len(SUMMARY), n), (n, m, heads.attributes * heads.per), (n, m, heads.attributes))
        summary, outputs, weights = (self.hidden.new_empty(size, dtype=kind) for size in sizes)
        return summary, outputs, weights
