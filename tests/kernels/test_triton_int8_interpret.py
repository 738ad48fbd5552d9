"""int8 heads on the Triton backend, in Triton's interpreter: the CPU's whole numbers, and float64.

Run like test_triton_interpret.py, by test_triton_interpreter.py; those marked slow by ``make compile-gate``. How near
is in int8_checks.py.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs its own process with TRITON_INTERPRET=1 set", allow_module_level=True)
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import triton
import triton_checks as checks
from int8_checks import check, check_same_numbers, draw, make_head, random_whole, spread, whole_head

from rmcore import ops
from rmcore._base.errors import BackendError
from rmcore.kernels import features_int8, heuristics, heuristics_int8, launches, rows_int8
from rmcore.kernels.heuristics import Tile
from rmcore.ops import plans, self_check, whole_numbers
from rmcore.ops.backends import cpu
from rmcore.ops.backends import triton as backend

DEVICE = heuristics.Device("interpreter", 4)


@pytest.fixture(autouse=True)
def _quick_products(monkeypatch):
    """numpy multiplies whole numbers one by one: here in float64, which holds their sums exactly."""
    dot = triton.runtime.interpreter.InterpreterBuilder.create_dot

    def quick(self, a, b, d, *rest):
        if a.data.dtype != np.int8:
            return dot(self, a, b, d, *rest)
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return triton.runtime.interpreter.TensorHandle(product.astype(np.int32) + d.data, d.dtype.scalar)

    monkeypatch.setattr(triton.runtime.interpreter.InterpreterBuilder, "create_dot", quick)


@pytest.fixture(autouse=True)
def _poison():
    torch.set_num_threads(1)
    with checks.poisoned_workspaces():
        yield


def run(hidden, weights):
    out = torch.full((4, hidden.shape[0]), math.nan)
    backend.score(hidden, weights, out)
    return out


FEW = ((1, 1, 3), (100, 200, 20), (64, 256, 0))
MORE = ((100, 300, 65), (70, 129, 129), (300, 200, 64))


@pytest.mark.parametrize("cases", [FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_score_is_right_and_the_cpu_s(cases):
    """Every edge of a tile; h ≤ D/2 takes rows in two terms; with columns of different size and without."""
    for h, d, rows in cases:
        weights, hidden = make_head(h, d, calibrated=d != 200), spread(draw(rows, h)).half()
        got = run(hidden, weights)
        if rows:
            check(got, hidden, weights, what=f"{h} {d} {rows}")
        if rows and cpu.unavailable("score", torch.device("cpu"), torch.int8) is None:
            same = torch.full((4, rows), math.nan)
            cpu.score(hidden, weights, same)
            check_same_numbers(got, same, weights)


def test_rows_become_the_same_whole_numbers_bit_for_bit():
    h, padded = 300, 320
    hidden = draw(11, h)
    hidden[0] = 0.0
    hidden[1] *= 1e-36
    hidden[2, 5], hidden[2, 299] = 1e5, -9e4
    hidden[3, :30] = 1e4 * 1.5 ** -torch.arange(30.0)
    hidden[4, ::9] = 1e6  # 34 of one size: too many
    hidden[5, 7], hidden[6, 8], hidden[7, 9] = math.nan, math.inf, -math.inf
    hidden[8] = (torch.arange(h) % 40 - 20) / 2
    hidden[8, 0] = 63.5  # a step of one half: ties to even
    shift, balance = draw(1, h, seed=3)[0], 2.0 ** draw(1, h, seed=5)[0].round()
    for x, kind in ((hidden, {}), (hidden.T.contiguous().T, {"shift": shift, "balance": balance})):
        got = rows_int8.whole_rows(
            x, padded, scale=0.5, shift=kind.get("shift"), balance=kind.get("balance"), two_terms=True
        )
        plain = (hidden - kind["shift"]) * (kind["balance"] * 0.5) if kind else hidden * 0.5
        want = whole_numbers.whole_rows(plain, True)
        apart = torch.zeros(11, h)
        for row, count in enumerate(got.counts.tolist()):
            apart[row, got.columns[row, :count].long()] = got.values[row, :count]
        finite = plain.isfinite().all(1)
        assert finite.sum() == 8
        assert torch.equal(apart[finite], want.apart[finite])
        assert got.low is not None
        for parts, exact in ((got.whole, want.whole), (got.low, want.low)):
            assert torch.equal(parts[finite, :h].float(), exact[finite])
            assert not bool(parts[finite, h:].any())
        assert torch.equal(got.factor[finite], want.factor[finite, 0])
        assert bool(got.factor[~finite].isnan().all())
    assert (got.counts > 0).sum() >= 2


@pytest.mark.slow
def test_sums_are_exact_at_their_largest():
    for extreme in (False, True):
        d = 257
        p = random_whole((d,), False, d).long()
        q = torch.randint(-127, 128, (70,), generator=torch.Generator().manual_seed(d))
        if extreme:  # c = ±1
            p, q = torch.where(p < 0, 64, 0), torch.full((70,), 8)
            q[1::2] = 16
        c = 127 * torch.cos(2 * math.pi * (q[:, None] * p).double() / 1024)
        row = random_whole((d,), extreme, d + 1)
        weights = whole_head(torch.stack([torch.zeros(d), p], 1).to(torch.int8), 2.0**-10, row)
        hidden = torch.stack([torch.full((70,), 127.0), q.float()], 1)
        sums = (c.round().long()[:, :-1] * row.long()[:-1]).sum(1)
        y = sums.float() * 2.0**-9 * torch.tensor(1 / 127)
        for rows in (1, 70) if extreme else (3,):
            torch.testing.assert_close(run(hidden[:rows], weights)[1], (y * y)[:rows], rtol=1e-6, atol=0)


PROJECTS = {
    "cut": Tile(64, 128, 64, 4, 1, fill=8.0),
    "wide": Tile(64, 256, 128, 4, 1, group=1),
    "narrow": Tile(32, 64, 128, 4, 1, group=1),
}
PRODUCTS = {
    "wide": Tile(64, 256, 64, 4, 1, group=2),
    "narrow, paired": Tile(64, 64, 128, 4, 1, paired=True),
    "paired, odd count": Tile(64, 128, 128, 4, 1, paired=True),
    "in quarters": Tile(128, 128, 128, 4, 1),
    "pieces": Tile(64, 128, 128, 4, 1, fill=7.0),
}


@pytest.mark.slow
def test_every_way_to_cut_finds_the_same_whole_numbers(monkeypatch):
    monkeypatch.setattr(heuristics, "_MIN_STEPS", 1)
    for h in (192, 120):
        weights, hidden = make_head(h, 250), spread(draw(40, h))
        columns = features_int8.columns(weights.map)
        m = weights.map
        rows = rows_int8.whole_rows(
            hidden, columns, scale=1.0, shift=m.hidden_shift, balance=m.hidden_scale, two_terms=2 * h <= 250
        )
        found = []
        for name, tile in PROJECTS.items():
            monkeypatch.setattr(heuristics_int8, "project", lambda *_, tile=tile: tile)
            c, logits = features_int8.project(rows, m, weights.beta, DEVICE)
            assert logits is not None
            found.append((name, c, logits.double().sum(0)))
        for name, c, g in found[1:]:
            assert torch.equal(c, found[0][1]), name
            torch.testing.assert_close(g, found[0][2], rtol=0, atol=1e-6 * float(weights.beta.norm()))
    monkeypatch.undo()
    weights, hidden = make_head(64, 600), draw(40, 64)  # five tiles of 128, so that pairs are uneven
    for name, tile in PRODUCTS.items():
        monkeypatch.setattr(heuristics_int8, "product", lambda *_, tile=tile: tile)
        check(run(hidden, weights), hidden, weights, what=name)


def test_outliers_join_in_float32():
    weights, hidden = make_head(129, 300), draw(9, 129)
    hidden[::2, 7], hidden[4, 100] = 800.0, -700.0
    plain = (hidden - weights.map.hidden_shift) * weights.map.hidden_scale
    assert (whole_numbers.whole_rows(plain, False).apart != 0).sum(1).tolist() == [1, 0, 1, 0, 2, 0, 1, 0, 1]
    got = run(hidden, weights)
    check_same_numbers(got.double(), whole_numbers.score(hidden, weights), weights)
    for row in (0, 1):  # alone as among others
        check_same_numbers(run(hidden[row : row + 1], weights), got[:, row : row + 1], weights)


def test_a_non_finite_row_spoils_only_itself():
    weights, hidden = make_head(100, 130), draw(5, 100)
    clean = run(hidden, weights)
    for bad in (math.nan, math.inf):
        spoilt = hidden.clone()
        spoilt[2, 99] = bad
        got = run(spoilt, weights)
        keep = torch.arange(5) != 2
        assert torch.equal(got[:, keep], clean[:, keep])
        assert not bool(got[:, 2].isfinite().any())


@pytest.mark.slow
def test_rows_of_any_strides_and_dtype():
    weights, wide = make_head(64, 100), draw(12, 150, torch.float16)
    for hidden in (wide[::2, 3:67], wide[:6, 10:138:2], wide[:1, :64].expand(6, -1), wide[:3, :64].double()):
        assert torch.equal(run(hidden, weights), run(hidden.contiguous().float(), weights))


@pytest.mark.slow
def test_a_plan_launches_the_same(monkeypatch):
    monkeypatch.setattr(plans, "stream_of", lambda _index: 0)
    monkeypatch.setattr(launches, "hooked", lambda: False)
    weights, hidden = make_head(100, 120), draw(40, 100).half()
    plan = backend.plan(hidden, weights)
    assert plan is not None
    for seed in (1, 2):
        other = draw(40, 100, seed=seed).half()
        out = torch.full((4, 40), math.nan)
        assert plan(other, weights, out)
        assert torch.equal(out, run(other, weights))


def test_ops_take_it_and_say_what_they_do_not(monkeypatch):
    weights, hidden = make_head(64, 130), draw(3, 64)
    assert ops.explain("score", "cpu", torch.int8, "triton").backend == "triton"
    assert torch.equal(torch.stack(ops.score(hidden, weights, backend="triton")), run(hidden, weights))
    with pytest.raises(BackendError, match=r"triton.*of int8 heads it has score alone, no pair_variance"):
        ops.pair_variance(hidden, torch.tensor([3]), weights, backend="triton")
    monkeypatch.setattr(features_int8, "MAX_COLUMNS", 63)
    assert "hidden size 64: int8 heads are served up to 63" in str(
        ops.explain("score", "cpu", torch.int8, "triton", rows=3, weights=weights)
    )


@pytest.mark.slow
def test_the_self_check_passes(monkeypatch):
    monkeypatch.setattr(self_check, "REPEATS", 2)
    monkeypatch.setattr(self_check, "ROWS", (17,))
    assert self_check.check(backend, "score_int8", torch.device("cpu")) is None
    scale = whole_numbers.factor
    monkeypatch.setattr(whole_numbers, "factor", lambda weights: 1.02 * scale(weights))
    assert "off by" in str(self_check.check(backend, "score_int8", torch.device("cpu")))
