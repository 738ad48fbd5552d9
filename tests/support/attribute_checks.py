"""What a backend's ``score_attributes`` must satisfy, wherever it runs: shared by the CPU's, the interpreter's and the
GPU's tests.

Truth is float64 on the stored weights. The allowed error is twice that of torch with operands rounded to the serving
dtype and float32 sums, plus what float32 sums of that length may lose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmcore.model.families.head import RewardHead
from rmcore.model.families.registry import family_of
from rmcore.ops.attribute_weights import SUMMARY, AttributeWeights, reference_scores, summarize

__all__ = ["ATTRIBUTE_HEADS", "GATED", "check_scores", "make_heads", "published_head"]

EPS = 2.0**-24
ATTRIBUTE_HEADS: dict[str, dict[str, Any]] = {
    "fixed": {"members": 2},
    "selu": {"members": 3, "widths": (70, 130)},
    "selu, one layer": {"widths": (64,)},
    "softmax": {"members": 2, "widths": (65, 33, 128), "softmax": True},
    "quantiles": {"members": 2, "widths": (40, 40), "per": 7},
    "quantiles, fixed": {"per": 5},
}


def make_heads(
    h: int, dtype: torch.dtype, *, members: int = 1, attributes: int = 5, per: int = 2, widths: tuple[int, ...] = (),
    softmax: bool = False, input_scale: float = 1.0, seed: int = 0,
) -> AttributeWeights:  # fmt: skip
    """Random heads of about unit means, weights and σ."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    sizes = (h, *widths)
    value = normal(members, attributes * per, h, scale=input_scale * h**-0.5)  # so that large rows give usual numbers
    if per == 2:
        value[:, 1::2] *= 0.3  # log σ
    gate: dict[str, Any] = {"fixed": normal(members, attributes)}
    if widths:
        layers = [normal(members, n, k, scale=k**-0.5) for k, n in zip(sizes, widths, strict=False)]
        layers[0] *= input_scale
        gate = {
            "layers": tuple(layers),
            "biases": tuple(normal(members, n, scale=0.3) for n in widths),
            "last": normal(members, attributes, widths[-1], scale=widths[-1] ** -0.5),
            "last_bias": normal(members, attributes),
            "softmax": softmax,
            "temperature": 0.7 if softmax else 1.0,
            "scale": normal(members).abs() + 0.5 if softmax else None,
        }
    spread: Any = "normal" if per == 2 else "quantiles"
    return AttributeWeights.build(value, spread=spread, per=per, dtype=dtype, input_scale=input_scale, **gate)


GATED = ("urm-gated", "armorm", "qrm")
"""Published families whose heads the kernel computes."""


