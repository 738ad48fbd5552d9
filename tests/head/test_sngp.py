"""The trainable head: its spectral norm, its gradients, its configuration; training mode and eval mode."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.head import HeadConfig, SNGPHead
from rmcore.ops import reference


def rows(n=40, h=24, seed=1):
    return torch.randn(n, h, generator=torch.Generator().manual_seed(seed))


def layered(h=24, m=16, size=3.0, **config):
    """A head whose W has σ = size, well over its bound."""
    head = SNGPHead(h, num_features=32, layer_size=m, length_scale=4.0, **config)
    with torch.no_grad():
        head.weight.mul_(size / reference.spectral_norm(head.weight))
        head.beta.normal_(generator=torch.Generator().manual_seed(5))
    return head


def norm(w):
    w = w.detach().double()
    return float(torch.linalg.eigvalsh(w @ w.mT)[-1].sqrt())  # much faster than an SVD, and as good for the largest


def test_forward_is_the_formula():
    head = layered(mode="concat").double().eval()
    with torch.no_grad():
        head.bias.normal_()
        head.beta0.fill_(0.25)
    x = rows().double()
    sigma = (head.weight @ head.right_vector).norm()
    z = reference.normalized_layer(x, reference.spectral_normalize(head.weight, 0.95, sigma), head.bias)
    phi = reference.random_fourier_features(z, head.omega, head.b, length_scale=4.0)
    torch.testing.assert_close(head(x), phi @ head.beta + 0.25)
    torch.testing.assert_close(head.features(x), phi)


def test_the_effective_norm_comes_down_to_the_bound_as_steps_go_by():
    """One power step a forward is loose at first, from above, and tightens: 3 → about 1 → 0.95."""
    head = layered().train()
    effective = []
    for _ in range(60):
        head(rows())
        sigma = (head.weight.detach() @ head.right_vector).norm()
        effective.append(norm(reference.spectral_normalize(head.weight, 0.95, sigma)))
    assert effective[0] > 0.95 * 1.01
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(effective))
    assert effective[-1] == pytest.approx(0.95, rel=1e-2)


@pytest.mark.parametrize("shape", [(16, 24), (520, 600)])  # by SVD, and by power iteration to convergence
def test_a_frozen_norm_is_converged_where_one_step_is_loose(shape):
    head = layered(h=shape[1], m=shape[0]).train()
    head(rows(4, shape[1]))  # one training step
    loose = reference.spectral_normalize(head.weight, 0.95, (head.weight @ head.right_vector).norm())
    assert norm(loose) > 0.95 * 1.01
    assert norm(head.normalized_weight(converged=True)) <= 0.95 * (1 + 1e-5)
    assert norm(head.normalized_weight(converged=True)) >= 0.95 * (1 - 1e-5)


def test_a_frozen_tanh_layer_is_under_its_bound():
    head = layered(activation="tanh").train()
    head(rows())
    assert norm(head.freeze_features(torch.float32).layer_weight) <= 0.95 * (1 + 1e-5)
    # rounding entries to fp16 changes W by at most 2^-11 of its Frobenius norm
    w = head.freeze_features(torch.float16).layer_weight.double()
    assert norm(w) <= 0.95 + float(w.norm()) * 2**-11


def test_a_layer_under_its_bound_is_left_alone():
    head = layered(size=0.5)
    assert torch.equal(head.normalized_weight(converged=True), head.weight)
    assert torch.equal(head.train().normalized_weight(), head.weight)


def test_gradients_reach_w_bias_and_beta_but_not_sigma():
    head = layered().double().train()
    x = rows().double()
    # What one training step will take for σ, computed beside it and held constant.
    sigma = (head.weight.detach() @ head.right_vector).norm()
    weight = head.weight.detach().clone().requires_grad_()
    z = x @ (weight * (0.95 / sigma)).mT + head.bias.detach()
    phi = reference.random_fourier_features(z, head.omega, head.b, length_scale=4.0)
    (phi @ head.beta.detach()).sum().backward()
    head(x).sum().backward()
    torch.testing.assert_close(head.weight.grad, weight.grad)
    assert bool(head.weight.grad.any())
    assert bool(head.bias.grad.any())
    torch.testing.assert_close(head.beta.grad, phi.detach().sum(0))
    assert head.beta0.grad is None  # cancels in difference mode


def test_autograd_agrees_with_finite_differences():
    head = layered(activation="tanh", layernorm=True).double().eval()
    assert torch.autograd.gradcheck(head, rows(3).double().requires_grad_(), atol=1e-6)


def test_eval_changes_no_state():
    head = layered().eval()
    before = {name: t.clone() for name, t in head.state_dict().items()}
    for _ in range(3):
        head(rows())
    head.freeze_features(torch.float16, calibration=rows())
    head.normalized_weight(converged=True)
    assert all(torch.equal(t, before[name]) for name, t in head.state_dict().items())
    head.train()(rows())
    assert not torch.equal(head.right_vector, before["right_vector"])


def test_a_state_dict_restores_a_head():
    head, other = layered(), SNGPHead(24, num_features=32, layer_size=16, seed=9)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.eval()(rows()), head.eval()(rows()))


def test_beta0_is_trained_in_concat_mode_alone():
    assert layered(mode="concat").beta0.requires_grad
    assert not layered(mode="difference").beta0.requires_grad


# -- length-scale ----------------------------------------------------------------------------------------------------


def test_the_length_scale_is_the_median_distance_of_the_training_rows():
    x = rows(101)
    head = SNGPHead(24, num_features=8)
    scale = head.set_length_scale(x)
    truth = torch.nn.functional.pdist(x.double()).median()
    assert scale == pytest.approx(float(truth), rel=1e-6)
    assert float(head.length_scale) == scale
    doubled = SNGPHead(24, num_features=8, length_scale_factor=2.0)
    assert doubled.set_length_scale(x) == pytest.approx(2 * scale, rel=1e-12)


@pytest.mark.parametrize("h", [16, 256, 1024])
def test_the_length_scale_follows_the_hidden_size(h):
    assert SNGPHead(h, num_features=8).set_length_scale(rows(200, h)) == pytest.approx(math.sqrt(2 * h), rel=0.15)


def test_the_length_scale_is_taken_behind_the_layer():
    head = layered(size=10.0, layernorm=True)
    x = rows(100)
    z = head.hidden_to_z(x, converged=True)
    assert head.set_length_scale(x) == pytest.approx(float(torch.pdist(z.detach().double()).median()), rel=1e-5)


def test_there_is_no_scoring_before_a_length_scale():
    head = SNGPHead(24, num_features=8)
    for call in (lambda: head(rows()), lambda: head.freeze_features(torch.float32)):
        with pytest.raises(InputError, match=r"^length_scale: got none yet"):
            call()
    assert SNGPHead(24, features="linear")(rows()).shape == (40,)


def test_equal_rows_have_no_length_scale():
    with pytest.raises(InputError, match=r"^hidden: got rows that are all equal"):
        SNGPHead(24, num_features=8).set_length_scale(torch.ones(10, 24))
    with pytest.raises(NonFiniteError, match=r"^hidden: .*1 of 40 rows \(3\)"):
        SNGPHead(24, num_features=8).set_length_scale(rows().index_fill(0, torch.tensor([3]), math.nan))


# -- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 2.5),
        ("num_features", 0),
        ("layer_size", -1),
        ("mode", "both"),
        ("features", "poly"),
        ("activation", "relu"),
        ("likelihood", "probit"),
        ("norm_bound", 0.0),
        ("ridge", -1.0),
        ("ridge", math.inf),
        ("kernel_scale", math.nan),
        ("length_scale", 0.0),
        ("length_scale_factor", 0.0),
        ("amplitude", -0.1),
    ],
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(InputError, match=f"^{name}: got "):
        HeadConfig(**({"hidden_size": 8} | {name: value}))


def test_activation_needs_a_layer():
    for setting in ({"activation": "tanh"}, {"layernorm": True}):
        with pytest.raises(InputError, match="layer_size is None"):
            HeadConfig(8, **setting)


def test_a_configuration_survives_its_dictionary():
    config = HeadConfig(8, num_features=5, layer_size=3, activation="tanh", amplitude=0.5, seed=7)
    assert HeadConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match=r"unknown keys \['colour'\]"):
        HeadConfig.from_dict(config.to_dict() | {"colour": 1})


def test_linear_heads_have_as_many_features_as_z_has():
    assert HeadConfig(8, features="linear").num_features == 8
    assert HeadConfig(8, features="linear", layer_size=3, num_features=99).num_features == 3


def test_the_amplitude_defaults_to_the_mean_field_value():
    assert HeadConfig(8, kernel_scale=3.0).resolved_amplitude == math.pi / 8  # κ² is already in v
    assert HeadConfig(8, amplitude=0.0).resolved_amplitude == 0
