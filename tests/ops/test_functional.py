"""Backend choice, and the operators under torch.compile (traced whole, with the eager results)."""

from __future__ import annotations

import gc

import pytest
import torch

from rmcore import ops
from rmcore._base.errors import BackendError, InputError
from rmcore.ops import reference
from rmcore.ops.weights import HeadWeights, from_handle

H, D = 24, 40  # of the ``weights`` fixture


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_score_under_compile_is_traced_whole_and_equals_eager(weights: HeadWeights, backend: str) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        scores = ops.score(x * 2, weights, backend=backend)  # type: ignore[arg-type]
        return scores.preference + scores.uncertainty

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for count in (5, 9):
        torch.testing.assert_close(compiled(rows(count)), run(rows(count)), rtol=0, atol=0)


def test_score_into_out_under_compile(weights: HeadWeights) -> None:
    out = torch.full((4, 6), torch.nan)
    torch.compile(lambda x: ops.score(x, weights, out=out).logit, fullgraph=True, backend="aot_eager")(rows(6))
    assert torch.equal(out, torch.stack(ops.score(rows(6), weights)))


def test_pair_variance_under_compile(weights: HeadWeights) -> None:
    sizes = torch.tensor([3, 1, 2])
    compiled = torch.compile(lambda x: ops.pair_variance(x, sizes, weights), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(rows(6)), ops.pair_variance(rows(6), sizes, weights), strict=True):
        assert torch.equal(got, expected)


def test_accumulate_under_compile_updates_in_place(weights: HeadWeights) -> None:
    labels, beta = torch.ones(6), torch.zeros(D)

    def run(precision: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return ops.accumulate(rows_, labels, weights.map, beta, precision=precision, gradient=gradient)

    rows_ = rows(6)
    eager = torch.zeros(D, D), torch.zeros(D)
    traced = torch.zeros(D, D), torch.zeros(D)
    expected = run(*eager)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*traced)
    assert torch.equal(got, expected)
    assert torch.equal(traced[0].tril(), eager[0].tril())
    assert torch.equal(traced[1], eager[1])
    assert float(eager[0].diagonal().min()) > 0


def test_power_iteration_under_compile() -> None:
    weight, vector = torch.randn(7, 5), torch.ones(5)
    compiled = torch.compile(lambda w, v: ops.power_iteration(w, v, 3), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(weight, vector), ops.power_iteration(weight, vector, 3), strict=True):
        assert torch.equal(got, expected)


def test_handles_die_with_their_weights(weights: HeadWeights) -> None:
    moved = weights.to("cpu")
    assert moved.handle != weights.handle
    assert from_handle(moved.handle) is moved
    handle = moved.handle
    del moved
    gc.collect()
    with pytest.raises(InputError, match="handle"):
        from_handle(handle)


def test_float64_rows_are_scored_in_float64(weights: HeadWeights) -> None:
    x = rows(5).double()
    truth = reference.logit(weights.map(x), weights.beta.double(), weights.beta0)
    assert torch.equal(ops.score(x, weights).logit, truth.float())


def test_explain_names_the_choice_and_the_reasons() -> None:
    told = ops.explain("score", "cpu")
    assert told.backend in ("cpu", "torch")
    assert ops.explain("score", "cpu", backend="torch") == ops.Explanation("torch", {})
    refused = ops.explain("score", "cpu", backend="cuda")
    assert refused.backend == "none"
    assert refused.reasons["cuda"]


def test_a_named_backend_that_cannot_run_raises_and_says_why(weights: HeadWeights) -> None:
    with pytest.raises(BackendError, match="'cuda', which cannot run score here: "):
        ops.score(rows(2), weights, backend="cuda")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda w: ops.score(torch.zeros(2, H + 1), w), "hidden: got shape"),
        (lambda w: ops.score(torch.zeros(H), w), "hidden: got shape"),
        (lambda w: ops.score(torch.zeros(2, H, dtype=torch.int64), w), "floating-point"),
        (lambda w: ops.score([[0.0] * H], w), "hidden: got list"),
        (lambda w: ops.score(torch.zeros(2, H), w, out=torch.zeros(4, 3)), "out: got"),
        (lambda w: ops.score(torch.zeros(2, H), w, out=torch.zeros(2, 4).mT), "out: got"),
        (lambda w: ops.score(torch.zeros(2, H), w, backend="abacus"), "backend: got 'abacus'"),
        (lambda w: ops.pair_variance(torch.zeros(3, H), torch.tensor([2, 2]), w), "group_sizes"),
        (lambda w: ops.pair_variance(torch.zeros(3, H), torch.tensor([4, -1]), w), "group_sizes"),
        (lambda w: ops.pair_variance(torch.zeros(3, H), torch.tensor([3.0]), w), "group_sizes"),
        (lambda w: ops.power_iteration(torch.zeros(3), torch.zeros(3)), "weight: got shape"),
        (lambda w: ops.power_iteration(torch.zeros(3, 2), torch.zeros(3)), "vector: got shape"),
        (lambda w: ops.power_iteration(torch.ones(3, 2), torch.ones(2), 0), "iterations"),
        (lambda w: ops.explain("multiply"), "op: got 'multiply'"),
    ],
)
def test_bad_arguments_are_named(weights: HeadWeights, call: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        call(weights)  # type: ignore[operator]


def test_pair_indices_out_of_range_change_nothing(weights: HeadWeights) -> None:
    precision, gradient = torch.zeros(D, D), torch.zeros(D)
    with pytest.raises(InputError, match=r"pairs: got indices 0\.\.9"):
        ops.accumulate(
            rows(3),
            torch.ones(1),
            weights.map,
            torch.zeros(D),
            precision=precision,
            gradient=gradient,
            pairs=torch.tensor([[0, 9]]),
        )
    assert not precision.any()
    assert not gradient.any()
