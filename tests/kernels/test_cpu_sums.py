"""The cpu backend's ``accumulate``, ``pair_variance`` and ``power_iteration`` against float64.

Tolerances as in test_cpu_score: twice the error of torch with operands rounded to the same dtype, plus a bound from the
number of additions.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rmcore.ops import reference
from rmcore.ops.backends import cpu
from rmcore.ops.backends import torch as plain
from rmcore.ops.tasks import AccumulateTask
from rmcore.ops.weights import FeatureMap, HeadWeights

_cpu = pytest.importorskip("rmcore._cpu")

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
AVAILABLE = ISAS[: ISAS.index(_cpu.best_isa()) + 1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _best_isa_afterwards():
    yield
    _cpu.set_isa("auto")


def make_head(h, d, dtype, *, features="rff", layer=None):
    generator = torch.Generator().manual_seed(h * 1000 + d)
    width = layer or h
    layer_weight = (torch.randn(layer, h, generator=generator) / math.sqrt(h)).to(dtype) if layer else None
    layer_bias = torch.randn(layer, generator=generator) if layer else None
    rff = features == "rff"
    projection = (torch.randn(d, width, generator=generator) / (2 * math.sqrt(width))).to(dtype) if rff else None
    phase = torch.rand(d, generator=generator) if rff else None
    d = d if rff else width
    feature_map = FeatureMap(
        features, projection, phase, layer_weight, layer_bias, "tanh" if layer else "none", layer is not None, h, d,
        dtype, feature_scale=3 * math.sqrt(2 / d),
    )  # fmt: skip
    beta, factor = torch.randn(d, generator=generator), torch.randn(d, d, generator=generator).tril()
    return HeadWeights.build(feature_map, beta, 0.3, factor / math.sqrt(d), math.pi / 8)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_features(weights, hidden):
    """c as torch gets it when each product's operands are rounded to the serving dtype."""
    m = weights.map
    x = hidden.to(m.dtype).float()
    if m.layer_weight is not None:
        z = reference.normalized_layer(
            x, m.layer_weight.float(), m.layer_bias, activation=m.activation, layernorm=m.layernorm
        )
        x = z.to(m.dtype).float()
    return x if m.projection is None else reference.phase_features(x, m.projection.float(), m.phase)


def close(got, expected, same_dtype, additions, what, floor=0.0):
    """``floor`` is the size of one term, for sums that may be small by cancellation."""
    size = expected.abs().max().clamp_min(floor)
    allowed = 2 * (same_dtype.double() - expected).abs().max() + 8 * math.sqrt(additions) * 2.0**-24 * size
    error = (got.double() - expected).abs().max()
    assert float(error) <= float(allowed), f"{what}: error {error:.3g}, allowed {allowed:.3g}"


# -- accumulate ------------------------------------------------------------------------------------------------------


def accumulate(weights, hidden, labels, beta, *, pairs=None, sample_weight=None, likelihood="logistic", double=True):
    dtype, d = (torch.float64 if double else torch.float32), weights.num_features
    precision, gradient = torch.full((d, d), 2.0, dtype=dtype), torch.full((d,), 3.0, dtype=dtype)
    total = cpu.accumulate(
        AccumulateTask(hidden, labels, weights.map, beta, precision, gradient, pairs, sample_weight, 0.2, likelihood)
    )
    assert bool((precision.triu(1) == torch.full_like(precision, 2.0).triu(1)).all())  # the upper half is not ours
    return precision.tril() - torch.full_like(precision, 2.0).tril(), gradient - 3.0, total


def accumulated_truth(c, weights, labels, beta, pairs, sample_weight, likelihood, rounding=None):
    c = c if pairs is None else c[pairs[:, 0]] - c[pairs[:, 1]]
    compute = c.dtype
    phi = c * weights.map.feature_scale
    sample = None if sample_weight is None else sample_weight.to(compute)
    gram, slope, total = reference.accumulate(
        phi, labels.to(compute), beta.to(compute), beta0=0.2, likelihood=likelihood, sample_weight=sample
    )
    if rounding is not None:  # √w c rounded, as a product in that dtype would have it
        g = phi @ beta + 0.2
        w = torch.ones_like(g) if likelihood == "gaussian" else torch.sigmoid(g) * torch.sigmoid(-g)
        w = w if sample is None else w * sample
        operand = (w.sqrt()[:, None] * c).to(rounding).float()
        gram = operand.T @ operand * weights.map.feature_scale**2
    return gram.tril(), slope, total


