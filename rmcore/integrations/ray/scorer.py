"""Groups scored in ``ray.data.Dataset.map_batches``: one model an actor, one row a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from rmcore._base.errors import InputError, reject
from rmcore.engine.engine import RewardEngine
from rmcore.engine.routing import Router
from rmcore.judge.base import Judge

__all__ = ["OUTPUTS", "Scorer", "whole_groups"]

OUTPUTS = ("advantages", "rewards", "preference", "uncertainty", "logit", "variance", "routed")
"""What a :class:`Scorer` can add of a group: of its K responses the first two, squares (K, K) the others."""
Source: TypeAlias = "str | os.PathLike[str] | Callable[[], RewardEngine]"


class Scorer:
    """What ``Dataset.map_batches`` is given: loads a model once an actor, and adds columns to batches of groups.

    A batch is scored as ``RewardEngine.score`` scores the same groups in one call: the same bits on one backend, and a
    router that looks at the whole batch looks at this one. Results do not depend on which actor had it.

    Args:
        model: a folder or hub name; or what makes the engine, and then nothing else is given.
        judge: of the pairs that ``router`` routes: for all actors together that of
            :func:`~rmcore.integrations.ray.judge.start_judge`.
        router: as in :class:`~rmcore.engine.engine.RewardEngine`. One that learns or adapts does so in each actor by
            itself.
        prompt, responses: names of the columns; a prompt is a text or messages, responses are a list of these.
        outputs: which of :data:`OUTPUTS` to add, as columns of these names; and ``error``, null or why a group was not
            scored (its other columns are null then).
        on_error: ``column``, or ``raise``, which ends the job.
        **engine: further arguments of the engine.

    Example:
        >>> dataset.map_batches(  # doctest: +SKIP
        ...     Scorer,
        ...     fn_constructor_kwargs={"model": "my-rm"},
        ...     compute=ray.data.ActorPoolStrategy(size=8),
        ...     batch_size=64,
        ...     num_gpus=0.5,
        ... )

    Raises:
        InputError: an output that there is not, or settings beside an engine.
    """

    def __init__(
        self,
        model: Source,
        judge: Judge | None = None,
        router: Router | None = None,
        *,
        prompt: str = "prompt",
        responses: str = "responses",
        outputs: Sequence[str] = ("advantages", "rewards"),
        on_error: Literal["column", "raise"] = "column",
        **engine: Any,
    ) -> None:
        unknown = [name for name in outputs if name not in OUTPUTS]
        if unknown:
            reject("outputs", unknown, f"some of {', '.join(OUTPUTS)}")
        self.columns = (prompt, responses)
        self.outputs = tuple(outputs)
        self.on_error = on_error
        if isinstance(model, (str, os.PathLike)):
            from rmcore.model.reward_model import RewardModel

            self.engine = RewardEngine(RewardModel.from_pretrained(model), judge, router, **engine)
        elif (judge, router, engine) != (None, None, {}):
            reject("judge, router", "given beside an engine", "nothing: they are the engine's")
        else:
            self.engine = model()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch, columns of n rows each (``batch_format="numpy"``), with those of the results."""
        import numpy as np

        prompts, groups = ([_plain(value) for value in _column(batch, name)] for name in self.columns)
        scores = self.engine.score(prompts, groups, on_error="raise" if self.on_error == "raise" else "return")
        rows: list[dict[str, Any]] = []
        for outcome in scores.outcomes():
            if isinstance(outcome, Exception):
                rows.append({**dict.fromkeys(self.outputs), "error": f"{type(outcome).__name__}: {outcome}"})
            else:
                record = outcome.to_record()
                rows.append({**{name: record[name] for name in self.outputs}, "error": None})
        added: dict[str, Any] = {}
        for name in (*self.outputs, "error"):
            column = np.empty(len(rows), dtype=object)  # lists of several lengths stay lists
            for k, row in enumerate(rows):
                column[k] = row[name]
            added[name] = column
        return {**batch, **added}


def whole_groups(
    dataset: Any, key: str, *, prompt: str = "prompt", response: str = "response", order: str | None = None
) -> Any:
    """A ``Dataset`` with a row a group, of one with a row a response: columns ``key``, ``prompt`` and ``responses``.

    Args:
        dataset: a ``ray.data.Dataset``. It is shuffled, so that a group's rows come together.
        key: column that a group's rows, and no others, have in common.
        prompt: column of the prompts.
        response: column of the responses.
        order: column that responses are sorted by; None leaves them as they come.

    Raises InputError, in the job, where rows of one group have different prompts.
    """

    def whole(rows: Any) -> Any:
        if order is not None:
            rows = rows.sort_values(order, kind="stable")
        prompts = [_plain(value) for value in rows[prompt]]
        if any(other != prompts[0] for other in prompts):
            raise InputError(f"{prompt}: got several in the group {rows[key].iloc[0]!r}, expected one prompt a group")
        found = {key: rows[key].iloc[0], "prompt": prompts[0], "responses": [_plain(value) for value in rows[response]]}
        return type(rows)([found])

    return dataset.groupby(key).map_groups(whole, batch_format="pandas")


def _column(batch: Mapping[str, Any], name: str) -> Any:
    if name not in batch:
        reject("batch", f"columns {sorted(batch)}", f"one named {name!r}")
    return batch[name]


def _plain(value: Any) -> Any:
    """Text, lists and mappings as Python has them: Arrow gives arrays for lists, and nulls for keys missing."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
