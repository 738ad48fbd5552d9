"""CPU kernels on random shapes, strides, threads and numbers, on every instruction set, against float64.

The sizes are drawn around those where loops end: a vector, a tile, a panel, a chunk of rows. Numbers too: subnormal,
as large as float32 goes, zeros, NaN and Inf in rows beside others, which must not change by a bit. Threads: more than
tasks, than processors that the process may use, and none of the pool in a forked child.

``make sanitize`` runs it, as it does test_cpu_edges, on a build that stops at a byte out of bounds, and then on the one
that serves, whose loops are another compilation.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.attribute_checks import make_heads
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import int8_checks
import test_cpu_score as scores
import test_cpu_sums as sums
from test_cpu_edges import at_the_end, bounds

from rmcore.ops import reference
from rmcore.ops.backends import cpu

_cpu = pytest.importorskip("rmcore._cpu")

pytestmark = pytest.mark.sanitize

EDGES = (1, 2, 3, 4, 6, 7, 8, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 190, 191, 193)
ROWS = (1, 2, 5, 6, 7, 11, 12, 13, 23, 24, 64, 383, 384, 385)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
ROUNDS = int(os.environ.get("RMCORE_FUZZ", "40"))
"""Of each test and instruction set; RMCORE_FUZZ asks for more."""


@pytest.fixture(params=scores.AVAILABLE, autouse=True)
def isa(request) -> Iterator[str]:
    _cpu.set_isa(request.param)
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)
    _cpu.set_isa("auto")


def drawn(test: str) -> Iterator[random.Random]:
    """A source of choices for each round, the same on every instruction set."""
    for number in range(ROUNDS):
        yield random.Random(f"{test} {number}")


def layout(rows: Tensor, choice: random.Random) -> Tensor:
    """The same numbers somewhere else, with other strides."""
    kind = choice.randrange(4)
    if kind == 0:
        return rows.mT.contiguous().mT
    if kind == 1:
        return at_the_end(rows, choice.randrange(9), 1)
    if kind == 2:
        return at_the_end(rows, 0, choice.choice((2, 3)))
    return rows


def head(h: int, d: int, dtype: torch.dtype, choice: random.Random):
    if dtype == torch.int8:
        return int8_checks.make_head(h, d, calibrated=choice.random() < 0.5)
    return scores.make_head(h, d, dtype, **choice.choice(list(scores.KINDS.values())))


def test_score():
    for choice in drawn("score"):
        h, d, rows = choice.choice(EDGES), choice.choice(EDGES), choice.choice(ROWS)
        dtype, of = choice.choice(DTYPES), choice.choice((torch.float32, torch.float16, torch.bfloat16, torch.float64))
        what = f"h={h} D={d} B={rows} {dtype} rows {of}"
        weights, hidden = head(h, d, dtype, choice), scores.draw(rows, h, seed=choice.randrange(100)).to(of)
        torch.set_num_threads(1)
        whole = scores.run(hidden, weights)
        # Of few rows torch may lose next to nothing, by luck: what it loses at most in many.
        both = int8_checks.bounds if dtype == torch.int8 else bounds
        (expected, own), (_, many) = both(hidden, weights), both(scores.draw(200, h, seed=101).to(of), weights)
        scores.check(whole, hidden, weights, (expected, torch.maximum(own, many)), what)
        for threads in (choice.randrange(2, 5), 17):
            torch.set_num_threads(threads)
            assert torch.equal(scores.run(layout(hidden, choice), weights), whole), (what, threads)
        few = choice.sample(range(rows), min(rows, choice.randrange(1, 8)))
        assert torch.equal(scores.run(hidden[few], weights), whole[:, few]), what
        assert torch.equal(scores.run(hidden[:1].expand(3, -1), weights), whole[:, :1].expand(-1, 3)), what


def special(h: int, choice: random.Random) -> Tensor:
    """A row that is like no other."""
    row = torch.randn(h, generator=torch.Generator().manual_seed(choice.randrange(100)))
    scale = choice.choice((0.0, 1e-45, 1e-39, 1e-31, 1e-20, 1e15, 3e38))
    row = row.clamp(-1, 1) * scale
    for value in choice.sample((math.nan, math.inf, -math.inf, 3.4e38, 1e-45, -0.0), 2):
        if choice.random() < 0.4:
            row[choice.randrange(h)] = value
    return row


def test_no_row_changes_another_whatever_is_in_it():
    for choice in drawn("special"):
        h, d, rows = choice.choice(EDGES), choice.choice(EDGES), choice.choice(ROWS[2:])
        weights, hidden = head(h, d, choice.choice(DTYPES), choice), scores.draw(rows, h)
        torch.set_num_threads(choice.choice((1, 3)))
        clean, spoilt = scores.run(hidden, weights), hidden.clone()
        which = choice.sample(range(rows), choice.randrange(1, min(rows, 6)))
        for row in which:
            spoilt[row] = special(h, choice)
        got, what = scores.run(layout(spoilt, choice), weights), (h, d, rows, weights.dtype)
        keep = torch.ones(rows, dtype=torch.bool)
        keep[which] = False
        assert torch.equal(got[:, keep], clean[:, keep]), what
        for row in which:
            if not bool(spoilt[row].isfinite().all()):
                assert not bool(got[:, row].isfinite().any()), (*what, row)


def test_small_and_zero_rows_are_as_exact_as_others():
    """Numbers below float32's normal ones, which some instruction sets might take for zeros, and all of a row zero."""
    for choice in drawn("small"):
        h, d = choice.choice(EDGES), choice.choice(EDGES)
        weights = head(h, d, choice.choice(DTYPES), choice)
        hidden = scores.draw(8, h) * torch.tensor([0.0, 1e-45, 1e-42, 1e-38, 1e-35, 1e-29, 1e-12, 1e-6])[:, None]
        whole = weights.dtype == torch.int8
        got, true = scores.run(hidden, weights), (int8_checks if whole else scores).truth(hidden, weights)
        assert bool(got.isfinite().all())
        _, allowed = (int8_checks.bounds if whole else bounds)(scores.draw(64, h), weights)
        assert bool(((got.double() - true).abs().amax(1) <= 2 * allowed + 1e-6).all()), (h, d, weights.dtype)


