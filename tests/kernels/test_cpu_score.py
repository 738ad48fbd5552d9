"""The cpu backend's ``score`` against float64, on every instruction set this machine has.

Errors are held against what torch does in the same dtype (operands rounded to it, float32 products): at most twice
that, plus a bound from the number of additions (Higham: γ_n ≈ n · 2⁻²⁴, √n in practice; taken as 4 √n · 2⁻²⁴).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rmcore import ops
from rmcore.head import SNGPHead
from rmcore.ops import reference
from rmcore.ops.backends import cpu, cpu_packing
from rmcore.ops.weights import FeatureMap, HeadWeights

_cpu = pytest.importorskip("rmcore._cpu")

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
AVAILABLE = ISAS[: ISAS.index(_cpu.best_isa()) + 1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (0, 1, 2, 3, 7, 64, 65, 127, 129)
KINDS = {
    "folded": {},
    "tanh": {"layer": 77, "activation": "tanh"},
    "layernorm": {"layer": 64, "layernorm": True},
    "tanh + layernorm": {"layer": 33, "activation": "tanh", "layernorm": True},
    "linear": {"features": "linear"},
    "linear, projected": {"features": "linear", "project": True},
    "linear, layer": {"features": "linear", "layer": 70, "activation": "tanh"},
    "linear, layer, projected": {"features": "linear", "layer": 70, "layernorm": True, "project": True},
}


@pytest.fixture(autouse=True)
def _best_isa_afterwards():
    yield
    _cpu.set_isa("auto")


def make_head(
    h, d, dtype, *, features="rff", layer=None, activation="none", layernorm=False, project=None, input_scale=1.0
):
    """A random head of about unit phases, logits and variances."""
    generator = torch.Generator().manual_seed(h * 1000 + d)
    project = features == "rff" if project is None else project
    width = layer or h
    layer_weight = (torch.randn(layer, h, generator=generator) / math.sqrt(h)).to(dtype) if layer else None
    layer_bias = torch.randn(layer, generator=generator) if layer else None
    projection = (torch.randn(d, width, generator=generator) / (2 * math.sqrt(width))).to(dtype) if project else None
    phase = torch.rand(d, generator=generator) if project else None
    d = d if project else width
    feature_map = FeatureMap(
        features, projection, phase, layer_weight, layer_bias, activation, layernorm, h, d, dtype, input_scale,
        feature_scale=3 * math.sqrt(2 / d),
    )  # fmt: skip
    beta, factor = torch.randn(d, generator=generator), torch.randn(d, d, generator=generator).tril()
    return HeadWeights.build(feature_map, beta, 0.3, factor / math.sqrt(d), math.pi / 8)


def draw(rows, h, dtype=torch.float32, seed=0):
    return torch.randn(rows, h, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(hidden, weights):
    out = torch.full((4, hidden.shape[0]), math.nan)
    cpu.score(hidden, weights, out)
    return out


def truth(hidden, weights):
    """(4, B) float64 from the stored weights."""
    c = weights.map(hidden.double())
    factor = reference.unpack_lower(weights.factor, weights.num_features).double() * math.sqrt(weights.factor_scale)
    return torch.stack(
        reference.score(c, weights.beta.double(), factor, beta0=weights.beta0, amplitude=weights.amplitude)
    )


def same_dtype(hidden, weights):
    """What torch gets when each product's operands are rounded to the serving dtype and summed in float32."""
    m, dtype = weights.map, weights.dtype

    def rounded(t):
        return t.to(dtype).float()

    x = rounded(hidden.float() * m.input_scale)
    if m.layer_weight is not None:
        z = reference.normalized_layer(
            x, m.layer_weight.float(), m.layer_bias, activation=m.activation, layernorm=m.layernorm
        )
        x = rounded(z)
    c = x
    if m.projection is not None:
        phases = reference.phase_features if m.features == "rff" else lambda x, w, b: x @ w.T + b
        c = phases(x, m.projection.float(), m.phase)
    factor = reference.unpack_lower(weights.factor, weights.num_features).float() * math.sqrt(weights.factor_scale)
    g = c @ weights.beta + weights.beta0
    v = (rounded(c) @ factor.T).square().sum(-1)
    u = reference.uncertainty(v, weights.amplitude)
    return torch.stack([g, v, u, g / u])


