"""``rmcore score --ray``: a file's groups scored by actors of a cluster, the results in the order of the file.

The unit of work is a *chunk*: as many groups, one after another, as one process scores together. So batches, and with
them the bits of the results, are those of one process, however many actors there are and whichever of them dies: Ray
gives a chunk whose actor is gone to another.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from rmcore._base.errors import DataError
from rmcore._base.numbers import COUNT, Within, check_numbers
from rmcore.engine.engine import RewardEngine
from rmcore.integrations.ray.cluster import ray_module

if TYPE_CHECKING:
    from rmcore.engine.group_score import GroupScore
    from rmcore.model.data import Group

__all__ = ["Chunk", "ChunkScorer", "Pool", "read_chunks", "score_in_order"]

Line: TypeAlias = "Callable[[Group, GroupScore], dict[str, Any] | None]"
"""What is written of a group; nothing for None."""


@dataclass(frozen=True)
class Pool:
    """The actors that score.

    Attributes:
        size: how many.
        num_gpus: of each; a fraction puts several on one GPU.
        num_cpus: of each.
    """

    size: int = 1
    num_gpus: float = 0.0
    num_cpus: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, COUNT, "size")
        check_numbers(self, Within(least=0), "num_gpus", "num_cpus")


@dataclass(frozen=True)
class Chunk:
    """What became of a chunk.

    Attributes:
        last: number of the line of its last group.
        records: of its groups, with ``id``, ``line`` and ``digest``, without those of which ``line`` makes nothing.
        errors: of the groups that could not be scored: [line, message].
        summary: as ``GroupScores.summary``; empty where none could be scored.
        ends: why nothing after it can be read; None where it can.
    """

    last: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    errors: list[list[Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    ends: str | None = None
    groups: int = 0
    """How many groups it has."""


def read_chunks(
    source: str, columns: Mapping[str, str], size: int, part: tuple[int, int], after: int
) -> Iterator[dict[str, Any]]:
    """Rows of chunks, as Ray carries them, of a part of a file; those that end by line ``after`` are left out.

    A line that cannot be read ends its part: what is before it in its chunk comes with the error.
    """
    from rmcore.model.data import Part, read_groups

    groups = read_groups(source, columns, part=Part(*part, unit=size))
    chunk: list[Group] = []
    ends: str | None = None
    while ends is None:
        try:
            group = next(groups, None)
        except DataError as error:
            group, ends = None, str(error)
        if group is not None:
            chunk.append(group)
        if ends is not None or (chunk and (group is None or len(chunk) == size)):
            if ends is not None or chunk[-1].line > after:
                told = [[g.line, g.id, g.prompt, list(g.responses)] for g in chunk]
                yield {"groups": json.dumps(told), "ends": ends or ""}
            chunk = []
        if group is None:
            return


class ChunkScorer:
    """Scores a chunk a call; one engine an actor.

    Args:
        make: makes the engine.
        line: what is written of a group.
    """

    def __init__(self, make: Callable[[], RewardEngine], line: Line) -> None:
        self.engine, self.line = make(), line

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of :func:`read_chunks` → JSON of a :class:`Chunk`."""
        from rmcore.model.data import Group
        from rmcore.model.data.results import group_result

        groups = [
            Group(prompt, tuple(responses), id=name, line=line)
            for line, name, prompt, responses in json.loads(row["groups"])
        ]
        found = Chunk(last=groups[-1].line if groups else 0, ends=row["ends"] or None, groups=len(groups))
        if not groups:
            return {"chunk": json.dumps(vars(found))}
        scores = self.engine.score([g.prompt for g in groups], [g.responses for g in groups], on_error="return")
        for group, outcome in zip(groups, scores.outcomes(), strict=True):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                record = self.line(group, outcome)
            except Exception as error:  # a tokenizer's own as well: it is this group's alone
                found.errors.append([group.line, error_text(error)])
                continue
            if record is not None:
                found.records.append(group_result(group, record))
        found.summary.update(scores.summary() if len(scores) else {})
        return {"chunk": json.dumps(vars(found))}


def error_text(error: Exception) -> str:
    """What is said of a group that could not be scored."""
    from rmcore._base.errors import InputError

    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def score_in_order(
    source: str,
    make: Callable[[], RewardEngine],
    line: Line,
    *,
    columns: Mapping[str, str] | None = None,
    size: int = 64,
    pool: Pool | None = None,
    after: int = 0,
) -> Iterator[Chunk]:
    """Score a file's groups on the cluster this process is connected to; chunks in the order of the file.

    Args:
        source: as :func:`rmcore.model.data.read_groups` takes it, and every node can read it. ``-`` is read here.
        make: makes an actor's engine.
        line: what is made of a group, in the actor.
        columns: other names of columns.
        size: groups of a chunk.
        pool: the actors; None for one.
        after: line of the last group whose result is known: its chunk is scored again where it has more, and its groups
            up to there are left out.
    """
    data = ray_module("ray.data")
    pool = pool or Pool()
    context = data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    names = dict(columns or {})
    if source == "-":
        chunks = data.from_items(list(read_chunks(source, names, size, (0, 1), after)))
    else:
        parts = 1 if source.startswith("hf://") else pool.size  # each is a process that has torch to import

        def read(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
            for row in read_chunks(source, names, size, (int(batch["id"][0]), parts), after):
                yield {name: [value] for name, value in row.items()}

        chunks = data.range(parts, override_num_blocks=parts).map_batches(read, batch_size=1, num_cpus=0.25)
    scored = chunks.map(
        ChunkScorer,
        fn_constructor_args=(make, line),
        compute=data.ActorPoolStrategy(size=pool.size),
        num_gpus=pool.num_gpus or None,
        num_cpus=pool.num_cpus,
    )
    for row in scored.iter_rows():
        chunk = Chunk(**json.loads(row["chunk"]))
        chunk.records[:] = [record for record in chunk.records if record["line"] > after]
        yield chunk
        if chunk.ends is not None:
            return
