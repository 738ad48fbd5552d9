"""Whole numbers and factors: what int8 heads are made of, and what they keep of a fitted head's uncertainties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rmcore import ops
from rmcore._base.errors import CheckpointError, FactorizationError
from rmcore.head import SNGPHead
from rmcore.head.checkpoint import load_head, save_head
from rmcore.head.fit import fit
from rmcore.ops import reference
from rmcore.ops.quantize import balance_columns, dequantize_rows, quantize_rows
from rmcore.ops.weights import HeadWeights


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (65, 7)])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_rows_are_kept_to_half_a_step(shape, size):
    matrix = draw(*shape).double() * size
    whole, scale = quantize_rows(matrix)
    assert whole.dtype == torch.int8
    assert int(whole.abs().amax()) == 127
    assert bool((whole.abs().amax(1) == 127).all())
    error = (dequantize_rows(whole, scale).double() - matrix).abs()
    assert bool((error <= scale.double()[:, None] * (0.5 + 1e-5)).all())


@pytest.mark.parametrize("value", [0.0, 1e-60])
def test_a_row_of_zeros_stays_zero(value):
    whole, scale = quantize_rows(torch.full((2, 5), value, dtype=torch.float64))
    assert not bool(whole.any())
    assert bool((scale == 1).all())


@pytest.mark.parametrize("size", [1, 127, 129, 300])
@pytest.mark.parametrize("size_of_u", [1e-15, 1.0, 1e12])
def test_the_factor_is_kept_at_a_power_of_two_whatever_the_ridge(size, size_of_u):
    head = SNGPHead(8, num_features=size, length_scale=3.0)
    frozen = head.freeze_features(torch.int8)
    u = (torch.eye(size) + draw(size, size).tril(-1) / 100).double() * size_of_u
    weights = HeadWeights.build(frozen, torch.zeros(size), 0.0, u, 0.4)
    assert math.frexp(weights.factor_scale)[0] == 0.5
    assert 2**9 <= float(weights.factor_diagonal.max()) <= 2**10
    hidden = torch.randint(-127, 128, (10, 8), generator=torch.Generator().manual_seed(3)) / 64
    hidden[:, 0] = 127 / 64  # rows that are whole numbers already: what is left is the rounding of c and of U
    phi = frozen(hidden.double()) * frozen.feature_scale
    exact = reference.variance(phi, u)
    # c is off by half of 1/127 at most, an entry of U by half of 1/127 of its row's largest.
    off = size_of_u * math.sqrt(size) * frozen.feature_scale / 254 * (1.5 + size / 100)
    for backend in ("torch", "cpu"):
        v = ops.score(hidden, weights, backend=backend).variance.double()
        assert bool((v.sqrt() - exact.sqrt()).abs().max() <= off), backend
        assert float(v.max()) > 0


def test_columns_are_centred_and_brought_together_by_powers_of_two():
    rows = draw(500, 12)
    rows[:, 3] = rows[:, 3] * 100 + 1000
    rows[:, 5] = 7.0
    shift, scale = balance_columns(rows)
    torch.testing.assert_close(shift, rows.mean(0), rtol=1e-4, atol=1e-5)
    assert bool((scale.log2() == scale.log2().round()).all())
    assert float(scale[5]) == 1
    spread = ((rows - shift) * scale).abs().amax(0)
    assert 5 < float(spread[3] / spread[0]) < 20  # √100: weights take the other half
    constant = balance_columns(torch.full((4, 3), 2.0))
    assert torch.equal(constant[1], torch.ones(3))


@pytest.mark.parametrize("layer", [{}, {"layer_size": 12}])
@pytest.mark.parametrize("mode", ["difference", "concat"])
def test_a_fitted_head_keeps_its_uncertainties(make_data, fit_head, layer, mode):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, dtype=torch.int8, mode=mode, num_features=256, kernel_scale=3.0, **layer)
    sizes = torch.full((len(data.hidden) // 4,), 4, dtype=torch.int64)
    hidden = data.hidden[: 4 * len(sizes)]
    phi = head.feature_map(hidden.double()) * head.feature_map.feature_scale
    if mode == "difference":
        served = head.score_pairs(hidden, sizes)
        i, j = torch.triu_indices(4, 4, 1)
        groups = phi.view(len(sizes), 4, -1)
        phi = (groups[:, i] - groups[:, j]).flatten(0, 1)
    else:
        served = head.score(hidden)
    v = reference.variance(phi, head.posterior.factor())
    u = reference.uncertainty(v, head.config.resolved_amplitude)
    # c is rounded to 1/127: 0.23% a feature, which adds up to 0.32% · 2 / √D of v, four of that for the worst of many.
    assert float(((served.uncertainty - u) / u).abs().max()) < 4 * 0.0064 / math.sqrt(256)
    g = phi @ head.beta + head.beta0
    assert float((served.logit - g).abs().max()) < 2e-3 * float(g.abs().max())


def score_error(head, hidden, calibration):
    frozen = head.freeze_features(torch.int8, calibration=calibration)
    weights = HeadWeights.build(frozen, torch.ones(100), 0.0, torch.eye(100).double(), 0.4)
    g = ops.score(hidden, weights, backend="cpu").logit.double()
    return float((g - frozen(hidden.double()) @ weights.beta.double()).abs().max())


@pytest.mark.parametrize("size", [10.0, 300.0, 1e5])
def test_massive_activations_leave_the_others_their_digits(size):
    """A few columns far beyond the rest, as language models have: in all rows, in one that was not seen, or learned."""
    head = SNGPHead(64, num_features=100, length_scale=12.0)
    plain, other = draw(400, 64), draw(400, 64, seed=1)
    base = score_error(head, other, plain)
    everywhere = plain.clone()
    everywhere[:, [3, 40]] = everywhere[:, [3, 40]] * 2 + torch.tensor([size, -size])
    one = plain.clone()
    one[5, 7] = size
    unseen = other.clone()
    unseen[::3, 7] = size
    # A float32 phase of `size` is exact to half a unit in its last place, for each of 100 features.
    bound = 4 * base + 100 * 2 * math.pi * size * 2**-24
    for rows, calibration in (
        (everywhere, None),
        (everywhere, everywhere),
        (unseen, None),
        (unseen, plain),
        (unseen, one),
        (other, one),
    ):
        assert score_error(head, rows, calibration) <= bound


def test_one_wild_calibration_row_does_not_coarsen_the_weights():
    rows = draw(400, 64)
    rows[5, 7] = 1e5
    assert balance_columns(rows)[1][7] == 1 / 8


def test_the_float32_map_has_the_same_features():
    head = SNGPHead(40, num_features=90, length_scale=6.0)
    frozen = head.freeze_features(torch.int8, calibration=draw(100, 40) * 3 + 1)
    plain = frozen.dequantized()
    assert plain.dtype == torch.float32
    assert plain.dequantized() is plain
    hidden = draw(30, 40).double() * 3 + 1
    torch.testing.assert_close(plain(hidden), frozen(hidden), rtol=0, atol=1e-5)


@pytest.mark.parametrize("include_posterior", [True, False])
def test_a_loaded_head_scores_bit_for_bit(make_data, fit_head, tmp_path, include_posterior):
    data = make_data(dtype=torch.float32)
    head = fit_head(data, dtype=torch.int8, num_features=130)
    save_head(head, tmp_path / "head", include_posterior=include_posterior)
    loaded = load_head(tmp_path / "head")
    assert loaded.dtype == torch.int8
    sizes = torch.tensor([5, 8])
    mine, theirs = (one.score_pairs(data.hidden[:13], sizes) for one in (head, loaded))
    assert torch.equal(mine.logit, theirs.logit)
    assert torch.equal(mine.variance, theirs.variance)
    if include_posterior:
        loaded.update(data.hidden[:2], torch.ones(1), pairs=torch.tensor([[0, 1]]))
        assert bool(loaded.score_pairs(data.hidden[:13], sizes).uncertainty.isfinite().all())


def test_a_folder_without_the_diagonal_is_refused(make_data, fit_head, tmp_path):
    import hashlib
    import json

    from safetensors.torch import load_file, save_file

    save_head(fit_head(make_data(dtype=torch.float32), dtype=torch.int8), tmp_path / "head")
    file = tmp_path / "head" / "head.safetensors"
    tensors = load_file(file)
    del tensors["factor_diagonal"]
    save_file(tensors, file)
    document = tmp_path / "head" / "rmcore.json"
    values = json.loads(document.read_text())
    values["head"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    document.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="factor_diagonal"):
        load_head(tmp_path / "head")


def test_copies_and_sizes():
    head = SNGPHead(16, num_features=200, length_scale=4.0)
    frozen = head.freeze_features(torch.int8, calibration=draw(9, 16))
    weights = HeadWeights.build(frozen, torch.ones(200), 0.0, torch.eye(200).double(), 0.4)
    wide = HeadWeights.build(head.freeze_features(torch.float32), torch.ones(200), 0.0, torch.eye(200).double(), 0.4)
    assert weights.nbytes() < 0.32 * wide.nbytes()
    copy = weights.clone()
    assert copy.factor.data_ptr() != weights.factor.data_ptr()
    assert copy.factor_diagonal.data_ptr() != weights.factor_diagonal.data_ptr()
    assert torch.equal(copy.dense_factor, weights.dense_factor)
    assert replace(weights, amplitude=0.5).factor_diagonal is weights.factor_diagonal


def test_a_factor_that_is_not_finite_is_refused():
    frozen = SNGPHead(8, num_features=4, length_scale=3.0).freeze_features(torch.int8)
    with pytest.raises(FactorizationError, match=r"^factor: .*Raise the ridge"):
        HeadWeights.build(frozen, torch.zeros(4), 0.0, torch.eye(4) * math.inf, 0.4)


def test_the_posterior_is_fitted_with_the_rounded_projection():
    hidden = draw(60, 10)
    labels = (hidden[:, 0] > 0).float()
    head, _ = fit(SNGPHead(10, num_features=40, mode="concat"), hidden, labels, dtype=torch.int8)
    phi = head.feature_map(hidden.double()) * head.feature_map.feature_scale
    p = torch.sigmoid(phi @ head.beta + head.beta0)
    gram = (phi * (p * (1 - p))[:, None]).T @ phi
    torch.testing.assert_close(head.posterior.gram.tril(), gram.tril(), rtol=1e-4, atol=1e-5)
