"""The estimators against their definitions, in float64 where they are exact."""

import math

import pytest
import torch

from rmcore._base.errors import CheckpointError, InputError, NonFiniteError
from rmcore.head import HeadConfig
from rmcore.head.attributes import FitOptions
from rmcore.head.estimators import ESTIMATORS, Dropout, Ensemble, estimator_named, load_estimator, save_estimator
from rmcore.head.estimators.laplace import Laplace, LaplaceDiagonal, LaplaceKronecker, log_evidence
from rmcore.head.estimators.samples import sampled_estimate

WIDTH, COUNT = 7, 60
SMALL = {
    "sngp": {"config": HeadConfig(WIDTH, num_features=32), "dtype": torch.float32},
    "dropout": {"layers": (8,), "masks": 16, "epochs": 3},
    "ensemble": {"layers": (8,), "members": 3, "epochs": 3},
    "urm": {"options": FitOptions(steps=40)},
    "urme": {"options": FitOptions(steps=40)},
}


def _equal(one, other):
    columns = [(*found[:-1], *(found.measures or {}).values()) for found in (one, other)]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*columns, strict=True))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2 * COUNT, WIDTH, generator=generator, dtype=torch.float64)
    pairs = torch.randperm(2 * COUNT, generator=generator).view(COUNT, 2)
    truth = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.sigmoid((hidden[pairs[:, 0]] - hidden[pairs[:, 1]]) @ truth)
    labels[::3] = labels[::3].round()
    return hidden, labels, pairs


@pytest.fixture(scope="module")
def fitted(data):
    return {name: kind.fit(*data, **SMALL.get(name, {})) for name, kind in ESTIMATORS.items()}


def _differences(data):
    hidden, _, pairs = data
    return hidden[pairs[:, 0]] - hidden[pairs[:, 1]]


def _loss(beta, data, ridge):
    g = _differences(data) @ beta
    likelihood = torch.nn.functional.binary_cross_entropy_with_logits(g, data[1], reduction="sum")
    return likelihood + 0.5 * ridge * beta @ beta


# -- Laplace ---------------------------------------------------------------------------------------------------------


def test_laplace_is_the_curvature_that_autograd_finds_at_a_point_without_slope(data):
    found = Laplace.fit(*data, ridge=0.7)
    slope = torch.autograd.functional.jacobian(lambda b: _loss(b, data, 0.7), found.beta)
    hessian = torch.autograd.functional.hessian(lambda b: _loss(b, data, 0.7), found.beta)
    assert slope.abs().max() < 1e-6
    torch.testing.assert_close(found.factor.mT @ found.factor, torch.linalg.inv(hessian), rtol=1e-9, atol=1e-12)
    rows, delta = data[0][:4], data[0][0] - data[0][1]
    estimate = found.pairs(rows, torch.tensor([4]))
    v = delta @ torch.linalg.solve(hessian, delta)
    torch.testing.assert_close(estimate.variance[0], v, rtol=1e-9, atol=0)
    assert float(estimate.logit[0]) == pytest.approx(float(delta @ found.beta), rel=1e-12)
    assert float(estimate.preference[0]) == pytest.approx(float(delta @ found.beta / (1 + math.pi / 8 * v).sqrt()))


def test_kronecker_and_diagonal_are_their_definitions_at_the_same_weights(data):
    full, kron, diag = (kind.fit(*data, ridge=0.7) for kind in (Laplace, LaplaceKronecker, LaplaceDiagonal))
    assert torch.equal(full.beta, kron.beta)
    assert torch.equal(full.beta, diag.beta)
    delta = _differences(data)
    p = torch.sigmoid(delta @ full.beta)
    of_kron = (p * (1 - p)).mean() * delta.mT @ delta + 0.7 * torch.eye(WIDTH)
    torch.testing.assert_close(kron.factor.mT @ kron.factor, torch.linalg.inv(of_kron))
    hessian = torch.autograd.functional.hessian(lambda b: _loss(b, data, 0.7), full.beta)
    torch.testing.assert_close(diag.factor**2, 1 / hessian.diagonal())
    one = data[0][0] - data[0][1]
    torch.testing.assert_close(diag.pairs(data[0][:2], torch.tensor([2])).variance[0], (one**2 / hessian.diag()).sum())


def test_the_prior_precision_has_most_evidence(data):
    found, delta = Laplace.fit(*data), _differences(data)
    best = log_evidence(delta, data[1], found.ridge)
    for factor in (0.01, 0.5, 2.0, 100.0):
        assert log_evidence(delta, data[1], factor * found.ridge) < best
    # and is the integral that it stands for: one weight, by quadrature
    narrow, w = delta[:, :1], torch.linspace(-30, 30, 20001, dtype=torch.float64)
    g = narrow * w
    inside = data[1][:, None] * torch.nn.functional.logsigmoid(g)
    inside = (inside + (1 - data[1][:, None]) * torch.nn.functional.logsigmoid(-g)).sum(0)
    prior = 0.5 * math.log(2.0 / (2 * math.pi)) - w**2
    exact = float((inside + prior).exp().sum().log() + math.log(float(w[1] - w[0])))
    assert log_evidence(narrow, data[1], 2.0) == pytest.approx(exact, abs=0.02)


