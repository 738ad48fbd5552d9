"""The row posterior: its formula, its range, what it measures, and that it goes wherever the head goes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.old_folders import as_0_1_0_wrote_it

from rmcore._base.errors import CheckpointError, InputError, NonFiniteError
from rmcore._base.files import digest_file
from rmcore.head import FrozenHead, HeadConfig, SNGPHead
from rmcore.head.checkpoint import load_head, save_head
from rmcore.head.fit import fit, fit_amplitude, upgrade
from rmcore.ops import reference
from rmcore.ops.backends import cpu
from rmcore.ops.backends import torch as plain

BACKENDS = {"torch": plain, "cpu": cpu}
KINDS = [
    {},
    {"kernel_scale": 3.0, "num_features": 129},
    {"features": "linear"},
    {"layer_size": 12, "features": "linear"},
    {"layer_size": 12, "activation": "tanh", "layernorm": True},
    {"row_ridge": 1.0},
]


@pytest.fixture(scope="module")
def data(make_data):
    return make_data(rows=120, pairs=200, dtype=torch.float32)


@pytest.fixture(scope="module")
def head(data, fit_head):
    return fit_head(data, dtype=torch.float32)


def inverse(head: FrozenHead, train: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """N by a dense inverse in float64, from the definition."""
    phi, seen = (head.feature_map(x.double()) * head.feature_map.feature_scale for x in (hidden, train))
    linear = head.config.features == "linear"
    prior = float(seen.square().sum(1).mean()) if linear else head.config.kernel_scale**2
    s = head.config.row_ridge * prior
    precision = s * torch.eye(phi.shape[1], dtype=torch.float64) + seen.T @ seen
    left = s * torch.einsum("nd,de,ne->n", phi, torch.linalg.inv(precision), phi)
    return left / (phi.square().sum(1) if linear else prior)


@pytest.mark.parametrize("kind", KINDS)
def test_novelty_is_the_formula_by_a_dense_inverse(data, fit_head, kind):
    head = fit_head(data, dtype=torch.float32, **kind)
    seen = data.hidden[data.pairs.flatten().unique()]
    hidden = torch.cat([data.hidden[:20], torch.randn(30, data.hidden.shape[1]) * 3])
    expected = inverse(head, seen, hidden)
    for backend in BACKENDS:
        if BACKENDS[backend].unavailable("score", hidden.device, torch.float32) is None:
            n = head.novelty(hidden, backend=backend)
            assert n.dtype == torch.float32
            torch.testing.assert_close(n.double(), expected, rtol=2e-4, atol=2e-5)
    phi = head.feature_map(hidden.double()) * head.feature_map.feature_scale
    k = None if head.config.features == "linear" else head.config.kernel_scale**2
    train = head.feature_map(seen.double()) * head.feature_map.feature_scale
    formula = reference.novelty(phi, train, ridge=head.config.row_ridge, prior=k)
    torch.testing.assert_close(formula, expected)
    # Never more than the prior: ‖φ‖² / k(x, x), which is 1 for linear features and 1 ± 1/√(2D) for random ones.
    bound = phi.square().sum(1) / (phi.square().sum(1) if k is None else k)
    assert bool((n > 0).all())
    assert bool((n.double() <= bound * (1 + 1e-4)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_serving_dtypes_agree_with_float32(data, fit_head, dtype):
    hidden = torch.cat([data.hidden[:40], 4 * torch.randn(40, data.hidden.shape[1])])
    head = fit_head(data, dtype=dtype)
    n = [head.novelty(hidden, backend=backend) for backend in ("torch", "auto")]
    torch.testing.assert_close(n[0], n[1], rtol=0.03, atol=0.03)
    exact = inverse(head, data.hidden[data.pairs.flatten().unique()], hidden).float()
    torch.testing.assert_close(n[0], exact, rtol=0.03, atol=0.03)


def test_rows_seen_are_near_and_rows_unlike_them_are_far():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(60, 24, generator=generator)
    pairs = torch.arange(60).view(30, 2)
    config = HeadConfig(24, num_features=1024)
    head, _ = fit(SNGPHead(config), train, torch.ones(30), pairs=pairs, dtype=torch.float32)
    away = torch.nn.functional.normalize(torch.randn(40, 24, generator=generator), dim=1)
    seen = head.novelty(train)
    steps = [head.novelty(train[:40] + step * 5 * away).median() for step in (0.1, 0.5, 1, 2, 8)]
    assert float(seen.max()) < 0.05
    assert all(a < b for a, b in zip([seen.median(), *steps], steps, strict=False))
    # Far away the kernel is 0: all of the prior is left, which random features have up to 1/√(2D).
    assert float((head.novelty(train[:40] + 1000 * away) - 1).abs().max()) < 0.3
    assert float((head.novelty(train[:40] + 1000 * away).mean() - 1).abs()) < 0.06


def test_a_pairs_novelty_is_the_mean_of_its_rows(data, head):
    sizes = torch.tensor([3, 1, 4])
    scores = head.score_pairs(data.hidden[:8], sizes, novelty=True, dtype=torch.float64)
    n = scores.row_novelty
    assert n.shape == (8,)
    first, second = torch.tensor([0, 0, 1, 4, 4, 4, 5, 5, 6]), torch.tensor([1, 2, 2, 5, 6, 7, 6, 7, 7])
    assert torch.equal(scores.novelty, (n[first] + n[second]) / 2)
    assert torch.equal(n.float(), head.novelty(data.hidden[:8]))
    plain = head.score_pairs(data.hidden[:8], sizes, dtype=torch.float64)
    assert plain.novelty is None
    assert plain.row_novelty is None
    assert len(scores) == len(plain) == 4
    assert all(torch.equal(a, b) for a, b in zip(scores, plain, strict=True))


def test_a_bad_row_is_nan_and_alone(data, head):
    hidden = data.hidden[:6].clone()
    hidden[2, 3] = torch.nan
    n = head.novelty(hidden)
    assert n.isnan().tolist() == [False, False, True, False, False, False]
    good = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(n[good], head.novelty(data.hidden[:6])[good])
    scores = head.score_pairs(hidden, torch.tensor([3, 3]), novelty=True, nonfinite="keep")
    assert scores.novelty.isnan().tolist() == [False, True, True, False, False, False]


def test_who_has_none_says_so(data, fit_head):
    old = fit_head(data, dtype=torch.float32, row_ridge=None)
    assert old.rows is None
    with pytest.raises(InputError, match="novelty: got a head without row posterior"):
        old.novelty(data.hidden)
    with pytest.raises(InputError, match="novelty: got a head without row posterior"):
        old.score_pairs(data.hidden[:2], torch.tensor([2]), novelty=True)
    concat = fit_head(data, dtype=torch.float32, mode="concat")
    assert concat.config.row_ridge is None
    assert concat.rows is None
    with pytest.raises(InputError, match=r"concat-mode head.*In concat mode v measures distance"):
        concat.novelty(data.hidden)
    with pytest.raises(InputError, match="row_ridge"):
        HeadConfig(4, row_ridge=0.0)


# -- learning --------------------------------------------------------------------------------------------------------


def test_an_update_is_a_refit_with_the_rows(data, fit_head):
    head = fit_head(data, dtype=torch.float32)
    new = torch.randn(10, data.hidden.shape[1], generator=torch.Generator().manual_seed(5)) + 3
    pairs, weight = torch.tensor([[0, 1], [2, 3], [0, 4], [8, 9]]), torch.tensor([1.0, 0.5, 1.0, 0.0])
    before, seen = head.novelty(new), data.hidden[data.pairs.flatten().unique()]
    head.update(new, torch.ones(4), pairs=pairs, sample_weight=weight)
    assert head.rows.count == len(seen) + 5  # a row of several pairs counts once, of none with weight not at all
    expected = inverse(head, torch.cat([seen, new[:5]]), new)
    torch.testing.assert_close(head.novelty(new).double(), expected, rtol=2e-4, atol=2e-5)
    assert bool((head.novelty(new)[:5] < before[:5] / 4).all())
    bad = torch.full_like(new, torch.nan)
    with pytest.raises(NonFiniteError):
        head.update(bad, torch.ones(4), pairs=pairs)
    torch.testing.assert_close(head.novelty(new).double(), expected, rtol=2e-4, atol=2e-5)


def test_ways_to_a_head_keep_the_row_posterior(data, head):
    scores = head.score_pairs(data.hidden[:40], torch.tensor([2] * 20))
    tuned = fit_amplitude(head, scores.logit, scores.variance, (scores.logit > 0).float())
    n = head.novelty(data.hidden)
    assert torch.equal(tuned.novelty(data.hidden), n)
    moved = head.to("cpu")
    assert torch.equal(moved.novelty(data.hidden), n)
    assert moved.rows.weights.map is moved.feature_map
    of_others = upgrade(data.hidden, data.pairs, torch.ones(data.hidden.shape[1]))
    torch.testing.assert_close(
        of_others.novelty(data.hidden).double(),
        inverse(of_others, data.hidden[data.pairs.flatten().unique()], data.hidden),
        rtol=5e-3,
        atol=5e-3,
    )


# -- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("include_posterior", [True, False])
def test_a_loaded_head_is_bit_for_bit_as_novel(data, fit_head, tmp_path, dtype, include_posterior):
    head = fit_head(data, dtype=dtype)
    save_head(head, tmp_path / "head", include_posterior=include_posterior)
    again = load_head(tmp_path / "head")
    assert torch.equal(again.novelty(data.hidden), head.novelty(data.hidden))
    if not include_posterior:
        with pytest.raises(InputError, match="include_posterior"):
            again.rows.with_rows(data.hidden)
        return
    assert again.rows.count == head.rows.count
    assert torch.equal(
        again.rows.with_rows(data.hidden).novelty(data.hidden), head.rows.with_rows(data.hidden).novelty(data.hidden)
    )


def test_a_head_of_before_still_loads(data, head, tmp_path):
    """As an older version wrote it: no ``row_ridge`` in the configuration, no ``rows``, no tensors of them."""
    save_head(head, tmp_path / "head")
    assert "row_factor" in load_file(tmp_path / "head" / "head.safetensors")
    as_0_1_0_wrote_it(tmp_path / "head")
    old = load_head(tmp_path / "head")
    assert old.rows is None
    assert old.config.row_ridge is None
    assert "row_ridge" not in old.config.to_dict()
    assert torch.equal(old.score(data.hidden).variance, head.score(data.hidden).variance)
    with pytest.raises(InputError, match="without row posterior"):
        old.novelty(data.hidden)
    save_head(old, tmp_path / "again")
    assert load_head(tmp_path / "again").rows is None


def test_damaged_row_tensors_are_found(head, tmp_path):
    def damaged(change):
        save_head(head, tmp_path / "head")
        file, described = tmp_path / "head" / "head.safetensors", tmp_path / "head" / "rmcore.json"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        values = json.loads(described.read_text())
        values["head"]["sha256"] = digest_file(file)
        described.write_text(json.dumps(values))
        load_head(tmp_path / "head")

    with pytest.raises(CheckpointError, match="row_factor"):
        damaged(lambda tensors: tensors.pop("row_factor"))
    with pytest.raises(CheckpointError, match="row_gram"):
        damaged(lambda tensors: tensors.pop("row_gram"))
    with pytest.raises(CheckpointError, match=r"row_factor.*NaN"):
        damaged(lambda tensors: tensors["row_factor"].fill_(torch.nan))
