"""Freezing and serving: the folded form, the serving dtypes, massive activations, non-finite rows, updates."""

from __future__ import annotations

import math

import pytest
import torch

from rmcore._base.errors import FactorizationError, InputError, NonFiniteError
from rmcore.head import FrozenHead, SNGPHead
from rmcore.head.fit import fit
from rmcore.ops import reference
from rmcore.ops.backends import torch as backend
from rmcore.ops.weights import HeadWeights, default_dtype, power_of_two_scale

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


def rows(n=40, h=24, seed=1, dtype=torch.float64):
    return torch.randn(n, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(head, hidden):
    """g, v, u, p in float64 from the *stored* weights: what any arithmetic should come to."""
    weights = head.weights
    c = weights.map(hidden.double())
    factor = reference.unpack_lower(weights.factor, weights.num_features).double() * math.sqrt(weights.factor_scale)
    return reference.score(c, weights.beta.double(), factor, beta0=weights.beta0, amplitude=weights.amplitude)


# -- the serving form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "activation", "layernorm"),
    [(None, "none", False), *((10, activation, norm) for activation in ("none", "tanh") for norm in (False, True))],
)
def test_frozen_features_are_the_heads_features(layer, activation, layernorm):
    head = SNGPHead(24, num_features=50, layer_size=layer, activation=activation, layernorm=layernorm, length_scale=3.0,
                    kernel_scale=2.0)  # fmt: skip
    with torch.no_grad():
        if layer is not None:
            head.weight.mul_(4)
            head.bias.normal_()
    head = head.double().eval()
    frozen = head.freeze_features(torch.float32)
    assert frozen.folded == (activation == "none" and not layernorm)
    z = head.hidden_to_z(rows(), converged=True)
    phi = reference.random_fourier_features(z, head.omega, head.b, length_scale=3.0, kernel_scale=2.0)
    # The map's matrices are rounded to float32: 24 products of relative error 6e-8 in a phase of a few turns.
    torch.testing.assert_close(frozen(rows()) * frozen.feature_scale, phi, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [None, 10])
def test_frozen_linear_features_are_z(layer):
    head = SNGPHead(24, features="linear", layer_size=layer).double().eval()
    frozen = head.freeze_features(torch.float32)
    z = head.hidden_to_z(rows(), converged=True)
    torch.testing.assert_close(frozen(rows()) * frozen.feature_scale, z.detach(), rtol=1e-5, atol=1e-6)


def test_linear_features_after_a_nonlinearity_are_refused():
    with pytest.raises(InputError, match=r"^config: got linear features after tanh"):
        SNGPHead(24, features="linear", layer_size=8, activation="tanh").freeze_features(torch.float32)


def test_only_serving_dtypes_serve():
    with pytest.raises(InputError, match=r"^dtype: got torch.float64"):
        SNGPHead(24, num_features=8, length_scale=1.0).freeze_features(torch.float64)
    assert default_dtype("cpu") in DTYPES
    assert default_dtype("cuda") == torch.float16


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size_of_u", [1e-6, 1.0, 1e6])
def test_weights_keep_the_factor_at_a_power_of_two(size, dtype, size_of_u):
    head = SNGPHead(8, num_features=size, length_scale=3.0, kernel_scale=1.5)
    frozen = head.freeze_features(dtype)
    generator = torch.Generator().manual_seed(size)
    u = torch.randn(size, size, generator=generator, dtype=torch.float64).tril() * size_of_u
    beta = torch.randn(size, generator=generator, dtype=torch.float64)
    weights = HeadWeights.build(frozen, beta, 0.5, u, 0.4)
    assert math.frexp(weights.factor_scale)[0] == 0.5
    assert math.frexp(weights.factor_scale)[1] % 2 == 1  # an even power: its square root is a power of two as well
    assert 2**9 <= float(weights.factor.abs().max()) <= 2**10
    c = frozen(rows(10, 8))
    phi = c * frozen.feature_scale
    out = torch.empty(4, 10, dtype=torch.float64)
    backend.score(rows(10, 8), weights, out)
    # U is rounded entry by entry: ‖δU c‖ ≤ ε/2 ‖|U| |c|‖, and |U||c| exceeds |Uc| by up to √D for random signs.
    tolerance = torch.finfo(dtype).eps * 2 * math.sqrt(size)
    torch.testing.assert_close(out[1], reference.variance(phi, u), rtol=max(tolerance, 1e-6), atol=0)
    torch.testing.assert_close(out[0], phi @ beta + 0.5, rtol=1e-5, atol=1e-5)
    assert weights.nbytes() == weights.factor.nbytes + 4 * size * 2 + size * 8 * frozen.projection.element_size()


