"""The formulas against torch's own, autograd and Monte Carlo, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal
from torch.nn import functional

from rmcore._base.errors import InputError
from rmcore.head.attributes.losses import (
    bradley_terry,
    gaussian_nll,
    pinball,
    purm_logit,
    quantile_levels,
    sampled_mse,
)

NAN = math.nan
LABELS = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, NAN], [4.0, 0.0, 2.0]], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_likelihood_is_torchs_where_there_are_labels():
    mean, log_std = drawn(3, 3), drawn(3, 3, seed=1)
    known = ~LABELS.isnan()
    expected = -Normal(mean, log_std.exp()).log_prob(LABELS.nan_to_num())[known].sum() / 2  # two rows have labels
    torch.testing.assert_close(gaussian_nll(mean, log_std, LABELS), expected)


def test_gradients_are_right_and_a_missing_label_gives_none():
    mean, log_std, noise = (drawn(3, 3, seed=s).requires_grad_(s < 2) for s in range(3))
    assert torch.autograd.gradcheck(lambda m, s: gaussian_nll(m, s, LABELS), (mean, log_std))
    assert torch.autograd.gradcheck(lambda m, s: sampled_mse(m, s, LABELS, noise), (mean, log_std))
    quantiles = drawn(3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: pinball(q, LABELS), quantiles)
    (slope,) = torch.autograd.grad(gaussian_nll(mean, log_std, LABELS), mean)
    assert bool((slope[LABELS.isnan()] == 0).all())
    assert bool((slope[~LABELS.isnan()] != 0).all())


def test_the_sampled_regression_is_the_squared_error_and_the_variance():
    mean, log_std, labels = drawn(1, 3), 0.3 * drawn(1, 3, seed=1), LABELS[2:]
    a, b, c = (x.expand(200_000, 3) for x in (mean, log_std, labels))
    found = sampled_mse(a, b, c, drawn(200_000, 3, seed=2))
    expected = (mean - labels).square().sum() + log_std.exp().square().sum()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_pinball_is_least_at_the_quantiles():
    levels = quantile_levels(3)
    assert levels.tolist() == [0.25, 0.5, 0.75]
    labels = drawn(20_001, 1)
    found = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([found], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = pinball(found.expand(len(labels), 1, 3), labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(found.detach(), labels[:, 0].quantile(levels), rtol=0, atol=0.01)


def test_purms_closed_form_is_near_the_integral():
    nodes = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = (-0.5 * nodes.square()).exp()
    density /= density.sum()
    for difference in (-3.0, -0.5, 0.0, 1.0, 4.0):
        for variance in (0.01, 0.5, 2.0, 20.0):
            integral = (density * torch.sigmoid(difference + variance**0.5 * nodes)).sum()
            closed = purm_logit(torch.tensor(difference), torch.tensor(variance)).sigmoid().double()
            torch.testing.assert_close(closed, integral, rtol=0, atol=0.02)


def test_bradley_terry_on_a_sampled_reward_drives_sigma_to_nothing():
    """The paper's argument against it: softplus is convex, so any spread costs, whatever the difference."""
    nodes = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    density = (-0.5 * nodes.square()).exp()
    density /= density.sum()
    for difference in (-2.0, 0.0, 3.0):
        log_std = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([log_std], lr=0.2)
        for _ in range(120):
            loss = bradley_terry(difference + log_std.exp() * nodes, density)
            optimiser.zero_grad()
            loss.backward()
            assert log_std.grad is not None
            assert float(log_std.grad) > 0
            optimiser.step()
        assert float(log_std.detach().exp()) < 0.05
        torch.testing.assert_close(
            bradley_terry(torch.tensor([difference])), functional.softplus(torch.tensor(-difference))
        )


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="one shape"):
        gaussian_nll(drawn(3, 2), drawn(3, 2), LABELS)
    with pytest.raises(InputError, match="noise"):
        sampled_mse(drawn(3, 3), drawn(3, 3), LABELS, drawn(1, 3))
    with pytest.raises(InputError, match="quantiles"):
        pinball(drawn(3, 3), LABELS)