def test_accumulate():
    for choice in drawn("accumulate"):
        h, d, n = choice.choice(EDGES[:16]), choice.choice(EDGES), choice.choice((1, 2, 63, 64, 65, 1023, 1025, 2049))
        dtype = choice.choice(DTYPES[:3])
        weights, hidden = sums.make_head(h, d, dtype), sums.draw(n, h, seed=choice.randrange(9))
        pairs = (
            torch.randint(0, n, (n, 2), generator=torch.Generator().manual_seed(n)) if choice.random() < 0.5 else None
        )
        generator = torch.Generator().manual_seed(d)
        labels, weight = torch.rand(n, generator=generator), torch.rand(n, generator=generator)
        likelihood, beta = choice.choice(("logistic", "gaussian")), sums.draw(d, seed=2) / math.sqrt(d)
        results = []
        for threads in (1, 2, 9):
            torch.set_num_threads(threads)
            rows = layout(hidden, choice)
            results.append(
                sums.accumulate(weights, rows, labels, beta, pairs=pairs, sample_weight=weight, likelihood=likelihood)
            )
        what = f"h={h} D={d} N={n} {dtype} {likelihood} pairs={pairs is not None}"
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), what
        true = sums.accumulated_truth(weights.map(hidden.double()), weights, labels, beta, pairs, weight, likelihood)
        rounding = {torch.float32: 2.0**-18, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-7}[dtype]
        for got, want in zip(results[0], true, strict=True):
            size = float(want.abs().max()) + 9 * math.sqrt(n) / d
            assert float((got.double() - want).abs().max()) <= 8 * rounding * size, what


