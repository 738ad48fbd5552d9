"""Training the layer: the loss falls, the bound holds, the same seed is the same run."""

from __future__ import annotations

import math

import pytest
import torch

from rmcore._base.errors import InputError, NonFiniteError
from rmcore.head import SNGPHead
from rmcore.head.fit import fit
from rmcore.model import training
from rmcore.model.training import train_layer

BOUND = 0.95


@pytest.fixture(scope="module")
def noisy(make_data):
    """Four channels that matter among 28 louder ones that do not: what a trained W can find and a kernel cannot."""

    def make(seed, pairs=1200):
        data = make_data(rows=800, size=32, pairs=pairs, seed=seed, dtype=torch.float32)
        data.hidden[:, 4:] *= 2
        return data

    return make


def head_of(h=32, **config):
    return SNGPHead(h, **({"num_features": 128, "layer_size": 8, "kernel_scale": 3.0, "ridge": 0.3} | config))


def norm(head):
    return float(torch.linalg.matrix_norm(head.normalized_weight(converged=True).detach().double(), 2))


def held_out_loss(head, data):
    rewards = head.score(data.hidden, backend="torch").logit
    g = rewards[data.pairs[:, 0]] - rewards[data.pairs[:, 1]]
    return float(torch.nn.functional.binary_cross_entropy_with_logits(g, data.labels))


# -- the layer -------------------------------------------------------------------------------------------------------


def test_training_the_layer_beats_a_random_one(noisy):
    data, held_out = noisy(0), noisy(1)
    random = head_of()
    trained = head_of()
    report = train_layer(trained, data.hidden, data.labels, data.pairs, epochs=8, batch_size=64, lr=8e-3)
    assert len(report.losses) == 8
    assert report.steps == 8 * math.ceil(1200 / 64)
    assert report.best_epoch == 8
    assert report.validation_losses == ()
    assert report.losses[-1] < report.losses[0] - 0.1
    assert norm(trained) <= BOUND * (1 + 1e-5)
    losses = [
        held_out_loss(fit(h, data.hidden, data.labels, pairs=data.pairs, dtype=torch.float32)[0], held_out)
        for h in (random, trained)
    ]
    assert losses[1] < losses[0] - 0.05


def test_the_bound_holds_at_every_step(noisy, monkeypatch):
    """What a training forward really multiplies by, with σ from one step of power iteration."""
    data = noisy(0)
    norms, normalized = [], SNGPHead.normalized_weight

    def watched(self, *, converged=False):
        weight = normalized(self, converged=converged)
        norms.append(float(torch.linalg.matrix_norm(weight.detach(), 2)))
        return weight

    head = head_of()
    with torch.no_grad():
        head.weight.mul_(5)
    monkeypatch.setattr(SNGPHead, "normalized_weight", watched)
    train_layer(head, data.hidden, data.labels, data.pairs, epochs=2, batch_size=128, lr=5e-3)
    # σ is at most one optimiser step behind a converged one: lr on each of 8·32 entries is at most 16·5e-3
    assert max(norms) <= BOUND * 1.05
    assert len(norms) >= 20


def test_the_same_seed_is_the_same_run(noisy):
    data = noisy(0)

    def run(seed):
        head = head_of()
        report = train_layer(head, data.hidden, data.labels, data.pairs, epochs=2, seed=seed)
        return report, {name: t.clone() for name, t in head.state_dict().items()}

    torch.manual_seed(1)
    (first, weights), (other, _) = run(0), run(1)
    torch.manual_seed(2)
    again, same = run(0)
    assert first == again
    assert all(torch.equal(t, same[name]) for name, t in weights.items())
    assert first != other


def test_the_epoch_with_the_least_validation_loss_is_kept(noisy):
    data, held_out = noisy(0, pairs=60), noisy(1)
    head = head_of(ridge=1e-3)
    validation = (held_out.hidden, held_out.labels, held_out.pairs)
    report = train_layer(head, data.hidden, data.labels, data.pairs, epochs=40, batch_size=16, lr=2e-2,
                         validation=validation)  # fmt: skip
    losses = report.validation_losses
    assert len(losses) == 41
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # β is still zero
    assert report.best_epoch == losses.index(min(losses)) < 40  # 60 pairs are soon learned by heart
    kept = training._head_loss(head, *validation)
    assert kept == pytest.approx(min(losses), rel=1e-6)


