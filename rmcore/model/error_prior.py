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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore._base.files import digest_file
from rmcore.head.ascent import learn
from rmcore.head.config import HeadConfig
from rmcore.head.fit import fit
from rmcore.head.frozen import FrozenHead
from rmcore.head.ranks import Ranks
from rmcore.head.sngp import SNGPHead
from rmcore.ops import reference

__all__ = [
    "FEATURES",
    "MOST_PAIRS",
    "ErrorPrior",
    "asked_about",
    "error_features",
    "error_prior_on",
    "fit_error_prior",
    "part_of_pairs",
    "read_error_prior",
    "row_distance",
    "shared_error_prior",
    "sketch_rows",
    "write_error_prior",
]

FEATURES = ("log variance", "log margin", "distance", "longer preferred", "length ratio", "margin x distance")
"""The head's v and |p|; ``distance``, the mean of the two rows' to the nearest of the sketch; the logarithm of the
responses' length ratio, counted positive where the head prefers the longer one, and its magnitude. The last is the
product of two others, standardised: far from the training data a large margin says less."""

Fitted: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], FrozenHead]
"""Makes a head of hidden rows, labels and pairs (None in concat mode)."""

MOST_PAIRS = 2000
"""A sample of that many is learned from where there are more: the fits then cost no more than one of all."""

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


def fit_error_prior(
    config: HeadConfig,
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    log_length_ratio: Tensor,
    *,
    folds: int = 5,
    sketch: int = 256,
    most_pairs: int = MOST_PAIRS,
    seed: int | None = 0,
    fitted: Fitted | None = None,
) -> ErrorPrior:
    """Learn where a head of this configuration errs on pairs that it was not fitted on.

    Args:
        config: of the head.
        hidden: as :func:`rmcore.head.fit.fit` takes them, as are the next two. In concat mode rows 2k and 2k + 1 are
            the two orders of pair k.
        labels: (N,), or (2N,) in concat mode.
        pairs: (N, 2); None in concat mode.
        log_length_ratio: (N,) log(1 + characters), first response minus second.
        folds: parts that are left out in turn.
        sketch: rows to keep.
        most_pairs: a sample of that many is taken where there are more: the fits then cost no more than one of all.
        seed: of the split; None for pairs that are in random order already.
        fitted: makes the head of some of the pairs, given as the whole is; default: a head of the configuration. For
            one whose β is given, or whose layer is trained too.

    Raises:
        InputError: fewer pairs than folds.
    """
    count = len(log_length_ratio)
    if count < 2 * folds:
        reject("pairs", f"{count} pairs", f"at least {2 * folds}, two for each of {folds} folds")
    config = replace(config, row_ridge=None)  # nobody asks these heads for novelty
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = order[:most_pairs]
    features, wrong = [], []
    for fold in range(folds):
        held_out = order[fold::folds]
        kept = torch.cat([order[other::folds] for other in range(folds) if other != fold])
        rows, own_labels, own_pairs = part_of_pairs(hidden, labels, pairs, kept)
        if fitted is None:
            head, _ = fit(SNGPHead(config).to(hidden.device), rows, own_labels, pairs=own_pairs, max_passes=12)
        else:
            head = fitted(rows, own_labels, own_pairs)
        found = _errors(head, hidden, labels, pairs, log_length_ratio, held_out, sketch_rows(rows, sketch))
        features.append(found[0])
        wrong.append(found[1])
    return _prior(torch.cat(features), torch.cat(wrong), sketch_rows(hidden, sketch))


def error_prior_on(
    head: FrozenHead,
    seen: Tensor,
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    log_length_ratio: Tensor,
    *,
    sketch: int = 256,
) -> ErrorPrior:
    """Learn where a head errs from pairs that neither it nor its backbone was trained on.

    Args:
        head: the fitted head.
        seen: (R, h) the rows it was fitted on, for the sketch.
        hidden: rows of the other pairs, as :func:`fit_error_prior` takes them, as are the next three.
        labels: (N,), or (2N,) in concat mode.
        pairs: (N, 2); None in concat mode.
        log_length_ratio: (N,).
        sketch: rows to keep.

    Raises:
        InputError: fewer than ten pairs.
    """
    count = len(log_length_ratio)
    if count < 10:
        reject("pairs", f"{count} pairs", "at least 10")
    rows = sketch_rows(seen, sketch)
    features, wrong = _errors(head, hidden, labels, pairs, log_length_ratio, torch.arange(count), rows)
    return _prior(features, wrong, rows)


