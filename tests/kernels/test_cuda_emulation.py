"""The CUDA latency kernels' index arithmetic, run on the host: csrc/cuda/emulate.cpp against float64 formulas."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.weights import FeatureMap, HeadWeights

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulate") / "libemulate.so"
    names = ("emulate.cpp", "emulate_stream.cpp", "score_plan.cpp", "stream_plan.cpp", "power_plan.cpp")
    command = [
        "g++",
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-pthread",
        *(str(SOURCES / n) for n in names),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, capture_output=True)
    lib = ctypes.CDLL(str(target))
    lib.emulate_message.restype = ctypes.c_char_p
    return lib


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def padded(matrix: Tensor) -> Tensor:
    """float32 with a row pitch of the next multiple of 8, zero-filled, as the backend hands matrices over."""
    out = torch.zeros(matrix.shape[0], math.ceil(matrix.shape[1] / 8) * 8)
    out[:, : matrix.shape[1]] = matrix.float()
    return out


def head(h: int, d: int, m: int = 0, *, dtype=torch.float16, seed=0, layernorm=False, scale=1.0, linear=False):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = m or h
    feature_map = FeatureMap(
        features="linear" if linear else "rff",
        projection=(randn(d, width) / math.sqrt(width) * 0.3 / (1 if m else scale)).to(dtype),
        phase=torch.rand(d, generator=generator),
        layer_weight=(randn(m, h) / math.sqrt(h) / scale).to(dtype) if m else None,
        layer_bias=randn(m).float() * 0.1 if m else None,
        activation="tanh" if m else "none",
        layernorm=layernorm,
        hidden_size=h,
        num_features=d,
        dtype=dtype,
        input_scale=scale,
    )
    factor = randn(d, d).tril() / math.sqrt(d)
    return HeadWeights.build(feature_map, randn(d) / math.sqrt(d), 0.25, factor, math.pi / 8)


def truth(hidden: Tensor, weights: HeadWeights) -> Tensor:
    """(4, B) float64 from the stored weights, with the roundings the kernel makes: rows, z and c."""
    m, dtype = weights.map, weights.dtype
    x = (hidden.double() * m.input_scale).to(dtype).double()
    if m.layer_weight is not None:
        x = reference.normalized_layer(
            x, m.layer_weight.double(), m.layer_bias.double(), activation=m.activation, layernorm=m.layernorm
        )
        x = x.to(dtype).double()
    if m.features == "linear":
        c = x @ m.projection.double().mT + m.phase.double()
    else:
        c = reference.phase_features(x, m.projection.double(), m.phase.double())
    g = c @ weights.beta.double() + weights.beta0
    factor = reference.unpack_lower(weights.factor, weights.num_features).double() * math.sqrt(weights.factor_scale)
    v = reference.variance(c.to(dtype).double(), factor)
    u = torch.sqrt(1 + weights.amplitude * v)
    return torch.stack([g, v, u, g / u])


def emulate(library, hidden: Tensor, weights: HeadWeights, *, grid=5, slots=3, split=-1, in_place=False) -> Tensor:
    m, rows = weights.map, hidden.shape[0]
    projection = padded(m.projection)
    layer = None if m.layer_weight is None else padded(m.layer_weight)
    factor = weights.factor.float().contiguous()
    out = torch.full((4, rows), math.nan)
    f = ctypes.c_float
    code = library.emulate_score(
        DTYPES[weights.dtype], m.hidden_size, m.num_features, 0 if layer is None else layer.shape[0],
        pointer(projection), ctypes.c_int64(projection.stride(0)), pointer(m.phase),
        pointer(layer), ctypes.c_int64(0 if layer is None else layer.stride(0)), pointer(m.layer_bias),
        pointer(weights.beta), pointer(factor), int(m.activation == "tanh"), int(m.layernorm),
        int(m.features == "linear"), f(m.input_scale), f(weights.beta0), f(weights.factor_scale), f(weights.amplitude),
        pointer(hidden), ctypes.c_int64(hidden.stride(0)), rows, int(in_place), grid, slots, split, pointer(out),
    )  # fmt: skip
    assert code == 0, library.emulate_message().decode()
    return out


def check(out: Tensor, expected: Tensor, dtype: torch.dtype, d: int) -> None:
    # Products are exact in float32; what is left is float32 summation over D terms, and c that round the other way.
    tolerance = 32 * 2.0**-24 * math.sqrt(d) + EPSILON[dtype] / math.sqrt(d)
    for got, want in zip(out.double(), expected, strict=True):
        assert torch.isfinite(got).all()
        assert ((got - want).abs() <= tolerance * (1 + want.abs())).all(), ((got - want).abs().max(), tolerance)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 63, 64])
def test_every_batch_size(library, rows):
    weights = head(72, 200)
    hidden = torch.randn(rows, 72, generator=torch.Generator().manual_seed(rows))
    check(emulate(library, hidden, weights), truth(hidden, weights), torch.float16, 200)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize(("rows", "grid"), [(3, 1), (3, 7), (12, 40), (20, 3), (40, 11), (64, 132)])
def test_shares_whole_and_split(library, rows, grid, split):
    weights = head(520, 390)
    hidden = torch.randn(rows, 520, generator=torch.Generator().manual_seed(1))
    check(emulate(library, hidden, weights, grid=grid, split=split), truth(hidden, weights), torch.float16, 390)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("rows", [5, 33])
@pytest.mark.parametrize(("h", "d"), [(1, 1), (7, 15), (8, 16), (31, 17), (32, 33), (33, 127), (100, 129), (260, 300)])
def test_edges_of_h_and_d(library, h, d, rows, split):
    weights = head(h, d)
    hidden = torch.randn(rows, h, generator=torch.Generator().manual_seed(2))
    check(emulate(library, hidden, weights, split=split), truth(hidden, weights), torch.float16, d)


@pytest.mark.parametrize("slots", [1, 2, 11])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ring_depth_and_dtype(library, slots, dtype):
    weights = head(330, 260, dtype=dtype)
    hidden = torch.randn(19, 330, generator=torch.Generator().manual_seed(3)).to(dtype).float()
    check(emulate(library, hidden, weights, slots=slots), truth(hidden, weights), dtype, 260)


@pytest.mark.parametrize("rows", [1, 13, 50])
def test_rows_read_in_place_with_a_stride(library, rows):
    weights = head(264, 150)
    hidden = torch.randn(rows, 320, generator=torch.Generator().manual_seed(4)).half().float()[:, :264]
    assert hidden.stride(0) == 320 or rows == 1
    check(emulate(library, hidden, weights, in_place=True), truth(hidden, weights), torch.float16, 150)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize(("h", "m", "d", "rows"), [(96, 64, 160, 4), (75, 51, 99, 30), (300, 260, 140, 64)])
def test_unfolded_heads(library, h, m, d, rows, layernorm, split):
    weights = head(h, d, m, layernorm=layernorm)
    hidden = torch.randn(rows, h, generator=torch.Generator().manual_seed(5))
    out, expected = emulate(library, hidden, weights, split=split), truth(hidden, weights)
    # A z that rounds to the other side in float32 moves a phase by a few 1e-4 turns of one feature.
    assert ((out.double() - expected).abs() <= 2e-3 * (1 + expected.abs())).all()


def test_input_scale_and_linear_features(library):
    hidden = torch.randn(6, 80, generator=torch.Generator().manual_seed(6))
    weights = head(80, 100, scale=2.0**-6)
    check(emulate(library, hidden * 64, weights), truth(hidden * 64, weights), torch.float16, 100)
    weights = head(80, 100, linear=True)
    check(emulate(library, hidden, weights), truth(hidden, weights), torch.float16, 100)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("m", [0, 72])  # with a layer: tanh saturates, and must not hide an infinite row
def test_a_nan_row_stays_alone(library, split, m):
    weights = head(96, 200, m)
    hidden = torch.randn(20, 96, generator=torch.Generator().manual_seed(7))
    clean = emulate(library, hidden, weights, split=split)
    hidden[11, 5] = math.nan
    hidden[4, 95] = math.inf
    dirty = emulate(library, hidden, weights, split=split)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[4, 11]] = True
    assert dirty[:, bad].isnan().all()
    assert torch.equal(dirty[:, ~bad], clean[:, ~bad])


def test_results_repeat(library):
    weights = head(200, 260)
    hidden = torch.randn(33, 200, generator=torch.Generator().manual_seed(8))
    assert torch.equal(emulate(library, hidden, weights, split=1), emulate(library, hidden, weights, split=1))


@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (1 << 19, 1 << 19), (1000, 33), (17, 5)])
@pytest.mark.parametrize("triangular", [0, 1])
def test_equal_shares_differ_by_one_step_and_leave_none_out(library, rows, columns, triangular):
    columns = rows if triangular else columns
    for strips in (1, 2, 4):
        steps = (ctypes.c_int64 * 132)()
        library.emulate_shares(rows, columns, triangular, strips, 132, ctypes.c_int(1), steps)
        taken = [n for n in steps if n]
        last = 2 * math.ceil(rows / 32) - 1  # of the strips, two to a step of the columns left of the diagonal
        blocks = range(0, last + 1, strips)
        full = math.ceil(columns / 32)
        want = sum(min(b + strips - 1, last) // 2 + 1 for b in blocks) if triangular else len(blocks) * full
        assert sum(taken) == want
        assert max(taken) - min(taken) <= 1


@pytest.mark.parametrize("grid", [78, 108, 132, 148])
@pytest.mark.parametrize("size", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize(("triangular", "strips"), [(0, 2), (0, 4), (1, 1), (1, 4)])
def test_shares_are_balanced(library, size, grid, triangular, strips):
    steps = (ctypes.c_int64 * grid)()
    library.emulate_shares(size, size, triangular, strips, grid, ctypes.c_int(-1), steps)
    shares = list(steps)
    n = size // 16
    total = sum(i // 2 + 1 for i in range(n)) if strips == 1 else None
    if total is not None:
        assert sum(shares) == total
    # Never longer than an equal share by more than what equal shares cost (in steps, measured: schedule.h).
    assert max(shares) <= math.ceil(sum(shares) / grid) + 256


@pytest.mark.parametrize(("shared", "least"), [(232448 - 512, 3), (166912 - 512, 2), (101376 - 512, 1)])
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_the_ring_fits_and_is_deep_enough(library, rows, shared, least):
    plan = (ctypes.c_int64 * 5)()
    assert library.emulate_plan(0, 4096, 4096, 0, 0, rows, 132, ctypes.c_int64(shared), plan) == 0
    tiles, grid, slots, used, workspace = plan
    assert tiles * 8 >= rows
    assert grid == 132
    assert slots >= least
    assert used <= shared
    assert workspace < 16 << 20
    if shared > 200_000:  # H100, H200, B200: weights under way on one SM
        strips = 2 if rows <= 16 else 4
        assert slots * strips * 16 * 64 * 8 >= 64 << 10


def test_too_many_rows_and_too_little_memory_are_told(library):
    plan = (ctypes.c_int64 * 5)()
    assert library.emulate_plan(0, 64, 64, 0, 0, 65, 132, ctypes.c_int64(1 << 18), plan) == 1
    assert "expected 1 to 64" in library.emulate_message().decode()
    assert library.emulate_plan(0, 64, 64, 0, 0, 64, 132, ctypes.c_int64(48 << 10), plan) == 1
    assert "shared memory" in library.emulate_message().decode()
    assert library.emulate_plan(0, 1 << 20, 64, 0, 0, 1, 132, ctypes.c_int64(1 << 18), plan) == 1
    assert "expected at most 524288" in library.emulate_message().decode()


def stream(library, hidden: Tensor, weights: HeadWeights, *, grid: int) -> Tensor:
    """The streamed kernel's way, from (B, h) float32 rows."""
    m, rows, f = weights.map, hidden.shape[0], ctypes.c_float
    projection, factor, out = padded(m.projection), weights.factor.float().contiguous(), torch.full((4, rows), math.nan)
    code = library.emulate_stream(
        DTYPES[weights.dtype], m.hidden_size, m.num_features, pointer(projection),
        ctypes.c_int64(projection.stride(0)), pointer(m.phase), pointer(weights.beta), pointer(factor),
        int(m.features == "linear"), f(m.input_scale), f(weights.beta0), f(weights.factor_scale), f(weights.amplitude),
        pointer(hidden), ctypes.c_int64(hidden.stride(0)), rows, grid, pointer(out),
    )  # fmt: skip
    assert code == 0, library.emulate_message().decode()
    return out


