"""The posterior: P as a sum, its factor, its staleness; nothing kept alive; shards; failures that help."""

from __future__ import annotations

import gc
import math
import re
import textwrap
import weakref

import pytest
import torch

from rmcore._base.errors import FactorizationError, InputError, NonFiniteError
from rmcore.head import SNGPHead
from rmcore.head.posterior import Posterior
from rmcore.ops import reference

F64 = torch.float64


def feature_map(h=16, d=48, **config):
    return SNGPHead(h, num_features=d, length_scale=4.0, **config).freeze_features(torch.float32)


@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
def test_precision_is_the_sum_and_the_factor_its_root(make_data, likelihood):
    data, features = make_data(), feature_map()
    beta = torch.linspace(-1, 1, 48, dtype=F64)
    posterior = Posterior(48, ridge=0.5, likelihood=likelihood)
    gradient, total = posterior.accumulate(data.hidden, data.labels, features, beta, pairs=data.pairs, backend="torch")
    phi = features(data.hidden) * features.feature_scale
    delta = phi[data.pairs[:, 0]] - phi[data.pairs[:, 1]]
    gram, slope, log_likelihood = reference.accumulate(delta, data.labels, beta, likelihood=likelihood)
    p = gram + 0.5 * torch.eye(48, dtype=F64)
    torch.testing.assert_close(posterior.precision, p)
    torch.testing.assert_close(gradient, slope)
    assert total == pytest.approx(float(log_likelihood), rel=1e-12)
    assert posterior.count == 500
    torch.testing.assert_close(posterior.cholesky() @ posterior.cholesky().mT, p)
    constant = 0.5 if likelihood == "gaussian" else 1.0
    torch.testing.assert_close(posterior.factor().mT @ posterior.factor(), constant * torch.linalg.inv(p))
    v = torch.ones(48, dtype=F64)
    torch.testing.assert_close(posterior.solve(v), torch.linalg.solve(p, v))
    assert posterior.log_determinant() == pytest.approx(float(torch.logdet(p)), rel=1e-12)


def test_precision_is_the_bradley_terry_hessian(make_data):
    """Against autograd, through the features: the negative log posterior of rewards φᵀβ."""
    data, features = make_data(), feature_map(d=20)
    beta = torch.linspace(-1, 1, 20, dtype=F64)
    posterior = Posterior(20, ridge=0.5)
    posterior.accumulate(data.hidden, data.labels, features, beta, pairs=data.pairs, backend="torch")
    phi = features(data.hidden) * features.feature_scale

    def negative_log_posterior(b):
        reward = phi @ b
        g = reward[data.pairs[:, 0]] - reward[data.pairs[:, 1]]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(g, data.labels, reduction="sum")
        return loss + 0.25 * b.square().sum()

    torch.testing.assert_close(posterior.precision, torch.autograd.functional.hessian(negative_log_posterior, beta))


def test_nothing_of_the_graph_is_kept():
    features = feature_map()
    posterior = Posterior(48)
    beta = torch.zeros(48, requires_grad=True)
    dead, counts = [], []
    for step in range(50):
        hidden = torch.randn(30, 16, requires_grad=True) * 1.0  # in a graph
        assert hidden.grad_fn is not None
        gradient, _ = posterior.accumulate(hidden, torch.ones(30), features, beta)
        assert not gradient.requires_grad
        dead.append(weakref.ref(hidden))
        del hidden, gradient
        if step in (9, 49):
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    for tensor in (posterior.gram, posterior.precision, posterior.cholesky(), posterior.factor()):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    assert all(ref() is None for ref in dead)
    assert counts[1] <= counts[0]  # as many tensors alive after 50 calls as after 10


def test_new_data_marks_the_factor_stale(make_data):
    data, features, beta = make_data(), feature_map(), torch.zeros(48)
    posterior = Posterior(48)
    assert posterior.stale
    posterior.accumulate(data.hidden, data.labels, features, beta, pairs=data.pairs)
    first = posterior.factor()
    assert not posterior.stale
    assert posterior.factor() is first
    posterior.accumulate(data.hidden, data.labels, features, beta, pairs=data.pairs)
    assert posterior.stale
    phi = features(data.hidden) * features.feature_scale
    assert bool((reference.variance(phi, posterior.factor()) < reference.variance(phi, first)).all())