def check_accumulate(make, n, *, paired, weighted, likelihood, double):
    """On every instruction set, against one truth; ``make()`` gives each a head that it packs itself."""
    weights = make()
    d = weights.num_features
    generator = torch.Generator().manual_seed(3)
    hidden, beta = draw(n, weights.hidden_size), draw(d, seed=2)
    labels = torch.rand(n + 5 if paired else n, generator=generator)
    beta = beta / (weights.map.feature_scale * math.sqrt(d))
    pairs = torch.randint(0, n, (n + 5, 2), generator=generator) if paired else None
    sample_weight = torch.rand(len(labels), generator=generator) if weighted else None
    rest = (weights, labels, beta, pairs, sample_weight, likelihood)
    expected = accumulated_truth(weights.map(hidden.double()), *rest)
    same = accumulated_truth(rounded_features(weights, hidden), *rest, rounding=weights.dtype)
    scale, additions = weights.map.feature_scale, n + weights.hidden_size
    # A lone number: torch's error in it may be small by luck, so its errors of the single terms are counted instead.
    error = (rounded_features(weights, hidden).double() - weights.map(hidden.double())) @ (beta * scale).double()
    allowed = 4 * math.sqrt(len(labels)) * float(error.norm()) / math.sqrt(n) + 1e-6 * len(labels)
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        got = accumulate(
            make(), hidden, labels, beta, pairs=pairs, sample_weight=sample_weight, likelihood=likelihood, double=double
        )
        close(got[0], expected[0], same[0], additions, f"{isa}: precision", scale**2)
        close(got[1], expected[1], same[1], additions, f"{isa}: gradient", scale)
        assert abs(float(got[2] - expected[2])) <= allowed, isa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "h", "d"), [(1, 33, 1), (129, 385, 129), (65, 1, 200), (2100, 64, 70)])
@pytest.mark.parametrize("paired", [False, True])
def test_accumulate_agrees_with_float64(dtype, n, h, d, paired):
    make = partial(make_head, h, d, dtype)
    check_accumulate(make, n, paired=paired, weighted=False, likelihood="logistic", double=True)
    check_accumulate(make, n, paired=paired, weighted=True, likelihood="gaussian", double=False)


