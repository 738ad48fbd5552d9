"""What the Triton backend must satisfy, on whatever device: shared by the interpreter's tests and the GPU's.

Truth is float64 on the stored weights. The allowed error is twice that of the plain computation with operands rounded
to the serving dtype and sums in float32, plus what float32 sums of that length may lose (``_slack``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.backends import torch as truth
from rmcore.ops.backends import triton as backend
from rmcore.ops.tasks import AccumulateTask
from rmcore.ops.weights import FeatureMap, HeadWeights

EPS = 2.0**-24
COSINE_ERROR = 2.0**-22
TANH_ERROR = 3e-7
TENSOR_CORE_DEPTH = 16
"""Products of 16-bit operands that one matrix instruction adds to its float32 sum."""


def make_head(
    h: int,
    d: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
    layer: int = 0,
    activation: str = "none",
    layernorm: bool = False,
    features: str = "rff",
    projection: bool = True,
    input_scale: float = 1.0,
    spread: float = 0.3,
) -> HeadWeights:
    """A head with random features and the posterior of random rows (from 1025 features on, a random U).

    ``spread``: of the phases, in turns.
    """
    g = torch.Generator().manual_seed(seed)
    inner, scale = (layer, 1.0) if layer else (h, input_scale)
    weight = torch.randn(layer, h, generator=g).div(math.sqrt(h) * input_scale).to(dtype) if layer else None
    layer_bias = torch.randn(layer, generator=g) * 0.1 if layer else None
    turns = (torch.randn(d, inner, generator=g) * spread / (math.sqrt(inner) * scale)).to(dtype) if projection else None
    if not projection:
        d = inner
    feature_map = FeatureMap(
        features if projection else "linear",  # type: ignore[arg-type]
        turns,
        torch.rand(d, generator=g) if projection else None,
        weight,
        layer_bias,
        activation,  # type: ignore[arg-type]
        layernorm,
        h,
        d,
        dtype,
        input_scale,
        math.sqrt(2 / d) if features == "rff" and projection else 1.0,
    )
    if d <= 1024:
        rows = torch.randn(2 * d, d, generator=g, dtype=torch.float64) / math.sqrt(2 * d)
        precision = 0.2 * rows.mT @ rows + 0.05 * torch.eye(d, dtype=torch.float64)
        factor = reference.triangular_factor(precision)
    else:
        factor = torch.randn(d, d, generator=g).tril().double() / math.sqrt(d) + 2 * torch.eye(d, dtype=torch.float64)
    return HeadWeights.build(feature_map, torch.randn(d, generator=g), 0.3, factor, 0.4).to(device)


def rounded_features(hidden: Tensor, feature_map: FeatureMap) -> Tensor:
    """c in float32, before its own rounding, from operands rounded to the serving dtype: plain torch."""
    dtype = feature_map.dtype
    x = (hidden.float() * feature_map.input_scale).to(dtype).float()
    if feature_map.layer_weight is not None:
        x = reference.normalized_layer(
            x,
            feature_map.layer_weight.float(),
            feature_map.layer_bias,
            activation=feature_map.activation,
            layernorm=feature_map.layernorm,
        )
        x = x.to(dtype).float() if feature_map.projection is not None else x
    if feature_map.projection is None:
        return x
    assert feature_map.phase is not None
    if feature_map.features == "linear":
        return x @ feature_map.projection.float().mT + feature_map.phase
    return reference.phase_features(x, feature_map.projection.float(), feature_map.phase)


def _slack(hidden: Tensor, feature_map: FeatureMap) -> Tensor:
    """What float32 may do to one c, per row: a sum of n products x w loses about ε ‖x‖ ‖w‖, four times that allowed.

    (n roundings, each ε times a partial sum that grows as its root: ε √n √n |x w|.) A turn counts 2π.
    """
    x = hidden.double() * feature_map.input_scale
    error = torch.zeros(hidden.shape[0], dtype=torch.float64, device=hidden.device)
    if feature_map.layer_weight is not None:
        w = feature_map.layer_weight.double()
        error = 4 * EPS * (x.norm(dim=1) * w.norm(dim=1).amax() + 1) + TANH_ERROR
        x = reference.normalized_layer(x, w, feature_map.layer_bias, activation=feature_map.activation)
        if feature_map.layernorm:
            error = error / x.std(1) + 4 * EPS * x.abs().amax(1) / x.std(1)
            x = torch.nn.functional.layer_norm(x, x.shape[-1:])
    if feature_map.projection is None:
        return error + EPS * x.abs().amax(1)
    longest = feature_map.projection.double().norm(dim=1).amax()
    error = error * longest + 4 * EPS * (x.norm(dim=1) * longest + 1)
    return error if feature_map.features == "linear" else 2 * math.pi * error + COSINE_ERROR


def check_score(hidden: Tensor, weights: HeadWeights) -> Tensor:
    """g, v, u, p against truth; every element of a poisoned output written. Returns the output."""
    out = torch.full((4, hidden.shape[0]), float("nan"), device=hidden.device)
    backend.score(hidden, weights, out)
    exact = torch.empty(4, hidden.shape[0], dtype=torch.float64, device=hidden.device)
    truth.score(hidden.double(), weights, exact)
    c = rounded_features(hidden, weights.map)
    factor, beta = weights.dense_factor, weights.beta
    plain_g = reference.logit(c, beta, weights.beta0)
    plain_v = reference.variance(c.to(weights.dtype).float(), factor)
    plain_u = reference.uncertainty(plain_v, weights.amplitude)
    plain = torch.stack([plain_g, plain_v, plain_u, plain_g / plain_u])
    # One c wrong by δ moves g by β δ and v by 2 (UᵀU c) δ; errors of different columns do not conspire, so 2-norms.
    exact_c, beta, factor = weights.map(hidden.double()), beta.double(), factor.double()
    delta = _slack(hidden, weights.map)
    g_slack = delta * beta.norm() + 4 * EPS * (exact_c.abs() @ beta.abs() + abs(weights.beta0))
    y = exact_c @ factor.mT
    y_slack = 4 * EPS * exact_c.norm(dim=1) * factor.norm(dim=1).amax()
    v_slack = 2 * delta * (y @ factor).norm(dim=1) + 2 * y_slack * y.norm(dim=1) + 4 * EPS * exact[1]
    v_slack = v_slack + delta**2 * factor.square().sum()
    # A few c lie so near a tie that float32 noise rounds them the other way, by a whole unit.
    unit = torch.finfo(weights.dtype).eps
    v_slack = v_slack + 4 * unit * exact_c.abs().amax(1) * 2 * (y @ factor).abs().amax(1)
    u_slack = weights.amplitude * v_slack / 2 + EPS * exact[2]
    p_slack = g_slack + exact[3].abs() * u_slack
    for name, got, want, other, slack in zip(
        "gvup", out, exact, plain, (g_slack, v_slack, u_slack, p_slack), strict=True
    ):
        assert bool(got.isfinite().all()), f"{name}: not finite at {(~got.isfinite()).nonzero().flatten().tolist()}"
        error, allowed = (got - want).abs(), 2 * (other - want).abs().amax() + slack
        worst = int((error - allowed).argmax())
        assert bool((error <= allowed).all()), (
            f"{name}[{worst}]: off by {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
        )
    return out


def tensor_core_loss(terms: int) -> float:
    """By how much of itself a float32 sum of so many like-signed products comes out too small on tensor cores.

    They do not round, they cut off: of each step's 16 products what lies below a quarter of the sum's last bit, half of
    that on average, and then of the sum what lies below its last bit, again half. A step thus loses
    (16 / 4 + 1) / 2 = 2.5 units of 2^-23 of the sum so far (at most: the sum lies between a power of two and the next),
    and over the whole sum those partial sums are half of it on average. The errors all have one sign, so they grow with
    the number of terms and not with its root. An H100 showed it twice: the diagonal of P from 20,000 rows 8.8e-5 low
    where ``test_tolerances`` emulates 8.3e-5, and from 65,536 rows in chunks of 16,384 also 8.3e-5 low.
    """
    return 2.5 * 2.0**-23 * (terms / TENSOR_CORE_DEPTH) / 2


def check_accumulate(
    hidden: Tensor,
    labels: Tensor,
    weights: HeadWeights,
    *,
    precision_dtype: torch.dtype = torch.float32,
    pairs: Tensor | None = None,
    sample_weight: Tensor | None = None,
    likelihood: str = "logistic",
) -> tuple[Tensor, Tensor, Tensor]:
    """P, gradient and log-likelihood against truth; added to what was there, the upper triangle untouched."""
    feature_map, d = weights.map, weights.num_features
    beta = weights.beta / feature_map.feature_scale
    before = torch.randn(d, d, generator=torch.Generator().manual_seed(1)).to(hidden.device, precision_dtype)
    start = torch.randn(d, generator=torch.Generator().manual_seed(2)).to(hidden.device, precision_dtype)
    precision, gradient = before.clone(), start.clone()
    options: Any = (pairs, sample_weight, 0.1 if pairs is None else 0.0, likelihood)
    total = backend.accumulate(AccumulateTask(hidden, labels, feature_map, beta, precision, gradient, *options))
    assert total.dtype == torch.float64
    assert total.shape == ()

    def plain(c: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        if dtype is not None and pairs is None:
            c = c.to(dtype).float()
        phi = (c if pairs is None else c[pairs[:, 0]] - c[pairs[:, 1]]) * feature_map.feature_scale
        w = None if sample_weight is None else sample_weight.to(phi.dtype)
        g = reference.logit(phi, beta.to(phi.dtype), options[2])
        _, slope, ll = reference.accumulate(
            phi, labels.to(phi.dtype), beta.to(phi.dtype), beta0=options[2], likelihood=options[3], sample_weight=w
        )
        p = torch.sigmoid(g)
        curvature = torch.ones_like(g) if w is None else w
        curvature = curvature * p * (1 - p) if likelihood == "logistic" else curvature
        rows = curvature.sqrt()[:, None] * phi
        if dtype is not None:
            rows = (rows / feature_map.feature_scale).to(dtype).double() * feature_map.feature_scale
        return rows.mT @ rows, slope, ll

    gram, slope, likelihood_sum = plain(feature_map(hidden.double()), None)
    near_gram, near_slope, near_likelihood = plain(rounded_features(hidden, feature_map), feature_map.dtype)
    upper = torch.ones(d, d, dtype=torch.bool, device=hidden.device).triu(1)
    assert torch.equal(precision[upper], before[upper]), "the upper triangle was written"
    n = labels.shape[0]
    weight = 1.0 if sample_weight is None else float(sample_weight.amax())
    c_slack = float(_slack(hidden, feature_map).amax()) * feature_map.feature_scale
    largest = float(gram.diagonal().amax())
    stored = torch.finfo(precision_dtype).eps  # of adding to what was there

    error = ((precision.double() - before.double()) - gram).tril().abs().amax()
    allowed = 2 * float((near_gram - gram).tril().abs().amax()) + stored * float(before.abs().amax() + largest)
    allowed += 8 * EPS * largest + 2 * c_slack * math.sqrt(largest * weight)
    if hidden.is_cuda and feature_map.dtype != torch.float32:
        chunk = min(backend._chunk(backend.GRAM_WORKSPACE, d, feature_map.dtype.itemsize), backend.GRAM_ROWS)
        allowed += tensor_core_loss(min(n, chunk)) * largest
    assert error <= allowed, f"precision: off by {error:.3g}, allowed {allowed:.3g}"

    g_slack = c_slack * float(beta.norm()) + 4 * EPS * float(
        (feature_map(hidden.double()).abs() @ weights.beta.double().abs()).amax()
    )
    error = (gradient.double() - start.double() - slope).abs().amax()
    allowed = 2 * float((near_slope - slope).abs().amax()) + stored * float(start.abs().amax() + slope.abs().amax())
    allowed += weight * math.sqrt(n) * (g_slack * feature_map.feature_scale + c_slack + 4 * EPS)
    assert error <= allowed, f"gradient: off by {error:.3g}, allowed {allowed:.3g}"

    error = abs(float(total - likelihood_sum))
    allowed = 2 * abs(float(near_likelihood - likelihood_sum)) + 4 * EPS * abs(float(likelihood_sum))
    allowed += 2 * weight * math.sqrt(n) * g_slack
    assert error <= allowed, f"log-likelihood: off by {error:.3g}, allowed {allowed:.3g}"
    return precision, gradient, total


def check_pair_variance(hidden: Tensor, sizes: list[int], weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """g and v of all pairs against truth, in the documented order."""
    group_sizes = torch.tensor(sizes, dtype=torch.int64)
    g, v = backend.pair_variance(hidden, group_sizes, weights)
    want_g, want_v = [], []
    near_v = []
    c, near = weights.map(hidden.double()), rounded_features(hidden, weights.map)
    factor = weights.dense_factor
    sensitivity = []
    start = 0
    for k in sizes:
        i, j = torch.triu_indices(k, k, 1, device=hidden.device)
        group, plain = c[start : start + k], near[start : start + k]
        start += k
        delta = group[i] - group[j]
        want_g.append(delta @ weights.beta.double())
        want_v.append(reference.variance(delta, factor.double()))
        sensitivity.append(2 * (delta @ factor.double().mT @ factor.double()).norm(dim=1))
        y = (plain - plain[:1]).to(weights.dtype).float() @ factor.mT
        near_v.append((y[i] - y[j]).square().sum(1))
    exact_g, exact_v, plain_v = torch.cat(want_g), torch.cat(want_v), torch.cat(near_v)
    assert g.shape == v.shape == exact_g.shape
    if not len(exact_v):
        return g, v
    delta = 2 * float(_slack(hidden, weights.map).amax())
    allowed = delta * float(weights.beta.norm()) + 8 * EPS * float((c.abs() @ weights.beta.double().abs()).amax())
    error = (g - exact_g).abs().amax()
    assert error <= allowed, f"g: off by {error:.3g}, allowed {allowed:.3g}"
    allowed = 2 * (plain_v - exact_v).abs().amax() + 16 * EPS * exact_v.amax()
    allowed = allowed + delta * (torch.cat(sensitivity) + delta * factor.double().square().sum())
    error = (v - exact_v).abs()
    assert bool((error <= allowed).all()), f"v: off by {error.amax():.3g}"
    return g, v


def check_power_iteration(weight: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """σ and v against truth on the stored weights."""
    sigma, v = backend.power_iteration(weight, vector, iterations)
    assert sigma.shape == ()
    assert v.shape == vector.shape
    assert v.dtype == sigma.dtype == vector.dtype
    want_sigma, want_v = reference.power_iteration(weight.double(), vector.double(), iterations)
    tolerance = 64 * EPS * math.sqrt(sum(weight.shape)) + torch.finfo(vector.dtype).eps
    assert abs(float(sigma - want_sigma)) <= tolerance * float(want_sigma), (float(sigma), float(want_sigma))
    assert float((v - want_v).norm()) <= 4 * tolerance * iterations
    return sigma, v


@contextmanager
def poisoned_workspaces() -> Iterator[None]:
    """Fill whatever torch.empty returns with NaN or a large number: reading what no kernel wrote shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 100)

    torch.empty = poisoned  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty
