"""int8 heads of the cuda backend on a GPU: the CPU's whole numbers, bits, graphs, what is poisoned before.

``-k sanitizer`` selects the small shapes for compute-sanitizer.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from int8_checks import check, check_same_numbers, draw, make_head, random_whole, spread, whole_head

from rmcore import ops
from rmcore.ops import whole_numbers
from rmcore.ops.backends import cpu, cuda
from rmcore.ops.weights import HeadWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="needs an NVIDIA GPU with bulk copies",
    ),
]


@pytest.fixture(autouse=True)
def _poisoned_workspaces():
    reason = cuda.unavailable("score", torch.device("cuda", torch.cuda.current_device()), torch.int8)
    assert reason is None, reason
    for workspace in cuda._workspaces.values():
        workspace.fill_(0xFF)
    yield
    torch.cuda.synchronize()


def run(hidden: Tensor, weights: HeadWeights) -> Tensor:
    out = torch.full((4, hidden.shape[0]), math.nan, device="cuda")
    cuda.score(hidden, weights, out)
    return out


def compare(weights: HeadWeights, rows: int, dtype: torch.dtype = torch.float16) -> None:
    hidden = spread(draw(rows, weights.hidden_size, seed=rows)).to(dtype)
    got = run(hidden.cuda(), weights.to("cuda")).cpu()
    check(got, hidden, weights, what=f"{weights.hidden_size} {weights.num_features} {rows}")
    if cpu.unavailable("score", torch.device("cpu"), torch.int8) is None:
        same = torch.full((4, rows), math.nan)
        cpu.score(hidden, weights, same)
        check_same_numbers(got, same, weights)


@pytest.mark.parametrize(
    ("h", "d"), [(1, 1), (15, 17), (16, 130), (33, 127), (129, 70), (1003, 1003), (2060, 40), (72, 2050), (1024, 2048)]
)
def test_every_size_and_batch(h, d):
    weights = make_head(h, d)
    for rows in (1, 2, 7, 8, 9, 15, 16):
        compare(weights, rows)


def test_full_size_heads():
    for h, d in ((4096, 4096), (2048, 4096), (4096, 2048)):
        weights = make_head(h, d)
        for rows in (1, 16):
            compare(weights, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_any_dtype_and_strides(dtype):
    weights = make_head(64, 200).to("cuda")
    wide = draw(24, 150, dtype).cuda()
    for hidden in (wide[:9, :64], wide[:9, 3:67], wide[::2, 10:138:2], wide[:1, :64].expand(6, -1)):
        assert torch.equal(run(hidden, weights), run(hidden.contiguous().float(), weights))


@pytest.mark.parametrize("extreme", [False, True])
def test_sums_are_exact_at_their_largest(extreme):
    d = 1027
    p = random_whole((d,), False, d).long()
    q = torch.randint(-127, 128, (16,), generator=torch.Generator().manual_seed(d))
    if extreme:  # c = ±1
        p, q = torch.where(p < 0, 64, 0), torch.full((16,), 8)
        q[1::2] = 16
    c = 127 * torch.cos(2 * math.pi * (q[:, None] * p).double() / 1024)
    row = random_whole((d,), extreme, d + 1)
    weights = whole_head(torch.stack([torch.zeros(d), p], 1).to(torch.int8), 2.0**-10, row).to("cuda")
    hidden = torch.stack([torch.full((16,), 127.0), q.float()], 1).cuda()
    y = (c.round().long()[:, :-1] * row.long()[:-1]).sum(1).float() * 2.0**-9 * torch.tensor(1 / 127)
    for rows in (1, 8, 16):
        torch.testing.assert_close(run(hidden[:rows], weights)[1].cpu(), (y * y)[:rows], rtol=1e-6, atol=0)


def test_outliers_join_in_float32_and_bad_rows_stay_alone():
    weights = make_head(1029, 1200)
    hidden = draw(12, 1029)
    hidden[::2, 7], hidden[4, 100] = 3000.0, -2900.0
    clean = run(hidden.cuda(), weights.to("cuda"))
    check_same_numbers(clean.cpu().double(), whole_numbers.score(hidden, weights), weights)
    hidden[3, 1028], hidden[6, 0] = math.nan, math.inf
    got, keep = run(hidden.cuda(), weights.to("cuda")), torch.tensor([row not in (3, 6) for row in range(12)])
    assert torch.equal(got[:, keep.cuda()], clean[:, keep.cuda()])
    assert not bool(got[:, ~keep.cuda()].isfinite().any())


def test_twice_the_same_bits_and_as_a_graph_replays():
    weights = make_head(2048, 2048).to("cuda")
    for rows in (1, 16):
        hidden = draw(rows, 2048, torch.float16).cuda()
        first = run(hidden, weights)
        for value in (0x00, 0xFF, 0x7F):
            for workspace in cuda._workspaces.values():
                workspace.fill_(value)
            assert all(torch.equal(first, run(hidden, weights)) for _ in range(70))
        out, graph = torch.empty_like(first), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            cuda.score(hidden, weights, out)
        for seed in (1, 2):
            hidden.copy_(draw(rows, 2048, torch.float16, seed=seed))
            out.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, run(hidden, weights))


def test_ops_choose_it_for_few_rows():
    weights, hidden = make_head(128, 300).to("cuda"), draw(16, 128).cuda()
    found = ops.explain("score", "cuda", torch.int8, rows=16, weights=weights)
    assert found.backend in ("cuda", "triton"), str(found)
    assert "up to 16" in ops.explain("score", "cuda", torch.int8, "cuda", rows=17, weights=weights).reasons["cuda"]
    planned = [torch.stack(ops.score(hidden, weights, backend="cuda")) for _ in range(3)]
    assert all(torch.equal(run(hidden, weights), other) for other in planned)


@pytest.mark.parametrize("rows", [1, 12])
def test_sanitizer_score_int8(rows):
    for h, d in ((72, 200), (67, 130), (200, 90)):
        compare(make_head(h, d), rows)
        compare(make_head(h, d), rows, torch.float32)
