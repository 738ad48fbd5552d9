"""URM and URME behind the protocol: what they learn, the law of total variance, and the parts of a variance by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rmcore._base.errors import InputError
from rmcore.head import HeadConfig
from rmcore.head.attributes import URM_WEIGHTS, AttributeConfig, AttributeHead, FitOptions, GateConfig, PairStates
from rmcore.head.attributes.losses import bradley_terry
from rmcore.head.attributes.optimise import split_rows
from rmcore.head.estimators import (
    SNGP,
    URM,
    URME,
    AttributeLabels,
    Laplace,
    SNGPWithURM,
    load_estimator,
    of_kind,
    save_estimator,
)
from rmcore.head.estimators.combined import _common_unit
from rmcore.head.estimators.samples import sampled_estimate
from rmcore.ops.reference import difference_variance

WIDTH = 6


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def heads() -> list[AttributeHead]:
    config = AttributeConfig(WIDTH, weights=URM_WEIGHTS, gate=GateConfig(width=5))
    found = [AttributeHead(config, seed=seed).double().eval() for seed in range(3)]
    for head in found:
        assert head.gate is not None
        torch.nn.init.normal_(head.gate.linear_layers[-1].weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return found


def test_the_total_variance_is_that_of_draws_of_member_and_answers(heads):
    """Draw a member, then each answer's attributes by that member's means and σ: Monte Carlo of the mixture."""
    rows, draws = drawn(2, WIDTH), 400_000
    found = URME(heads).pairs(rows, torch.tensor([2]))
    assert found.epistemic is not None
    assert found.aleatoric is not None
    torch.testing.assert_close(found.variance, found.epistemic + found.aleatoric)
    means, stds, weights = [], [], []
    for head in heads:
        said = head.scores(rows)
        assert said.attribute_std is not None
        means.append(said.attributes)
        stds.append(said.attribute_std)
        weights.append(said.attribute_weights)
    which = torch.randint(3, (draws,), generator=torch.Generator().manual_seed(2))
    mean, std, weight = (torch.stack(column)[which] for column in (means, stds, weights))  # (draws, 2, A)
    reward = (weight * (mean + std * drawn(draws, 2, mean.shape[2], seed=3))).sum(2)
    logit = reward[:, 0] - reward[:, 1]
    assert float(found.logit[0]) == pytest.approx(float(logit.mean()), abs=5 * float(logit.std()) / draws**0.5)
    assert float(found.variance[0]) == pytest.approx(float(logit.var()), rel=0.02)
    p = float(torch.sigmoid(logit).mean())
    assert float(torch.sigmoid(found.preference[0])) == pytest.approx(p, abs=0.02)  # the probit form's own error


def test_one_head_tells_the_aleatoric_part_and_equal_members_have_no_epistemic_one(heads):
    rows, sizes = drawn(5, WIDTH, seed=4), torch.tensor([3, 2])
    one, same = URM(heads[:1]), URME([heads[0], heads[0]])
    found, twice = one.pairs(rows, sizes), same.pairs(rows, sizes)
    assert (one.kind, same.kind) == ("aleatoric", "total")
    assert found.epistemic is None
    assert twice.epistemic is not None
    assert float(twice.epistemic.abs().max()) < 1e-12
    for name in ("logit", "variance", "preference", "aleatoric"):
        torch.testing.assert_close(getattr(found, name), getattr(twice, name))
    noise = heads[0].scores(rows).score_variance
    assert noise is not None
    torch.testing.assert_close(found.variance[0], noise[0] + noise[1])
    # any combination of a group's scores: answers are apart, so Σ a² n
    v = torch.zeros(3, 3, dtype=torch.float64)
    v[0, 1], v[0, 2], v[1, 2] = found.variance[:3]
    a = torch.tensor([1.0, -0.5, -0.5], dtype=torch.float64)
    torch.testing.assert_close(difference_variance(v + v.T, a[None])[0], (a.square() * noise[:3]).sum())


def test_the_part_of_a_variance_is_asked_for_by_name(heads):
    rows, sizes = drawn(4, WIDTH, seed=5), torch.tensor([4])
    urme = URME(heads).pairs(rows, sizes)
    for kind, part in (("epistemic", urme.epistemic), ("aleatoric", urme.aleatoric)):
        found = of_kind(urme, kind, "total", "urme")
        assert found.variance is part
        torch.testing.assert_close(found.preference, urme.logit / (1 + math.pi / 8 * part).sqrt())
    assert of_kind(urme, "total", "total", "urme") is urme
    with pytest.raises(InputError, match=r"'epistemic' of 'urm'.*aleatoric"):
        of_kind(URM(heads[:1]).pairs(rows, sizes), "epistemic", "aleatoric", "urm")
    laplace = Laplace(drawn(WIDTH), torch.eye(WIDTH), 1.0).pairs(rows, sizes)
    with pytest.raises(InputError, match=r"'total' of 'laplace'.*epistemic"):
        of_kind(laplace, "total", "epistemic", "laplace")
    with pytest.raises(InputError, match="'all'"):
        of_kind(laplace, "all", "epistemic", "laplace")  # type: ignore[arg-type]


def test_samples_without_noise_have_no_aleatoric_part_and_zero_noise_changes_nothing():
    rewards, sizes = drawn(4, 3, seed=6), torch.tensor([4])
    plain, still = sampled_estimate(rewards, sizes), sampled_estimate(rewards, sizes, torch.zeros(4, 3))
    assert plain.aleatoric is None
    for name in ("logit", "variance", "preference", "information", "epistemic"):
        assert torch.equal(getattr(plain, name), getattr(still, name))


def test_it_learns_from_attribute_labels_and_pairs_or_from_pairs_alone():
    hidden = torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(7))
    hidden[:, 0] = 1.0
    labels = torch.stack([2 + hidden[:, 1], 2 - hidden[:, 2]], 1)
    labels += torch.tensor([0.3, 0.9]) * torch.randn(600, 2, generator=torch.Generator().manual_seed(8))
    pairs = torch.arange(600).view(300, 2)
    wins = (labels[pairs[:, 0], 0] > labels[pairs[:, 1], 0]).float()
    said = AttributeLabels(("first", "second"), hidden, labels)
    quick = FitOptions(steps=200, lr=1e-2)
    taught = URM.fit(hidden, wins, pairs, attributes=said, gate=GateConfig(width=8), options=quick, gate_options=quick)
    alone = URME.fit(hidden, wins, pairs, members=2, options=quick)
    rows = hidden[pairs].flatten(0, 1)
    for estimator, least in ((taught, 0.85), (alone, 0.85)):
        found = estimator.pairs(rows, torch.full((300,), 2))
        assert float(((found.logit > 0) == (wins > 0.5)).double().mean()) > least
    std = taught.attributes(hidden).attribute_std
    assert std is not None
    assert float(std[:, 0].median()) < 0.5 < float(std[:, 1].median()) < 1.5
    assert [head.config.names for head in (*taught.heads, *alone.heads)] == [("first", "second"), *[("reward",)] * 2]
    with pytest.raises(InputError, match="members"):
        URME.fit(hidden, wins, pairs, members=1)
    with pytest.raises(InputError, match="urme"):
        URM(alone.heads)


def test_a_fractional_label_is_both_orders_by_its_weight():
    hidden, pairs = drawn(6, 3), torch.tensor([[0, 1], [2, 3], [4, 5]])
    labels = torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64)
    states, w = PairStates.of_labels(hidden, labels, pairs), drawn(3, seed=9)
    found = bradley_terry((states.chosen - states.rejected) @ w, states.weight)
    logit = (hidden[pairs[:, 0]] - hidden[pairs[:, 1]]) @ w
    torch.testing.assert_close(found, torch.nn.functional.binary_cross_entropy_with_logits(logit, labels))
    hard = PairStates.of_labels(hidden, labels.round(), pairs)
    assert hard.weight is None
    assert torch.equal(hard.chosen, hidden[[1, 2, 4]])
    with pytest.raises(InputError, match="weight"):
        PairStates(hidden, hidden, weight=torch.zeros(6))


def test_pairs_that_share_rows_are_held_out_together():
    pairs = torch.tensor([[0, 1], [2, 3], [1, 4], [5, 6], [6, 3]])
    states = PairStates.of_labels(drawn(7, 3), torch.ones(5, dtype=torch.float64), pairs)
    assert states.group is not None
    number = states.group.tolist()
    assert number[0] == number[2]
    assert number[1] == number[3] == number[4]
    assert number[0] != number[1]
    group = torch.arange(40) // 4
    held, rest = split_rows(40, FitOptions(holdout=0.25), group)
    assert sorted([*held.tolist(), *rest.tolist()]) == list(range(40))
    assert len(held) == 8
    assert not set(group[held].tolist()) & set(group[rest].tolist())
    with pytest.raises(InputError, match="group"):
        PairStates(drawn(3, 2), drawn(3, 2), group=torch.zeros(3))


# -- SNGP and URM in one ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def combined(heads) -> SNGPWithURM:
    rows, pairs = drawn(60, WIDTH, seed=6), torch.arange(60).view(30, 2)
    labels = (rows[pairs[:, 0], 0] > rows[pairs[:, 1], 0]).double()
    config = HeadConfig(WIDTH, num_features=16, amplitude=0.7)
    head = copy.deepcopy(heads[0]).float()  # as it is stored
    return SNGPWithURM(SNGP.fit(rows, labels, pairs, config=config, dtype=torch.float32), URM([head]), 0.5)


def test_both_parts_are_those_of_the_two_and_the_variance_their_sum(combined):
    rows, sizes = drawn(5, WIDTH, seed=7), torch.tensor([3, 2])
    found, own = combined.pairs(rows, sizes), combined.sngp.pairs(rows, sizes)
    noise = combined.urm.heads[0].scores(rows).score_variance
    assert torch.equal(found.logit, own.logit)
    in_logits = own.variance * 0.7 / (math.pi / 8)
    torch.testing.assert_close(found.epistemic, in_logits)
    torch.testing.assert_close(found.aleatoric[:2], 0.25 * torch.stack([noise[0] + noise[1], noise[0] + noise[2]]))
    torch.testing.assert_close(found.variance, found.epistemic + found.aleatoric)
    torch.testing.assert_close(found.preference, found.logit / (1 + math.pi / 8 * found.variance).sqrt())
    epistemic = of_kind(found, "epistemic", "total", "sngp-urm")
    torch.testing.assert_close(epistemic.preference, own.preference)  # the head's own, to rounding
    assert torch.equal(of_kind(found, "aleatoric", "total", "sngp-urm").variance, found.aleatoric)
    y = combined.deviations(rows)
    torch.testing.assert_close((y[0] - y[1]).square().sum(), found.epistemic[0], rtol=1e-5, atol=0)


def test_verdicts_teach_the_head_and_leave_the_spread(combined, tmp_path):
    save_estimator(combined, tmp_path / "it")
    loaded = load_estimator(tmp_path / "it")
    assert isinstance(loaded, SNGPWithURM)
    rows, sizes = drawn(4, WIDTH, seed=8), torch.tensor([4])
    before = loaded.pairs(rows, sizes)
    for name in ("logit", "variance", "preference", "epistemic", "aleatoric"):
        assert torch.equal(getattr(before, name), getattr(combined.pairs(rows, sizes), name))
    loaded.update(rows.repeat(20, 1), torch.ones(20), torch.arange(80).view(40, 2)[::2])
    after = loaded.pairs(rows, sizes)
    assert bool((after.epistemic < before.epistemic).all())
    assert torch.equal(after.aleatoric, before.aleatoric)


def test_the_common_unit_gives_rewards_the_size_of_the_heads_logits(combined):
    """Also where the reward orders every pair, which would want an infinite one of most likelihood."""
    rows, pairs = drawn(40, WIDTH, seed=9), torch.arange(40).view(20, 2)
    c = _common_unit(combined.sngp, combined.urm, rows, pairs)
    g = combined.sngp.pairs(rows, torch.full((20,), 2)).logit
    reward = combined.urm.rewards(rows)
    d = reward[pairs[:, 0]] - reward[pairs[:, 1]]
    assert c == pytest.approx(float(g.square().mean().sqrt() / d.square().mean().sqrt()))
    same = _common_unit(combined.sngp, combined.urm, torch.ones(4, WIDTH).double(), torch.arange(4).view(2, 2))
    assert same == 1.0


def test_parts_that_do_not_fit_together_are_refused(combined):
    other = AttributeHead(AttributeConfig(WIDTH + 1)).eval()
    with pytest.raises(InputError, match="urm: got width 7"):
        SNGPWithURM(combined.sngp, URM([other]))
    with pytest.raises(InputError, match="scale: got 0"):
        SNGPWithURM(combined.sngp, combined.urm, 0.0)
