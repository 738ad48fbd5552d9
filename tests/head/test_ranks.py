"""One head from several processes: the same to the bit on all, that of one process but for rounding; nobody hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import one_rank
from support.warm import WarmProcess, WarmPython

from rmcore.head import FrozenHead
from rmcore.head.checkpoint import load_head
from rmcore.head.fit import FitReport
from rmcore.head.posterior import Posterior

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)

Job = Callable[..., tuple[Path, list[WarmProcess]]]


@pytest.fixture(scope="module")
def start(warm_python: WarmPython, tmp_path_factory) -> Job:
    """``start(scenario, size)``: the job's folder and its processes."""
    code = Path(one_rank.__file__).read_text()

    def started(scenario: str, size: int, *arguments: object) -> tuple[Path, list[WarmProcess]]:
        folder = tmp_path_factory.mktemp(f"{scenario}-{size}")
        modules = ["torch", "torch.distributed", "rmcore.model.training", "safetensors.torch"]
        return folder, [
            warm_python.start(code, rank, size, folder, scenario, *arguments, modules=modules) for rank in range(size)
        ]

    return started


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.distributed)])
def heads(request, start) -> list[dict[str, Path]]:
    """Of each rank, the folder of each case's head."""
    folder, ranks = start("fits", request.param)
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    names = {path.name.rpartition(" rank ")[0] for path in folder.glob("* rank *")}
    return [{name: folder / f"{name} rank {rank}" for name in names} for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[FrozenHead, FitReport | None]]:
    return one_rank.fits(0, 1, None)


def test_all_ranks_have_one_head(heads, alone):
    assert set(heads[0]) == set(alone)
    for name, folder in heads[0].items():
        for other in heads[1:]:
            for file in ("head.safetensors", "rmcore.json"):
                assert (other[name] / file).read_bytes() == (folder / file).read_bytes(), (name, file)


ROUNDING = {"float32": 1e-5, "layer": 1e-3}
"""Of β and P against one process, relative to their largest entry, where it is more than 1e-13, that of sums in another
order: float32 rows have features that are products of other shapes, and W is float32, trained in 8 steps."""


def test_it_is_the_head_of_one_process(heads, alone):
    for name, (expected, _) in alone.items():
        got = load_head(heads[0][name])
        assert got.posterior.count == expected.posterior.count
        assert got.config == expected.config, name  # the length-scale too: the same rows are measured
        for a, b in (
            (got.beta, expected.beta),
            (got.posterior.precision, expected.posterior.precision),
            *([] if got.rows is None else [(got.rows.posterior.precision, expected.rows.posterior.precision)]),
        ):
            error = float((a - b).abs().max()) / float(b.abs().max())
            assert error <= ROUNDING.get(name, 1e-13), name
        for field, tensor in expected.feature_map.tensors().items():
            if name == "layer":
                torch.testing.assert_close(getattr(got.feature_map, field), tensor, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(getattr(got.feature_map, field), tensor), (name, field)
        assert got.feature_map.input_scale == expected.feature_map.input_scale


def test_without_the_reduction_a_rank_is_unsure_of_what_it_knows(alone):
    """The published code fits P on each rank's own data: v is up to as many times too large as there are ranks."""
    expected, _ = alone["many"]
    ratio = {}
    for size in (2, 4, 8):
        hidden, labels, pairs, _ = one_rank.part(0, 1, many=True)
        count = len(labels) // size
        posterior = Posterior(40, ridge=expected.config.ridge)
        posterior.accumulate(hidden, labels[:count], expected.feature_map, expected.beta, pairs=pairs[:count])
        forgot = FrozenHead(expected.config, expected.feature_map, expected.beta, 0.0, posterior)
        rows = one_rank.part(0, 1).hidden
        twos = torch.full((len(rows) // 2,), 2)
        mine, whole = (h.score_pairs(rows, twos, backend="torch").variance for h in (forgot, expected))
        ratio[size] = float((mine / whole).median())
    assert 1.4 < ratio[2] < 2
    assert 2 < ratio[4] < 4
    assert 3.3 < ratio[8] < 8


BROKEN = {
    "nonfinite": ("RankError: rank 1 (", "failed in the fit: NonFiniteError: hidden: got NaN or Inf in 1 of"),
    "killed": ("RankError: rank 1 (", ") died"),
    "stopped": ("RankError: rank 1 (", ") gave no sign of life for 1.5 s"),
    "nothing": ("InputError: labels: got 0 data, expected at least one",),
    "unlike": ("InputError: head.config: got another on ranks [1] than on rank 0, expected the same on all",),
    "raised": ("RankError: rank 1 (", "failed in the job: KeyError: 'elsewhere'"),
}


def test_a_rank_that_ends_ends_the_job_with_its_name(start):
    jobs = {scenario: start(scenario, 2, 1.5)[1] for scenario in BROKEN}
    for scenario, said in BROKEN.items():
        first, second = jobs[scenario]
        out, errors = first.communicate(timeout=60)
        assert first.returncode == 3, errors
        for part in said:
            assert part in out, scenario
        second.kill() if scenario == "stopped" else None
        second.wait(60)
        assert second.returncode == (-9 if scenario in ("killed", "stopped") else 3), scenario
