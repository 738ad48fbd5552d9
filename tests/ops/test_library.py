"""The registered operators: schemas that come from the tasks, and torch's own checks of each."""

from __future__ import annotations

import pytest
import torch

from rmcore import ops
from rmcore._base.errors import InputError
from rmcore.ops.library import OPERATIONS
from rmcore.ops.weights import HeadWeights

H, D = 24, 40  # of the ``weights`` fixture


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(2))


HEADS = ops.AttributeWeights.build(
    torch.randn(2, 6, H, generator=torch.Generator().manual_seed(3)),
    layers=(torch.randn(2, 7, H, generator=torch.Generator().manual_seed(4)),), biases=(torch.zeros(2, 7),),
    last=torch.ones(2, 3, 7), last_bias=torch.zeros(2, 3),
)  # fmt: skip


def arguments(op: str, weights: HeadWeights, backend: str) -> tuple[object, ...]:
    sums = torch.zeros(D, D), torch.zeros(D)
    pairs = torch.tensor([[0, 1], [2, 0], [4, 3]])
    return {
        "score": (rows(5), weights.handle, torch.empty(4, 5), backend),
        "accumulate": (rows(5), torch.ones(5), weights.map.handle, torch.zeros(D), *sums,
                       None, None, 0.0, "logistic", backend),
        "accumulate of pairs": (rows(5), torch.ones(3), weights.map.handle, torch.zeros(D), *sums,
                                pairs, torch.ones(3), 0.5, "gaussian", backend),
        "pair_variance": (rows(6), torch.tensor([3, 1, 2]), weights.handle, backend),
        "power_iteration": (torch.randn(4, 3), torch.ones(3), 2, backend),
        "score_attributes": (rows(5), HEADS.handle, None, backend),
        "score_attributes with prompts": (rows(5), HEADS.handle, rows(5) + 1, backend),
    }[op]  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(
    "op",
    [
        "score", "accumulate", "accumulate of pairs", "pair_variance", "power_iteration", "score_attributes",
        "score_attributes with prompts",
    ],
)  # fmt: skip
def test_every_operator_passes_torchs_own_checks(weights: HeadWeights, op: str, backend: str) -> None:
    """Schema, autograd registration, fake tensors, and AOT dispatch with dynamic (and data-dependent) shapes."""
    operator = OPERATIONS[op.split()[0]].operator
    report = torch.library.opcheck(operator, arguments(op, weights, backend))
    assert set(report) == {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }
    assert set(report.values()) == {"SUCCESS"}


def test_the_registry_holds_every_operation() -> None:
    assert tuple(OPERATIONS) == ops.OPS
    for operation in OPERATIONS.values():
        assert operation.operator is getattr(torch.ops.rmcore, operation.operator_name).default


@pytest.mark.parametrize(
    ("op", "schema"),
    [
        ("score", "rmcore::score_out(Tensor hidden, int weights, Tensor(a!) out, str backend) -> ()"),
        ("accumulate",
         "rmcore::accumulate(Tensor hidden, Tensor labels, int feature_map, Tensor beta, Tensor(a!) precision, "
         "Tensor(b!) gradient, Tensor? pairs, Tensor? sample_weight, float beta0, str likelihood, str backend) "
         "-> Tensor"),
        ("pair_variance",
         "rmcore::pair_variance(Tensor hidden, Tensor group_sizes, int weights, str backend) -> (Tensor, Tensor)"),
        ("power_iteration",
         "rmcore::power_iteration(Tensor weight, Tensor vector, int iterations, str backend) -> (Tensor, Tensor)"),
        ("score_attributes",
         "rmcore::score_attributes(Tensor hidden, int weights, Tensor? gate_hidden, str backend) "
         "-> (Tensor, Tensor, Tensor)"),
    ],
)  # fmt: skip
def test_a_tasks_fields_are_its_operators_signature(op: str, schema: str) -> None:
    assert str(OPERATIONS[op].operator._schema) == schema


def test_operators_give_what_the_functions_give(weights: HeadWeights) -> None:
    out = torch.empty(4, 5)
    OPERATIONS["score"].operator(rows(5), weights.handle, out, "torch")
    assert torch.equal(out, torch.stack(ops.score(rows(5), weights, backend="torch")))
    sizes = torch.tensor([3, 1, 2])
    got = OPERATIONS["pair_variance"].operator(rows(6), sizes, weights.handle, "torch")
    for a, b in zip(got, ops.pair_variance(rows(6), sizes, weights, backend="torch"), strict=True):
        assert torch.equal(a, b)


def test_the_handle_must_be_of_a_head(weights: HeadWeights) -> None:
    with pytest.raises(InputError, match=r"^handle: got \d+, of a FeatureMap"):
        OPERATIONS["score"].operator(rows(5), weights.map.handle, torch.empty(4, 5), "torch")
    with pytest.raises(
        InputError, match=r"^handle: got \d+, of a HeadWeights, expected the handle of AttributeWeights"
    ):
        OPERATIONS["score_attributes"].operator(rows(5), weights.handle, None, "torch")


def test_an_unchanged_vector_comes_back_in_memory_of_its_own() -> None:
    vector = torch.tensor([1.0, 0.0])
    _, right = OPERATIONS["power_iteration"].operator(torch.zeros(3, 2), vector, 1, "torch")
    assert torch.equal(right, vector)
    assert right.data_ptr() != vector.data_ptr()


def test_two_results_in_one_tensor_come_back_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cuda backend makes them, in one allocation."""
    both = torch.arange(3.0)
    monkeypatch.setattr("rmcore.ops.backends.torch.power_iteration", lambda *_: (both[2], both[:2]))
    sigma, right = OPERATIONS["power_iteration"].operator(torch.zeros(3, 2), torch.ones(2), 1, "torch")
    assert float(sigma) == 2
    assert torch.equal(right, torch.tensor([0.0, 1.0]))
    assert sigma.storage_offset() == right.storage_offset() == 0
    assert len({t.untyped_storage().data_ptr() for t in (both, sigma, right)}) == 3
