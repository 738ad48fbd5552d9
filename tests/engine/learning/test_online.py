"""One step of online Laplace: what it must equal, how far it may move, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.engine.learning.judged import JudgedPairs
from rmcore.engine.learning.online import LearningConfig, fold
from rmcore.head import FrozenHead, SNGPHead
from rmcore.head.fit import fit
from rmcore.head.posterior import Posterior

FREE = LearningConfig(max_shift=math.inf)
F64 = torch.float64


def part(data, start, stop, *, weight=1.0):
    """Pairs start..stop of the data as judged pairs."""
    labels = data.labels[start:stop].float()
    return JudgedPairs(data.hidden, labels, torch.full_like(labels, weight), data.pairs[start:stop])


def nothing_learnt(data, **config):
    """A head whose features are set and that has seen no pair."""
    head = SNGPHead(data.hidden.shape[1], num_features=64, **config)
    if head.config.features == "rff":
        head.set_length_scale(data.hidden)
    resolved = replace(head.config, length_scale=float(head.length_scale)) if head.config.features == "rff" else None
    posterior = Posterior(head.config.num_features, ridge=head.config.ridge, likelihood=head.config.likelihood)
    beta = torch.zeros(head.config.num_features, dtype=F64)
    feature_map = head.freeze_features(torch.float32, calibration=data.hidden)
    return FrozenHead(resolved or head.config, feature_map, beta, 0.0, posterior)


def deltas(head, data):
    phi = head.feature_map(data.hidden) * head.feature_map.feature_scale
    return phi[data.pairs[:, 0]] - phi[data.pairs[:, 1]]


def lower(head):
    return head.posterior.gram.tril()


def test_from_the_prior_alone_it_is_the_fit(make_data):
    """The prior is exactly quadratic, so nothing is approximated: same β, same P as fitting the data."""
    data = make_data()
    fitted, _ = fit(
        SNGPHead(16, num_features=64), data.hidden, data.labels.float(), pairs=data.pairs, dtype=torch.float32
    )
    online, report = fold(nothing_learnt(data), part(data, 0, 500), FREE)
    torch.testing.assert_close(online.beta, fitted.beta, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lower(online), lower(fitted), rtol=1e-6, atol=1e-9)
    assert online.posterior.count == 500
    assert report.converged
    assert report.surprise == pytest.approx(math.log(2))
    assert report.surprise_after < report.surprise


def test_where_the_model_is_linear_and_gaussian_parts_equal_the_whole(make_data):
    """Labels near ½ keep |g| below 0.2, where σ is a line up to g²/12 < 0.4%: sequential updates are then the closed
    form of Bayesian linear regression with precision ¼, β = (sI + ¼ΦᵀΦ)⁻¹ Φᵀ(y − ½)."""
    data = make_data()
    data = data._replace(labels=0.5 + 0.02 * torch.tanh(data.logit))
    head = nothing_learnt(data)
    phi = deltas(head, data)
    precision = torch.eye(64, dtype=F64) + phi.mT @ phi / 4
    exact = torch.linalg.solve(precision, phi.mT @ (data.labels - 0.5))
    assert float((phi @ exact).abs().max()) < 0.2
    for start in range(0, 500, 50):
        head, _ = fold(head, part(data, start, start + 50), FREE, backend="torch")
    assert float((head.beta - exact).norm() / exact.norm()) < 4e-3
    error = (head.posterior.precision - precision).norm() / (precision - torch.eye(64, dtype=F64)).norm()
    assert float(error) < 4e-3


def test_a_gaussian_posterior_is_the_same_sum_whatever_the_order(make_data):
    """Its weights do not depend on β, so P is exact."""
    data = make_data()
    head = nothing_learnt(data, likelihood="gaussian", features="linear")
    phi = deltas(head, data)
    for start in range(0, 500, 100):
        head, report = fold(head, part(data, start, start + 100), FREE, backend="torch")
        assert report.converged
    torch.testing.assert_close(lower(head), (phi.mT @ phi).tril(), rtol=1e-12, atol=1e-10)
    assert float(((phi @ head.beta > 0) == (data.labels > 0.5)).double().mean()) > 0.6


@pytest.mark.parametrize("kernel_scale", [1.0, 3.0])
def test_logistic_updates_stay_close_to_the_fit_of_everything(make_data, fit_head, kernel_scale):
    """What is lost is the third derivative of the old data's log-likelihood along the moves since. Each update moves β
    by a few posterior deviations at most, so the result is within a fraction of one of the MAP of all the data, and
    much closer to it than to where it began."""
    data = make_data(pairs=1000)
    everything = fit_head(data, kernel_scale=kernel_scale)
    old = data._replace(labels=data.labels[:500], pairs=data.pairs[:500])
    start = head = fit_head(old, kernel_scale=kernel_scale)
    for k in range(500, 1000, 50):
        head, _ = fold(head, part(data, k, k + 50), FREE, backend="torch")
    precision = everything.posterior.precision

    def distance(a, b):
        return math.sqrt(float((a.beta - b.beta) @ (precision @ (a.beta - b.beta))))

    assert distance(head, everything) < 0.2 * distance(start, everything)
    assert distance(head, everything) < 0.15 * math.sqrt(64)  # a draw from the posterior is √D away
    spread = (head.posterior.precision - precision).norm() / precision.norm()
    assert float(spread) < 0.1


def test_concat_mode_takes_rows_as_data(make_data, fit_head):
    data = make_data(rows=400, size=8)
    head = fit_head(data, mode="concat")
    judged = JudgedPairs(data.hidden[:40], torch.ones(40), torch.ones(40))
    new, report = fold(head, judged, FREE)
    before, after = head.score(data.hidden[:40]), new.score(data.hidden[:40])
    assert report.pairs == 40
    assert float(after.logit.mean()) > float(before.logit.mean())
    assert bool((after.variance <= before.variance * 1.0001).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_the_old_head_is_left_alone_and_the_new_one_learns(make_data, fit_head, dtype):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, dtype=dtype)
    before = [t.clone() for t in (head.beta, head.posterior.gram, head.weights.beta, head.weights.factor)]
    wrong = data._replace(labels=1 - data.labels)
    new, report = fold(head, part(wrong, 0, 40), FREE)
    after = [head.beta, head.posterior.gram, head.weights.beta, head.weights.factor]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert head.posterior.count == 500
    assert new.posterior.count == 540
    assert report.surprise > report.surprise_after
    assert new.dtype == dtype
    assert new.feature_map is head.feature_map


def test_the_trust_region_shortens_the_step_and_says_so(make_data, fit_head, caplog):
    data = make_data()
    head = fit_head(data, kernel_scale=3.0)
    wrong = data._replace(labels=1 - data.labels)
    free, without = fold(head, part(wrong, 0, 60), FREE, backend="torch")
    short, report = fold(head, part(wrong, 0, 60), LearningConfig(max_shift=0.05), backend="torch")
    assert not without.shortened
    assert report.shortened
    assert report.shift == pytest.approx(0.05 * math.sqrt(60))
    assert without.shift > report.shift
    move, whole = short.beta - head.beta, free.beta - head.beta
    torch.testing.assert_close(move / move.norm(), whole / whole.norm(), rtol=1e-9, atol=1e-9)
    assert math.sqrt(float(move @ (head.posterior.precision @ move))) == pytest.approx(report.shift)
    assert without.surprise_after < report.surprise_after < report.surprise
    assert "posterior deviations" in caplog.text


def test_by_default_equal_rows_meet_the_trust_region_where_different_ones_do_not(make_data, fit_head):
    """Sixty surprises about different pairs are learnt in full; one surprise told sixty times is not."""
    data = make_data()
    head = fit_head(data, kernel_scale=3.0)
    wrong = data._replace(labels=1 - data.labels)
    _, different = fold(head, part(wrong, 0, 60), backend="torch")
    worst = int(((deltas(head, data) @ head.beta) * (2 * data.labels - 1)).argmax())
    same = wrong._replace(pairs=data.pairs[worst].expand(60, 2), labels=wrong.labels[worst].expand(60))
    _, repeated = fold(head, part(same, 0, 60), backend="torch")
    assert (different.shortened, repeated.shortened) == (False, True)


def test_weights_scale_what_is_learnt(make_data, fit_head):
    """A pair of weight 2 is the pair twice."""
    data = make_data()
    head = fit_head(data)
    double, _ = fold(head, part(data, 0, 30, weight=2.0), FREE, backend="torch")
    twice = JudgedPairs(
        data.hidden, data.labels[:30].float().repeat(2), torch.ones(60), torch.cat([data.pairs[:30]] * 2)
    )
    repeated, _ = fold(head, twice, FREE, backend="torch")
    torch.testing.assert_close(double.beta, repeated.beta, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(lower(double), lower(repeated), rtol=1e-6, atol=1e-7)


def test_p_stays_positive_definite_over_many_updates(make_data, fit_head):
    data = make_data()
    head = fit_head(data, ridge=1e-3)
    generator = torch.Generator().manual_seed(0)
    for k in range(40):
        labels = torch.rand(20, generator=generator)
        judged = JudgedPairs(data.hidden, labels, torch.full((20,), 3.0), data.pairs[k * 10 : k * 10 + 20])
        head, _ = fold(head, judged)
    eigenvalues = torch.linalg.eigvalsh(head.posterior.precision)
    assert float(eigenvalues[0]) >= 1e-3 * (1 - 1e-6)
    assert bool(head.weights.factor.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named(make_data, fit_head, value):
    data = make_data()
    judged = part(data, 0, 10)
    judged.hidden[7, 3] = value
    with pytest.raises(NonFiniteError, match=r"hidden: got NaN or Inf in 1 of 300 rows \(7\)") as caught:
        fold(fit_head(make_data()), judged)
    assert caught.value.rows == (7,)


def test_what_is_refused(make_data, fit_head):
    data = make_data()
    head = fit_head(data)
    good = part(data, 0, 10)
    no_posterior = FrozenHead(head.config, head.feature_map, head.beta, weights=head.weights)
    for bad, message in [
        (replace(good, labels=good.labels + 0.5), "labels: got values"),
        (replace(good, weights=-good.weights), "sample_weight: got values"),
        (replace(good, weights=0 * good.weights), "weights: got 0 in all"),
        (replace(good, pairs=None), "pairs: got None"),
        (replace(good, hidden=good.hidden[:, :5]), "hidden: got shape"),
        (replace(good, labels=good.labels[:0], weights=good.weights[:0], pairs=good.pairs[:0]), "labels: got 0 data"),
    ]:
        with pytest.raises(InputError, match=message):
            fold(head, bad)
    with pytest.raises(InputError, match=r"head\.posterior: got none"):
        fold(no_posterior, good)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("judge_weight", 0.0),
        ("judge_weight", math.inf),
        ("judge_weight", math.nan),
        ("flip_weight", -0.1),
        ("flip_weight", 1.5),
        ("epsilon", 0.5),
        ("max_share", 0.0),
        ("max_share", math.nan),
        ("max_shift", -1.0),
        ("max_passes", 0),
    ],
)
def test_settings_are_checked(name, value):
    with pytest.raises(InputError, match=f"{name}: got"):
        LearningConfig(**{name: value})
