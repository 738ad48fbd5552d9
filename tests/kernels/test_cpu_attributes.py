"""The cpu backend's ``score_attributes`` against float64, on every instruction set this machine has."""

from __future__ import annotations

import pytest
import torch
from support.attribute_checks import ATTRIBUTE_HEADS, check_scores, make_heads

from rmcore import ops
from rmcore.ops.backends import cpu

_cpu = pytest.importorskip("rmcore._cpu")

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
AVAILABLE = ISAS[: ISAS.index(_cpu.best_isa()) + 1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (0, 1, 65)


@pytest.fixture(autouse=True)
def _best_isa_afterwards():
    yield
    _cpu.set_isa("auto")


def draw(rows: int, h: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, h, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", ATTRIBUTE_HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_head_on_every_instruction_set(kind, dtype):
    heads = make_heads(67, dtype, **ATTRIBUTE_HEADS[kind])
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        for rows in ROWS:
            check_scores(cpu, draw(rows, 67), heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_rows_and_where_gates_read(dtype):
    for h, kind in ((1, {"widths": (1,)}), (64, ATTRIBUTE_HEADS["selu"]), (200, {"members": 30, "attributes": 19})):
        check_scores(cpu, draw(9, h), make_heads(h, dtype, **kind))
    heads = make_heads(70, dtype, **ATTRIBUTE_HEADS["softmax"])
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        check_scores(cpu, draw(9, 70, kind), heads, draw(9, 70, kind, seed=1))
    wide = draw(20, 150)
    check_scores(cpu, wide[::2, ::2][:, :70], heads, wide.mT[:70, :10].mT)  # any strides
    check_scores(cpu, draw(5, 70) * 1024, make_heads(70, dtype, input_scale=2.0**-10, **ATTRIBUTE_HEADS["selu"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(dtype):
    heads, hidden = make_heads(131, dtype, **ATTRIBUTE_HEADS["selu"]), draw(400, 131)  # more than one chunk
    whole = cpu.score_attributes(hidden, heads, None)
    some = cpu.score_attributes(hidden[37:50], heads, None)
    for a, b, dim in zip(whole, some, (1, 0, 0), strict=True):
        assert torch.equal(a.narrow(dim, 37, 13), b)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(cpu.score_attributes(hidden, heads, None), whole, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["selu", "softmax", "quantiles", "fixed"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(kind, bad):
    heads, hidden = make_heads(64, torch.float16, **ATTRIBUTE_HEADS[kind]), draw(8, 64)
    clean = cpu.score_attributes(hidden, heads, None)
    hidden[3] = bad
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        summary, *_ = ops.score_attributes(hidden, heads, backend="cpu")
        assert not bool(summary[3].isfinite())
        again = cpu.score_attributes(hidden, heads, None)
        assert not bool(again[0][:4, 3].isfinite().any())
        keep = torch.arange(8) != 3
        assert bool(again[0][:4, keep].isfinite().all())
    _cpu.set_isa("auto")
    for a, b, dim in zip(cpu.score_attributes(hidden, heads, None), clean, (1, 0, 0), strict=True):
        others = (t.movedim(dim, 0)[keep].nan_to_num() for t in (a, b))  # a norm of quantiles is NaN
        assert torch.equal(*others)


def test_the_registry_chooses_the_kernel_and_says_so():
    heads = make_heads(16, torch.bfloat16, **ATTRIBUTE_HEADS["selu"])
    for rows in (0, 3):
        explained = ops.explain("score_attributes", "cpu", torch.bfloat16, rows=rows, weights=heads)
        assert (explained.backend, explained.reasons) == ("cpu", {})
    assert "int8" in ops.explain("score_attributes", "cuda", torch.int8, "triton").reasons["triton"]
    told = ops.explain("score_attributes", "cuda", torch.float16, "cuda").reasons["cuda"]
    assert told == "has no score_attributes kernel; triton serves it"
