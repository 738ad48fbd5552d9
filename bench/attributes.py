"""Multi-attribute heads: one URM head and an ensemble of three, gates as wide as the states, beside torch.

``rmcore bench --suite attributes``. Weights are rotated over copies that together exceed twice the last-level cache, as
in the suite ``score``. Peers are the published formula in torch's own operations, eager and compiled; of an ensemble
head by head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, selu

from rmcore import ops
from rmcore.ops import AttributeWeights, Backend
from rmcore.ops.attribute_weights import reference_scores

from .harness import left_out, relative_error, rotations, time_calls
from .peers import TOLERANCE
from .rows import dtype_name, time_columns
from .setup import Row, Setup

__all__ = ["attribute_heads", "attributes"]

ATTRIBUTES = 5
MEMBERS = (1, 3)
COMPILED_BATCHES = (1, 16, 64, 256, 1024, 4096)
_BACKENDS: tuple[Backend, ...] = ("triton", "cpu")
_Run = Callable[[AttributeWeights, Tensor], tuple[Tensor, Tensor]]


def attributes(setup: Setup) -> Iterator[Row]:
    """Ours and torch's at each size, number of heads, dtype and batch; bytes are those of ``size`` h × h gates."""
    for h, _ in setup.sizes:
        for members in MEMBERS:
            for dtype in (d for d in setup.dtypes if d.is_floating_point):
                yield from _measured(setup, attribute_heads(h, members).to(setup.device), dtype)


def attribute_heads(h: int, members: int, dtype: torch.dtype = torch.float32) -> AttributeWeights:
    """URM heads of about unit means and weights, gates as wide as the states."""
    g = torch.Generator().manual_seed(members)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    a, narrow = ATTRIBUTES, h**-0.5
    value = normal(members, 2 * a, h, scale=narrow)
    value[:, 1::2] *= 0.3
    return AttributeWeights.build(
        value, dtype=dtype, layers=(normal(members, h, h, scale=narrow), normal(members, h, h, scale=narrow)),
        biases=(normal(members, h, scale=0.1), normal(members, h, scale=0.1)),
        last=normal(members, a, h, scale=narrow), last_bias=normal(members, a),
    )  # fmt: skip


def _in(heads: AttributeWeights, dtype: torch.dtype) -> AttributeWeights:
    parts = {"layers": heads.layers, "biases": heads.biases, "last": heads.last, "last_bias": heads.last_bias}
    return AttributeWeights.build(heads.value, dtype=dtype, **parts)  # type: ignore[arg-type]


def _peer(heads: AttributeWeights, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(mean reward, mean Σ w² σ²), head by head, as each published head computes it."""
    assert heads.last is not None
    assert heads.last_bias is not None
    x, rewards, variances = hidden.to(heads.dtype), [], []
    for m in range(heads.members):
        outputs = linear(x, heads.value[m]).view(len(x), ATTRIBUTES, 2)
        z = x
        for layer, bias in zip(heads.layers, heads.biases, strict=True):
            z = selu(linear(z, layer[m], bias[m].to(z.dtype)))
        w = linear(z, heads.last[m].to(z.dtype), heads.last_bias[m].to(z.dtype))
        rewards.append((w * outputs[..., 0]).sum(1).float())
        variances.append((w.float() * outputs[..., 1].float().exp()).square().sum(1))
    return torch.stack(rewards).mean(0), torch.stack(variances).mean(0)


def _variants(setup: Setup, dtype: torch.dtype) -> Iterator[tuple[str, torch.dtype, _Run]]:
    for name in _BACKENDS:
        if ops.explain("score_attributes", setup.device, dtype, name).backend == name:

            def ours(heads: AttributeWeights, x: Tensor, name: Backend = name) -> tuple[Tensor, Tensor]:
                found = ops.score_attributes(x, heads, backend=name)
                return found.mean, found.variance

            yield f"rmcore {name}", dtype, ours
    yield "torch eager", dtype, _peer
    if setup.compiled:
        torch.compiler.reset()  # past eight recompilations of a function torch would run it eagerly
        yield "torch.compile", dtype, torch.compile(_peer, dynamic=False)
    if dtype == setup.dtypes[0]:
        yield "torch eager", torch.float32, _peer


def _measured(setup: Setup, heads: AttributeWeights, dtype: torch.dtype) -> Iterator[Row]:
    h, members = heads.hidden_size, heads.members
    for variant, kind, run in _variants(setup, dtype):
        weights = _in(heads, kind)
        copies = [weights, *(weights.clone() for _ in range(rotations(weights.nbytes(), setup.device) - 1))]
        why = ""
        for rows in setup.batches:
            if variant == "torch.compile" and rows not in COMPILED_BATCHES:
                continue
            common: Row = {
                "suite": f"attributes, {members} head{'s' if members > 1 else ''}", "variant": variant,
                "dtype": dtype_name(kind), "h": h, "d": h, "rows": rows,
            }  # fmt: skip
            setup.note(f"attributes h={h} M={members} B={rows} {variant} {common['dtype']}")
            x = torch.randn(rows, h, generator=torch.Generator().manual_seed(rows)).to(setup.device, dtype)
            found = _timed(setup, run, copies, x, why)
            why = str(found.get("left_out", ""))
            yield common | found


def _timed(setup: Setup, run: _Run, copies: list[AttributeWeights], x: Tensor, why: str) -> dict[str, Any]:
    try:
        got = run(copies[0], x)
        if why := why or left_out(partial(run, copies[0], x), setup.device) or "":
            return {"left_out": why}
        timing = time_calls([partial(run, one, x) for one in copies], setup.device, budget_s=setup.budget_s)
    except Exception as error:  # a peer that cannot run is reported, never silently missing
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    heads, rows = copies[0], len(x)
    products = heads.value.numel() + sum(layer.numel() for layer in heads.layers)
    moved = heads.nbytes() + x.numel() * x.element_size()
    floor = setup.limits.floor(moved, 2.0 * rows * products, dtype_name(heads.dtype))
    true = reference_scores(x[:64].double(), heads)[0]
    off = max(relative_error(got[k][:64], true[k]) for k in range(2))
    return time_columns(timing) | {
        "bytes": moved, "flop": 2.0 * rows * products, **floor.beside(timing.median),
        "error": off, "right": off <= TOLERANCE[heads.dtype],
    }  # fmt: skip