def test_an_update_is_exact_for_one_pair(data):
    hidden, labels, pairs = data
    for row in (0, 1):  # a hard and a fractional label
        known = Laplace.fit(hidden, labels[10:], pairs[10:], ridge=0.7)
        mean, precision = known.beta.clone(), torch.linalg.inv(known.factor.mT @ known.factor)
        known.update(hidden, labels[row : row + 1], pairs[row : row + 1])
        delta = _differences(data)[row]
        p = torch.sigmoid(known.beta @ delta)
        torch.testing.assert_close(precision @ (known.beta - mean), (labels[row] - p) * delta, rtol=1e-8, atol=1e-9)
        after = torch.linalg.inv(precision + p * (1 - p) * torch.outer(delta, delta))
        torch.testing.assert_close(known.factor.mT @ known.factor, after, rtol=1e-8, atol=1e-12)
    before = known.beta.clone()
    known.update(hidden, torch.tensor([1.0]), torch.tensor([[3, 3]]))  # a row against itself
    assert torch.equal(known.beta, before)


def test_an_update_that_is_refused_leaves_everything_as_it_was(data):
    known = Laplace.fit(*data, ridge=0.7)
    before = known.beta.clone(), known.factor.clone()
    with pytest.raises(NonFiniteError):
        known.update(torch.full((2, WIDTH), math.nan), torch.tensor([1.0]), torch.tensor([[0, 1]]))
    assert torch.equal(known.beta, before[0])
    assert torch.equal(known.factor, before[1])


# -- samples ---------------------------------------------------------------------------------------------------------


def test_moments_probability_and_information_of_samples_are_those_of_each_sample_by_itself():
    rewards = torch.tensor([[0.0, 1.0, -2.0], [0.5, -1.0, 3.0], [80.0, 90.0, 100.0]], dtype=torch.float64)
    found = sampled_estimate(rewards, torch.tensor([3]))
    for k, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
        logits = rewards[i] - rewards[j]
        p = torch.sigmoid(logits)
        assert float(found.logit[k]) == pytest.approx(float(logits.mean()))
        assert float(found.variance[k]) == pytest.approx(float(((logits - logits.mean()) ** 2).mean()))
        entropy = torch.special.entr
        bald = entropy(p.mean()) + entropy(1 - p.mean()) - (entropy(p) + entropy(1 - p)).mean()
        assert float(found.information[k]) == pytest.approx(float(bald), abs=1e-12)
        odds = float(torch.log(p.mean()) - torch.log1p(-p.mean())) if k == 0 else None
        assert odds is None or float(found.preference[k]) == pytest.approx(odds)
    # σ(−80) is 1.8e-35 and 1 − it is 1: the log-odds keep their digits
    assert float(found.preference[1]) == pytest.approx(math.log((math.exp(-80) + math.exp(-89) + math.exp(-102)) / 3))