def test_a_factor_out_of_range_is_refused():
    head = SNGPHead(8, num_features=4, length_scale=3.0)
    with pytest.raises(FactorizationError, match=r"^factor: .*Raise the ridge"):
        HeadWeights.build(head.freeze_features(torch.float16), torch.zeros(4), 0.0, torch.eye(4) * math.inf, 0.4)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_variance_is_right_for_any_ridge(make_data, fit_head, scale):
    data = make_data()
    head = fit_head(data, ridge=scale if scale > 1 else 1.0, kernel_scale=max(scale, 1e-3) if scale < 1 else 1.0)
    p = head.posterior.precision
    phi = head.feature_map(data.hidden) * head.feature_map.feature_scale
    v = (phi @ torch.linalg.inv(p) * phi).sum(-1)
    torch.testing.assert_close(head.score(data.hidden, backend="torch").variance.double(), v, rtol=1e-4, atol=0)


# -- dtypes and massive activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [{}, {"layer_size": 12, "activation": "tanh"}])
def test_scores_agree_with_float64_on_the_same_weights(make_data, fit_head, dtype, layer):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, dtype=dtype, num_features=200, **layer)
    g, v, u, p = truth(head, data.hidden)
    scores = head.score(data.hidden, backend="torch")
    # Stored weights are the truth's too, so what is left is float32: sums of at most 200 products, 200·6e-8.
    torch.testing.assert_close(scores.uncertainty.double(), u, rtol=2e-5, atol=0)
    torch.testing.assert_close(scores.variance.double(), v, rtol=2e-4, atol=0)
    torch.testing.assert_close(scores.logit.double(), g, rtol=0, atol=2e-4)
    torch.testing.assert_close(scores.preference.double(), p, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights_change_uncertainty_little(make_data, fit_head, dtype):
    """The posterior is fitted with the rounded projection, so only the rounding of U and of the draw is left."""
    data = make_data()
    low = fit_head(data, dtype=dtype, num_features=200)
    phi = low.feature_map(data.hidden) * low.feature_map.feature_scale
    exact = reference.uncertainty(reference.variance(phi, low.posterior.factor()), low.config.resolved_amplitude)
    u = low.score(data.hidden, backend="torch").uncertainty.double()
    # each entry of U has a relative error of ε/2 at most, and so has ‖Uφ‖ up to signs; u changes less than v
    torch.testing.assert_close(u, exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
    full = fit_head(data, dtype=torch.float32, num_features=200).score(data.hidden, backend="torch").uncertainty
    assert float((u / full.double() - 1).abs().max()) < (0.002 if dtype == torch.float16 else 0.02)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layer_size": 12},
        {"layer_size": 12, "layernorm": True},
        {"features": "linear"},
        {"features": "linear", "layer_size": 12},
    ],
)
def test_massive_activations_fit_fp16(make_data, fit_head, config):
    """One channel at 1e5 in every row, as transformers have them, is past fp16's 65504."""
    data = make_data(dtype=torch.float32)
    hidden = data.hidden.clone()
    hidden[:, 7] = 1e5 * (1 + 0.001 * hidden[:, 7])
    data = data._replace(hidden=hidden)
    head = fit_head(data, dtype=torch.float16, **config)
    scale = head.feature_map.input_scale
    assert scale == 2.0**-4  # the largest power of two that brings 1e5 under 8192
    assert bool((hidden * scale).half().isfinite().all())
    assert all(bool(t.isfinite().all()) for t in head.feature_map.tensors().values())
    g, v, u, _ = truth(head, hidden)
    scores = head.score(hidden, backend="torch")
    assert all(bool(t.isfinite().all()) for t in scores)
    # Sums of 16 products, one of them 1e5 times the rest, leave 16·6e-8·1e5 = 0.1 in float32 where rows differ by 100
    # in the massive channel; relative to that (the length-scale, and z's own spread) 1e-3, and 2π a turn.
    tolerance = 6e-3
    torch.testing.assert_close(scores.uncertainty.double(), u, rtol=tolerance, atol=0)
    torch.testing.assert_close(scores.logit.double(), g, rtol=0, atol=tolerance * (1 + float(g.abs().max())))
    torch.testing.assert_close(scores.variance.double(), v, rtol=tolerance, atol=tolerance * float(v.max()))