def test_shards_merge_to_one_pass(make_data):
    data, features, beta = make_data(), feature_map(), torch.linspace(-1, 1, 48, dtype=F64)

    def shard(index):
        posterior = Posterior(48, ridge=0.5)
        posterior.accumulate(data.hidden, data.labels[index], features, beta, pairs=data.pairs[index], backend="torch")
        return posterior

    whole, left, right = shard(slice(None)), shard(slice(0, 170)), shard(slice(170, None))
    left.factor()
    left.merge(right)
    assert left.stale
    assert left.count == whole.count == 500
    torch.testing.assert_close(left.precision, whole.precision, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left.factor(), whole.factor(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("other", "name"),
    [(Posterior(8), "num_features"), (Posterior(4, ridge=2.0), "ridge"),
     (Posterior(4, likelihood="gaussian"), "likelihood")],
)  # fmt: skip
def test_only_like_posteriors_merge(other, name):
    with pytest.raises(InputError, match=f"^other.{name}: got "):
        Posterior(4).merge(other)


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)
def test_ranks_reduce_to_one_pass(tmp_path, warm_python):
    script = textwrap.dedent(
        """
        import sys, torch, torch.distributed as dist
        from rmcore.head import SNGPHead
        from rmcore.head.posterior import Posterior
        from rmcore.head.ranks import Ranks

        rank, folder = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        features = SNGPHead(6, num_features=20, length_scale=3.0).freeze_features(torch.float32)
        x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y, beta = torch.ones(50, dtype=torch.float64), torch.linspace(-1, 1, 20, dtype=torch.float64)

        def accumulated(rows):
            posterior = Posterior(20)
            posterior.accumulate(x[rows], y[rows], features, beta, backend="torch")
            return posterior

        mine = accumulated(slice(0, 20) if rank == 0 else slice(20, 50))
        mine.factor()
        with Ranks.of() as ranks:
            mine, gradient, total = mine.summed(ranks, beta * rank, 0.5 * rank)
        whole = accumulated(slice(None))
        assert mine.stale and mine.count == whole.count == 50
        torch.testing.assert_close(mine.precision, whole.precision, rtol=1e-12, atol=1e-12)
        assert torch.equal(gradient, beta) and total == 0.5
        dist.destroy_process_group()
        """
    )
    ranks = [
        warm_python.start(script, rank, tmp_path, modules=["torch", "rmcore.head.sngp", "rmcore.head.posterior"])
        for rank in (0, 1)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_a_saved_gram_is_the_posterior(make_data):
    data, features, beta = make_data(), feature_map(), torch.zeros(48)
    posterior = Posterior(48, ridge=0.3, likelihood="gaussian")
    posterior.accumulate(data.hidden, data.labels, features, beta, pairs=data.pairs)
    again = Posterior.from_gram(posterior.gram.tril(), posterior.count, ridge=0.3, likelihood="gaussian")
    assert torch.equal(again.factor(), posterior.factor())
    assert again.count == 500


# -- failures --------------------------------------------------------------------------------------------------------


def hopeless(ridge):
    """A sum of float32 outer products of large, nearly equal rows: their rounding dwarfs the ridge."""
    generator = torch.Generator().manual_seed(0)
    rows = 1e4 + torch.randn(500, 64, generator=generator)
    features = SNGPHead(64, features="linear").freeze_features(torch.float32)
    posterior = Posterior(64, ridge=ridge, likelihood="gaussian")
    posterior.accumulate(rows, torch.ones(500), features, torch.zeros(64), backend="torch")
    return posterior


def test_too_small_a_ridge_says_so_and_what_to_change():
    posterior = hopeless(1e-9)
    with pytest.raises(FactorizationError, match=r"^precision: .*condition .* after 500 data.*Raise ridge") as error:
        posterior.factor()
    assert error.value.condition > 1e9
    assert isinstance(error.value, ArithmeticError)
    assert posterior.stale
    advice = float(re.search(r"at least ([0-9.e+-]+)\)", str(error.value)).group(1))
    assert advice > 1e-9
    assert bool(hopeless(advice).factor().isfinite().all())  # and the advice is good


def test_an_overflowing_sum_is_refused_and_changes_nothing():
    features = SNGPHead(4, features="linear").freeze_features(torch.float32)
    posterior = Posterior(4)
    good = torch.randn(5, 4)
    posterior.accumulate(good, torch.ones(5), features, torch.zeros(4))
    before = posterior.gram.clone()
    with pytest.raises(NonFiniteError, match=r"^hidden: "):
        posterior.accumulate(torch.full((3, 4), 1e25), torch.ones(3), features, torch.zeros(4))
    assert torch.equal(posterior.gram, before)
    assert posterior.count == 5
    assert bool(posterior.factor().isfinite().all())


def test_a_non_finite_row_is_refused_and_changes_nothing():
    features, posterior = feature_map(), Posterior(48)
    hidden = torch.randn(20, 16)
    hidden[[2, 11], 3] = torch.tensor([math.nan, math.inf])
    with pytest.raises(NonFiniteError, match=r"2 of 20 rows \(2, 11\)") as error:
        posterior.accumulate(hidden, torch.ones(20), features, torch.zeros(48))
    assert error.value.rows == (2, 11)
    assert posterior.count == 0
    assert not posterior.gram.any()


def test_many_bad_rows_are_counted_and_the_first_shown():
    with pytest.raises(NonFiniteError, match=r"12 of 20 rows \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)") as error:
        Posterior(48).accumulate(
            torch.cat([torch.full((12, 16), math.nan), torch.zeros(8, 16)]), torch.ones(20), feature_map(),
            torch.zeros(48)
        )  # fmt: skip
    assert error.value.rows == tuple(range(12))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"num_features": 0}, "num_features"), ({"ridge": 0.0}, "ridge"), ({"ridge": math.nan}, "ridge"),
     ({"likelihood": "poisson"}, "likelihood")],
)  # fmt: skip
def test_a_bad_setting_is_named(arguments, name):
    with pytest.raises(InputError, match=f"^{name}: got "):
        Posterior(**({"num_features": 4} | arguments))


def test_the_ridge_alone_is_a_posterior():
    posterior = Posterior(5, ridge=4.0)
    torch.testing.assert_close(posterior.factor(), torch.eye(5, dtype=F64) / 2)
    torch.testing.assert_close(Posterior(5, ridge=4.0, likelihood="gaussian").factor(), torch.eye(5, dtype=F64))
