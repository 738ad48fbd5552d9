"""The boundary of the operations: what is checked, what an output tensor may be, which backend and why."""

from __future__ import annotations

import pytest
import torch

from rmcore import ops
from rmcore._base.errors import BackendError, InputError


@pytest.fixture(scope="module")
def head(make_data, fit_head):
    return fit_head(make_data(), num_features=32)


def test_an_output_tensor_receives_the_scores(head, make_data):
    x = make_data(dtype=torch.float32).hidden
    out = torch.full((4, 300), float("nan"))
    scores = ops.score(x, head.weights, out=out, backend="torch")
    assert bool(out.isfinite().all())
    assert scores.logit.data_ptr() == out.data_ptr()
    for a, b in zip(scores, ops.score(x, head.weights, backend="torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hidden", {"hidden": torch.zeros(3, 15)}),
        ("hidden", {"hidden": torch.zeros(16)}),
        ("hidden", {"hidden": torch.zeros(3, 16, dtype=torch.int64)}),
        ("hidden", {"hidden": [[0.0] * 16]}),
        ("out", {"out": torch.empty(4, 2)}),
        ("out", {"out": torch.empty(4, 3, dtype=torch.float64)}),
        ("out", {"out": torch.empty(3, 4).mT}),
        ("backend", {"backend": "opencl"}),
    ],
)
def test_score_names_what_does_not_fit(head, name, arguments):
    with pytest.raises(InputError, match=f"^{name}: got .*, expected "):
        ops.score(**({"hidden": torch.zeros(3, 16), "weights": head.weights} | arguments))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("labels", {"labels": torch.zeros(4)}),
        ("beta", {"beta": torch.zeros(31)}),
        ("gradient", {"gradient": torch.zeros(33)}),
        ("precision", {"precision": torch.zeros(32, 31)}),
        ("precision", {"precision": torch.zeros(32, 32, dtype=torch.float16)}),
        ("sample_weight", {"sample_weight": torch.ones(1)}),
        ("pairs", {"pairs": torch.tensor([[0, 1], [1, 2], [0, 5]])}),
        ("pairs", {"pairs": torch.tensor([[0, 1], [1, 2], [0, -1]])}),
        ("pairs", {"pairs": torch.zeros(3, 2)}),
        ("pairs", {"pairs": torch.zeros(3, 3, dtype=torch.int64)}),
        ("hidden", {"hidden": torch.zeros(3, 17)}),
    ],
)
def test_accumulate_names_what_does_not_fit(head, name, arguments):
    precision, gradient = torch.zeros(32, 32), torch.zeros(32)
    given = {
        "hidden": torch.zeros(5 if "pairs" in arguments else 3, 16),
        "labels": torch.zeros(3),
        "feature_map": head.feature_map,
        "beta": torch.zeros(32),
        "precision": precision,
        "gradient": gradient,
    }
    with pytest.raises(InputError, match=f"^{name}: got .*, expected "):
        ops.accumulate(**(given | arguments))
    assert not precision.any()
    assert not gradient.any()


def test_accumulate_adds_to_what_is_there(head, make_data):
    data = make_data()
    arguments = {"pairs": data.pairs, "backend": "torch"}
    once, twice = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    slope, slopes = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    ops.accumulate(data.hidden, data.labels, head.feature_map, head.beta, precision=once, gradient=slope, **arguments)
    for _ in range(2):
        ops.accumulate(data.hidden, data.labels, head.feature_map, head.beta, precision=twice, gradient=slopes,
                       **arguments)  # fmt: skip
    torch.testing.assert_close(twice.tril(), 2 * once.tril())
    torch.testing.assert_close(slopes, 2 * slope)


def test_accumulate_takes_no_data(head):
    precision, gradient = torch.zeros(32, 32), torch.zeros(32)
    total = ops.accumulate(torch.zeros(0, 16), torch.zeros(0), head.feature_map, torch.zeros(32), precision=precision,
                           gradient=gradient)  # fmt: skip
    assert float(total) == 0
    assert total.dtype == torch.float64
    assert not precision.any()


