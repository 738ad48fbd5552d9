"""Commands under torchrun: which process this is, and who of them speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rmcore._base.errors import InputError
from rmcore.cli.console import notes

if TYPE_CHECKING:
    from rmcore.head.ranks import Ranks
    from rmcore.model.data import Part

__all__ = ["check_count", "main_process", "many_processes", "part_of", "started_ranks", "totals"]

_TIMES = (("PATIENCE", 60.0), ("MEET_WITHIN", 300.0))
"""Of :meth:`rmcore.head.ranks.Ranks.here`, from the environment."""


def many_processes() -> bool:
    """Whether accelerate or torchrun started several of us."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def main_process() -> bool:
    """Whether this is the one that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def started_ranks() -> Iterator[Ranks | None]:
    """The processes that torchrun started, of which this is one with a GPU of its own; None where it is alone.

    Rank 0 alone shows progress and notes. What a rank raises ends them all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    import torch

    from rmcore.head.ranks import Ranks

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    patience, within = (float(os.environ.get(f"RMCORE_{name}", default)) for name, default in _TIMES)
    with Ranks.here(patience=patience, meet_within=within) or _alone() as ranks:
        quiet, notes.quiet = notes.quiet, notes.quiet or ranks.rank > 0
        try:
            yield ranks
            ranks.counts(0)  # no rank leaves, and with it perhaps the job's store, while another works
        finally:
            notes.quiet = quiet


def _alone() -> Ranks:
    raise InputError("WORLD_SIZE: got more than 1, but torch has no torch.distributed; expected a torch built with it")


def part_of(ranks: Ranks | None) -> Part:
    """The part of every input that this process reads."""
    from rmcore.model.data import Part

    return Part() if ranks is None else Part(ranks.rank, ranks.size)


def check_count(name: str, mine: int, ranks: Ranks | None) -> int:
    """How many rows all processes read; raises InputError where there is none."""
    count = mine if ranks is None else sum(ranks.counts(mine))
    if not count:
        raise InputError(f"{name}: got no lines, expected at least one")
    return count


def totals(ranks: Ranks | None, *mine: int) -> list[int]:
    """Whole numbers, summed over all ranks."""
    import torch

    return list(mine) if ranks is None else [int(n) for n in ranks.total(torch.tensor(mine, dtype=torch.float64))]