class _Held:
    """Tensors by name, as a checkpoint's files give them."""

    source = "made"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.names = tensors, list(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def published_head(family: str, h: int, *, width: int = 40, seed: int = 0) -> RewardHead:
    """The head of one of :data:`GATED`, of random tensors in its layout: about unit attributes and weights."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    count, per = {"urm-gated": (5, 2), "armorm": (7, 1), "qrm": (4, 3)}[family]
    names, width = (
        (("score", "weights.fc", 2), h)
        if family == "urm-gated"
        else (("regression_layer", "gating.layers", 3 if family == "qrm" else 2), width)
    )
    value, gate, step = names
    tensors = {f"{value}.weight": normal(count * per, h, scale=h**-0.5)}
    sizes = (h, width, width, count)
    for k in range(3):
        tensors[f"{gate}.{step * k}.weight"] = normal(sizes[k + 1], sizes[k], scale=sizes[k] ** -0.5)
        if family != "qrm" or k == 2:
            tensors[f"{gate}.{step * k}.bias"] = normal(sizes[k + 1], scale=0.3)
        if family == "qrm" and k < 2:
            norm = f"{gate}.{step * k + 2}"
            tensors |= {f"{norm}.{part}": normal(width, scale=0.5) for part in ("bias", "running_mean")}
            tensors |= {f"{norm}.{part}": normal(width).abs() + 0.5 for part in ("weight", "running_var")}
    if family != "urm-gated":
        tensors |= {"reward_transform_matrix": normal(count, count, scale=count**-0.5)}
        tensors |= {"gating.logit_scale": torch.tensor([1.25])}
    config = {"num_objectives": count, "gating_hidden_dim": width, "gating_n_hidden": 2, "gating_temperature": 0.7}
    config |= {"num_quantiles": per, "hidden_size": h}
    spec = family_of(family).head
    assert spec is not None
    files: Any = _Held(tensors)
    return RewardHead(spec, files, config, h, family=family, token_id=lambda text: 0)


def rounded_scores(hidden: Tensor, heads: AttributeWeights, gate_hidden: Tensor | None) -> tuple[Tensor, ...]:
    """Torch in the serving dtype: rows rounded, and each layer's activations too; float32 sums."""
    x, gate = (None if t is None else t.float() * heads.input_scale for t in (hidden, gate_hidden))
    assert x is not None
    x = x.to(heads.dtype).float()
    z = (x if gate is None else gate.to(heads.dtype).float()).expand(heads.members, -1, -1)
    outputs = torch.einsum("nh,mch->nmc", x, heads.value.float())
    if heads.last is None or heads.last_bias is None:
        assert heads.fixed is not None
        w = heads.fixed.expand(len(x), -1, -1)
    else:
        for layer, bias in zip(heads.layers, heads.biases, strict=True):
            z = torch.baddbmm(bias[:, None], z, layer.float().mT)
            z = (z.relu() if heads.softmax else torch.nn.functional.selu(z)).to(heads.dtype).float()
        w = torch.baddbmm(heads.last_bias[:, None], z, heads.last.mT).transpose(0, 1)
    if heads.softmax:
        w = (w / heads.temperature).softmax(-1)
        w = w if heads.scale is None else w * heads.scale[:, None]
    return summarize(outputs, w, heads.spread), outputs, w


def _exact(hidden: Tensor, heads: AttributeWeights, gate_hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return reference_scores(hidden.double(), heads, None if gate_hidden is None else gate_hidden.double())


def _more(hidden: Tensor) -> Tensor:
    """Rows of the same numbers in other columns, until there are 64."""
    return torch.cat([hidden.roll(shift, 1) for shift in range(max(1, -(-64 // len(hidden))))])


def check_scores(
    backend: Any, hidden: Tensor, heads: AttributeWeights, gate_hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every result against truth; returns them."""
    got: tuple[Tensor, Tensor, Tensor] = backend.score_attributes(hidden, heads, gate_hidden)
    n = len(hidden)
    shapes = (len(SUMMARY), n), (n, heads.members, heads.attributes * heads.per), (n, heads.members, heads.attributes)
    assert tuple(part.shape for part in got) == shapes
    assert all(part.dtype == torch.float32 and part.is_contiguous() for part in got)
    if not n:
        return got
    exact = _exact(hidden, heads, gate_hidden)
    # What rounding does to the largest of 64 rows: of one or two the error may happen to be small.
    more, gates = (None if t is None else _more(t) for t in (hidden, gate_hidden))
    assert more is not None
    plain = rounded_scores(more, heads, gates)
    like = _exact(more, heads, gates)
    longest = max(heads.hidden_size, *(layer.shape[2] for layer in heads.layers), 1)

    def parts(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        named = dict(zip(SUMMARY, results[0], strict=True)) | {"outputs": results[1], "weights": results[2]}
        return {name: part.double().cpu() for name, part in named.items()}

    found, true, near, wanted = (parts(r) for r in (got, exact, plain, like))
    # A reward is a sum that may cancel: its size is that of what was added.
    scale = float((exact[2].abs() * exact[1].abs().amax(-1, keepdim=True)).sum(-1).amax())
    allowed = {}
    for name, b in true.items():
        size = max(float(b.abs().amax()), scale if name in ("mean", "gap") else 0.0)
        allowed[name] = 2 * float((near[name] - wanted[name]).abs().amax()) + 16 * EPS * longest**0.5 * size
    # Rewards off by δ each move their variance by at most twice δ times the largest difference between them.
    allowed["epistemic"] = max(allowed["epistemic"], 2 * (allowed["gap"] + scale * EPS) * float(true["gap"].amax()))
    for name, a in found.items():
        if name == "norm" and heads.spread == "quantiles":
            assert bool(a.isnan().all())
            continue
        assert bool(a.isfinite().all()), f"{name}: not finite"
        error = float((a - true[name]).abs().amax())
        assert error <= allowed[name], f"{name}: off by {error:.3g}, allowed {allowed[name]:.3g}"
    return got