@pytest.mark.parametrize(
    ("h", "d", "grid"),
    [(1, 1, 5), (7, 15, 1), (8, 16, 3), (31, 17, 2), (33, 127, 40), (100, 129, 7), (1030, 140, 5), (72, 1040, 9)],
)
def test_the_streamed_way(library, h, d, grid):
    """Every weight is fetched by one block and used by one warp, whatever the sizes; and the numbers are right."""
    for rows in (1, 3, 8, 9, 16) if max(h, d) < 200 else (2, 13):
        for dtype in DTYPES if max(h, d) < 200 else (torch.float16,):
            weights = head(h, d, dtype=dtype)
            hidden = torch.randn(rows, h + 3, generator=torch.Generator().manual_seed(rows))[:, :h]
            check(stream(library, hidden, weights, grid=grid), truth(hidden, weights), dtype, d)


def test_the_streamed_way_of_scaled_rows_linear_features_and_bad_rows(library):
    hidden = torch.randn(12, 80, generator=torch.Generator().manual_seed(6))
    weights = head(80, 100, scale=2.0**-6)
    check(stream(library, hidden * 64, weights, grid=3), truth(hidden * 64, weights), torch.float16, 100)
    weights = head(80, 100, linear=True)
    clean = stream(library, hidden, weights, grid=3)
    check(clean, truth(hidden, weights), torch.float16, 100)
    hidden[4, 79], hidden[11, 5] = math.inf, math.nan
    dirty = stream(library, hidden, weights, grid=3)
    bad = torch.zeros(12, dtype=torch.bool)
    bad[[4, 11]] = True
    assert dirty[:, bad].isnan().any(0).all()
    assert torch.equal(dirty[:, ~bad], clean[:, ~bad])


