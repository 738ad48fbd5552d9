"""Training from cached states: what each objective does to means, spread and gate, and the ensemble's two measures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.head.attributes import (
    AttributeConfig,
    AttributeEnsemble,
    AttributeHead,
    FitOptions,
    GateConfig,
    PairStates,
    fit_attributes,
    fit_ensemble,
    fit_gate,
    fit_pairs,
)

H = 12
NAMES = ("helpfulness", "correctness")
CONFIG = AttributeConfig(H, NAMES)
QUICK = FitOptions(steps=400, batch_size=128, lr=3e-2)


def states(rows: int, seed: int = 0, width: int = H) -> Tensor:
    """With a constant entry, as the heads have no bias."""
    found = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    found[:, 0] = 1.0
    return found


def labelled(hidden: Tensor, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, means, σ): the second attribute is noisier, the first one's σ grows with a state's entry."""
    mean = torch.stack([2 + hidden[:, 1], 2 - 0.5 * hidden[:, 2]], 1)
    std = torch.stack([(-1 + 0.4 * hidden[:, 3]).exp(), torch.full((len(hidden),), 0.8)], 1)
    return mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)), mean, std


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = states(4000)
    return (hidden, *labelled(hidden))


def test_the_likelihood_keeps_sigma_and_the_regression_does_not(data):
    hidden, labels, mean, std = data
    partly = labels.clone()
    partly[::3, 0] = math.nan
    kept, lost = AttributeHead(CONFIG), AttributeHead(CONFIG)
    fit_attributes(kept, hidden, partly, options=QUICK)
    fit_attributes(lost, hidden, partly, objective="regression", options=QUICK)
    found, collapsed = kept.scores(hidden), lost.scores(hidden)
    assert found.attribute_std is not None
    assert collapsed.attribute_std is not None
    assert float((found.attributes - mean).abs().mean()) < 0.1
    assert float((found.attribute_std / std).log().abs().mean()) < 0.1
    assert float((collapsed.attributes - mean).abs().mean()) < 0.15
    assert float(collapsed.attribute_std.mean()) < 0.15 * float(std.mean())
    torch.testing.assert_close(found.aleatoric, found.attribute_std.square().sum(1))
    torch.testing.assert_close(found.score_variance, 0.25 * found.attribute_std.square().sum(1))  # weights of ½


def test_scaled_states_give_the_same_head(data):
    hidden, labels, _, _ = data
    one, other = AttributeHead(CONFIG), AttributeHead(CONFIG, state_scale=100.0)
    short = FitOptions(steps=50)
    fit_attributes(one, hidden, labels, options=short)
    fit_attributes(other, 100 * hidden, labels, options=short)
    torch.testing.assert_close(one(hidden), other(100 * hidden), rtol=1e-3, atol=1e-3)


def test_quantiles_are_those_of_the_labels(data):
    hidden, labels, _, _ = data
    head = AttributeHead(AttributeConfig(H, NAMES, spread="quantiles", quantiles=3))
    fit_attributes(head, hidden, labels, options=QUICK)
    found = head.scores(hidden)
    assert found.quantiles is not None
    share = (labels[..., None] <= found.quantiles).double().mean(0)
    torch.testing.assert_close(share, torch.tensor([[0.25, 0.5, 0.75]] * 2, dtype=torch.float64), rtol=0, atol=0.03)
    assert found.attribute_std is None
    with pytest.raises(InputError, match="pinball"):
        fit_attributes(head, hidden, labels, objective="mle")


@pytest.mark.parametrize("kind", ["selu", "softmax"])
def test_a_gate_starts_at_its_prior_and_learns_which_attribute_counts(data, kind):
    """Where a state's entry is positive the first attribute decides, elsewhere the second; the values stay frozen."""
    hidden, labels, mean, _ = data
    gate = GateConfig(kind, depth=1, width=32, temperature=1.0, dropout=0.1 if kind == "softmax" else 0.0)
    head = AttributeHead(AttributeConfig(H, NAMES, weights=(0.3, 0.7), gate=gate))
    fit_attributes(head, hidden, labels, options=QUICK)
    weights = head.attribute_weights(hidden[:5])
    torch.testing.assert_close(weights, torch.tensor([[0.3, 0.7]]).expand(5, 2))
    other = states(4000, seed=5)
    other[:, 4] = hidden[:, 4]
    first = hidden[:, 4] > 0
    difference = mean - labelled(other)[1]
    better = torch.where(first, difference[:, 0], difference[:, 1]) > 0
    chosen, rejected = (torch.where(better[:, None], *sides) for sides in ((hidden, other), (other, hidden)))
    before = head.value.weight.clone()
    pairs = PairStates(chosen, rejected, hidden if kind == "softmax" else None)
    accuracy = float((head(chosen, pairs.gate) > head(rejected, pairs.gate)).double().mean())
    fit_gate(head, pairs, options=FitOptions(steps=300, lr=1e-2))
    assert torch.equal(before, head.value.weight)
    learned = float((head(chosen, pairs.gate) > head(rejected, pairs.gate)).double().mean())
    assert learned > max(0.9, accuracy + 0.1)
    weights = head.attribute_weights(hidden).detach()
    assert (
        float((weights[first, 0] - weights[first, 1]).mean())
        > 0
        > float((weights[~first, 0] - weights[~first, 1]).mean())
    )


