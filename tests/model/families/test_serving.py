"""Gated heads of published models by the kernel: what it gives is what their layers give, and it says when not."""

from __future__ import annotations

import math

import pytest
import torch
from support.attribute_checks import GATED, check_scores, published_head
from support.families import LAYOUTS

from rmcore import RewardModel
from rmcore.model.families.head import RewardHead
from rmcore.model.families.registry import family_of
from rmcore.model.families.serving import no_kernel
from rmcore.ops.backends import cpu
from rmcore.ops.backends import torch as plain

CPU = torch.device("cpu")
H = 48


def states(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 2, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_module(head: RewardHead, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return head.full_rows(x).detach()


def exact(family: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In float64 on the tensors as ``dtype`` holds them."""
    held = published_head(family, H).to(CPU, dtype)
    head = published_head(family, H).to(CPU, torch.float64)
    for mine, theirs in ((head._layers, held._layers), (head._gate, held._gate)):
        mine[:] = [layer.to(CPU, torch.float64) for layer in theirs]
    head._last = held._last.to(CPU, torch.float64)
    head.dtype = torch.float64
    if held._transform is not None:
        head._transform = held._transform.double()
    if held._gate_scale is not None:
        head._gate_scale = held._gate_scale.double()
    return by_module(head, x.double()).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", GATED)
def test_rows_are_those_of_the_layers(family, dtype):
    """Features to the bit; score and weights no further from float64 than twice what the layers one by one are."""
    head, x = published_head(family, H).to(CPU, dtype), states(64, dtype)
    assert head.explain(64).backend == "cpu"
    with torch.no_grad():
        found = head.full_rows(x).double()
    own, true = by_module(head, x).double(), exact(family, x, dtype)
    assert found.shape == own.shape == (64, head.full_width)
    assert torch.equal(found[:, :H], own[:, :H])
    error, theirs = (float((rows - true)[:, H:].abs().max()) for rows in (found, own))
    assert error <= 2 * theirs + 1e-5
    assert float(true[:, H:].abs().max()) > 0.5


@pytest.mark.parametrize("family", GATED)
def test_the_cpus_and_torchs_kernels_are_held_to_truth(family):
    for dtype in (torch.float32, torch.bfloat16):
        head, x = published_head(family, H).to(CPU, dtype), states(20, seed=1)
        gate = None if family == "urm-gated" else x[:, 1].contiguous()
        for backend in (cpu, plain):
            check_scores(backend, x[:, 0].contiguous(), head._kernel(), gate)


@pytest.mark.parametrize("family", GATED)
def test_gradients_go_through_the_layers(family):
    head, x = published_head(family, H), states(3).requires_grad_()
    head.rows(x)[:, -1].sum().backward()
    assert x.grad is not None
    assert bool((x.grad[:, 0].abs().sum(1) > 0).all())
    with torch.no_grad():
        torch.testing.assert_close(head.rows(x), head.rows(x.detach()), rtol=0, atol=0)


def test_a_row_that_is_not_finite_stays_alone_and_is_no_number():
    head, x = published_head("qrm", H), states(6)
    x[2, 1, 5] = math.inf
    with torch.no_grad():
        found, others = head.rows(x)[:, -1], head.rows(states(6))[:, -1]
    assert found.isnan().tolist() == [False, False, True, False, False, False]
    keep = torch.arange(6) != 2
    torch.testing.assert_close(found[keep], others[keep], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("urm", "linear in its last layer's input"),
        ("inf-orm", "linear in its last layer's input"),
        ("ldl", "attributes are not linear in one state"),
    ],
)
def test_who_has_no_kernel_says_why(family, why, tmp_path):
    model = RewardModel.from_pretrained(LAYOUTS[family].make().write(tmp_path / family), device="cpu")
    told = model.backbone.explain_head()
    assert told.backend == "module"
    assert why in told.reasons["score_attributes"]


def test_a_models_backbone_tells_whose_kernel_it_is(tmp_path, make_backbone):
    model = RewardModel.from_pretrained(LAYOUTS["armorm"].make().write(tmp_path / "armorm"), device="cpu")
    assert model.backbone.explain_head(4).backend == "cpu"
    told = make_backbone("llama").explain_head()
    assert (told.backend, told.reasons) == ("none", {"score_attributes": "no published head behind the states"})
    head = published_head("urm-gated", H).to(CPU, torch.float64)
    assert head.explain().backend == "torch"
    assert "float64" in head.explain().reasons["cpu"]


def test_gates_of_other_layers_have_no_kernel():
    head, spec = published_head("armorm", H), family_of("armorm").head
    assert spec is not None
    assert no_kernel(spec, [], head._last, head._gate, softmax=True) is None
    assert "selu" in str(no_kernel(spec, [], head._last, head._gate, softmax=False))
    assert "one state" in str(no_kernel(spec, head._gate[:1], head._last, head._gate, softmax=True))
    assert "relu" in str(no_kernel(spec, [], head._last, head._gate[-1:], softmax=True))