H100_SHARED = 232448 - 512


@pytest.mark.parametrize(
    ("h", "d", "rows", "shared", "slots"),
    [
        (4096, 4096, 1, H100_SHARED, 12),
        (4096, 4096, 8, H100_SHARED, 9),
        (4096, 4096, 16, H100_SHARED, 5),
        (8192, 4096, 8, H100_SHARED, 5),
        (8192, 4096, 16, H100_SHARED, 0),  # the operand leaves no room: score.cuh serves it
        (4096, 4096, 17, H100_SHARED, 0),
        (4096, 4096, 8, 101376 - 512, 0),
    ],
)
def test_what_the_streamed_way_serves(library, h, d, rows, shared, slots):
    plan = (ctypes.c_int64 * 6)()
    library.emulate_stream_plan(0, h, d, 0, rows, 132, ctypes.c_int64(shared), plan)
    assert plan[0] == slots
    if slots:
        assert plan[1] == 132
        assert plan[2] <= shared
        assert plan[3] < 1 << 20
        read = 2 * d * h + d * (d + 128)
        assert plan[4] <= 1.05 * read / 132  # of the busiest block, and of the idlest
        assert plan[5] >= 0.8 * read / 132
    library.emulate_stream_plan(0, h, d, 64, rows, 132, ctypes.c_int64(shared), plan)
    assert plan[0] == 0  # a layer that does not fold


