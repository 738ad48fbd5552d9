"""The ``triton`` backend's other ways through its large products: persistent programs, operands by descriptors.

Which way is taken stands here (:data:`SERVES`) and not beside the kernels, so that what serves may change without a
byte of what was measured. No GPU has run these forms yet: ``plain`` serves. Each of the others has a proof of its own
(``rmcore.ops.sources.LAUNCHED``); where it is unproven on a card it checks itself there first, and where it fails the
plain form serves, with a warning (``rmcore.ops.dispatch``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rmcore.ops.weights import FeatureMap, HeadWeights

if TYPE_CHECKING:
    from rmcore.kernels.heuristics import Device

__all__ = [
    "FORMS",
    "SERVES",
    "Large",
    "choosing",
    "features",
    "form_of",
    "give_up",
    "gram",
    "kernel_of_form",
    "memory",
    "score",
]

FORMS = ("plain", "persistent", "specialized")
"""``plain``: a program a tile (features.py, variance.py, gram.py). ``persistent``: one a multiprocessor, which asks for
the next tile's operands while it ends one. ``specialized``: that, with warps of their own for the asking."""


class Large(NamedTuple):
    """How large products are computed.

    Attributes:
        form: one of :data:`FORMS`.
        rows: the form is taken from so many on. Fewer than 512 do not fill a tile on every multiprocessor.
        programs: at most so many, 0 for one a multiprocessor: small problems have more tiles than programs only so.
    """

    form: str = "plain"
    rows: int = 512
    programs: int = 0


SERVES = [Large()]
"""The way taken; one element."""

_given_up: set[tuple[str, int | None]] = set()


@contextmanager
def choosing(large: Large) -> Iterator[None]:
    """Another way for a while, to hold them side by side. For the whole process."""
    assert large.form in FORMS, large
    before, SERVES[0] = SERVES[0], large
    try:
        yield
    finally:
        SERVES[0] = before


def kernel_of_form(op: str) -> str | None:
    """Whose proof ``op`` needs beside the plain form's, as far as calls are large; None where nothing else serves."""
    form = SERVES[0].form
    return f"{op}_{form}" if form != "plain" and op in ("score", "accumulate") else None


def give_up(kernel: str, device: torch.device) -> None:
    """Serve plainly what ``kernel`` would have served on a device."""
    _given_up.add((kernel, device.index))


def form_of(op: str, rows: int, feature_map: FeatureMap, device: Device, on: torch.device) -> str:
    """The form of a call of ``score`` or ``accumulate`` (without pairs): ``plain`` where the chosen one cannot."""
    large = SERVES[0]
    if large.form == "plain" or rows < large.rows or (f"{op}_{large.form}", on.index) in _given_up:
        return "plain"
    from rmcore.kernels import features_tma

    return large.form if features_tma.refusal(feature_map, device) is None else "plain"


def memory(form: str) -> Callable[..., Any] | None:
    """What runs a function in such a way that its launches may have descriptors; None for a form without any."""
    if form == "plain":
        return None
    from rmcore.kernels import launch_tma

    return launch_tma.with_memory


def _narrowed(device: Device) -> Device:
    limit = SERVES[0].programs
    return device._replace(multiprocessors=min(limit, device.multiprocessors)) if limit else device


def score(hidden: Tensor, weights: HeadWeights, out: Tensor, device: Device, form: str) -> None:
    """Fill ``out`` (4, B) with g, v, u, p by ``form``."""
    from rmcore.kernels import launch_tma, variance, variance_tma

    c, logits = features(hidden, weights.map, device, form, weights.beta)
    size, narrowed = weights.num_features, _narrowed(device)
    parts = launch_tma.with_memory(variance_tma.squares, c, weights.factor, size, narrowed, form)
    variance.score(
        logits, parts, out,
        beta0=weights.beta0, factor_scale=weights.factor_scale, amplitude=weights.amplitude,
    )  # fmt: skip


def features(hidden: Tensor, feature_map: FeatureMap, device: Device, form: str, beta: Tensor) -> tuple[Tensor, Tensor]:
    """c of hidden rows, and partial logits, by ``form``."""
    from rmcore.kernels import features_tma, launch_tma

    compute = functools.partial(features_tma.compute, hidden, feature_map, _narrowed(device), form, beta=beta)
    c, logits = launch_tma.with_memory(compute)
    assert logits is not None
    return c, logits


def gram(phi: Tensor, precision: Tensor, device: Device, form: str, *, scale: float) -> None:
    """precision (D, D), lower triangle, += scale · phiᵀ phi, by ``form``."""
    from rmcore.kernels import gram_tma, launch_tma

    launch_tma.with_memory(functools.partial(gram_tma.gram, phi, precision, _narrowed(device), form, scale=scale))