def test_more_rows_than_a_chunk_are_all_taken(head):
    x = torch.randn(9000, 16, generator=torch.Generator().manual_seed(0))
    whole = ops.score(x, head.weights, backend="torch")
    for start in (0, 4095, 4096, 8191, 8192, 8999):
        one = ops.score(x[start : start + 1], head.weights, backend="torch")
        # a matrix product may sum one row in another order: 48 float32 products
        torch.testing.assert_close(whole.variance[start : start + 1], one.variance, rtol=1e-4, atol=1e-7)
    pairs = torch.stack([torch.arange(9000), torch.arange(9000).flip(0)], dim=1)
    precision, gradient = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    ops.accumulate(x.double(), torch.ones(9000), head.feature_map, torch.zeros(32), precision=precision,
                   gradient=gradient, pairs=pairs, backend="torch")  # fmt: skip
    phi = head.feature_map(x.double()) * head.feature_map.feature_scale
    delta = phi - phi.flip(0)
    torch.testing.assert_close(precision.tril(), (delta.mT @ delta / 4).tril())


@pytest.mark.parametrize(
    "sizes", [torch.tensor([2, 2]), torch.tensor([4, -1]), torch.tensor([3.0]), torch.tensor([[3]]),
              torch.tensor([3], dtype=torch.int32)]
)  # fmt: skip
def test_group_sizes_must_add_up(head, sizes):
    with pytest.raises(InputError, match=r"^group_sizes: got .*, expected "):
        ops.pair_variance(torch.zeros(3, 16), sizes, head.weights)


def test_no_pairs_are_no_results(head):
    for sizes in ([], [0], [1], [0, 1, 0]):
        g, v = ops.pair_variance(torch.zeros(sum(sizes), 16), torch.tensor(sizes, dtype=torch.int64), head.weights)
        assert g.shape == v.shape == (0,)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_zero_start_of_power_iteration_is_never_an_answer(backend):
    """Looking for zeros would make the host wait for the device, so the result says it instead."""
    sigma, _ = ops.power_iteration(torch.ones(2, 3), torch.zeros(3), backend=backend)
    assert not bool(sigma.isfinite())


def test_explain_says_who_and_why():
    assert ops.explain("score", backend="torch").backend == "torch"
    explanation = ops.explain("score")
    assert explanation.backend in ("cuda", "triton", "cpu", "torch")
    assert all(explanation.reasons.values())
    assert f"{explanation.backend}: chosen" in str(explanation)
    with pytest.raises(InputError, match=r"^op: got 'fly'"):
        ops.explain("fly")
    with pytest.raises(InputError, match=r"^backend: got 'tpu'"):
        ops.explain("score", backend="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_explains_a_gpu_where_there_is_none(dtype):
    found = ops.explain("score", "cuda", dtype)
    assert found.backend == "torch"
    assert set(found.reasons) == {"cuda", "triton"}


def test_a_named_backend_that_cannot_run_says_why(head):
    if ops.explain("score", backend="cuda").backend == "cuda":
        pytest.skip("it can")
    with pytest.raises(BackendError, match=r"^backend: got 'cuda', which cannot run score here: "):
        ops.score(torch.zeros(3, 16), head.weights, backend="cuda")


@pytest.mark.parametrize(
    ("op", "dtype", "rows", "first"),
    [
        ("score", torch.float16, 16, "cuda"),
        ("score", torch.float16, 17, "triton"),
        ("score", torch.bfloat16, 4096, "triton"),
        ("score", torch.float16, None, "cuda"),
        ("power_iteration", torch.float16, None, "triton"),
        ("power_iteration", torch.float32, None, "cuda"),
        ("accumulate", torch.float16, 65536, "cuda"),
    ],
)
def test_what_was_measured_on_a_gpu_says_who_is_tried_first(op, dtype, rows, first):
    from rmcore.ops.dispatch import _order

    order = _order(op, torch.device("cuda"), dtype, rows)
    assert order[0] == first
    assert sorted(order) == ["cuda", "torch", "triton"]
    assert _order(op, torch.device("cpu"), dtype, rows) == ("cpu", "torch")
