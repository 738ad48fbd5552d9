"""What ``score`` of the cuda backend must satisfy, and why: shared by the GPU's tests and an emulation of them.

Truth is float64 on the stored weights. A value may be off by twice what torch loses in the same dtype, and by what
rounding must be expected to lose (:func:`rounding`), since with one row torch may lose next to nothing by luck.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmcore.ops import reference
from rmcore.ops.weights import FeatureMap, HeadWeights

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
DEVIATIONS = 4
"""Standard deviations of rounding that are allowed: of 10,000 values one lies beyond."""


def head(
    h: int, d: int, m: int = 0, *, dtype=torch.float16, seed=0, layernorm=False, activation="tanh", scale=1.0,
    device="cuda",
) -> HeadWeights:  # fmt: skip
    """Random features and a random U: v is about D/4 and g about 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    width = m or h
    feature_map = FeatureMap(
        features="rff",
        projection=(randn(d, width) / math.sqrt(width) * 0.3 / (1 if m else scale)).to(dtype),
        phase=torch.rand(d, generator=generator, device=device),
        layer_weight=(randn(m, h) / math.sqrt(h) / scale).to(dtype) if m else None,
        layer_bias=randn(m).float() * 0.1 if m else None,
        activation=activation if m else "none",
        layernorm=layernorm,
        hidden_size=h,
        num_features=d,
        dtype=dtype,
        input_scale=scale,
    )
    factor = (randn(d, d) / math.sqrt(d)).tril()
    return HeadWeights.build(feature_map, randn(d) / math.sqrt(d), 0.25, factor, math.pi / 8)


def rows_of(b: int, h: int, dtype=torch.float16, seed=1, device="cuda") -> Tensor:
    """Random rows, the same for the same seed."""
    return torch.randn(b, h, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def chain(
    hidden: Tensor, weights: HeadWeights, dtype: torch.dtype | None = None, *, errors: list[Tensor] | None = None
) -> Tensor:
    """(4, B) in float64 from the stored weights; with ``dtype``, by torch products of that dtype.

    ``errors`` receives, for every value that the kernel rounds to the serving dtype (z of a head that does not fold, c
    on its way to U), a zero that was added to it: what the results owe to its rounding is their gradient there.
    """
    m, compute = weights.map, dtype or torch.float64

    def cast(t: Tensor) -> Tensor:
        return t.to(compute)

    def rounded(t: Tensor) -> Tensor:
        if errors is None:
            return cast(t)
        errors.append(torch.zeros_like(t, requires_grad=True))
        step = torch.exp2(torch.floor(torch.log2(t.detach().abs().clamp_min(2.0**-14))))
        return t + errors[-1] * step  # a unit of it is the spacing's power of two

    x = cast((hidden.double() * m.input_scale).to(m.dtype))
    if m.layer_weight is not None:
        x = (x @ cast(m.layer_weight).mT).to(torch.float64) + m.layer_bias.double()
        x = torch.tanh(x) if m.activation == "tanh" else x
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5) if m.layernorm else x
        x = rounded(x)
    t = (x @ cast(m.projection).mT).to(torch.float64) + m.phase.double()
    c = torch.cos(2 * math.pi * t)
    g = (cast(c) @ cast(weights.beta)).double() + weights.beta0
    # The stored factor is scaled for a kernel that keeps products in float32; torch rounds them to 16 bits.
    factor = cast(reference.unpack_lower(weights.factor, weights.num_features).double() / 32)
    v = (rounded(c) @ factor.mT).double().square().sum(-1) * (1024 * weights.factor_scale)
    u = torch.sqrt(1 + weights.amplitude * v)
    return torch.stack([g, v, u, g / u])


def rounding(hidden: Tensor, weights: HeadWeights) -> Tensor:
    """(4, B): the standard deviation of what rounding to the serving dtype does to g, v, u, p of each row.

    x in [2^e, 2^(e+1)) is off by up to 2^e UNIT either way, evenly spread: 2^e UNIT / √3. Errors of different values
    are independent, so their effects, each the error times the result's derivative, add up as squares. In a head that
    does not fold z is rounded too and moves every t, which counts several times as much as c does. (A bound by c alone
    failed on the first GPU: 100 features behind a layer norm, one row, v off by 3.5e-4 of itself, 2.3e-4 allowed.)
    """
    errors: list[Tensor] = []
    results = chain(hidden, weights, errors=errors)
    squares = []
    for result in results:
        slopes = torch.autograd.grad(result.sum(), errors, retain_graph=True, allow_unused=True)
        squares.append(sum(s.square().sum(-1) for s in slopes if s is not None) + torch.zeros_like(result.detach()))
    return torch.stack(squares).sqrt() * (UNIT[weights.dtype] / math.sqrt(3))


def check(out: Tensor, hidden: Tensor, weights: HeadWeights) -> None:
    """Every value of ``out`` (4, B) is as near to the truth as it can be expected to be."""
    truth, peer = chain(hidden, weights), chain(hidden, weights, weights.dtype)
    assert torch.isfinite(out).all()
    lost = DEVIATIONS * rounding(hidden, weights)
    for name, got, want, other, by_rounding in zip(("g", "v", "u", "p"), out.double(), truth, peer, lost, strict=True):
        # The last term: float32 summation, D terms whose partial sums are no larger than the result.
        bound = 2 * (other - want).abs().max() + by_rounding + 64 * UNIT[torch.float32] * (1 + want.abs().max())
        worst = int(((got - want).abs() - bound).argmax())
        assert (got - want).abs()[worst] <= bound[worst], (name, float((got - want)[worst]), float(bound[worst]))