def test_input_scale_is_for_fp16_alone(make_data, fit_head):
    data = make_data(scale=1e5, dtype=torch.float32)
    assert fit_head(data, dtype=torch.bfloat16).feature_map.input_scale == 1
    assert fit_head(data, dtype=torch.float32).feature_map.input_scale == 1
    assert fit_head(make_data(dtype=torch.float32), dtype=torch.float16).feature_map.input_scale == 1


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4, 1e6])
def test_fp16_resolves_rows_of_any_magnitude(make_data, fit_head, scale):
    """Rows, length-scale and projection scale together: u must not depend on the unit hidden states come in."""
    reference_u = fit_head(make_data(), num_features=200).score(make_data().hidden, backend="torch").uncertainty
    data = make_data(scale=scale)
    u = fit_head(data, dtype=torch.float16, num_features=200).score(data.hidden, backend="torch").uncertainty
    assert float((u / reference_u - 1).abs().max()) < 0.004


def test_power_of_two_scale():
    assert power_of_two_scale(100.0, 8192.0) == 1
    assert power_of_two_scale(8192.0, 8192.0) == 1
    assert power_of_two_scale(8193.0, 8192.0) == 0.5
    assert power_of_two_scale(1e5, 8192.0) == 2**-4
    with pytest.raises(InputError, match=r"^largest: got inf"):
        power_of_two_scale(math.inf, 8192.0)


# -- serving ---------------------------------------------------------------------------------------------------------


def test_scores_are_four_rows_of_one_tensor(make_data, fit_head):
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    scores = head.score(data.hidden)
    assert all(t.shape == (300,) and t.dtype == torch.float32 and not t.requires_grad for t in scores)
    assert bool((scores.variance >= 0).all())
    assert bool((scores.uncertainty >= 1).all())
    empty = head.score(data.hidden[:0])
    assert all(t.shape == (0,) for t in empty)


def test_scores_do_not_depend_on_strides(make_data, fit_head):
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    strided = torch.stack([data.hidden, torch.full_like(data.hidden, NAN)], dim=2)[..., 0]
    assert not strided.is_contiguous()
    for got, expected in zip(head.score(strided, backend="torch"), head.score(data.hidden, backend="torch"),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[20], [1, 2, 0, 5, 12], [1, 1, 18], [3] * 100])
def test_pairs_are_those_of_the_reference(make_data, fit_head, sizes):
    data = make_data()
    head = fit_head(data)
    hidden = data.hidden[: sum(sizes)]
    scores = head.score_pairs(hidden, torch.tensor(sizes), backend="torch")
    phi = head.feature_map(hidden) * head.feature_map.feature_scale
    g, v = [], []
    for group in phi.split(sizes):
        i, j = torch.triu_indices(len(group), len(group), 1)
        logit, variance = reference.pair_variance(group, head.beta, head.posterior.factor())
        g.append(logit[i, j])
        v.append(variance[i, j])
    # float64 rows and features against β and U rounded to float32
    torch.testing.assert_close(scores.logit.double(), torch.cat(g), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.variance.double(), torch.cat(v), rtol=1e-5, atol=1e-9)
    u = reference.uncertainty(scores.variance, head.config.resolved_amplitude)
    torch.testing.assert_close(scores.uncertainty, u)
    torch.testing.assert_close(scores.preference, scores.logit / u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_responses_have_exactly_no_difference(make_data, fit_head, dtype):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, dtype=dtype)
    hidden = data.hidden[:4].clone()
    hidden[3] = hidden[1]
    scores = head.score_pairs(hidden, torch.tensor([4]))
    at = [(i, j) for i in range(4) for j in range(i + 1, 4)].index((1, 3))
    assert float(scores.logit[at]) == 0
    assert float(scores.variance[at]) == 0
    assert float(scores.uncertainty[at]) == 1


def test_pairs_are_for_difference_mode(make_data, fit_head):
    data = make_data()
    with pytest.raises(InputError, match=r"^mode: got concat"):
        fit_head(data, mode="concat").score_pairs(data.hidden, torch.tensor([300]))


def test_uncertainty_is_larger_out_of_distribution(make_data, fit_head):
    data = make_data(pairs=2000, dtype=torch.float32)
    head = fit_head(data, num_features=256, mode="concat", kernel_scale=3.0)
    near = head.score(make_data(seed=5, dtype=torch.float32).hidden).uncertainty
    far = head.score(make_data(seed=5, shift=6.0, dtype=torch.float32).hidden).uncertainty
    assert float(far.quantile(0.05)) > float(near.quantile(0.95))


# -- non-finite rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_non_finite_row_is_named(make_data, fit_head, bad):
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    hidden = data.hidden.clone()
    hidden[5, 2] = hidden[17, 0] = bad
    for call in (lambda: head.score(hidden), lambda: head.score_pairs(hidden, torch.tensor([300]))):
        with pytest.raises(NonFiniteError, match=r"^hidden: got NaN or Inf in 2 of 300 rows \(5, 17\)") as error:
            call()
        assert error.value.rows == (5, 17)
        assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_tanh_does_not_hide_an_infinite_row(make_data, fit_head, bad, backend):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, mode="concat", layer_size=16, activation="tanh")
    hidden = data.hidden.clone()
    hidden[5, 2] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 300 rows"):
        head.score(hidden, backend=backend)


def test_keeping_a_non_finite_row_isolates_it(make_data, fit_head):
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    hidden = data.hidden.clone()
    hidden[5] = NAN
    clean, kept = head.score(data.hidden), head.score(hidden, nonfinite="keep")
    others = torch.arange(300) != 5
    for a, b in zip(clean, kept, strict=True):
        assert not bool(b[5].isfinite())
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("row", [0, 2, 4])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_keeping_a_non_finite_row_isolates_its_group(make_data, fit_head, row, backend):
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    hidden, sizes = data.hidden[:10].clone(), torch.tensor([5, 5])
    clean = head.score_pairs(hidden, sizes, backend=backend)
    hidden[row] = NAN
    kept = head.score_pairs(hidden, sizes, backend=backend, nonfinite="keep")
    touched = torch.tensor([row in (i, j) for i in range(5) for j in range(i + 1, 5)])
    good = torch.cat([hidden[:row], hidden[row + 1 :]])
    again = head.score_pairs(good, torch.tensor([4, 5]), backend=backend)
    for a, b, c in zip(clean, kept, again, strict=True):
        assert bool(b[:10][touched].isnan().all())
        assert torch.equal(a[10:], b[10:])
        assert torch.equal(b[:10][~touched], c[:6]), "as if the row were not there, bit for bit"
        torch.testing.assert_close(c[:6], a[:10][~touched], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_keeping_bad_rows_of_many_groups(make_data, fit_head, backend):
    """Groups without a good pair, with one, with a single row; several bad rows in one."""
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    sizes = [3, 1, 2, 4, 2, 1]
    bad = {0: NAN, 1: math.inf, 3: NAN, 4: -math.inf, 7: NAN}
    hidden = data.hidden[: sum(sizes)].clone()
    clean = head.score_pairs(hidden, torch.tensor(sizes), backend=backend)
    for row, value in bad.items():
        hidden[row] = value
    kept = head.score_pairs(hidden, torch.tensor(sizes), backend=backend, nonfinite="keep")
    start, usable = 0, []
    for k in sizes:
        rows = range(start, start + k)
        usable += [i not in bad and j not in bad for i in rows for j in rows if i < j]
        start += k
    for a, b in zip(clean, kept, strict=True):
        assert b.isfinite().tolist() == usable
        torch.testing.assert_close(b[torch.tensor(usable)], a[torch.tensor(usable)], rtol=1e-4, atol=1e-6)


# -- learning --------------------------------------------------------------------------------------------------------


def test_new_data_is_in_the_next_score(make_data, fit_head):
    data, more = make_data(dtype=torch.float32), make_data(seed=8, shift=4.0, dtype=torch.float32)
    head = fit_head(data, kernel_scale=3.0)
    sizes = torch.tensor([300])
    before, pairs_before = head.score(more.hidden).variance, head.score_pairs(more.hidden[:300], sizes).variance
    head.update(more.hidden, more.labels, pairs=more.pairs)
    assert head.posterior.stale
    after, pairs_after = head.score(more.hidden).variance, head.score_pairs(more.hidden[:300], sizes).variance
    assert not head.posterior.stale
    assert head.posterior.count == 1000
    assert bool((pairs_after <= pairs_before * (1 + 1e-4)).all())
    assert float(pairs_after.mean()) < 0.5 * float(pairs_before.mean())
    assert float(after.mean()) < float(before.mean())


def test_scoring_changes_nothing(make_data, fit_head):
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    first = head.score(data.hidden)
    gram, weights = head.posterior.gram.clone(), head.weights
    for _ in range(3):
        again = head.score(data.hidden)
        head.score_pairs(data.hidden, torch.tensor([300]))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(head.posterior.gram, gram)
    assert head.weights is weights  # not even rebuilt


def test_updating_is_fitting_the_posterior_on_all_data(make_data, fit_head):
    data = make_data()
    head = fit_head(data)
    part = FrozenHead(head.config, head.feature_map, head.beta, posterior=type(head.posterior)(64))
    for index in torch.arange(500).split(120):
        part.update(data.hidden, data.labels[index], pairs=data.pairs[index])
    assert part.posterior.count == head.posterior.count
    scale = float(head.posterior.precision.abs().max())
    # the accumulate pass may run in float32 on some backends: 500 products of order 1
    torch.testing.assert_close(part.posterior.precision, head.posterior.precision, rtol=0, atol=2e-3 * scale)


def test_a_bad_update_leaves_the_head_as_it_was(make_data, fit_head):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, features="linear", likelihood="gaussian")
    before = head.score(data.hidden)
    hidden = data.hidden.clone()
    hidden[3] = NAN
    with pytest.raises(NonFiniteError):
        head.update(hidden, data.labels, pairs=data.pairs)
    hidden[3] = 1e30  # finite, but its outer product is not
    with pytest.raises(NonFiniteError):
        head.update(hidden, data.labels, pairs=data.pairs)
    with pytest.raises(InputError, match=r"^labels: "):
        head.update(data.hidden, data.labels[:-1], pairs=data.pairs)
    assert head.posterior.count == 500
    assert all(torch.equal(a, b) for a, b in zip(before, head.score(data.hidden), strict=True))


def test_a_head_needs_a_posterior_or_weights():
    head = SNGPHead(8, num_features=4, length_scale=1.0)
    with pytest.raises(InputError, match=r"^posterior, weights: got neither"):
        FrozenHead(head.config, head.freeze_features(torch.float32), head.beta)


def test_a_moved_head_scores_and_learns_the_same(make_data, fit_head):
    data = make_data(dtype=torch.float32)
    head = fit_head(data)
    moved = head.to("cpu")
    assert all(torch.equal(a, b) for a, b in zip(head.score(data.hidden), moved.score(data.hidden), strict=True))
    moved.update(data.hidden, data.labels, pairs=data.pairs)
    assert (head.posterior.count, moved.posterior.count) == (500, 1000)  # its own copy


def test_orthogonal_heads_fit_and_serve(make_data):
    data = make_data()
    head = SNGPHead(16, num_features=40, orthogonal=True)
    frozen, report = fit(head, data.hidden, data.labels, pairs=data.pairs, dtype=torch.float32, backend="torch")
    assert report.converged
    assert bool(frozen.score(data.hidden).variance.isfinite().all())
