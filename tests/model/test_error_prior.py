"""What is known of a head's errors before any verdict, and the sketch of its training rows."""

import json

import pytest
import torch

from rmcore._base.errors import CheckpointError, InputError
from rmcore.head.config import HeadConfig
from rmcore.head.fit import fit, upgrade
from rmcore.head.sngp import SNGPHead
from rmcore.model.error_prior import (
    FEATURES,
    error_features,
    read_error_prior,
    row_distance,
    sketch_rows,
    write_error_prior,
)
from rmcore.model.error_prior_fit import error_prior_of, error_prior_on, fit_error_prior
from rmcore.model.training_pairs import Preference


def data(count=240, concat=False):
    """Pairs whose better response has the larger first entry, but for noise: close calls are errors."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * count, 4, generator=random)
    if concat:
        rows[1::2] = -rows[::2]
        better = rows[::2, 0] + 0.7 * torch.randn(count, generator=random) > 0
        return rows, torch.stack([better, ~better], 1).flatten().float(), None
    gap = rows[::2, 0] - rows[1::2, 0]
    better = (gap + 0.7 * torch.randn(count, generator=random) > 0).float()
    return rows, better, torch.arange(2 * count).view(-1, 2)


@pytest.mark.parametrize("concat", [False, True])
def test_it_learns_that_close_calls_are_errors(concat):
    rows, labels, pairs = data(concat=concat)
    config = HeadConfig(4, mode="concat" if concat else "difference", features="linear")
    prior = fit_error_prior(config, rows, labels, pairs, torch.zeros(240))
    weight = dict(zip(("offset", *FEATURES), prior.mean.tolist(), strict=True))
    assert weight["log margin"] < -0.4
    assert prior.pairs == 240
    assert 0.05 < prior.error_rate < 0.35
    assert prior.sketch is not None
    assert prior.sketch.shape == (256, 4)


def test_a_sketch_covers_the_rows_and_equal_rows_count_once():
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    few, many = sketch_rows(rows, 10), sketch_rows(rows, 100)
    assert row_distance(rows, few).max() > row_distance(rows, many).max() > 0
    # Greedy k-centre: the centres are at least as far apart as any row is from them.
    apart = torch.cdist(many, many).fill_diagonal_(torch.inf).min()
    assert apart >= row_distance(rows, many).max()
    assert sketch_rows(rows[:1].expand(50, 3), 10).shape == (1, 3)
    assert torch.equal(sketch_rows(rows, 10), few)


def test_features_of_known_pairs():
    g, v, p = (torch.tensor(values).double() for values in ([2.0, -1.0], [0.5, 2.0], [1.0, -0.5]))
    columns = {"log_length_ratio": torch.tensor([-0.7, -0.3])}
    found = error_features(g, v, p, columns)
    assert found[:, 0].tolist() == pytest.approx([-0.693147, 0.693147], abs=1e-5)
    assert found[:, 1].tolist() == pytest.approx([0.0009995, -0.691149], abs=1e-5)
    assert bool(found[:, 2].isnan().all())
    assert found[:, 3:].flatten().tolist() == pytest.approx([-0.7, 0.7, 0.3, 0.3])


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("decided", [0, 1, 2, 12])
def test_ties_alone_teach_nothing(concat, decided, tmp_path):
    """What is made of them can be saved and read: no mean of no errors, no deviation of a single one."""
    rows, labels, pairs = data(count=40, concat=concat)
    labels[(2 if concat else 1) * decided :] = 0.5
    config = HeadConfig(4, mode="concat" if concat else "difference", features="linear")
    prior = fit_error_prior(config, rows, labels, pairs, torch.zeros(40), sketch=8)
    values = json.loads(json.dumps(write_error_prior(prior, tmp_path), allow_nan=False))
    assert read_error_prior(tmp_path, values, 4).pairs == (decided if decided > 1 else 0)
    preferences = [Preference("p", f"a{k}", f"b{k}") for k in range(40)]
    found = error_prior_of(config, preferences, rows, labels, pairs)
    assert (found is None) is (decided < 10)


def test_it_is_saved_and_a_damaged_one_is_named(tmp_path):
    rows, labels, pairs = data()
    prior = fit_error_prior(HeadConfig(4, features="linear"), rows, labels, pairs, torch.zeros(240), sketch=8)
    values = json.loads(json.dumps(write_error_prior(prior, tmp_path)))
    again = read_error_prior(tmp_path, values, 4)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in prior.tensors().items())
    assert (again.pairs, again.error_rate) == (prior.pairs, prior.error_rate)
    for wrong, width in (({**values, "features": ["x"]}, 4), (values, 5), ({}, 4), (None, 4)):
        with pytest.raises(CheckpointError, match="error_prior"):
            read_error_prior(tmp_path, wrong, width)
    (tmp_path / "error_prior.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_error_prior(tmp_path, values, 4)


def test_a_given_head_is_asked_about_pairs_its_posterior_has_not_seen():
    rows, labels, pairs = data()
    config, beta, seen = HeadConfig(4, features="linear"), torch.ones(4), []

    def fitted(some, own_labels, own_pairs):
        seen.append(len(own_pairs))
        return upgrade(some, own_pairs, beta, labels=own_labels, config=config)

    prior = fit_error_prior(config, rows, labels, pairs, torch.zeros(240), fitted=fitted)
    assert seen == [192] * 5
    logit = (rows[pairs[:, 0]] - rows[pairs[:, 1]]).sum(1)
    assert prior.error_rate == pytest.approx(float(((logit > 0) != (labels > 0.5)).double().mean()))
    assert bool(torch.linalg.eigvalsh(prior.precision).gt(0).all())


def test_of_a_trained_layer_it_is_learned_from_pairs_held_out():
    rows, labels, pairs = data()
    config = HeadConfig(4, features="linear")
    head, _ = fit(SNGPHead(config), rows, labels, pairs=pairs)
    others = data(40)
    prior = error_prior_on(head, rows, *others, torch.zeros(40), sketch=8)
    assert prior.pairs == 40
    assert prior.sketch.shape == (8, 4)
    with pytest.raises(InputError, match="at least 10"):
        error_prior_on(head, rows, *others, torch.zeros(9))


def test_too_few_pairs():
    rows, labels, pairs = data(8)
    with pytest.raises(InputError, match="at least 10"):
        fit_error_prior(HeadConfig(4, features="linear"), rows, labels, pairs, torch.zeros(8))