def test_purm_learns_means_from_pairs_alone():
    head = AttributeHead(AttributeConfig(H, ("reward",), weights=(1.0,)))
    sides = states(2000, seed=3), states(2000, seed=4)
    wins = torch.sigmoid(4 * (sides[0][:, 1] - sides[1][:, 1])) > torch.rand(
        2000, generator=torch.Generator().manual_seed(0)
    )
    chosen, rejected = torch.where(wins[:, None], *sides), torch.where(wins[:, None], *sides[::-1])
    assert fit_pairs(head, PairStates(chosen, rejected), options=QUICK) < 0.45
    assert float(torch.corrcoef(torch.stack([head(sides[0]).detach(), sides[0][:, 1]]))[0, 1]) > 0.95


def test_an_ensemble_is_less_sure_away_from_its_data():
    """States of training lie in half of the directions; the others are as long."""
    hidden, away = states(2000, width=24), states(500, seed=7, width=24)
    labels = labelled(hidden)[0]
    hidden[:, 12:], away[:, 1:12] = 0, 0
    away[:, 1:] *= (11 / 12) ** 0.5
    ensemble = fit_ensemble(AttributeConfig(24, NAMES), hidden, labels, size=3, options=QUICK)
    near, far = ensemble.scores(hidden), ensemble.scores(away)
    assert float(far.gap.mean()) > 2 * float(near.gap.mean())
    for measure in ("gap", "covariance"):
        assert float(far.uncertainty(measure).mean()) > 1.2 * float(near.uncertainty(measure).mean())
    assert float(far.epistemic.mean()) > 10 * float(near.epistemic.mean())
    # by hand: every pair of members, every member's whole covariance matrix
    rewards = [head(away).double() for head in ensemble.heads]
    gaps = torch.stack([(a - b).abs() for a in rewards for b in rewards]).amax(0)
    torch.testing.assert_close(far.gap, gaps.detach(), rtol=1e-5, atol=1e-5)
    stds = [member.attribute_std for member in far.members]
    norms = [torch.linalg.matrix_norm(torch.diag_embed(std.square())) for std in stds if std is not None]
    torch.testing.assert_close(far.covariance_norm, torch.stack(norms).amax(0))
    torch.testing.assert_close(far.penalised(0.5), far.mean - 0.5 * far.gap)
    cut = float(near.gap.quantile(0.95))
    assert float(near.kept(cut).double().mean()) > 0.9 > 0.5 > float(far.kept(cut).double().mean())
    both = near.kept_pairs(torch.tensor([[0, 1], [2, 2]]), float(near.gap[:2].amax()))
    assert both.tolist() == [True, bool(near.gap[2] <= near.gap[:2].amax())]
    again = fit_ensemble(AttributeConfig(24, NAMES), hidden, labels, size=3, options=QUICK)
    assert torch.equal(again.scores(away).rewards, far.rewards)


def test_what_cannot_be_trained_is_refused(data):
    hidden, labels, _, _ = data
    head, nothing = AttributeHead(CONFIG), labels.clone()
    nothing[:, 1] = math.nan
    for bad, message in ((nothing, "correctness"), (labels[:, :1], "labels"), (labels / 0, "infinite")):
        with pytest.raises(InputError, match=message):
            fit_attributes(head, hidden, bad)
    spoiled = hidden.clone()
    spoiled[3] = math.inf
    with pytest.raises(NonFiniteError):
        fit_attributes(head, spoiled, labels)
    with pytest.raises(InputError, match="gate"):
        fit_gate(head, PairStates(hidden, hidden))
    with pytest.raises(InputError, match="at least 2"):
        AttributeEnsemble([head])
    with pytest.raises(InputError, match="positive weights"):
        AttributeHead(AttributeConfig(H, NAMES, weights=(-1.0, 1.0), gate=GateConfig("softmax")))


def test_wide_states_are_learnt_in_few_steps():
    """Means start at a ridge regression, also where labels are missing, and σ stays what it is."""
    hidden, fresh = states(3000, width=150), states(500, seed=9, width=150)
    labels = labelled(hidden)[0]
    labels[::4, 0] = math.nan
    head = AttributeHead(AttributeConfig(150, NAMES))
    fit_attributes(head, hidden, labels, options=FitOptions(steps=300))
    found, (_, mean, std) = head.scores(fresh), labelled(fresh)
    assert found.attribute_std is not None
    assert float((found.attributes - mean).abs().mean()) < 0.2
    assert 0.7 < float(found.attribute_std[:, 1].mean() / std[:, 1].mean()) < 1.3
