"""Newton's method to the MAP, the three ways to fit, the amplitude, and what is refused."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from rmcore._base.errors import FactorizationError, InputError, NonFiniteError, RmcoreError
from rmcore.head import HeadConfig, SNGPHead
from rmcore.head.fit import fit, fit_amplitude, newton, upgrade
from rmcore.ops import reference

F64 = torch.float64


def fitted(data, *, labels=None, pairs=None, sample_weight=None, tolerance=1e-8, num_features=64, **config):
    head = SNGPHead(data.hidden.shape[1], num_features=num_features, **config)
    return fit(
        head,
        data.hidden,
        data.labels if labels is None else labels,
        pairs=data.pairs if pairs is None else pairs,
        sample_weight=sample_weight,
        dtype=torch.float32,
        backend="torch",
        tolerance=tolerance,
    )


def deltas(head, data):
    phi = head.feature_map(data.hidden) * head.feature_map.feature_scale
    return phi[data.pairs[:, 0]] - phi[data.pairs[:, 1]]


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("features", [{}, {"features": "linear"}, {"kernel_scale": 3.0, "layer_size": 8}])
def test_beta_is_the_map(make_data, ridge, features):
    """The gradient of the log posterior vanishes: Φᵀ(y − p) = sβ."""
    data = make_data()
    head, report = fitted(data, ridge=ridge, tolerance=1e-16, **features)
    assert report.converged
    phi = deltas(head, data)
    slope = phi.mT @ (data.labels - torch.sigmoid(phi @ head.beta)) - ridge * head.beta
    # decrement gᵀP⁻¹g ≤ 2·tolerance·N = 1e-13, and g² ≤ decrement·λ_max(P); the trace bounds λ_max
    assert float(slope.norm()) <= math.sqrt(1e-13 * float(head.posterior.precision.trace())) * 1.01


def test_the_posterior_is_at_the_map(make_data):
    data = make_data()
    head, _ = fitted(data, tolerance=1e-16)
    phi = deltas(head, data)
    gram, _, _ = reference.accumulate(phi, data.labels, head.beta)
    torch.testing.assert_close(head.posterior.precision, gram + torch.eye(64, dtype=F64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["difference", "concat"])
@pytest.mark.parametrize("kernel_scale", [1.0, 3.0])
def test_newton_takes_at_most_eight_passes(make_data, mode, kernel_scale):
    data = make_data(rows=2000, size=32, pairs=2000, dtype=torch.float32)
    head = SNGPHead(32, num_features=256, mode=mode, kernel_scale=kernel_scale)
    pairs = data.pairs if mode == "difference" else None
    lines = []
    _, report = fit(head, data.hidden, data.labels, pairs=pairs, progress=lines.append)
    assert report.converged
    assert report.passes <= 8
    assert list(report.log_posterior) == sorted(report.log_posterior)
    assert list(report.decrements) == sorted(report.decrements, reverse=True)
    assert len(lines) == len(report.log_posterior) - 1


def test_the_fit_learns_what_there_is(make_data):
    data, held_out = make_data(rows=2000, size=8, pairs=3000), make_data(rows=2000, size=8, pairs=1000, seed=1)
    head, _ = fitted(data, num_features=512, kernel_scale=3.0)
    g = deltas(head, held_out) @ head.beta
    accuracy = float(((g > 0) == (held_out.labels > 0.5)).double().mean())
    ceiling = float(((held_out.logit > 0) == (held_out.labels > 0.5)).double().mean())
    assert accuracy > ceiling - 0.06
    assert accuracy > 0.7


def test_separable_data_has_a_finite_map(make_data):
    data = make_data()
    labels = (data.hidden[data.pairs[:, 0], 0] > data.hidden[data.pairs[:, 1], 0]).double()
    head, report = fitted(data, labels=labels, features="linear", ridge=1e-3)
    assert report.converged
    assert bool(head.beta.isfinite().all())
    g = deltas(head, data) @ head.beta
    assert bool(((g > 0) == (labels > 0.5)).all())
    assert float(g.abs().max()) > 20  # nearly saturated: where undamped Newton steps are worst


def test_a_far_start_comes_back(make_data):
    """Newton on a logistic loss diverges from far away without its halving of steps."""
    data = make_data()
    frozen, _ = fitted(data, tolerance=1e-14)
    start = 200 * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=F64)
    beta, _, report = newton(
        frozen.feature_map, data.hidden, data.labels, frozen.config, pairs=data.pairs, start=start, tolerance=1e-14,
        max_passes=200, backend="torch"
    )  # fmt: skip
    assert report.converged
    assert list(report.log_posterior) == sorted(report.log_posterior)
    torch.testing.assert_close(beta, frozen.beta, rtol=1e-4, atol=1e-5)


def test_a_soft_label_is_two_weighted_hard_ones(make_data):
    data = make_data()
    soft = torch.rand(500, generator=torch.Generator().manual_seed(3), dtype=F64)
    ones = torch.ones_like(soft)
    one, _ = fitted(data, labels=soft, tolerance=1e-16)
    two, _ = fitted(data, labels=torch.cat([ones, 0 * ones]), pairs=torch.cat([data.pairs] * 2),
                    sample_weight=torch.cat([soft, 1 - soft]), tolerance=1e-16)  # fmt: skip
    torch.testing.assert_close(one.beta, two.beta, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(one.posterior.precision, two.posterior.precision, rtol=1e-6, atol=1e-8)


def test_a_sample_weight_is_a_repetition(make_data):
    data = make_data()
    times = torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(3))
    weighted, _ = fitted(data, sample_weight=times.double(), tolerance=1e-16)
    repeated, _ = fitted(data, labels=data.labels.repeat_interleave(times),
                         pairs=data.pairs.repeat_interleave(times, dim=0), tolerance=1e-16)  # fmt: skip
    torch.testing.assert_close(weighted.beta, repeated.beta, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(weighted.posterior.precision, repeated.posterior.precision, rtol=1e-6, atol=1e-8)


def test_exchanging_a_pair_and_its_label_changes_nothing(make_data):
    data = make_data()
    one, _ = fitted(data, tolerance=1e-16)
    two, _ = fitted(data, labels=1 - data.labels, pairs=data.pairs.flip(1), tolerance=1e-16)
    torch.testing.assert_close(one.beta, two.beta, rtol=1e-6, atol=1e-8)


def test_the_gaussian_posterior_has_unit_weights_and_the_ridge_in_front(make_data):
    data = make_data()
    head, report = fitted(data, likelihood="gaussian", ridge=0.3)
    logistic, plain = fitted(data, ridge=0.3)
    assert report.passes == plain.passes + 1
    torch.testing.assert_close(head.beta, logistic.beta)  # the same MAP
    phi = deltas(head, data)
    p = phi.mT @ phi + 0.3 * torch.eye(64, dtype=F64)
    torch.testing.assert_close(head.posterior.precision, p)
    c = head.feature_map(data.hidden) * head.feature_map.feature_scale
    v = 0.3 * (c @ torch.linalg.inv(p) * c).sum(-1)
    # U is stored in float32 and v returned in it
    torch.testing.assert_close(head.score(data.hidden, backend="torch").variance.double(), v, rtol=1e-5, atol=0)


def test_fitting_again_starts_at_the_map(make_data):
    data = make_data()
    head = SNGPHead(16, num_features=64)
    arguments = {"pairs": data.pairs, "dtype": torch.float32, "backend": "torch"}
    first, _ = fit(head, data.hidden, data.labels, **arguments)
    second, report = fit(head, data.hidden, data.labels, **arguments)
    assert report.passes <= 2
    torch.testing.assert_close(first.beta, second.beta, rtol=1e-3, atol=1e-4)


def test_an_unfinished_fit_says_so(make_data, caplog):
    data = make_data()
    head = SNGPHead(16, num_features=64)
    with caplog.at_level(logging.WARNING, logger="rmcore"):
        _, report = fit(head, data.hidden, data.labels, pairs=data.pairs, max_passes=2, tolerance=1e-14)
    assert not report.converged
    assert "did not converge in 2 passes" in caplog.text


def test_the_length_scale_is_set_once_and_kept(make_data):
    data = make_data()
    head, _ = fitted(data)
    assert head.config.length_scale == pytest.approx(float(torch.pdist(data.hidden).median()), rel=1e-5)
    assert fitted(data, length_scale=7.0)[0].config.length_scale == 7.0
    assert fitted(data, features="linear")[0].config.length_scale is None


# -- upgrading an existing reward model ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_an_upgrade_leaves_the_scores_unchanged(make_data, dtype, scale):
    data = make_data(scale=scale, dtype=torch.float32)
    beta = torch.randn(16, generator=torch.Generator().manual_seed(0)) / scale
    head = upgrade(data.hidden, data.pairs, beta, 0.7, dtype=dtype)
    expected = data.hidden.double() @ beta.double() + 0.7
    scores = head.score(data.hidden, backend="torch")
    torch.testing.assert_close(scores.logit.double(), expected, rtol=1e-5, atol=1e-5)
    delta = data.hidden.double()[data.pairs[:, 0]] - data.hidden.double()[data.pairs[:, 1]]
    p = torch.sigmoid(delta @ beta.double())
    precision = delta.mT @ ((p * (1 - p))[:, None] * delta) + torch.eye(16, dtype=F64)
    # accumulated by an unnamed backend, perhaps from features in the serving dtype
    tolerance = 500**0.5 * torch.finfo(dtype).eps * float(precision.abs().max())
    torch.testing.assert_close(head.posterior.precision, precision, rtol=0, atol=max(tolerance, 1e-5))


@pytest.mark.parametrize("config", [{"mode": "concat", "features": "linear"}, {}, {"features": "linear",
                                                                                    "layer_size": 4}])  # fmt: skip
def test_only_a_plain_linear_head_is_an_upgrade(make_data, config):
    data = make_data()
    with pytest.raises(InputError, match=r"^config: got "):
        upgrade(data.hidden, data.pairs, torch.zeros(16), config=HeadConfig(16, **config))


def test_an_upgrade_checks_its_arguments(make_data):
    data = make_data()
    with pytest.raises(InputError, match=r"^beta: got shape \(15,\), expected \(16,\)"):
        upgrade(data.hidden, data.pairs, torch.zeros(15))
    with pytest.raises(InputError, match=r"^labels: "):
        upgrade(data.hidden, data.pairs, torch.zeros(16), labels=torch.zeros(3))


# -- amplitude -------------------------------------------------------------------------------------------------------


def test_the_fitted_amplitude_minimises_the_held_out_loss(make_data, fit_head):
    head = fit_head(make_data())
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(20000, generator=generator, dtype=F64) * 4
    g = torch.randn(20000, generator=generator, dtype=F64) * 2
    labels = torch.bernoulli(torch.sigmoid(g / torch.sqrt(1 + 1.5 * v)), generator=generator)
    other = fit_amplitude(head, g, v, labels)
    assert other.config.amplitude == pytest.approx(1.5, rel=0.25)
    assert other.weights.amplitude == other.config.amplitude

    def loss(a):
        return -float(reference.log_likelihood(g / torch.sqrt(1 + a * v), labels).mean())

    best = other.config.amplitude
    assert all(loss(best) <= loss(best * f) for f in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))
    assert head.config.amplitude is None  # the given head is as it was
    x = make_data().hidden
    assert torch.equal(other.score(x).logit, head.score(x).logit)
    assert not torch.equal(other.score(x).uncertainty, head.score(x).uncertainty)


def test_confident_and_right_wants_no_amplitude_and_is_warned_about(make_data, fit_head, caplog):
    g = torch.linspace(-3, 3, 100)
    with caplog.at_level(logging.WARNING, logger="rmcore"):
        head = fit_amplitude(fit_head(make_data()), g, torch.ones(100), (g > 0).float())
    assert head.config.amplitude == 0
    assert "the 100 held-out pairs, 0 of them wrong, want no uncertainty at all" in caplog.text


def test_worse_than_chance_wants_all_of_it_and_is_warned_about(make_data, fit_head, caplog):
    g = torch.linspace(-3, 3, 100)
    with caplog.at_level(logging.WARNING, logger="rmcore"):
        head = fit_amplitude(fit_head(make_data()), g, torch.ones(100), (g < 0).float())
    assert head.config.amplitude > 1000
    assert "no better than chance" in caplog.text


def test_the_amplitude_needs_held_out_pairs(make_data, fit_head):
    head = fit_head(make_data())
    with pytest.raises(InputError, match=r"^logit: got 0 held-out pairs"):
        fit_amplitude(head, torch.zeros(0), torch.zeros(0), torch.zeros(0))
    with pytest.raises(InputError, match=r"^variance: got a median of 0"):
        fit_amplitude(head, torch.ones(3), torch.zeros(3), torch.ones(3))


# -- what is refused -------------------------------------------------------------------------------------------------


def changed(data, **changes):
    return {"hidden": data.hidden, "labels": data.labels, "pairs": data.pairs} | changes


BAD = {
    "hidden": [
        ("hidden", lambda d: d.hidden[:, :-1]),
        ("hidden", lambda d: d.hidden[0]),
        ("hidden", lambda d: d.hidden.long()),
    ],
    "labels": [
        ("labels", lambda d: d.labels[:-1]),
        ("labels", lambda d: d.labels[:, None]),
        ("labels", lambda d: d.labels[:0]),
        ("labels", lambda d: d.labels + 0.5),
        ("labels", lambda d: d.labels - 1),
        ("labels", lambda d: d.labels * math.nan),
    ],
    "pairs": [
        ("pairs", lambda d: None),
        ("pairs", lambda d: d.pairs.int()),
        ("pairs", lambda d: d.pairs[:, :1]),
        ("pairs", lambda d: d.pairs.flatten()),
        ("pairs", lambda d: d.pairs + 1),
        ("pairs", lambda d: d.pairs - 1),
    ],
    "sample_weight": [
        ("sample_weight", lambda d: d.labels[:-1]),
        ("sample_weight", lambda d: d.labels - 2),
        ("sample_weight", lambda d: d.labels * math.nan),
        ("sample_weight", lambda d: d.labels + math.inf),
    ],
}


@pytest.mark.parametrize(("name", "change"), [case for cases in BAD.values() for case in cases])
def test_bad_data_is_named_and_leaves_the_head_alone(make_data, name, change):
    data = make_data()
    data = data._replace(pairs=data.pairs.clamp(1, 298))
    data.pairs[0] = torch.tensor([0, 299])
    head = SNGPHead(16, num_features=16)
    with pytest.raises(InputError, match=f"^{name}: got .*, expected ") as error:
        fit(head, **changed(data, **{name: change(data)}))
    assert isinstance(error.value, RmcoreError)
    assert not head.beta.any()


def test_modes_and_pairs_go_together(make_data):
    data = make_data()
    with pytest.raises(InputError, match=r"^pairs: got None"):
        fit(SNGPHead(16, num_features=16), data.hidden, torch.ones(300))
    with pytest.raises(InputError, match=r"^pairs: got a tensor"):
        fit(SNGPHead(16, num_features=16, mode="concat"), data.hidden, data.labels, pairs=data.pairs)


def test_no_data_is_refused():
    with pytest.raises(InputError, match=r"^labels: got 0 data"):
        fit(SNGPHead(16, num_features=16, mode="concat"), torch.zeros(0, 16), torch.zeros(0))
    with pytest.raises(InputError, match=r"^labels: got 0 data"):
        fit(SNGPHead(16), torch.ones(4, 16), torch.zeros(0), pairs=torch.zeros(0, 2, dtype=torch.int64))


def test_a_non_finite_row_is_named(make_data):
    data = make_data()
    data.hidden[9, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"^hidden: got NaN or Inf in 1 of 300 rows \(9\)"):
        fit(SNGPHead(16, num_features=16), data.hidden, data.labels, pairs=data.pairs)


def test_equal_rows_are_refused():
    with pytest.raises(InputError, match=r"^hidden: got rows that are all equal"):
        fit(SNGPHead(16, mode="concat"), torch.ones(5, 16), torch.ones(5))


def test_a_hopeless_ridge_is_reported():
    rows = 1e4 + torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    head = SNGPHead(64, mode="concat", features="linear", ridge=1e-9, likelihood="gaussian")
    with pytest.raises(FactorizationError, match="Raise ridge"):
        fit(head, rows, (torch.arange(400) % 2).float(), dtype=torch.float32, backend="torch")


def test_one_pair_is_enough():
    one = torch.tensor([[0, 1]])
    head, report = fit(SNGPHead(4, num_features=16), torch.randn(2, 4), torch.ones(1), pairs=one)
    assert report.converged
    assert head.posterior.count == 1
