"""Attribute heads are scored by the kernel: what it gives is what the modules give, and always of today's weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.head.attributes import (
    AttributeConfig,
    AttributeEnsemble,
    AttributeHead,
    GateConfig,
    ensemble,
    head,
    serving,
)

H = 20
GATES = {
    "fixed": None,
    "selu": GateConfig("selu", dropout=0.5),
    "softmax": GateConfig("softmax", depth=1, width=12, temperature=0.5),
}


def made(gate: str, seed: int = 0, spread: Any = "normal") -> AttributeHead:
    return AttributeHead(AttributeConfig(H, spread=spread, quantiles=5, gate=GATES[gate]), seed=seed).eval()


def rows(count: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", ["normal", "quantiles"])
@pytest.mark.parametrize("gate", GATES)
def test_scores_are_those_of_the_module(gate, spread):
    one, x = made(gate, spread=spread), rows()
    prompts = None if gate == "fixed" else rows(seed=1)
    found = one.scores(x, prompts)
    with torch.no_grad():
        outputs, weights = one.outputs(x).double(), one.attribute_weights(x, prompts).double()
        reward = one(x, prompts).double()
    assert torch.allclose(found.attributes, one.means_of(outputs), atol=1e-6)
    assert torch.allclose(found.attribute_weights, weights, atol=1e-6)
    assert torch.allclose((found.attributes * found.attribute_weights).sum(1), reward, atol=1e-5)
    spreads = found.attribute_std if spread == "normal" else found.quantiles
    assert spreads is not None
    assert torch.allclose(spreads, outputs[..., 1].exp() if spread == "normal" else outputs, atol=1e-6)
    for dtype, close in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        assert torch.allclose(one.scores(x, prompts, dtype=dtype).attributes, found.attributes, atol=close)
    assert found.attributes.dtype == one.double().scores(x, prompts).attributes.dtype == torch.float64
    one.train()  # scoring is no training: no dropout
    assert torch.allclose(one.scores(x, prompts).attribute_weights, weights, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_an_ensemble_of_one_form_is_one_call_over_the_states(gate, monkeypatch):
    calls = []
    called = ensemble.score_attributes
    for module in (ensemble, head):
        monkeypatch.setattr(module, "score_attributes", lambda *a, **k: (calls.append(1), called(*a, **k))[1])
    heads = [made(gate, seed) for seed in range(3)]
    together = AttributeEnsemble(heads).scores(rows())
    assert len(calls) == 1
    for member, one in zip(together.members, heads, strict=True):
        alone = one.scores(rows())
        assert torch.equal(member.attributes, alone.attributes)
        assert torch.equal(member.attribute_weights, alone.attribute_weights)
    assert together.rewards.shape == (3, 9)


def test_heads_of_several_forms_are_scored_one_by_one():
    heads = [made("fixed"), made("selu", 1), made("softmax", 2)]
    together = AttributeEnsemble(heads).scores(rows())
    for member, one in zip(together.members, heads, strict=True):
        assert torch.equal(member.attributes, one.scores(rows()).attributes)
    assert not serving.alike([made("softmax"), AttributeHead(AttributeConfig(H, gate=GateConfig("softmax", 1, 12)))])


def test_weights_are_packed_once_and_anew_when_one_has_changed():
    one, x = made("selu"), rows()
    before = one.scores(x)
    packed = serving.weights_of(one, [one])
    assert serving.weights_of(one, [one]) is packed
    with torch.no_grad():
        one.value.weight.mul_(2)
    assert torch.allclose(one.scores(x).attributes, 2 * before.attributes)
    one.load_state_dict(made("selu", 7).state_dict())
    assert torch.equal(one.scores(x).attributes, made("selu", 7).scores(x).attributes)
    one.value.weight.data = made("selu").value.weight.data  # no version counter tells of this one
    assert torch.equal(one.scores(x).attributes, before.attributes)
    other = copy.deepcopy(one)
    assert torch.equal(other.scores(x).attributes, before.attributes)
    with torch.inference_mode():
        fresh = made("selu")
        assert torch.equal(fresh.scores(x).attributes, before.attributes)


def test_states_that_do_not_fit_are_refused():
    both = AttributeEnsemble([made("fixed"), made("fixed", 1)])
    for scored in (made("fixed"), both):
        with pytest.raises(InputError, match="gate_hidden: got states"):
            scored.scores(rows(), rows())
        with pytest.raises(InputError, match="hidden: got shape"):
            scored.scores(rows()[:, 1:])
    gated = AttributeEnsemble([made("selu"), made("selu", 1)])
    with pytest.raises(InputError, match="gate_hidden: got 4 rows"):
        gated.scores(rows(), rows(4))
