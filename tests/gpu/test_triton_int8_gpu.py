"""int8 heads of the triton backend on a GPU: the CPU's whole numbers at every row of the tables, bits, graphs."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import triton_checks as checks
from int8_checks import check, check_same_numbers, draw, make_head, random_whole, spread, whole_head

from rmcore import ops
from rmcore.kernels import features_int8, heuristics, rows_int8
from rmcore.ops import whole_numbers
from rmcore.ops.backends import cpu
from rmcore.ops.backends import triton as backend
from rmcore.ops.weights import HeadWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
# One below, at and above every limit of the tables, and beyond the last one.
ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257, 512, 513, 1024, 1025]


@pytest.fixture(autouse=True)
def _poison():
    with checks.poisoned_workspaces():
        yield
    torch.cuda.synchronize()


def run(hidden: Tensor, weights: HeadWeights) -> Tensor:
    out = torch.full((4, hidden.shape[0]), math.nan, device="cuda")
    backend.score(hidden, weights, out)
    return out


def test_it_runs_here():
    assert backend.unavailable("score", torch.device("cuda", 0), torch.int8) is None
    assert "score alone" in str(backend.unavailable("pair_variance", torch.device("cuda", 0), torch.int8))


@pytest.mark.parametrize(("h", "d"), [(1, 1), (384, 900), (257, 129), (384, 700), (1003, 1003)])
def test_score_at_every_row_of_the_tables(h, d):
    """Heads whose rows take one term, and two: h ≤ D / 2."""
    weights = make_head(h, d)
    there = weights.to("cuda")
    for rows in ROWS:
        hidden = spread(draw(rows, h, seed=rows)).half()
        got = run(hidden.cuda(), there).cpu()
        check(got, hidden, weights, what=str(rows))
        if cpu.unavailable("score", torch.device("cpu"), torch.int8) is None:
            same = torch.full((4, rows), math.nan)
            cpu.score(hidden, weights, same)
            check_same_numbers(got, same, weights)
    assert run(draw(0, h).cuda(), there).shape == (4, 0)


def test_rows_become_the_same_whole_numbers_bit_for_bit():
    for h in (1, 70, 300, 4096, 16384):
        hidden = draw(40, h)
        hidden[1] *= 1e-36
        if h > 50:
            hidden[2, 5], hidden[2, h - 1] = 1e5, -9e4
            hidden[3, :30] = 1e4 * 1.5 ** -torch.arange(30.0)
            hidden[4, ::2] = 1e6
            hidden[5] = (torch.arange(h) % 40 - 20) / 2
            hidden[5, 0] = 63.5  # a step of one half: ties to even
        hidden[6, 0], hidden[7, h - 1] = math.nan, math.inf
        padded = -(-h // 64) * 64
        got = rows_int8.whole_rows(hidden.cuda(), padded, scale=1.0, shift=None, balance=None, two_terms=True)
        want = whole_numbers.whole_rows(hidden, True)
        finite = hidden.isfinite().all(1)
        assert got.low is not None
        assert torch.equal(got.whole.cpu()[finite, :h].float(), want.whole[finite])
        assert torch.equal(got.low.cpu()[finite, :h].float(), want.low[finite])
        assert torch.equal(got.factor.cpu()[finite], want.factor[finite, 0])
        assert torch.equal(got.counts.cpu()[finite], (want.apart != 0).sum(1).int()[finite])
        assert bool(got.factor.cpu()[~finite].isnan().all())


@pytest.mark.parametrize("extreme", [False, True])
def test_sums_are_exact_at_their_largest(extreme):
    d = 1027
    p = random_whole((d,), False, d).long()
    q = torch.randint(-127, 128, (1100,), generator=torch.Generator().manual_seed(d))
    if extreme:  # c = ±1
        p, q = torch.where(p < 0, 64, 0), torch.full((1100,), 8)
        q[1::2] = 16
    c = 127 * torch.cos(2 * math.pi * (q[:, None] * p).double() / 1024)
    row = random_whole((d,), extreme, d + 1)
    weights = whole_head(torch.stack([torch.zeros(d), p], 1).to(torch.int8), 2.0**-10, row).to("cuda")
    hidden = torch.stack([torch.full((1100,), 127.0), q.float()], 1).cuda()
    sums = (c.round().long()[:, :-1] * row.long()[:-1]).sum(1)
    y = sums.float() * 2.0**-9 * torch.tensor(1 / 127)
    for rows in (1, 17, 64, 200, 600, 1100):
        torch.testing.assert_close(run(hidden[:rows], weights)[1].cpu(), (y * y)[:rows], rtol=1e-6, atol=0)


def test_a_row_has_the_same_features_in_every_batch():
    device = heuristics.device(torch.device("cuda", 0))
    for h, d in ((4096, 4096), (1024, 4096)):
        weights = make_head(h, d).to("cuda")
        m, hidden = weights.map, spread(draw(1500, h)).half().cuda()

        def features(rows: Tensor, m=m, weights=weights, two=2 * h <= d) -> Tensor:
            whole = rows_int8.whole_rows(
                rows, features_int8.columns(m), scale=1.0, shift=m.hidden_shift, balance=m.hidden_scale, two_terms=two
            )
            return features_int8.project(whole, m, weights.beta, device).c

        together = features(hidden)
        for rows in (1, 20, 64, 150, 400):
            assert torch.equal(features(hidden[7 : 7 + rows]), together[7 : 7 + rows])
        assert not bool(together.eq(100).all())


def test_outliers_join_in_float32():
    weights = make_head(1029, 1200)
    for rows in (9, 200, 1100):
        hidden = draw(rows, 1029)
        hidden[::2, 7], hidden[4, 100] = 3000.0, -2900.0
        got = run(hidden.cuda(), weights.to("cuda")).cpu()
        check_same_numbers(got.double(), whole_numbers.score(hidden, weights), weights)


def test_a_non_finite_row_spoils_only_itself():
    weights = make_head(128, 300).to("cuda")
    for rows in (3, 20, 65, 600, 1100):
        hidden = draw(rows, 128).cuda()
        clean = run(hidden, weights)
        keep = torch.arange(rows, device="cuda") != rows // 2
        for value in (math.nan, math.inf):
            spoilt = hidden.clone()
            spoilt[rows // 2, 5] = value
            got = run(spoilt, weights)
            assert not bool(got[:, rows // 2].isfinite().any())
            assert torch.equal(got[:, keep], clean[:, keep])


def test_rows_of_any_strides_and_dtype():
    weights, wide = make_head(64, 200).to("cuda"), draw(80, 150, torch.float16).cuda()
    views = (wide[:, 3:67], wide[::2, 10:138:2], wide[:64, :9].mT, wide[:1, :64].expand(6, -1), wide[:, :64].double())
    for hidden in (*views, wide[:, :64].bfloat16()):
        assert torch.equal(run(hidden, weights), run(hidden.contiguous().float(), weights))


def test_twice_the_same_bits_and_as_a_graph_replays():
    for h, d in ((4096, 4096), (512, 1024)):
        weights = make_head(h, d).to("cuda")
        for rows in (1, 16, 64, 300, 1025):
            hidden = draw(rows, h, torch.float16).cuda()
            first = run(hidden, weights)
            assert all(torch.equal(first, run(hidden, weights)) for _ in range(50))
            out, graph = torch.empty_like(first), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                backend.score(hidden, weights, out)
            for seed in (1, 2):
                hidden.copy_(draw(rows, h, torch.float16, seed=seed))
                out.fill_(math.nan)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(out, run(hidden, weights))


def test_nothing_waits_for_the_gpu():
    weights, hidden = make_head(128, 300).to("cuda"), draw(130, 128).cuda()
    run(hidden, weights)
    out = torch.empty(4, 130, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.score(hidden, weights, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_choose_it():
    weights, hidden = make_head(128, 300).to("cuda"), draw(40, 128).cuda()
    for rows in (1, 40):
        found = ops.explain("score", "cuda", torch.int8, rows=rows, weights=weights)
        assert found.backend in ("cuda", "triton"), str(found)
    planned = [torch.stack(ops.score(hidden, weights, backend="triton")) for _ in range(3)]
    assert all(torch.equal(planned[0], other) for other in planned)
    assert torch.equal(planned[0], run(hidden, weights))
