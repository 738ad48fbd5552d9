"""How the cpu backend calls its kernels: workspaces that a thread keeps, and calls like an earlier one."""

from __future__ import annotations

import functools
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rmcore import ops
from rmcore.ops.backends import cpu, cpu_packing

sys.path.insert(0, str(Path(__file__).parent))
import int8_checks
from test_cpu_score import AVAILABLE, draw, make_head, run

_cpu = pytest.importorskip("rmcore._cpu")


@pytest.fixture(autouse=True)
def _as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _cpu.set_isa("auto")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_call_with_too_little_workspace_touches_nothing_and_says_what_it_needs(dtype):
    weights = make_head(33, 65, dtype)
    head = cpu_packing.packed_head(weights)
    x, out, memory = draw(3, 33), torch.full((4, 3), math.nan), torch.zeros(1 << 18, dtype=torch.uint8)
    address = -(-memory.data_ptr() // 64) * 64
    call = functools.partial(_cpu.score, head, x.data_ptr(), "float32", 3, 33, 1, out.data_ptr(), 1)
    needed = call(0, 0)
    assert 0 < needed < 1 << 17
    assert call(address, needed - 1) == needed
    assert out.isnan().all()
    assert not memory.any()
    assert call(address, needed) == needed
    assert out.isfinite().all()


def test_a_thread_keeps_its_workspace_and_no_more_than_it_may(monkeypatch):
    made: list[int] = []
    monkeypatch.setattr(cpu, "large", lambda nbytes: (made.append(nbytes), cpu_packing.large(nbytes))[1])
    monkeypatch.setattr(cpu, "_KEPT_BYTES", 1 << 20)
    monkeypatch.setattr(cpu, "_kept", threading.local())
    weights, few, many = make_head(33, 65, torch.float16), draw(3, 33), draw(40, 33)
    first, wide = run(few, weights), run(many, weights)
    assert len(made) == 2
    assert made[0] < made[1]
    assert torch.equal(run(few, weights), first)
    assert torch.equal(run(many, weights), wide)
    assert len(made) == 2
    with ThreadPoolExecutor(1) as others:
        assert torch.equal(others.submit(run, many, weights).result(), wide)
    assert made[2:] == made[1:2]
    monkeypatch.setattr(cpu, "_KEPT_BYTES", made[1] - 1)
    monkeypatch.setattr(cpu, "_kept", threading.local())
    for _ in range(2):
        assert torch.equal(run(many, weights), wide)
    assert len(made) == 5


def test_threads_that_score_at_once_do_not_share_a_workspace():
    weights, batches = make_head(129, 200, torch.float16), [draw(64, 129, seed=seed) for seed in range(8)]
    expected = [run(batch, weights) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            found = list(pool.map(lambda batch: run(batch, weights), batches))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def long_way(monkeypatch) -> list[int]:
    """A number for each call that was not planned."""
    taken: list[int] = []
    score = cpu.score
    monkeypatch.setattr(cpu, "score", lambda *task: (taken.append(1), score(*task))[1])
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("of_rows", [torch.float32, torch.float16, torch.bfloat16])
def test_a_call_like_an_earlier_one_gives_the_same_bits(long_way, dtype, of_rows):
    weights = int8_checks.make_head(33, 65) if dtype == torch.int8 else make_head(33, 65, dtype)
    wide = draw(12, 80, of_rows)
    for hidden in (wide[:5, :33], wide[::2, :33], wide[:5, 2:35], wide[:5, :66:2], wide[:0, :33], wide[:1, :33]):
        expected = run(hidden, weights)
        before = len(long_way)
        for _ in range(3):
            out = torch.full((4, len(hidden)), math.nan)
            ops.score(hidden, weights, out=out)
            assert torch.equal(out, expected)
            assert torch.equal(torch.stack(ops.score(hidden.clone(), weights)), expected)
        assert len(long_way) - before <= 2  # as it is and as it is copied


def test_calls_like_an_earlier_one_follow_threads_and_instruction_set(long_way):
    weights, hidden = make_head(65, 129, torch.float16), draw(40, 65)
    ops.score(hidden, weights)
    for isa in AVAILABLE:
        for threads in (1, 2, 7):
            _cpu.set_isa(isa)
            torch.set_num_threads(threads)
            planned = torch.stack(ops.score(hidden, weights))
            assert torch.equal(planned, run(hidden, weights.clone()))
    assert len(long_way) == 1 + 3 * len(AVAILABLE)  # those of run


def test_rows_that_the_kernels_do_not_take_as_they_are_go_the_long_way(long_way):
    weights, hidden = make_head(33, 65, torch.float16), draw(3, 33)
    eighth = hidden.to(torch.float8_e4m3fn)
    for _ in range(2):
        assert torch.equal(torch.stack(ops.score(eighth, weights)), run(eighth.float(), weights))
        exact = ops.score(hidden.double(), weights)  # torch's, in float64
        assert torch.equal(torch.stack(exact), torch.stack(ops.score(hidden.double(), weights, backend="torch")))
    assert len(long_way) == 4
