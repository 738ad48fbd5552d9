"""The kernels as functions of plain tensors: against the reference, packed once, and what does not fit is named."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor

from rmcore import ops
from rmcore._base.errors import InputError
from rmcore.ops import reference, tensors

H, M, D = 24, 20, 150  # more than one tile of U, and a part of another
BACKENDS = ["torch", "cpu"]
# Serving rounds β·c never, c and U to the dtype on some backends: relative errors of a few of its last places.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Head:
    """Plain tensors of a head in ``dtype``, and their float64 truth."""

    def __init__(self, dtype: torch.dtype, *, layer: bool = False) -> None:
        omega, b = reference.draw_features(D, M if layer else H)
        projection, self.phase = reference.fold_projection(omega, b, 4.0)
        self.projection = projection.to(dtype)
        self.options: dict[str, object] = {}
        if layer:
            weight, bias = (draw(M, H, seed=3) / 5).to(dtype), draw(M, seed=4)
            self.options = {"layer_weight": weight, "layer_bias": bias, "activation": "tanh", "layernorm": True}
        self.beta = draw(D, seed=1)
        a = draw(D, D, seed=2).double()
        self.factor = reference.triangular_factor(a @ a.mT / D + torch.eye(D, dtype=torch.float64))

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.projection, self.phase, self.beta, self.factor

    def phi(self, x: Tensor) -> Tensor:
        z = x.double()
        if self.options:
            weight, bias = self.options["layer_weight"].double(), self.options["layer_bias"].double()  # type: ignore[attr-defined]
            z = reference.normalized_layer(z, weight, bias, activation="tanh", layernorm=True)
        c = reference.phase_features(z, self.projection.double(), self.phase.double())
        return c * math.sqrt(2 / D)


def skip_unless_it_runs(op: str, dtype: torch.dtype, backend: str) -> None:
    explanation = ops.explain(op, "cpu", dtype, backend)  # type: ignore[arg-type]
    if explanation.backend == "none":
        pytest.skip(explanation.reasons[backend])


@pytest.mark.parametrize("layer", [False, True], ids=["folded", "tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_functions_equal_the_reference(backend, dtype, layer):
    skip_unless_it_runs("score", dtype, backend)
    head, x = Head(dtype, layer=layer), draw(9, H, seed=5).to(dtype)
    phi, beta = head.phi(x), head.beta.double()
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    got = ops.score_tensors(x, *head.arguments, beta0=0.3, amplitude=0.5, backend=backend, **head.options)
    want = reference.score(phi, beta, head.factor, beta0=0.3, amplitude=0.5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)

    g, v = ops.pair_variance_tensors(x, torch.tensor([4, 5]), *head.arguments, backend=backend, **head.options)
    squares = [reference.pair_variance(part, beta, head.factor) for part in (phi[:4], phi[4:])]
    for flat, each in ((g, [s[0] for s in squares]), (v, [s[1] for s in squares])):
        rows = [s[tuple(torch.triu_indices(len(s), len(s), 1))] for s in each]
        torch.testing.assert_close(flat.double(), torch.cat(rows), **tolerance)

    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 1.0])
    sums = ops.accumulate_tensors(x, labels, head.projection, head.phase, head.beta, backend=backend, **head.options)
    gram, slope, likelihood = reference.accumulate(phi, labels.double(), beta)
    torch.testing.assert_close(sums.precision.tril(), gram.tril(), **tolerance)
    torch.testing.assert_close(sums.gradient, slope, **tolerance)
    torch.testing.assert_close(sums.log_likelihood, likelihood, **tolerance)


def test_linear_features_are_the_projection_itself():
    weight, bias, x = draw(D, H), draw(D, seed=1), draw(5, H, seed=2)
    head = Head(torch.float32)
    got = ops.score_tensors(x, weight, bias, head.beta, head.factor, features="linear", backend="torch")
    phi = x.double() @ weight.double().mT + bias.double()
    torch.testing.assert_close(got.logit.double(), phi @ head.beta.double(), rtol=1e-4, atol=1e-3)
    assert float(got.uncertainty.min()) > 1


def test_sums_add_to_what_is_given():
    head, x, labels = Head(torch.float32), draw(9, H), torch.ones(9)
    features = (head.projection, head.phase, head.beta)
    once = ops.accumulate_tensors(x, labels, *features, backend="torch")
    twice = ops.accumulate_tensors(
        x, labels, *features, precision=once.precision.clone(), gradient=once.gradient.clone(), backend="torch"
    )
    torch.testing.assert_close(twice.precision.tril(), 2 * once.precision.tril())
    torch.testing.assert_close(twice.gradient, 2 * once.gradient)


def test_the_same_tensors_are_packed_once(monkeypatch):
    head, x = Head(torch.float32), draw(3, H)
    calls = []
    real = tensors.HeadWeights.build
    monkeypatch.setattr(tensors.HeadWeights, "build", lambda *args: calls.append(1) or real(*args))
    first = ops.score_tensors(x, *head.arguments, backend="torch")
    again = ops.score_tensors(x, *head.arguments, backend="torch")
    ops.pair_variance_tensors(x, torch.tensor([3]), *head.arguments, backend="torch")
    assert len(calls) == 1
    assert torch.equal(first.logit, again.logit)
    head.beta.mul_(2)  # written in place: no longer what was packed
    torch.testing.assert_close(ops.score_tensors(x, *head.arguments, backend="torch").logit, 2 * first.logit)
    assert len(calls) == 2
    shifted = ops.score_tensors(x, *head.arguments, beta0=1.0, backend="torch").logit
    torch.testing.assert_close(shifted, 2 * first.logit + 1)
    assert len(calls) == 3


def test_what_is_packed_goes_with_the_tensors():
    gc.collect()
    before = len(tensors._kept)
    head = Head(torch.float32)
    ops.score_tensors(draw(3, H), *head.arguments)
    ops.accumulate_tensors(draw(3, H), torch.ones(3), head.projection, head.phase, head.beta)
    assert len(tensors._kept) == before + 2
    del head
    gc.collect()
    assert len(tensors._kept) == before


def test_inference_tensors_are_never_stale():
    with torch.inference_mode():
        head, x = Head(torch.float32), draw(3, H)
        first = ops.score_tensors(x, *head.arguments, backend="torch").logit.clone()
        head.beta.mul_(3)
        torch.testing.assert_close(ops.score_tensors(x, *head.arguments, backend="torch").logit, 3 * first)


def test_a_prepared_head_scores_the_same_and_compiles():
    head, x = Head(torch.float16), draw(4, H)
    weights = ops.prepare(*head.arguments)
    for a, b in zip(ops.score(x, weights), ops.score_tensors(x, *head.arguments), strict=True):
        assert torch.equal(a, b)
    compiled = torch.compile(lambda rows: ops.score(rows, weights).logit, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.score(x, weights).logit)


def test_above_the_diagonal_the_factor_is_not_read():
    head, x = Head(torch.float32), draw(4, H)
    noisy = head.factor + torch.full((D, D), 9.0, dtype=torch.float64).triu(1)
    got = ops.score_tensors(x, head.projection, head.phase, head.beta, noisy)
    assert torch.equal(got.variance, ops.score_tensors(x, *head.arguments).variance)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("projection", {"projection": torch.zeros(D, H, dtype=torch.float64)}),
        ("projection", {"projection": torch.zeros(D, H, dtype=torch.int8)}),
        ("projection", {"projection": torch.zeros(D)}),
        ("projection", {"projection": None}),
        ("phase", {"phase": torch.zeros(D + 1)}),
        ("beta", {"beta": torch.zeros(D - 1)}),
        ("beta", {"beta": torch.zeros(D, dtype=torch.int64)}),
        ("factor", {"factor": torch.zeros(D, D - 1)}),
        ("layer_weight", {"layer_weight": torch.zeros(M, H)}),
        ("layer_weight", {"activation": "tanh"}),
        ("layer_bias", {"layer_weight": torch.zeros(H, M), "layer_bias": torch.zeros(M)}),
        ("activation", {"activation": "relu", "layer_weight": torch.zeros(H, M)}),
        ("features", {"features": "poly"}),
        ("features", {"features": "linear", "layer_weight": torch.zeros(H, M)}),
        ("hidden", {"hidden": torch.zeros(3, H + 1)}),
        ("backend", {"backend": "opencl"}),
    ],
)
def test_what_does_not_fit_is_named(name, change):
    head = Head(torch.float32)
    given = {"hidden": torch.zeros(3, H), "projection": head.projection, "phase": head.phase, "beta": head.beta,
             "factor": head.factor}  # fmt: skip
    with pytest.raises(InputError, match=f"^{name}: got .*, expected "):
        ops.score_tensors(**(given | change))


def test_the_settings_are_those_of_the_features():
    from typing import get_type_hints

    hints, defaults = get_type_hints(ops.prepare_features), ops.prepare_features.__kwdefaults__
    assert get_type_hints(tensors.FeatureSettings) == {name: hints[name] for name in defaults}


@pytest.mark.parametrize("value", [None, 1.0])
def test_a_setting_that_there_is_not_is_a_type_error(value):
    head, x = Head(torch.float32), draw(3, H)
    ops.score_tensors(x, *head.arguments)  # packed before: it must be found all the same
    for call in (
        lambda: ops.score_tensors(x, *head.arguments, feature_scal=value),  # type: ignore[call-arg]
        lambda: ops.pair_variance_tensors(x, torch.tensor([3]), *head.arguments, feature_scal=value),  # type: ignore[call-arg]
        lambda: ops.prepare(*head.arguments, feature_scal=value),  # type: ignore[call-arg]
        lambda: ops.accumulate_tensors(x, torch.ones(3), *head.arguments[:3], feature_scal=value),  # type: ignore[call-arg]
    ):
        with pytest.raises(TypeError, match="feature_scal"):
            call()


def test_a_default_that_is_given_packs_nothing_anew(monkeypatch):
    head, x = Head(torch.float32), draw(3, H)
    ops.score_tensors(x, *head.arguments)
    monkeypatch.setattr(tensors.HeadWeights, "build", lambda *_: pytest.fail("packed again"))
    ops.score_tensors(x, *head.arguments, activation="none", beta0=0.0, layernorm=False)
