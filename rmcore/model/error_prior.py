"""What is known of a head's errors before any verdict: from which pairs of its own training data it got wrong.

Fitted on four fifths of the training pairs, the head is asked about the last fifth, five times over. That gives the
features of pairs the head has not seen (by which they are standardised), how often it errs on them, and a logistic
regression of its errors on the features. With the model goes a *sketch* of the training rows, a few hundred that lie
far apart: the distance to the nearest of them tells how unlike the training data a response is.

Routers that learn begin with it (:class:`rmcore.engine.routing.LearnedRouter`); it is theirs to find out on a stream
whether what was learned on the training data holds there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError
from rmcore._base.files import digest_file

__all__ = [
    "FEATURES",
    "ErrorPrior",
    "error_features",
    "prior_precision",
    "read_error_prior",
    "row_distance",
    "sketch_rows",
    "with_product",
    "write_error_prior",
]

FEATURES = ("log variance", "log margin", "distance", "longer preferred", "length ratio", "margin x distance")
"""The head's v and |p|; ``distance``, the mean of the two rows' to the nearest of the sketch; the logarithm of the
responses' length ratio, counted positive where the head prefers the longer one, and its magnitude. The last is the
product of two others, standardised: far from the training data a large margin says less."""


_PRIOR_SD = 0.5
_FILE = "error_prior.safetensors"


@dataclass(frozen=True)
class ErrorPrior:
    """Where a router that learns begins.

    Attributes:
        center: (5,) float64, means of the features but for the product, over pairs the head had not seen.
        scale: (5,) their standard deviations.
        mean: (7,) float64, the regression's weights, the offset first.
        precision: (7, 7) float64, of its posterior.
        sketch: (S, h) float32 training rows; None where there is none, and no distance is known.
        pairs: how many pairs it was learned from.
        error_rate: of the head on them.
    """

    center: Tensor
    scale: Tensor
    mean: Tensor
    precision: Tensor
    sketch: Tensor | None = None
    pairs: int = 0
    error_rate: float = 0.5

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named = {name: getattr(self, name) for name in ("center", "scale", "mean", "precision", "sketch")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def error_features(logit: Tensor, variance: Tensor, preference: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """(Q, 5) float64: the features of pairs but for the product; NaN where a column is not given.

    Args:
        logit: (Q,) g.
        variance: (Q,) v.
        preference: (Q,) p.
        columns: ``distance``, and ``log_length_ratio``: log(1 + characters), first response minus second.
    """
    nothing = torch.full_like(logit, math.nan, dtype=torch.float64)
    ratio = columns.get("log_length_ratio", nothing).double()
    return torch.stack(
        [
            (variance.double() + 1e-12).log(),
            (preference.double().abs() + 1e-3).log(),
            columns.get("distance", nothing).double(),
            logit.double().sign() * ratio,
            ratio.abs(),
        ],
        1,
    )


def with_product(standardised: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(Q, 5 or more) standardised features with the product after the fifth, at most three deviations large each."""
    product = standardised[:, 1].clip(-3, 3) * standardised[:, 2].clip(-3, 3)
    return np.concatenate([standardised[:, :5], product[:, None], standardised[:, 5:]], 1)


# -- the sketch ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sketch_rows(hidden: Tensor, count: int = 256) -> Tensor:
    """(min(count, R), h) float32: rows far apart from each other, by the greedy k-centre rule (Gonzalez 1985).

    Every row is then at most twice as far from its nearest as with the best choice of that many rows. The first is the
    one nearest the mean, so that equal rows give equal sketches.
    """
    rows = hidden.detach().float()
    first = int((rows - rows.mean(0)).norm(dim=1).argmin())
    chosen, distance = [first], row_distance(rows, rows[first : first + 1])
    while len(chosen) < min(count, len(rows)):
        furthest = int(distance.argmax())
        if distance[furthest] == 0:
            break
        chosen.append(furthest)
        distance = torch.minimum(distance, row_distance(rows, rows[furthest : furthest + 1]))
    return rows[chosen].cpu()


@torch.no_grad()
def row_distance(hidden: Tensor, sketch: Tensor) -> Tensor:
    """(R,) float32: how far each row is from the nearest of the sketch."""
    return torch.cdist(hidden.float(), sketch.to(hidden.device)).amin(dim=1)


# -- the regression --------------------------------------------------------------------------------------------------


def prior_precision(features: int) -> Tensor:
    """Deviation 1 on the offset, one half on the weights of standardised features."""
    return torch.diag(torch.tensor([1.0] + [_PRIOR_SD**-2] * features, dtype=torch.float64))


# -- on disk ---------------------------------------------------------------------------------------------------------


def write_error_prior(prior: ErrorPrior, folder: Path) -> dict[str, Any]:
    """Write the tensors into a model's folder; → what its ``rmcore.json`` says of them."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in prior.tensors().items()}, folder / _FILE)
    told = {"file": _FILE, "features": list(FEATURES), "pairs": prior.pairs, "error_rate": prior.error_rate}
    return {**told, "sha256": digest_file(folder / _FILE)}


def read_error_prior(folder: Path, values: object, width: int) -> ErrorPrior:
    """Read what :func:`write_error_prior` wrote; ``width`` is that of hidden rows.

    Raises CheckpointError where it is damaged, of other features, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        assert isinstance(values, Mapping)
        found = load_file(folder / _FILE)
        prior = ErrorPrior(**found, pairs=int(values["pairs"]), error_rate=float(values["error_rate"]))
        names: Sequence[Any] = values["features"]
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{folder / _FILE}: got an error prior that cannot be read ({error})") from error
    if "sha256" in values and digest_file(folder / _FILE) != values["sha256"]:  # earlier folders have none
        raise CheckpointError(
            f"{folder / _FILE}: got contents that differ from the sha256 in rmcore.json: the file is truncated, "
            "altered, or from another save. Copy the folder again"
        )
    width_of = 0 if prior.sketch is None else prior.sketch.shape[1]
    shapes = [tuple(t.shape) for t in (prior.center, prior.scale, prior.mean, prior.precision)]
    features = len(FEATURES)
    expected = [(features - 1,), (features - 1,), (features + 1,), (features + 1, features + 1)]
    finite = all(bool(tensor.isfinite().all()) for tensor in prior.tensors().values())
    if list(names) != list(FEATURES) or shapes != expected or width_of not in (0, width) or not finite:
        raise CheckpointError(
            f"{folder / _FILE}: got features {list(names)}, shapes {shapes} and a sketch {width_of} wide, expected "
            f"{list(FEATURES)}, {expected} and {width}, all finite"
        )
    return replace(prior, **{name: getattr(prior, name).double() for name in ("center", "scale", "mean", "precision")})