def bounds(hidden, weights):
    """The truth, and how far from it each quantity may be."""
    expected = truth(hidden, weights)
    allowed = 2 * (same_dtype(hidden, weights).double() - expected).abs().amax(1)
    # Each quantity as if all its terms had the size of the largest, in units of the additions behind it.
    additions = weights.hidden_size + weights.num_features
    sizes = torch.stack([weights.beta.norm().double(), *expected[1:].abs().amax(1)]) + expected.abs().amax(1)
    return expected, allowed + 4 * math.sqrt(additions) * 2.0**-24 * sizes


def check(got, hidden, weights, known=None, what=""):
    expected, allowed = known or bounds(hidden, weights)
    error = (got.double() - expected).abs().amax(1)
    assert bool((error <= allowed).all()), f"{what}: error {error.tolist()}, allowed {allowed.tolist()}"


def check_every_isa(hidden, make):
    """One truth for all instruction sets, and for each a head that it packs itself."""
    known = bounds(hidden, make())
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        weights = make()
        check(run(hidden, weights), hidden, weights, known, isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "d"), [(1, 1), (33, 65), (385, 129), (64, 1000), (1000, 33)])
def test_agrees_with_float64(dtype, h, d):
    check_every_isa(draw(129, h), lambda: make_head(h, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_features(dtype, kind):
    check_every_isa(draw(65, 100), lambda: make_head(100, 130, dtype, **KINDS[kind]))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_neither_on_its_batch_nor_on_threads_nor_on_the_run(isa, dtype):
    _cpu.set_isa(isa)
    weights, hidden = make_head(385, 200, dtype), draw(450, 385)  # 450 rows: more than one pass over the weights
    torch.set_num_threads(2)
    full = run(hidden, weights)
    assert torch.equal(full, run(hidden, weights))
    for rows in ROWS:
        assert torch.equal(full[:, 5 : 5 + rows], run(hidden[5 : 5 + rows], weights)), rows
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(full, run(hidden, weights)), threads


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype_and_strides_of_rows(isa, dtype):
    _cpu.set_isa(isa)
    weights, h = make_head(101, 70, torch.bfloat16), 101
    hidden = draw(20, h, dtype)
    expected = run(hidden.contiguous(), weights)
    wide = torch.full((40, 2 * h + 3), math.nan, dtype=dtype)
    wide[::2, 1 : 2 * h + 1 : 2] = hidden
    assert torch.equal(run(wide[::2, 1 : 2 * h + 1 : 2], weights), expected)  # both strides
    wide[:20, 3 : 3 + h] = hidden
    assert torch.equal(run(wide[:20, 3 : 3 + h], weights), expected)  # row stride, unaligned
    assert torch.equal(run(hidden.T.contiguous().T, weights), expected)  # transposed
    assert torch.equal(run(hidden[:1].expand(20, h), weights), expected[:, :1].expand(4, 20))  # row stride 0
    check(expected, hidden, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["folded", "tanh", "tanh + layernorm", "linear", "linear, layer, projected"])
def test_a_non_finite_row_spoils_itself_only(dtype, kind):
    for isa in AVAILABLE:
        _cpu.set_isa(isa)
        weights, hidden = make_head(100, 130, dtype, **KINDS[kind]), draw(14, 100)
        clean = run(hidden, weights)
        for row, value in ((0, math.nan), (6, math.inf), (13, -math.inf)):
            hidden[row, 99 - row] = value
        got, sick = run(hidden, weights), torch.tensor([0, 6, 13])
        assert not bool(got[:2, sick].isfinite().any()), isa
        healthy = [row for row in range(14) if row not in sick]
        assert torch.equal(got[:, healthy], clean[:, healthy]), isa


def test_a_bf16_head_loses_nothing_of_float32_rows_where_that_is_cheap():
    weights, hidden = make_head(100, 200, torch.bfloat16), draw(65, 100)
    error = (run(hidden, weights)[0].double() - truth(hidden, weights)[0]).abs().max()
    assert float(error) < 3e-4 * float(weights.beta.norm()) / 10  # one bf16 term: about 3e-3
    hidden = hidden.bfloat16()
    assert torch.equal(run(hidden, weights), run(hidden.float(), weights))


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("kind", ["folded", "tanh", "linear, layer, projected"])
def test_massive_activations_cost_a_bf16_head_nothing(isa, kind):
    """In 8 bits 1e5 is wrong by 200, where the other columns hold 1: such columns are multiplied in float32."""
    _cpu.set_isa(isa)
    for h, d in ((385, 129), (128, 600), (1000, 700)):
        weights = make_head(h, d, torch.bfloat16, **KINDS[kind])
        plain = draw(9, h, seed=4)
        hidden = plain.clone()
        hidden[::2, 3], hidden[1::2, 7], hidden[1::2, h - 1] = 1e5, 80.0, -3000.0
        error, usual = (float((run(x, weights)[0] - truth(x, weights)[0]).abs().max()) for x in (hidden, plain))
        first = weights.map.layer_weight if weights.map.projection is None else weights.map.projection
        assert first is not None
        # Phases of thousands of turns keep few digits in float32; what that costs the features adds up as noise does.
        turns = 2 * math.pi * 1e5 * float(first.float().abs().max()) * 2**-21 * float(weights.beta.norm())
        assert error <= 2 * usual + turns, (h, d)
        for row in range(3):  # alone as among others
            assert torch.equal(run(hidden[row : row + 1], weights)[0], run(hidden, weights)[0, row : row + 1])
        for strided in (hidden.double(), hidden.mT.contiguous().mT, hidden.repeat_interleave(2, 1)[:, ::2]):
            assert torch.equal(run(strided, weights), run(hidden, weights))


def test_input_scale_brings_massive_activations_into_range():
    weights = make_head(100, 130, torch.float16, input_scale=2.0**-7)
    hidden = draw(9, 100) * 2.0**7
    check(run(hidden, weights), hidden, weights)


def test_writes_all_of_out_and_nothing_else():
    weights, hidden = make_head(33, 65, torch.bfloat16), draw(7, 33)
    memory = torch.full((6, 7), 12345.0)
    cpu.score(hidden, weights, memory[1:5])
    assert bool((memory[0] == 12345).all())
    assert bool((memory[5] == 12345).all())
    assert torch.equal(memory[1:5], run(hidden, weights))


@pytest.mark.parametrize("isa", AVAILABLE)
def test_cosine_is_accurate_to_a_millionth(isa):
    _cpu.set_isa(isa)
    one = torch.ones(1, 1)
    feature_map = FeatureMap("rff", one, torch.zeros(1), None, None, "none", False, 1, 1, torch.float32)
    weights = HeadWeights.build(feature_map, torch.ones(1), 0.0, torch.eye(1), 1.0)
    turns = torch.cat([torch.linspace(-2, 2, 40001), torch.arange(-9, 10) / 4, torch.tensor([1e4 + 0.25, -3e6])])
    c = run(turns[:, None], weights)[0]
    assert float((c.double() - torch.cos(2 * math.pi * turns.double())).abs().max()) < 1e-6
    assert float(c.abs().max()) <= 1.0 + 2**-22


@pytest.mark.parametrize("isa", [isa for isa in AVAILABLE if isa != "scalar"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("size", [(1, 577), (33, 640), (300, 1030), (515, 900)], ids=str)
def test_a_row_alone_has_the_bits_it_has_among_others(isa, dtype, size):
    # Alone it may go through several panels at a time (csrc/cpu/streams.h), as many as the threads leave it.
    _cpu.set_isa(isa)
    h, d = size
    head = SNGPHead(h, num_features=d, length_scale=2 * math.sqrt(h))
    factor = torch.randn(d, d, generator=torch.Generator().manual_seed(h)).tril() / d + torch.eye(d)
    weights = HeadWeights.build(head.freeze_features(dtype), torch.ones(d), 0.1, factor.double(), 0.4)
    threads = torch.get_num_threads()
    for of_rows in (torch.float32, torch.bfloat16):
        hidden = draw(7, h, of_rows)
        together = run(hidden, weights)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                alone = torch.cat([run(row, weights) for row in hidden.split(1)], 1)
                assert torch.equal(alone, together)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_threads_that_meet_at_a_new_head_pack_it_once(monkeypatch, dtype):
    # A second packing would free the first under a kernel that still reads it.
    packed = []
    for name in ("_pack_map", "_pack_head"):
        pack = getattr(cpu_packing, name)

        def slow(weights, pack=pack, name=name):
            packed.append(name)
            time.sleep(0.05)
            return pack(weights)

        monkeypatch.setattr(cpu_packing, name, slow)
    head = SNGPHead(40, num_features=130, length_scale=8.0)
    weights = HeadWeights.build(head.freeze_features(dtype), torch.ones(130), 0.0, torch.eye(130).double(), 0.4)
    hidden, barrier = draw(5, 40), threading.Barrier(4)

    def first_call(_):
        barrier.wait()
        return run(hidden, weights)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(first_call, range(4)))
    assert sorted(packed) == ["_pack_head", "_pack_map"]
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0][1], ops.score(hidden, weights, backend="torch").variance, rtol=2e-2, atol=0)


def test_goes_through_ops_and_several_python_threads():
    weights, hidden = make_head(100, 130, torch.bfloat16), draw(200, 100)
    expected = torch.stack(ops.score(hidden, weights, backend="cpu"))
    assert torch.equal(expected, run(hidden, weights))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: run(hidden, weights), range(16)):
            assert torch.equal(got, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_runs_in_a_forked_child():
    weights, hidden = make_head(100, 130, torch.bfloat16), draw(20, 100)
    torch.set_num_threads(2)
    expected = run(hidden, weights)
    child = os.fork()
    if child == 0:
        out = torch.empty_like(expected)
        cpu.score(hidden, weights, out)
        os._exit(0 if out.numpy().tobytes() == expected.numpy().tobytes() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif("RMCORE_CPU_BUILD" in os.environ, reason="a new process has the kernels that are installed")
@pytest.mark.parametrize("wanted", [*AVAILABLE, "no-such-thing"])
def test_the_environment_lowers_the_instruction_set(wanted):
    code = "import sys; from rmcore import _cpu; assert 'torch' not in sys.modules; print(_cpu.isa())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "RMCORE_CPU_ISA": wanted}, capture_output=True, text=True
    )
    assert result.stdout.strip() == (wanted if wanted in AVAILABLE else _cpu.best_isa())


def test_bad_arguments_raise_instead_of_crashing():
    with pytest.raises(ValueError, match="isa"):
        _cpu.set_isa("sse9")
    head = cpu_packing.packed_head(make_head(33, 65, torch.float16))
    with pytest.raises(ValueError, match="dtype"):
        _cpu.score(head, 0, "int8", 0, 1, 1, 0, 1, 0, 0)
    with pytest.raises(ValueError, match="null pointer"):
        _cpu.score(head, 0, "float32", 1, 33, 1, 0, 1, 0, 0)
    x, out, memory = draw(1, 33), torch.empty(4, 1), torch.empty(1 << 18, dtype=torch.uint8)
    address = -(-memory.data_ptr() // 64) * 64
    with pytest.raises(ValueError, match="workspace: expected 64-byte alignment"):
        _cpu.score(head, x.data_ptr(), "float32", 1, 33, 1, out.data_ptr(), 1, address + 4, 1 << 17)


def test_says_why_it_cannot_run():
    assert cpu.unavailable("score", torch.device("cpu"), torch.bfloat16) is None
    assert "cuda" in str(cpu.unavailable("score", torch.device("cuda"), torch.bfloat16))
    assert "float64" in str(cpu.unavailable("score", torch.device("cpu"), torch.float64))
