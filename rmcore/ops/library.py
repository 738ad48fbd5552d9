"""The registry: for each task of :mod:`rmcore.ops.tasks` one ``torch.library`` operator ``rmcore::*``.

In eager code :meth:`Operation.__call__` goes straight to the backend: the custom-operator boundary costs more than a
kernel. Under ``torch.compile`` it calls the operator, whose schema, fake and implementation all come from the task.

A head's weights are named by an integer handle (:func:`rmcore.ops.weights.from_handle`), so that a graph neither copies
them nor loses the re-packed form a backend keeps beside them; a compiled function is guarded on the handle and must not
outlive its head.
"""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.ops.attribute_weights import AttributeWeights
from rmcore.ops.dispatch import Backend, select
from rmcore.ops.tasks import (
    AccumulateTask,
    PairVarianceTask,
    PowerIterationTask,
    ScoreAttributesTask,
    ScoreTask,
    Task,
)
from rmcore.ops.weights import FeatureMap, HeadWeights, from_handle

__all__ = ["OPERATIONS", "Operation"]

_KINDS: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    HeadWeights: "int",
    FeatureMap: "int",
    AttributeWeights: "int",
}
_HANDLED = (FeatureMap, HeadWeights, AttributeWeights)


class Operation:
    """One operation of the library: its task in, its result out, from whichever backend runs it.

    Args:
        name: as in :mod:`rmcore.ops`, and of the backends' function.
        task: the class of its calls; the fields are the operator's arguments.
        returns: the operator's result as schemas write it.
        mutates: fields written in place.
        operator: the operator's name, where it is another.
    """

    def __init__(
        self, name: str, task: Any, returns: str, *, mutates: tuple[str, ...] = (), operator: str | None = None
    ) -> None:
        self.name, self.task, self.operator_name = name, task, operator or name
        hints = typing.get_type_hints(task)
        self._fields = {field: hints[field] for field in task._fields}
        definition = torch.library.custom_op(
            f"rmcore::{self.operator_name}",
            self._implementation,
            mutates_args=mutates,
            schema=self._schema(returns, mutates),
        )
        definition.register_fake(self._fake)
        self.operator = getattr(torch.ops.rmcore, self.operator_name).default

    def __call__(self, task: Task, backend: Backend) -> Any:
        """Check the task and run it; raises InputError or BackendError."""
        task.check()
        return self.checked(task, backend)

    def checked(self, task: Task, backend: Backend) -> Any:
        """The same for a task whose tensors are known to fit."""
        if torch.compiler.is_compiling():
            return self.operator(*[v.handle if isinstance(v, _HANDLED) else v for v in task], backend)
        return self.run(task, backend)

    def run(self, task: Task, backend: Backend) -> Any:
        """The backend's result, called directly."""
        task.check_values()
        task = task.ready()
        tensor, dtype, weights = task.served()
        return task.run(select(self.name, tensor, dtype, backend, weights))

    def _schema(self, returns: str, mutates: tuple[str, ...]) -> str:
        alias = iter("abc")
        arguments = [
            f"Tensor({next(alias)}!) {name}" if name in mutates else f"{_KINDS.get(hint, 'str')} {name}"
            for name, hint in self._fields.items()
        ]
        return f"({', '.join([*arguments, 'str backend'])}) -> {returns}"

    def _implementation(self, *arguments: Any) -> Any:
        *values, backend = arguments
        kinds = zip(self._fields.values(), values, strict=True)
        task = self.task(*(_weights(v, kind) if kind in _HANDLED else v for kind, v in kinds))
        return _fresh(self.run(task, backend), values)

    def _fake(self, *arguments: Any) -> Any:
        return self.task(*arguments[:-1]).fake()


def _weights(handle: int, kind: Any) -> Any:
    weights = from_handle(handle)
    if kind is FeatureMap and isinstance(weights, HeadWeights):
        return weights.map
    if not isinstance(weights, kind):
        reject("handle", f"{handle}, of a {type(weights).__name__}", f"the handle of {kind.__name__}")
    return weights


def _fresh(result: Any, inputs: list[Any]) -> Any:
    """``result`` in memory of its own: an operator's outputs may be neither inputs nor parts of one tensor."""
    if isinstance(result, tuple):
        return tuple(_fresh(part, inputs) for part in result)
    if not isinstance(result, Tensor):
        return result
    part = result.untyped_storage().nbytes() != result.numel() * result.element_size()
    return result.clone() if part or any(result is given for given in inputs) else result


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("score", ScoreTask, "()", mutates=("out",), operator="score_out"),
        Operation("accumulate", AccumulateTask, "Tensor", mutates=("precision", "gradient")),
        Operation("pair_variance", PairVarianceTask, "(Tensor, Tensor)"),
        Operation("power_iteration", PowerIterationTask, "(Tensor, Tensor)"),
        Operation("score_attributes", ScoreAttributesTask, "(Tensor, Tensor, Tensor)"),
    )
}
"""By the name the operation has in :mod:`rmcore.ops`."""