def test_pair_variance():
    for choice in drawn("pairs"):
        h, d, dtype = choice.choice(EDGES), choice.choice(EDGES), choice.choice(DTYPES)
        sizes = torch.tensor([choice.choice((0, 1, 2, 3, 4, 7, 8, 16, 33)) for _ in range(choice.randrange(1, 12))])
        make = int8_checks.make_head if dtype == torch.int8 else lambda h, d, dtype=dtype: sums.make_head(h, d, dtype)
        weights, hidden = make(h, d), sums.draw(int(sizes.sum()), h)
        hidden[1::5] = hidden[::5][: len(hidden[1::5])]  # rows that are equal
        torch.set_num_threads(1)
        g, v = cpu.pair_variance(hidden, sizes, weights)
        for threads in (3, 11):
            torch.set_num_threads(threads)
            again = cpu.pair_variance(layout(hidden, choice), sizes, weights)
            assert torch.equal(again[0], g)
            assert torch.equal(again[1], v)
        start = pair = 0
        for k in sizes.tolist():
            i, j = torch.triu_indices(k, k, 1)
            group, count = hidden[start : start + k], k * (k - 1) // 2
            alone = cpu.pair_variance(group, torch.tensor([k]), weights)
            assert torch.equal(alone[0], g[pair : pair + count])
            assert torch.equal(alone[1], v[pair : pair + count])
            same = (group[i] == group[j]).all(1)
            assert not bool(alone[0][same].any())
            assert not bool(alone[1][same].any())
            start, pair = start + k, pair + count


def test_power_iteration():
    for choice in drawn("power"):
        m, n, dtype = choice.choice(EDGES), choice.choice(EDGES), choice.choice(DTYPES[:3])
        scale = choice.choice((1.0, 1e-3, 1e3, 0.0))
        weight, vector = (scale * sums.draw(m, n, seed=choice.randrange(9))).to(dtype), sums.draw(n, seed=1)
        steps = choice.randrange(1, 5)
        torch.set_num_threads(1)
        sigma, v = cpu.power_iteration(weight, vector, steps)
        for threads in (2, 13):
            torch.set_num_threads(threads)
            again = cpu.power_iteration(at_the_end(weight, choice.randrange(5), 1), vector, steps)
            assert torch.equal(again[0], sigma)
            assert torch.equal(again[1], v)
        want, direction = reference.power_iteration(weight.double(), vector.double(), steps)
        assert float((sigma - want).abs()) <= 1e-5 * float(want), (m, n, dtype, scale)
        assert float((v - direction).norm()) <= 1e-4, (m, n, dtype, scale)


def test_score_attributes():
    for choice in drawn("attributes"):
        h, rows, dtype = choice.choice(EDGES), choice.choice(ROWS[:12]), choice.choice(DTYPES[:3])
        widths = tuple(choice.choice(EDGES) for _ in range(choice.randrange(3)))
        kind = {"attributes": choice.randrange(1, 20), "per": choice.choice((2, 3)), "members": choice.randrange(1, 4)}
        heads = make_heads(h, dtype, **kind, widths=widths, softmax=bool(widths) and choice.random() < 0.5)
        hidden = sums.draw(rows, h)
        torch.set_num_threads(1)
        whole = cpu.score_attributes(hidden, heads, None)
        for threads in (2, 17):
            torch.set_num_threads(threads)
            for a, b in zip(cpu.score_attributes(layout(hidden, choice), heads, None), whole, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), (h, rows, dtype, kind, widths)
        spoilt, bad = hidden.clone(), choice.randrange(rows)
        spoilt[bad, choice.randrange(h)] = choice.choice((math.nan, math.inf))
        found = cpu.score_attributes(spoilt, heads, None)
        keep = torch.arange(rows) != bad
        assert torch.equal(found[1][keep], whole[1][keep])
        assert torch.equal(found[2][keep], whole[2][keep])
        assert not bool(found[0][:4, bad].isfinite().any()), (h, rows, dtype, kind, widths)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no processors to be kept from")
def test_more_threads_than_the_process_may_use():
    weights, hidden = scores.make_head(129, 193, torch.float16), scores.draw(385, 129)
    torch.set_num_threads(1)
    whole, allowed = scores.run(hidden, weights), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        torch.set_num_threads(8)
        for _ in range(20):
            assert torch.equal(scores.run(hidden, weights), whole)
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif("RMCORE_SANITISED" in os.environ, reason="a lock of the sanitizer's own may be held in a child")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_of_forks_compute_what_their_parents_do():
    weights, hidden = int8_checks.make_head(65, 129), scores.draw(13, 65)
    torch.set_num_threads(4)
    whole = scores.run(hidden, weights)

    def child(depth: int) -> int:
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        same = torch.equal(scores.run(hidden, weights), whole)
        os._exit(0 if same and (not depth or child(depth - 1) == 0) else 1)

    assert child(1) == 0
    assert torch.equal(scores.run(hidden, weights), whole)