def test_dropout_is_the_network_with_inputs_of_its_last_layer_left_out(data, fitted):
    found, rows = fitted["dropout"], data[0][:3]
    networks = found.networks
    z = (rows.float() - networks.center) / networks.scale
    z = torch.relu(z @ networks.weights[0][0].T + networks.biases[0][0])
    rewards = torch.stack([(z * mask) @ networks.weights[1][0, 0] for mask in found.masks], 1)
    expected = sampled_estimate(rewards, torch.tensor([3]))
    for got, wanted in zip(found.pairs(rows, torch.tensor([3])), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert sorted(found.masks.unique().tolist()) == pytest.approx([0.0, 1 / 0.9])


def test_dropout_of_a_linear_reward_has_the_variance_of_its_masks(data):
    found = Dropout.fit(*data, layers=(), rate=0.2, masks=40_000, epochs=1)
    estimate = found.pairs(data[0][:2], torch.tensor([2]))
    delta = (data[0][0] - data[0][1]).float() / found.networks.scale
    weight = found.networks.weights[0][0, 0]
    assert float(estimate.variance[0]) == pytest.approx(float(((delta * weight) ** 2).sum() * 0.25), rel=0.03)
    assert float(estimate.logit[0]) == pytest.approx(float(delta @ weight), abs=0.02)


def test_ensembles_are_their_members_and_go_by_their_seed(data, fitted):
    again = Ensemble.fit(*data, **SMALL["ensemble"])
    other = Ensemble.fit(*data, **SMALL["ensemble"], seed=1)
    rows, sizes = data[0][:5], torch.tensor([2, 3])
    first = fitted["ensemble"].pairs(rows, sizes)
    assert _equal(first, again.pairs(rows, sizes))
    assert not torch.equal(first.logit, other.pairs(rows, sizes).logit)
    networks = again.networks
    z = (rows.float() - networks.center) / networks.scale
    member = torch.relu(z @ networks.weights[0][1].T + networks.biases[0][1]) @ networks.weights[1][1, 0]
    torch.testing.assert_close(networks.rewards(rows)[:, 1], member)


def test_anchors_keep_members_near_where_they_began_and_training_finds_the_preferred(data):
    free, held = (Ensemble.fit(*data, members=2, layers=(8,), epochs=20, anchor=a) for a in (0.0, 1e4))
    start = Ensemble.fit(*data, members=2, layers=(8,), epochs=1, anchor=1e4)
    apart = [float((e.networks.weights[0] - start.networks.weights[0]).norm()) for e in (free, held)]
    assert apart[1] < 0.2 * apart[0]
    hidden, labels, pairs = data
    trained = Ensemble.fit(*data, members=2, layers=(8,), epochs=400)
    found = trained.pairs(hidden[pairs].flatten(0, 1), torch.full((COUNT,), 2))
    assert float(((found.logit > 0) == (labels > 0.5)).double().mean()) > 0.8


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_saved_and_loaded_each_scores_as_before(name, data, fitted, tmp_path):
    estimator, sizes = fitted[name], torch.tensor([1, 3, 2])
    save_estimator(estimator, tmp_path / "it")
    loaded = load_estimator(tmp_path / "it")
    assert type(loaded) is ESTIMATORS[name]
    before, after = (e.pairs(data[0][:6], sizes) for e in (estimator, loaded))
    assert _equal(before, after)
    assert before.logit.shape == (4,)
    assert bool((before.variance > 0).all())
    file = next((tmp_path / "it").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match=file.name):
        load_estimator(tmp_path / "it")


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_pairs_change_sign_with_their_order_and_equal_rows_have_nothing_between_them(name, data, fitted):
    rows, sizes = data[0][:2], torch.tensor([2])
    one, other = fitted[name].pairs(rows, sizes), fitted[name].pairs(rows.flip(0), sizes)
    torch.testing.assert_close(one.logit, -other.logit)
    torch.testing.assert_close(one.preference, -other.preference)
    torch.testing.assert_close(one.variance, other.variance)
    same = fitted[name].pairs(rows[[0, 0]], sizes)
    if same.aleatoric is None:
        assert float(same.variance[0]) == pytest.approx(0, abs=1e-12)
    else:  # two answers, each with a spread of its own
        assert float(same.variance[0]) == pytest.approx(float(same.aleatoric[0]))
        assert same.epistemic is None or float(same.epistemic[0]) == pytest.approx(0, abs=1e-12)
    assert float(same.preference[0]) == pytest.approx(0, abs=1e-7)


def test_what_cannot_be_is_refused_by_name(data, fitted, tmp_path):
    hidden, labels, pairs = data
    for name in ("laplace-kron", "laplace-diag", "dropout", "ensemble", "urm", "urme"):
        with pytest.raises(InputError, match=name):
            fitted[name].update(hidden, labels, pairs)
    with pytest.raises(InputError, match="laplace-kron"):
        estimator_named("laplace-krn")
    for name, estimator in fitted.items():
        with pytest.raises(InputError):
            estimator.pairs(hidden[:, 1:], torch.tensor([len(hidden)]))
        with pytest.raises(InputError):
            estimator.pairs(hidden[:3], torch.tensor([2]))
        bad = hidden[:2].clone()
        bad[1, 0] = math.nan
        with pytest.raises(NonFiniteError):
            estimator.pairs(bad, torch.tensor([2]))
        fit = ESTIMATORS[name].fit
        for wrong in ((hidden, labels + 1, pairs), (hidden, labels[1:], pairs), (hidden, labels, pairs + 1000)):
            with pytest.raises(InputError):
                fit(*wrong)
    for wrong in ({"members": 1}, {"layers": (0,)}, {"epochs": 0}, {"anchor": -1.0}):
        with pytest.raises(InputError):
            Ensemble.fit(*data, **wrong)
    for wrong in ({"rate": 0.0}, {"rate": 1.0}, {"masks": 1}):
        with pytest.raises(InputError):
            Dropout.fit(*data, **{"epochs": 1, **wrong})
    (tmp_path / "estimator.json").write_text("{}")
    with pytest.raises(CheckpointError, match="format"):
        load_estimator(tmp_path)


def test_verdicts_teach_the_head_and_the_full_laplace(data):
    hidden, labels, pairs = data
    for name in ("sngp", "laplace"):
        estimator = ESTIMATORS[name].fit(hidden, labels[20:], pairs[20:], **SMALL.get(name, {}))
        rows, sizes = hidden[pairs[:20]].flatten(0, 1), torch.full((20,), 2)
        before = estimator.pairs(rows, sizes).variance
        estimator.update(hidden, labels[:20], pairs[:20])
        assert bool((estimator.pairs(rows, sizes).variance < before).all())