def test_the_length_scale_is_set_before_the_start_and_kept(noisy):
    data = noisy(0)
    head = head_of()
    expected = head_of().set_length_scale(data.hidden)
    train_layer(head, data.hidden, data.labels, data.pairs, epochs=1)
    assert float(head.length_scale) == pytest.approx(expected, rel=1e-6)
    frozen, _ = fit(head, data.hidden, data.labels, pairs=data.pairs)
    assert frozen.config.length_scale == pytest.approx(expected, rel=1e-6)
    own = head_of(length_scale=3.5)
    train_layer(own, data.hidden, data.labels, data.pairs, epochs=1)
    assert float(own.length_scale) == 3.5


@pytest.mark.parametrize("training_mode", [True, False])
def test_the_mode_is_left_as_it_was(noisy, training_mode):
    data = noisy(0)
    head = head_of().train(training_mode)
    train_layer(head, data.hidden, data.labels, data.pairs, epochs=1, validation=(*data[:3],))
    assert head.training is training_mode


def test_concat_heads_train_their_offset(noisy):
    data = noisy(0)
    head = head_of(mode="concat")
    labels = (data.hidden[:, 0] > -0.8).float()  # mostly 1
    calls = []
    report = train_layer(head, data.hidden, labels, epochs=4, batch_size=100, lr=1e-2,
                         progress=lambda *call: calls.append(call))  # fmt: skip
    assert report.losses[-1] < report.losses[0]
    assert float(head.beta0.detach()) > 0
    assert calls[0] == ("training", 1, 32)
    assert calls[-1] == ("training", 32, 32)
    frozen, _ = fit(head, data.hidden, labels, dtype=torch.float32)
    assert frozen.beta0 == float(head.beta0.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hidden_states_come_in_any_dtype(noisy, dtype):
    data = noisy(0)
    report = train_layer(head_of(), data.hidden.to(dtype), data.labels, data.pairs, epochs=1)
    assert math.isfinite(report.losses[0])


def test_states_made_under_inference_mode_can_be_trained_on(noisy):
    data = noisy(0)
    with torch.inference_mode():
        hidden, labels = data.hidden * 1, data.labels * 1
    assert train_layer(head_of(), hidden, labels, data.pairs, epochs=1).steps == 5


def test_a_diverging_run_is_reported_and_undone(noisy):
    data = noisy(0)
    head = head_of()
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"^loss: got .*Lower the learning rate"):
        train_layer(head, data.hidden, data.labels, data.pairs, epochs=5, lr=1e36)
    assert all(torch.equal(p, before[name]) for name, p in head.named_parameters())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("epochs", {"epochs": 0}),
        ("batch_size", {"batch_size": 0}),
        ("lr", {"lr": 0.0}),
        ("lr", {"lr": math.nan}),
        ("weight_decay", {"weight_decay": -1.0}),
        ("pairs", {"pairs": None}),
        ("pairs", {"pairs": torch.tensor([[0, 800]])}),
        ("labels", {"labels": torch.ones(3)}),
        ("labels", {"labels": torch.full((1200,), 2.0)}),
        ("hidden", {"hidden": torch.ones(800, 31)}),
        ("validation: labels", {"validation": (torch.ones(2, 32), torch.ones(2), torch.tensor([[0, 1]]))}),
    ],
)
def test_what_does_not_fit_is_named(noisy, name, changes):
    data = noisy(0)
    given = {"hidden": data.hidden, "labels": data.labels, "pairs": data.pairs} | changes
    with pytest.raises(InputError, match=f"^{name}: got .*, expected "):
        train_layer(head_of(), **given)


def test_a_head_without_a_layer_has_nothing_to_train(noisy):
    data = noisy(0)
    with pytest.raises(InputError, match=r"^head: got layer_size=None.*rmcore\.head\.fit\.fit"):
        train_layer(SNGPHead(32), data.hidden, data.labels, data.pairs)


def test_finetune_says_where_it_has_gone():
    with pytest.raises(ImportError, match=r"rmcore\.integrations\.training\.finetune"):
        from rmcore.model.training import finetune  # noqa: F401
