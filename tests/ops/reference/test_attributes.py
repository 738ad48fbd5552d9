"""Multi-attribute heads: the formula of ``score_attributes`` against the modules that are trained, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.attribute_checks import ATTRIBUTE_HEADS, make_heads

from rmcore import ops
from rmcore._base.errors import InputError
from rmcore.ops.attribute_weights import AttributeWeights, reference_scores, summarize


@pytest.mark.parametrize("kind", ATTRIBUTE_HEADS)
def test_the_formula_head_by_head_and_number_by_number(kind):
    heads = make_heads(6, torch.float64, **ATTRIBUTE_HEADS[kind])
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    summary, outputs, weights = reference_scores(x, heads)
    for n in range(3):
        rewards, variances, norms = [], [], []
        for m in range(heads.members):
            z = x[n]
            for layer, bias in zip(heads.layers, heads.biases, strict=True):
                z = layer[m] @ z + bias[m]
                z = z.relu() if heads.softmax else torch.selu(z)
            if heads.last is None or heads.last_bias is None:
                assert heads.fixed is not None
                w = heads.fixed[m]
            else:
                w = heads.last[m] @ z + heads.last_bias[m]
            if heads.softmax:
                assert heads.scale is not None
                w = torch.softmax(w / heads.temperature, 0) * heads.scale[m]
            o = (heads.value[m] @ x[n]).view(heads.attributes, heads.per)
            if heads.spread == "normal":
                rewards.append(float(w @ o[:, 0]))
                variances.append(float((w**2) @ (2 * o[:, 1]).exp()))
                norms.append(math.sqrt(float((4 * o[:, 1]).exp().sum())))
            else:
                score = w @ o
                rewards.append(float(score.mean()))
                variances.append(float(score.var(correction=0)))
                norms.append(math.nan)
            assert torch.allclose(outputs[n, m], o.flatten())
            assert torch.allclose(weights[n, m], w)
        found = torch.tensor(rewards, dtype=torch.float64)
        spread = float(found.var()) if heads.members > 1 else 0.0
        want = [
            float(found.mean()),
            sum(variances) / len(variances),
            spread,
            float(found.max() - found.min()),
            max(norms),
        ]
        assert summary[:, n].tolist() == pytest.approx(want, nan_ok=True)
    assert torch.equal(summarize(outputs, weights, heads.spread).nan_to_num(), summary.nan_to_num())


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_function_gives_views_of_one_result(backend: Any):
    heads = make_heads(16, torch.float16, members=3, widths=(20, 20))
    x = torch.randn(5, 16)
    found = ops.score_attributes(x, heads, backend=backend)
    assert all(part.shape == (5,) for part in found[:5])
    assert len({part.untyped_storage().data_ptr() for part in found[:5]}) == 1
    assert (
        ops.score_attributes(x.double(), heads, backend=backend).mean.dtype == torch.float64
    )  # by torch, which keeps it
    compiled = torch.compile(
        lambda x: ops.score_attributes(x, heads, backend=backend).gap, fullgraph=True, backend="aot_eager"
    )
    assert torch.allclose(compiled(x), found.gap)
    many = torch.randn(5000, 16)  # torch takes runs of 4,096
    assert torch.allclose(
        ops.score_attributes(many, heads, backend=backend).mean[4990:],
        ops.score_attributes(many[4990:], heads, backend=backend).mean,
        atol=1e-5,
    )


def test_heads_move_and_are_copied():
    heads = make_heads(8, torch.bfloat16, members=2, widths=(4,), softmax=True)
    other = heads.clone().to("cpu")
    assert torch.equal(other.layers[0], heads.layers[0])
    assert other.layers[0].data_ptr() != heads.layers[0].data_ptr()
    assert heads.nbytes() == 2 * (2 * 10 * 8 + 2 * 4 * 8) + 4 * (2 * 4 + 2 * 5 * 4 + 2 * 5 + 2)
    assert other.handle != heads.handle


VALUE = torch.ones(1, 4, 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AttributeWeights.build(VALUE), "fixed: got weights beside a gate, or neither"),
        (lambda: AttributeWeights.build(VALUE, fixed=torch.ones(1, 3)), r"fixed: got \(1, 3\), expected cont"),
        (lambda: AttributeWeights.build(VALUE, per=3, fixed=torch.ones(1, 2)), "spread: got 'normal' with 3 outputs"),
        (lambda: AttributeWeights.build(VALUE[:, :3], fixed=torch.ones(1, 2)), r"value: got shape \(1, 3, 3\)"),
        (lambda: AttributeWeights.build(VALUE, last=torch.ones(1, 2, 3), last_bias=torch.ones(1, 2)), "layers: got 0"),
        (
            lambda: AttributeWeights.build(
                VALUE, layers=(torch.ones(1, 5, 4),), biases=(torch.ones(1, 5),), last=torch.ones(1, 2, 5),
                last_bias=torch.ones(1, 2),
            ),
            r"layers\[0\]: got \(1, 5, 4\), expected contiguous \(1, 5, 3\)",
        ),
        (lambda: AttributeWeights.build(VALUE * 1e6, fixed=torch.ones(1, 2), dtype=torch.float16), "value: got a val"),
        (lambda: AttributeWeights.build(VALUE, fixed=torch.full((1, 2), torch.nan)), "fixed: got a value"),
    ],
)  # fmt: skip
def test_heads_whose_parts_do_not_fit_are_refused(make, says):
    with pytest.raises(InputError, match=f"^{says}"):
        make()


def test_rows_that_do_not_fit_are_refused():
    gated, fixed = make_heads(4, torch.float32, widths=(3,)), make_heads(4, torch.float32)
    x = torch.ones(2, 4)
    for arguments, says in (
        ((x[:, :3], gated, None), r"hidden: got shape \(2, 3\)"),
        ((x.long(), gated, None), "hidden: got torch.int64"),
        ((x, gated, x[:1]), "gate_hidden: got 1 rows"),
        ((x, gated, x.half()), "gate_hidden: got 2 rows of torch.float16"),
        ((x, fixed, x), "gate_hidden: got states, expected None: the heads have no gate"),
    ):
        with pytest.raises(InputError, match=f"^{says}"):
            ops.score_attributes(arguments[0], arguments[1], gate_hidden=arguments[2])