def test_the_ring_never_stands_still(library):
    for slots in range(4, 13):
        for dense in (1, 3, 4, 16, 31):
            for triangle in (1, 2, 5, 6, 40):
                most = library.emulate_ring(dense, triangle, slots)
                assert most <= slots
                assert most >= min(slots, max(dense, min(triangle, 6)))


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize(("m", "h", "grid"), [(1, 1, 4), (5, 37, 2), (64, 300, 7), (40, 4097, 3), (33, 8192, 132)])
def test_power_iteration(library, m, h, grid, element_bytes):
    generator = torch.Generator().manual_seed(9)
    weight, vector = torch.randn(m, h, generator=generator), torch.randn(h, generator=generator)
    matrix, sigma, result = padded(weight), torch.full((), math.nan), torch.full((h,), math.nan)
    code = library.emulate_power(
        pointer(matrix), ctypes.c_int64(matrix.stride(0)), m, h, element_bytes, pointer(vector), 3, grid,
        ctypes.c_int64(230_000), pointer(sigma), pointer(result),
    )  # fmt: skip
    assert code == 0, library.emulate_message().decode()
    expected_sigma, expected = reference.power_iteration(weight.double(), vector.double(), 3)
    torch.testing.assert_close(sigma.double(), expected_sigma, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-6)


def meet(library, blocks: int, phases: int, *, missing: int = -1, phase: int = 0, patience: int = 50):
    """Barriers that each block passed, the message, the counter, what was seen, looks at the clock."""
    came, word, total = (ctypes.c_int * blocks)(), ctypes.c_uint64(), (ctypes.c_int64 * 2)()
    limit = ctypes.c_int64(patience)
    looks = library.emulate_barrier(blocks, phases, missing, phase, limit, came, ctypes.byref(word), total)
    return list(came), library.emulate_message().decode(), total[0], total[1], looks


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_a_barrier_holds_until_all_have_come_and_is_ready_for_the_next(library, blocks):
    came, message, counter, seen, _ = meet(library, blocks, 40)
    assert came == [40] * blocks
    assert message == ""
    assert counter % 2**31 == 0  # as it was before: the launch's next barrier starts from here
    assert seen == 40 * blocks * blocks  # what every block wrote before, every block saw after


@pytest.mark.parametrize(("missing", "phase"), [(0, 1), (3, 1), (5, 4), (0, 9)])
def test_a_block_that_does_not_come_ends_the_launch_and_is_named(library, missing, phase):
    came, message, *_, looks = meet(library, 6, 12, missing=missing, phase=phase)
    assert came == [phase - 1] * 6
    assert message.startswith(f"thread block {missing} did not come to grid barrier {phase} of an earlier score")
    assert message.endswith("; its results are NaN")
    assert looks > 0
