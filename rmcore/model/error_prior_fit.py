"""The error prior of a head, from its training pairs (:mod:`rmcore.model.error_prior`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.prompt import canonical_response, text_length
from rmcore.head.ascent import learn
from rmcore.head.config import HeadConfig
from rmcore.head.degenerate import told_already
from rmcore.head.fit import fit
from rmcore.head.frozen import FrozenHead
from rmcore.head.ranks import Ranks
from rmcore.head.shards import sampled_pairs, sampled_rows
from rmcore.head.sngp import SNGPHead
from rmcore.model.error_prior import (
    ErrorPrior,
    error_features,
    prior_precision,
    row_distance,
    sketch_rows,
    with_product,
)
from rmcore.model.training_pairs import Preference
from rmcore.ops import reference

__all__ = [
    "MOST_PAIRS",
    "Fitted",
    "asked_about",
    "error_prior_of",
    "error_prior_on",
    "fit_error_prior",
    "part_of_pairs",
]

log = logging.getLogger(__name__)

Fitted: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], FrozenHead]
"""Makes a head of hidden rows, labels and pairs (None in concat mode)."""

MOST_PAIRS = 2000
"""A sample of that many is learned from where there are more: the fits then cost no more than one of all."""


def error_prior_of(
    config: HeadConfig,
    preferences: Sequence[Preference],
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    *,
    fitted: Fitted | None = None,
    held_out_of: tuple[FrozenHead, Tensor] | None = None,
    ranks: Ranks | None = None,
) -> ErrorPrior | None:
    """The error prior of a head fitted on what :func:`encode_preferences` made of these preferences.

    ``fitted`` as in :func:`fit_error_prior`. With ``held_out_of``, a head and the rows it was
    fitted on, the preferences are such that neither head nor backbone has seen.

    Of several ``ranks`` each gives its own part; rank 0 learns from a sample of all, :data:`MOST_PAIRS` at most, and
    gives all what it found.

    None, with a warning, where there are too few to leave any out, ties aside, or some of them were left out as silent,
    so that rows and texts do not match.
    """
    lengths = [[text_length(canonical_response(text)) for text in (item.chosen, item.rejected)] for item in preferences]
    size = torch.tensor(lengths, dtype=torch.float64).view(-1, 2).log1p()
    ratio = size[:, 0] - size[:, 1]
    better = labels if pairs is not None else labels[::2]
    counted, fits = int((better != 0.5).sum()), len(lengths) == len(better)
    if ranks is not None:
        told = ranks.each(torch.tensor([counted, fits], dtype=torch.float64))
        counted, fits = int(told[:, 0].sum()), bool(told[:, 1].all())
    if not fits or counted < 10:
        log.warning("no error prior: it needs ten pairs besides ties, and all of them with different inputs")
        return None
    if ranks is None:
        if held_out_of is not None:
            return error_prior_on(*held_out_of, hidden, labels, pairs, ratio)
        return fit_error_prior(config, hidden, labels, pairs, ratio, fitted=fitted)
    with ranks.work("the error prior"):
        hidden, labels, pairs, columns = sampled_pairs(hidden, labels, pairs, ratio[:, None], MOST_PAIRS, ranks)
        seen = None if held_out_of is None else sampled_rows(held_out_of[1], 2 * MOST_PAIRS, ranks)
        prior = None
        if ranks.rank == 0 and held_out_of is not None and seen is not None:
            prior = error_prior_on(held_out_of[0], seen, hidden, labels, pairs, columns[:, 0])
        elif ranks.rank == 0:
            prior = fit_error_prior(config, hidden, labels, pairs, columns[:, 0], fitted=fitted, seed=None)
        return _shared(prior, ranks)


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
        with told_already():
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
    """The regression of errors on features; what is known without any where a sample has ties almost only."""
    if len(errors) < 2:
        unknown, none = prior_precision(raw.shape[1] + 1), raw.new_zeros(raw.shape[1])
        return ErrorPrior(none, none + 1, unknown.new_zeros(len(unknown)), unknown, sketch, 0, 0.5)
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


def _shared(prior: ErrorPrior | None, ranks: Ranks) -> ErrorPrior:
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
