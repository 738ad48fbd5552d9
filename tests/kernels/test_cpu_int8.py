"""int8 heads on the cpu backend: against float64, and against the same whole numbers multiplied by torch.

How near is in int8_checks.py. Sums of whole numbers are exact on every instruction set.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from int8_checks import bounds, check, check_same_numbers, draw, make_head, random_whole, spread, whole_head

from rmcore import ops
from rmcore._base.errors import BackendError, InputError
from rmcore.head import SNGPHead
from rmcore.ops import whole_numbers
from rmcore.ops.backends import cpu
from rmcore.ops.weights import FeatureMap, HeadWeights

_cpu = pytest.importorskip("rmcore._cpu")

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
AVAILABLE = ISAS[: ISAS.index(_cpu.best_isa()) + 1]
SIZES = [(1, 1), (3, 70), (33, 65), (385, 129), (64, 1000), (1000, 33), (129, 258)]
"""h ≤ D/2 takes rows in two terms; both kinds are here."""


@pytest.fixture(autouse=True)
def _best_isa_afterwards():
    yield
    _cpu.set_isa("auto")


def run(hidden, weights):
    out = torch.full((4, hidden.shape[0]), math.nan)
    cpu.score(hidden, weights, out)
    return out


# -- score -----------------------------------------------------------------------------------------------------------


def test_torch_finds_the_same_whole_numbers_of_every_row():
    """Of 3,000 rows a few lie so near the edge of two whole numbers that a division rounded twice takes the other."""
    for h, d, rows in ((384, 700, 1024), (384, 900, 1025), (1003, 1003, 1024)):
        weights, hidden = make_head(h, d), spread(draw(rows, h, seed=rows)).half()
        check_same_numbers(run(hidden, weights).double(), whole_numbers.score(hidden, weights), weights)


def test_one_whole_number_of_c_may_be_the_next_and_not_all_of_them():
    """The bound between kernels: c on an edge falls either way, which in a small head is all of the difference."""
    for d in (17, 130):
        weights, hidden = make_head(40, d), spread(draw(4, 40))
        c, factor = whole_numbers.features(hidden, weights.map), whole_numbers.factor(weights)
        whole, scores = (127 * c).round() / 127, whole_numbers.score(hidden, weights)

        def moved(which, whole=whole, factor=factor, scores=scores):
            v = ((whole + which / 127) @ factor.mT).square().sum(1)
            return torch.stack([scores[0], v, *scores[2:]])

        step = whole.sign()
        for k in range(0, d, 13):
            check_same_numbers(moved(torch.eye(d)[k] * step), scores, weights)
        with pytest.raises(AssertionError):
            check_same_numbers(moved(step), scores, weights)


@pytest.mark.parametrize(("h", "d"), SIZES)
@pytest.mark.parametrize("calibrated", [True, False])
def test_agrees_with_float64(h, d, calibrated):
    weights, hidden = make_head(h, d, calibrated=calibrated), spread(draw(129, h))
    known = bounds(hidden, weights)
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        weights = make_head(h, d, calibrated=calibrated)  # which packs itself for this instruction set
        check(run(hidden, weights), hidden, weights, known, isa)


@pytest.mark.parametrize(("h", "d"), SIZES)
def test_instruction_sets_multiply_the_same_whole_numbers(h, d):
    weights, hidden = make_head(h, d), spread(draw(67, h))
    results = []
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        results.append(run(hidden, weights))
    for other in results[1:]:
        check_same_numbers(other, results[0], weights)
    for other in results[2:]:  # from AVX2 on, all multiply and add alike: only the last sums differ in their order
        torch.testing.assert_close(other[0], results[1][0], rtol=0, atol=1e-6 * float(weights.beta.norm()))
        torch.testing.assert_close(other[1], results[1][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize(("h", "d"), [(385, 200), (64, 200)])
def test_a_row_depends_neither_on_its_batch_nor_on_threads_nor_on_the_run(isa, h, d):
    _cpu.set_isa(isa)
    weights, hidden = make_head(h, d), draw(450, h)
    torch.set_num_threads(2)
    full = run(hidden, weights)
    assert torch.equal(full, run(hidden, weights))
    for rows in (0, 1, 2, 3, 7, 64, 65, 127, 129):
        assert torch.equal(full[:, 5 : 5 + rows], run(hidden[5 : 5 + rows], weights)), rows
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(full, run(hidden, weights)), threads
    torch.set_num_threads(2)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_and_strides_of_rows(isa, dtype):
    _cpu.set_isa(isa)
    weights, h = make_head(101, 70), 101
    hidden = draw(20, h, dtype)
    expected = run(hidden.contiguous(), weights)
    wide = torch.full((40, 2 * h + 3), math.nan, dtype=dtype)
    wide[::2, 1 : 2 * h + 1 : 2] = hidden
    assert torch.equal(run(wide[::2, 1 : 2 * h + 1 : 2], weights), expected)
    wide[:20, 3 : 3 + h] = hidden
    assert torch.equal(run(wide[:20, 3 : 3 + h], weights), expected)
    assert torch.equal(run(hidden.T.contiguous().T, weights), expected)
    check(expected, hidden, weights)


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize(("h", "d"), [(100, 130), (60, 130)])
def test_a_non_finite_row_spoils_itself_only(isa, h, d):
    _cpu.set_isa(isa)
    weights, hidden = make_head(h, d), draw(14, h)
    clean = run(hidden, weights)
    for row, value in ((0, math.nan), (6, math.inf), (13, -math.inf)):
        hidden[row, h - 1 - row] = value
    got, sick = run(hidden, weights), torch.tensor([0, 6, 13])
    assert not bool(got[:, sick].isfinite().any())
    healthy = [row for row in range(14) if row not in sick]
    assert torch.equal(got[:, healthy], clean[:, healthy])


@pytest.mark.parametrize("isa", AVAILABLE)
def test_rows_of_any_size(isa):
    _cpu.set_isa(isa)
    weights = make_head(50, 66, calibrated=False)
    hidden = torch.stack([torch.zeros(50), torch.full((50,), 1e-38), torch.full((50,), 3e37), draw(1, 50)[0] * 1e-12])
    got = run(hidden, weights)
    assert bool(got.isfinite().all())
    check(got[:, [0, 1, 3]], hidden[[0, 1, 3]], weights)


# -- whole numbers, bit for bit --------------------------------------------------------------------------------------

ROWS = (1, 2, 3, 5, 6, 7, 11, 12, 13, 16, 17, 64, 65, 255, 256)
"""One register block and several, on both sides of where weights are widened first."""


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("extreme", [False, True])
def test_the_factor_s_whole_numbers_are_exact_bit_for_bit(isa, extreme):
    _cpu.set_isa(isa)
    for d in (2, 63, 64, 65, 129, 257, 1027):
        # t = q p / 1024 exactly, so that c's whole numbers are known: rows are (127, q), which makes their factor 1.
        p = random_whole((d,), False, d).long()
        q = torch.randint(-127, 128, (256,), generator=torch.Generator().manual_seed(d))
        if extreme:  # c = ±1
            p, q = torch.where(p < 0, 64, 0), torch.full((256,), 8)
            q[1::2] = 16
        c = 127 * torch.cos(2 * math.pi * (q[:, None] * p).double() / 1024)
        assert float(((c - c.floor()) - 0.5).abs().min()) > 1e-4  # on no edge
        row = random_whole((d,), extreme, d + 1)
        weights = whole_head(torch.stack([torch.zeros(d), p], 1).to(torch.int8), 2.0**-10, row)
        hidden = torch.stack([torch.full((256,), 127.0), q.float()], 1)
        sums = (c.round().long()[:, :-1] * row.long()[:-1]).sum(1)
        y = sums.float() * 2.0**-9 * torch.tensor(1 / 127)
        for rows in ROWS:
            assert torch.equal(run(hidden[:rows], weights)[1], (y * y)[:rows]), (d, rows)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("h", [2, 3, 63, 65, 255, 257, 1000, 4100])
def test_the_projection_s_whole_numbers_are_exact_bit_for_bit(extreme, h):
    d = 67 if h < 1000 else 3  # d ≥ 2 h takes a second term, which is 0 here
    projection = random_whole((d, h), extreme, h)
    hidden = random_whole((256, h), extreme, h + 1).clamp(min=-127).float()
    hidden[:, 0] = 127.0
    if extreme:  # the largest sums of either sign
        hidden[0] = torch.where(projection[d - 1] < 0, -127.0, 127.0)
        hidden[1] = -hidden[0]
    sums = hidden.long() @ projection.long().T
    results = {}
    for feature in (0, d - 1):
        weights = whole_head(projection, 2.0**-10, torch.zeros(d), feature=feature)
        for isa in AVAILABLE:
            _cpu.set_isa(isa)
            full = run(hidden, weights)[0]
            # A sum that is off by one turns c by 2π/1024; beyond 2²⁴ sums are rounded once, to float32.
            expected = torch.cos(2 * math.pi * sums[:, feature].float().double() / 1024)
            assert float((full.double() - expected).abs().max()) < 1e-6, isa
            assert all(torch.equal(run(hidden[:rows], weights)[0], full[:rows]) for rows in ROWS), isa
            results[isa] = full
        fused = [results[isa] for isa in AVAILABLE[1:]]
        assert all(torch.equal(other, fused[0]) for other in fused[1:])


@pytest.mark.parametrize("isa", AVAILABLE)
def test_the_largest_sums_do_not_saturate(isa):
    # Every product is the largest there is: 127 · 127, stored as 255 · 127.
    _cpu.set_isa(isa)
    h, d = 4096, 64
    projection = torch.full((d, h), 127, dtype=torch.int8)
    projection[::2] = -127
    scale = torch.full((d,), 1.0 / (127 * h))
    feature_map = FeatureMap(
        "rff", projection, torch.full((d,), 0.1), None, None, "none", False, h, d, torch.int8, projection_scale=scale
    )
    weights = HeadWeights.build(feature_map, torch.randn(d), 0.0, torch.eye(d).double(), 0.4)
    hidden = torch.cat([torch.ones(3, h), -torch.ones(3, h)]) * 0.3
    check(run(hidden, weights), hidden, weights)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_pairs_of_weights_on_either_side_of_where_sums_of_two_products_leave_int16(isa):
    _cpu.set_isa(isa)
    sums = [(64, 64), (64, 65), (127, 1), (127, 2), (127, 127), (1, 127), (127, -127), (126, -1)]
    pairs = torch.tensor([*sums, *[(-a, -b) for a, b in sums], (-128, 0), (-128, -1), (0, -128), (-128, 127)])
    d, h = 70, 2 * len(pairs) + 1  # odd: the last weight is a pair with a zero
    order = torch.stack([torch.randperm(len(pairs), generator=torch.Generator().manual_seed(n)) for n in range(d)])
    projection = torch.cat([pairs[order].flatten(1), torch.full((d, 1), -128)], 1).to(torch.int8)
    hidden = random_whole((193, h), False, 1).clamp(min=-127).float()
    hidden[:, 0] = 127.0  # which makes every row's factor 1
    hidden[7:160:3, 1:] = 127.0 * torch.where(hidden[7:160:3, 1:] < 0, -1.0, 1.0)
    hidden[8], hidden[9, 1:] = 127.0, -127.0
    turns = (hidden.long() @ projection.long().T).float().double() / 1024
    for feature in (0, 63, 64, d - 1):
        weights = whole_head(projection, 2.0**-10, torch.zeros(d), feature=feature)
        for rows in (*ROWS[:-2], 23, 24, 47, 48, 49, 192, 193):
            got = run(hidden[:rows], weights)[0]
            expected = torch.cos(2 * math.pi * turns[:rows, feature])
            assert float((got.double() - expected).abs().max()) < 1e-6, (feature, rows)


def test_writes_all_of_out_and_nothing_else():
    weights, hidden = make_head(33, 65), draw(7, 33)
    memory = torch.full((6, 7), 12345.0)
    cpu.score(hidden, weights, memory[1:5])
    assert bool((memory[0] == 12345).all())
    assert bool((memory[5] == 12345).all())
    assert torch.equal(memory[1:5], run(hidden, weights))


# -- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize(("h", "d"), [(33, 65), (385, 129), (64, 1000)])
def test_pairs_agree_with_float64(isa, h, d):
    _cpu.set_isa(isa)
    weights, sizes = make_head(h, d), torch.tensor([1, 4, 0, 7, 2, 65])
    hidden = spread(draw(int(sizes.sum()), h))
    g, v = cpu.pair_variance(hidden, sizes, weights)
    c, factor = weights.map(hidden.double()), whole_numbers.factor(weights)
    rounded = whole_numbers.features(hidden, weights.map)
    at = row = 0
    for k in sizes.tolist():
        i, j = torch.triu_indices(k, k, 1)
        pairs = slice(at, at + len(i))
        delta, own = c[row + i] - c[row + j], rounded[row : row + k]
        expected_g, expected_v = delta @ weights.beta.double(), (delta @ factor.T).square().sum(-1)
        if len(i):
            centred = whole_numbers.whole_rows((own - own[:1]).float(), False, outliers=False)
            near = centred.whole.double() * centred.factor.double()
            same_v = ((near[i] - near[j]) @ factor.T).square().sum(-1)
            same_g = (own[i] - own[j]) @ weights.beta.double()
            slack = 1e-5 * (1 + float(expected_v.max()))
            assert float((v[pairs] - expected_v).abs().max()) <= 2 * float((same_v - expected_v).abs().max()) + slack
            slack = 1e-5 * float(weights.beta.norm())
            assert float((g[pairs] - expected_g).abs().max()) <= 2 * float((same_g - expected_g).abs().max()) + slack
        row, at = row + k, at + len(i)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_equal_rows_have_no_difference(isa):
    _cpu.set_isa(isa)
    weights, hidden = make_head(70, 130), draw(6, 70)
    hidden[4] = hidden[2]
    hidden[5] = hidden[0]
    g, v = cpu.pair_variance(hidden, torch.tensor([6]), weights)
    order = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    for pair in ((2, 4), (0, 5)):
        assert float(g[order.index(pair)]) == 0
        assert float(v[order.index(pair)]) == 0
    assert float(v.max()) > 0


def test_a_non_finite_row_is_seen_in_its_pairs():
    weights, hidden = make_head(70, 130), draw(8, 70)
    hidden[6, 3] = math.nan
    g, v = cpu.pair_variance(hidden, torch.tensor([4, 4]), weights)
    assert bool(g[:6].isfinite().all())
    assert bool(v[:6].isfinite().all())
    sick = [pair for pair, (i, j) in enumerate((i, j) for i in range(4) for j in range(i + 1, 4)) if 2 in (i, j)]
    assert not bool(v[6:][sick].isfinite().any())
    assert not bool(g[6:][sick].isfinite().any())


# -- through the operations ------------------------------------------------------------------------------------------


def test_accumulate_takes_the_same_features_in_float32():
    weights, hidden = make_head(65, 130), spread(draw(50, 65))
    d, feature_map = 130, weights.map
    grams = []
    for taken in (feature_map, feature_map.dequantized()):
        gram, slope = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
        ops.accumulate(hidden, torch.ones(50), taken, torch.zeros(d), precision=gram, gradient=slope)
        grams.append((gram, slope))
    assert torch.equal(grams[0][0], grams[1][0])
    assert torch.equal(grams[0][1], grams[1][1])
    phi = feature_map(hidden.double()) * feature_map.feature_scale
    torch.testing.assert_close(grams[0][0].tril(), (phi.T @ phi / 4).tril(), rtol=1e-4, atol=1e-5)


def test_no_other_backend_than_torch_takes_them_by_mistake():
    weights = make_head(16, 32)
    assert ops.explain("score", "cpu", torch.int8).backend == "cpu"
    assert ops.explain("score", "cuda", torch.int8).backend == "torch"
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendError, match=f"{backend}.*cannot run score"):
            ops.score(draw(2, 16), weights, backend=backend)
    plain, fast = ops.score(draw(9, 16), weights, backend="torch"), ops.score(draw(9, 16), weights)
    torch.testing.assert_close(fast.uncertainty, plain.uncertainty, rtol=1e-3, atol=0)


def test_compiles_into_one_graph():
    weights, hidden = make_head(24, 48), draw(5, 24)
    compiled = torch.compile(lambda x: ops.score(x, weights).preference * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), ops.score(hidden, weights).preference * 2)


@pytest.mark.parametrize(
    "config",
    [{"features": "linear"}, {"layer_size": 8, "activation": "tanh"}, {"layer_size": 8, "layernorm": True}],
)
def test_heads_without_a_folded_projection_are_refused(config):
    head = SNGPHead(12, num_features=12 if "layer_size" not in config else 16, length_scale=1.0, **config)
    with pytest.raises(InputError, match=r"^dtype: got int8 for linear features, tanh or layernorm"):
        head.freeze_features(torch.int8)


def test_too_large_a_head_is_refused():
    with pytest.raises(InputError, match=r"^dtype: got int8 for h = 70000"):
        SNGPHead(70_000, num_features=1, length_scale=1.0).freeze_features(torch.int8)


def outlying(rows, h, columns, sizes):
    """Ordinary rows, but for `columns` of every second one."""
    hidden = draw(rows, h, seed=4)
    hidden[::2, columns] = torch.tensor(sizes) * torch.where(torch.arange(len(columns)) % 2 == 0, 1.0, -1.0)
    return hidden


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("calibrated", [False, True])
def test_outliers_of_a_row_are_multiplied_in_float32(isa, calibrated):
    _cpu.set_isa(isa)
    for h, d in ((1, 70), (70, 33), (129, 300), (300, 129)):
        weights = make_head(h, d, calibrated=calibrated)
        beta, size = (
            weights.beta.double(),
            weights.map.projection.double().abs() * weights.map.projection_scale[:, None],
        )
        plain = draw(9, h, seed=4)
        c = weights.map(plain.double())
        base = float((run(plain, weights)[0] - c @ beta - weights.beta0).abs().max())
        for columns, sizes in (
            ([0], [1e5]),
            ([h - 1], [80.0]),
            (range(0, min(h, 60), 3), [1e4 * 3**-k for k in range(20)]),
        ):
            columns = list(columns)
            hidden = outlying(9, h, columns, sizes[: len(columns)])
            g = run(hidden, weights)[0]
            truth = weights.map(hidden.double()) @ beta + weights.beta0
            largest = float(hidden.abs().max()) * (1.0 if weights.map.hidden_scale is None else 12.0)
            rounding = 2 * math.pi * len(columns) * largest * float(size.amax()) * 2**-23 * float(beta.abs().sum())
            assert float((g - truth).abs().max()) <= 4 * base + rounding + 1e-4, (h, d, columns)
            for row in range(3):  # alone as among others
                assert torch.equal(run(hidden[row : row + 1], weights)[0], g[row : row + 1])


def test_more_outliers_than_are_taken_apart_share_the_row():
    """33 columns of one size among 2,000: the row is coarse, as it was, and no more than that."""
    weights = make_head(2000, 33)
    hidden = outlying(4, 2000, list(range(33)), [1e5] * 33)
    g = run(hidden, weights)[0]
    assert bool(g.isfinite().all())
    assert torch.equal(run(hidden[1:2], weights)[0], g[1:2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_of_an_outlier_and_a_value_that_is_not_finite_is_not_finite(bad):
    weights = make_head(70, 33)
    hidden = outlying(4, 70, [3], [1e5])
    hidden[0, 9] = bad
    g = run(hidden, weights)[0]
    assert not bool(g[0].isfinite())
    assert bool(g[1:].isfinite().all())