def _errors(
    head: FrozenHead,
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    log_length_ratio: Tensor,
    asked: Tensor,
    sketch: Tensor,
) -> tuple[Tensor, Tensor]:
    """(n, 5) features of some pairs without ties, and (n,) float64, 1 where the head is wrong about them."""
    g, v, p, distance = _asked(head, hidden, pairs, asked, sketch)
    features = error_features(g, v, p, {"distance": distance, "log_length_ratio": log_length_ratio[asked]})
    better = (labels if pairs is not None else labels[::2]).cpu()[asked].double() - 0.5
    return features[better != 0], (g.sign() != better.sign()).double()[better != 0]


def _prior(raw: Tensor, errors: Tensor, sketch: Tensor) -> ErrorPrior:
    """The regression of errors on features."""
    center, scale = raw.mean(0), raw.std(0).clamp_min(1e-6)
    known = with_product(((raw - center) / scale).numpy())
    inputs = np.concatenate([np.ones((len(known), 1)), known], 1)
    start = prior_precision(known.shape[1]).numpy()
    mean, precision = learn(np.zeros((1, len(start))), start[None], inputs, errors.numpy(), np.ones(len(errors)))
    return ErrorPrior(
        center,
        scale,
        torch.from_numpy(mean[0]),
        torch.from_numpy(precision[0]),
        sketch,
        len(errors),
        float(errors.mean()),
    )


def shared_error_prior(prior: ErrorPrior | None, ranks: Ranks) -> ErrorPrior:
    """Rank 0's, on every rank; the others give None."""
    told = ranks.share() if prior is None else ranks.share(prior.tensors(), _numbers(prior))
    return prior or ErrorPrior(**told.tensors, **told.values)  # type: ignore[arg-type]


def _numbers(prior: ErrorPrior) -> dict[str, Any]:
    return {"pairs": prior.pairs, "error_rate": prior.error_rate}


def part_of_pairs(
    hidden: Tensor, labels: Tensor, pairs: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, labels and pairs of some of the pairs."""
    if pairs is None:
        rows = torch.stack([2 * kept, 2 * kept + 1], 1).flatten()
        return hidden[rows], labels[rows], None
    kept = kept.to(pairs.device)
    rows, where = pairs[kept].unique(return_inverse=True)
    return hidden[rows], labels[kept], where


def _asked(
    head: FrozenHead, hidden: Tensor, pairs: Tensor | None, asked: Tensor, sketch: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, v, p and distance of some of the pairs, on the CPU."""
    distance = row_distance(_rows_of(hidden, pairs, asked), sketch).view(-1, 2).mean(1)
    return *asked_about(head, hidden, pairs, asked), distance.cpu()


def asked_about(head: FrozenHead, hidden: Tensor, pairs: Tensor | None, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) float64 g, v and p of some of the pairs, given by number, on the CPU."""
    flat = _rows_of(hidden, pairs, asked)
    if pairs is not None:
        g, v = head.score_pairs(flat, torch.full((len(asked),), 2, dtype=torch.int64))[:2]
    else:
        scores = head.score(flat)
        g, v = (scores.logit[::2] - scores.logit[1::2]) / 2, (scores.variance[::2] + scores.variance[1::2]) / 2
    g, v = g.double(), v.double()
    p = reference.preference(g, reference.uncertainty(v, head.config.resolved_amplitude))
    return g.cpu(), v.cpu(), p.cpu()


def _rows_of(hidden: Tensor, pairs: Tensor | None, asked: Tensor) -> Tensor:
    """(2n, h) the two rows of some of the pairs."""
    rows = hidden[pairs[asked.to(pairs.device)]] if pairs is not None else hidden.view(-1, 2, hidden.shape[1])[asked]
    return rows.flatten(0, 1)


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
