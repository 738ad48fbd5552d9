"""One rank of a job that fits heads over several; started by tests/head/test_ranks.py, never collected.

    one_rank.py RANK SIZE FOLDER SCENARIO [PATIENCE]

``fits`` writes a head a case as ``FOLDER/CASE rank RANK``; the other scenarios end with an error, a line of stdout.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rmcore._base.errors import RmcoreError
from rmcore.head import SNGPHead
from rmcore.head.checkpoint import save_head
from rmcore.head.fit import FitReport, fit, upgrade
from rmcore.head.frozen import FrozenHead
from rmcore.head.ranks import Ranks
from rmcore.model.training import train_layer

SIZE, PAIRS = 12, 150
SHARES = {2: (0.3, 0.7), 4: (0.4, 0.0, 0.5, 0.1), 1: (1.0,)}
"""Which part of the data each rank has: uneven ones, and none."""


class Part(NamedTuple):
    hidden: Tensor
    labels: Tensor
    pairs: Tensor
    weight: Tensor


def part(rank: int, size: int, *, many: bool = False) -> Part:
    """This rank's part of the data: two rows of its own a pair."""
    generator = torch.Generator().manual_seed(0)
    count = 8 * PAIRS if many else PAIRS  # many: more rows than the length-scale is taken from
    rows = torch.randn(count, 2, SIZE, generator=generator, dtype=torch.float64)
    rows[:, :, 3] *= 50
    reward = 2 * rows[..., 0].sin() + rows[..., 1] * rows[..., 2]
    labels = torch.bernoulli((reward[:, 0] - reward[:, 1]).sigmoid(), generator=generator)
    weight = torch.rand(count, generator=generator, dtype=torch.float64)
    shares = SHARES[size]
    own = slice(round(count * sum(shares[:rank])), round(count * sum(shares[: rank + 1])))
    hidden = rows[own].reshape(-1, SIZE)
    return Part(hidden, labels[own], torch.arange(len(hidden)).view(-1, 2), weight[own])


def fits(rank: int, size: int, ranks: Ranks | None) -> dict[str, tuple[FrozenHead, FitReport | None]]:
    """A head of each kind."""

    def difference(dtype=torch.float32, many: bool = False, weighted: bool = False, rows=torch.float64, **config: Any):
        hidden, labels, pairs, weight = part(rank, size, many=many)
        hidden = hidden.to(rows)
        head = SNGPHead(SIZE, num_features=40, kernel_scale=3.0, **config)
        if config.get("layer_size"):
            data = (hidden, labels, pairs)
            report = train_layer(head, *data, epochs=2, batch_size=40, validation=data, ranks=ranks)
            assert report.steps == 8
            assert report.losses[1] < report.losses[0] < 1
            assert report.validation_losses[2] < report.validation_losses[0] < 1
        if rank > 0:
            with torch.no_grad():
                head.beta.fill_(rank)  # rank 0's start is taken
        found, report = fit(head, hidden, labels, pairs=pairs, dtype=dtype, backend="torch",
                            sample_weight=weight if weighted else None, ranks=ranks)  # fmt: skip
        assert float(head.length_scale) == found.config.length_scale or found.config.features == "linear"
        torch.testing.assert_close(head.beta.double(), found.beta, rtol=1e-6, atol=1e-6)
        return found, report

    hidden, labels, pairs, _ = part(rank, size)
    beta = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    concat = SNGPHead(2 * SIZE, num_features=40, mode="concat")
    with torch.no_grad():
        concat.beta0.fill_(0.25)
    return {
        "plain": difference(),
        "float32": difference(rows=torch.float32),
        "many": difference(many=True),
        "gaussian": difference(likelihood="gaussian", weighted=True),
        "layer": difference(layer_size=8, activation="tanh"),
        "linear": difference(features="linear"),
        "int8": difference(torch.int8),
        "half": difference(torch.float16),
        "concat": fit(concat, hidden.view(-1, 2 * SIZE), labels, backend="torch", ranks=ranks),
        "upgrade": (upgrade(hidden, pairs, beta, 0.5, labels=labels, backend="torch", ranks=ranks), None),
    }


def broken(scenario: str, rank: int, size: int, ranks: Ranks) -> None:
    """What ends a job; every rank must hear of it."""
    hidden, labels, pairs, _ = part(rank, size)
    head = SNGPHead(SIZE, num_features=40, seed=rank if scenario == "unlike" else 0)
    if scenario == "nonfinite" and rank == 1:
        hidden[3, 3] = torch.nan
    if scenario == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if scenario == "stopped" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if scenario == "nothing":
        hidden, labels, pairs = hidden[:0], labels[:0], pairs[:0]
    if scenario == "raised" and rank == 1:
        raise KeyError("elsewhere")
    fit(head, hidden, labels, pairs=pairs, ranks=ranks)


def main(rank: int, size: int, folder: Path, scenario: str, patience: float = 60.0) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        with Ranks.of(patience=patience) as ranks:
            if scenario != "fits":
                broken(scenario, rank, size, ranks)
            for name, (head, _) in fits(rank, size, ranks).items():
                save_head(head, folder / f"{name} rank {rank}")
    except (RmcoreError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(3)  # no barrier at the end for those that will not come
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], *map(float, sys.argv[5:]))