@pytest.mark.parametrize("kind", [{"layer": 50}, {"features": "linear"}, {"features": "linear", "layer": 50}])
def test_accumulate_with_every_kind_of_features(kind):
    for paired in (False, True):
        check_accumulate(
            partial(make_head, 100, 70, torch.bfloat16, **kind), 90,
            paired=paired, weighted=True, likelihood="logistic", double=True,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paired", [False, True])
def test_accumulate_does_not_depend_on_threads_or_the_run(dtype, paired):
    weights, labels = make_head(100, 200, dtype), torch.rand(2300)
    hidden, beta = draw(2300, 100), draw(200) / 10
    pairs = torch.randint(0, 2300, (2300, 2)) if paired else None
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(accumulate(weights, hidden, labels, beta, pairs=pairs))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_accumulate_adds_a_positive_semi_definite_matrix():
    weights = make_head(40, 150, torch.bfloat16)
    gram, _, _ = accumulate(weights, draw(60, 40), torch.rand(60), draw(150) / 10)  # rank 60 of 150
    eigenvalues = torch.linalg.eigvalsh(gram + gram.tril(-1).T)
    assert float(eigenvalues[0]) > -1e-6 * float(eigenvalues[-1])


@pytest.mark.parametrize("paired", [False, True])
def test_accumulate_of_nothing_changes_nothing(paired):
    weights = make_head(33, 65, torch.float16)
    hidden, pairs = draw(4 if paired else 0, 33), torch.empty(0, 2, dtype=torch.int64) if paired else None
    gram, slope, total = accumulate(weights, hidden, torch.empty(0), draw(65), pairs=pairs)
    assert not bool(gram.any())
    assert not bool(slope.any())
    assert float(total) == 0.0


def test_accumulate_takes_long_pair_lists_in_runs(monkeypatch):
    weights, hidden, labels, beta = make_head(50, 70, torch.float32), draw(300, 50), torch.rand(500), draw(70) / 10
    pairs = torch.randint(0, 300, (500, 2))
    whole = accumulate(weights, hidden, labels, beta, pairs=pairs)
    monkeypatch.setattr(cpu, "_FEATURE_BYTES", 4 * 128 * 100)  # 100 rows at a time
    for a, b in zip(accumulate(weights, hidden, labels, beta, pairs=pairs), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_accumulate_into_strided_outputs():
    weights, hidden, labels, beta = make_head(50, 70, torch.float32), draw(30, 50), torch.rand(30), draw(70) / 10
    gram, slope, _ = accumulate(weights, hidden, labels, beta)
    wide, steps = torch.zeros(70, 100, dtype=torch.float64), torch.zeros(140, dtype=torch.float64)
    cpu.accumulate(
        AccumulateTask(hidden, labels, weights.map, beta, wide[:, :70], steps[::2], None, None, 0.2, "logistic")
    )
    torch.testing.assert_close(wide[:, :70].tril(), gram)
    torch.testing.assert_close(steps[::2], slope)
    assert not bool(wide[:, 70:].any())
    assert not bool(steps[1::2].any())


# -- pair_variance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "d"), [(33, 65), (385, 200), (1, 1)])
def test_pair_variance_agrees_with_float64(dtype, h, d):
    weights, sizes = make_head(h, d, dtype), torch.tensor([3, 0, 1, 16, 2, 4, 270, 7, 1])
    hidden = draw(int(sizes.sum()), h)
    expected_g, expected_v = plain.pair_variance(hidden.double(), sizes, weights)
    same_g, same_v = [], []
    factor = reference.unpack_lower(weights.factor, d).float() * math.sqrt(weights.factor_scale)
    for c in rounded_features(weights, hidden).split(sizes.tolist()):
        i, j = torch.triu_indices(len(c), len(c), 1)
        delta = c - c[:1]
        y = delta.to(dtype).float() @ factor.T
        same_g.append((delta @ weights.beta)[i] - (delta @ weights.beta)[j])
        same_v.append((y[i] - y[j]).square().sum(-1))
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        g, v = cpu.pair_variance(hidden, sizes, make_head(h, d, dtype))
        close(g, expected_g.double(), torch.cat(same_g), h + d, f"{isa}: logit")
        close(v, expected_v.double(), torch.cat(same_v), h + d, f"{isa}: variance")


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_differ_by_exactly_nothing_and_swaps_change_the_sign(isa, dtype):
    _cpu.set_isa(isa)
    weights, hidden = make_head(100, 130, dtype), draw(40, 100)
    hidden[1], hidden[11], hidden[39] = hidden[0], hidden[5], hidden[20]
    sizes = torch.tensor([2, 10, 28])
    g, v = cpu.pair_variance(hidden, sizes, weights)
    equal = v == 0
    assert int(equal.sum()) == 3
    assert bool((g[equal] == 0).all())
    assert bool((v >= 0).all())
    two = hidden[[3, 7]]
    (forward, v1), (backward, v2) = (cpu.pair_variance(x, torch.tensor([2]), weights) for x in (two, two.flip(0)))
    assert torch.equal(forward, -backward)
    assert torch.equal(v1, v2)


def test_groups_depend_neither_on_each_other_nor_on_threads():
    weights, sizes = make_head(100, 200, torch.bfloat16), torch.tensor([16, 4, 5, 200, 3, 60])
    hidden, results = draw(288, 100), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.stack(cpu.pair_variance(hidden, sizes, weights)))
        assert torch.equal(results[0], results[-1])
    parts = [torch.stack(cpu.pair_variance(x, torch.tensor([len(x)]), weights)) for x in hidden.split(sizes.tolist())]
    assert torch.equal(torch.cat(parts, dim=1), results[0])
    hidden[20] = math.nan  # first row of the third group
    sick = cpu.pair_variance(hidden, sizes, weights)[1]
    third = torch.zeros(len(sick), dtype=torch.bool)
    third[126:136] = True  # after the 120 pairs of 16 rows and the 6 of 4
    assert torch.equal(sick.isnan(), third)


def test_no_pairs_is_an_empty_answer():
    weights = make_head(33, 65, torch.bfloat16)
    for sizes in ([], [0, 0], [1, 0, 1]):
        g, v = cpu.pair_variance(draw(sum(sizes), 33), torch.tensor(sizes, dtype=torch.int64), weights)
        assert g.shape == v.shape == (0,)


# -- power_iteration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 70), (70, 1), (129, 385), (333, 257), (65, 5000)])
def test_power_iteration_agrees_with_float64(dtype, m, n):
    weight, vector = draw(m, n).to(dtype), draw(n, seed=1) * 7
    norm = float(torch.linalg.matrix_norm(weight.double(), 2))
    for iterations in (1, 4):
        expected_sigma, expected_v = reference.power_iteration(weight.double(), vector.double(), iterations)
        bound = 8 * iterations * math.sqrt(m + n) * 2.0**-24
        for isa in AVAILABLE:
            _cpu.set_isa(isa)
            sigma, v = cpu.power_iteration(weight, vector, iterations)
            assert float((sigma - expected_sigma).abs()) <= bound * float(expected_sigma), isa
            assert float((v - expected_v).abs().max()) <= bound, isa
            assert float(sigma) <= norm * (1 + 1e-6), isa


def test_power_iteration_of_strided_and_zero_matrices_on_any_number_of_threads():
    wide, vector = draw(200, 300), draw(100)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu.power_iteration(wide[::2, 50:150], vector, 3))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
    turned = cpu.power_iteration(wide[::2, 50:150].T.contiguous().T, vector, 3)
    assert all(torch.equal(a, b) for a, b in zip(results[0], turned, strict=True))
    sigma, v = cpu.power_iteration(torch.zeros(30, 100), vector, 2)
    assert float(sigma) == 0.0
    torch.testing.assert_close(v, vector / vector.norm())
