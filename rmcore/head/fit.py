"""Fitting a head: β to its MAP by Newton's method, and with it the Laplace posterior (design 2.4).

Three ways, all ending at a :class:`~rmcore.head.FrozenHead` whose posterior belongs to the β it serves:

- :func:`fit`: features as they are; β by Newton/IRLS with the same ``accumulate`` pass that builds P (about 6 passes);
- :func:`rmcore.model.training.train_layer` first, W by AdamW, or a trainer for the backbone too, then :func:`fit`;
- :func:`upgrade`: β is an existing reward model's scalar head and stays; only P is fitted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.amplitude import fit_amplitude
from rmcore.head.ascent import ascend
from rmcore.head.config import HeadConfig
from rmcore.head.degenerate import warn_if_degenerate, warn_if_undecided
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import Posterior, check_finite
from rmcore.head.ranks import Ranks, Shared, working
from rmcore.head.rows import RowPosterior, counted_rows
from rmcore.head.shards import check_alike, one_feature_map, one_head, one_length_scale
from rmcore.head.sngp import SNGPHead
from rmcore.ops import reference
from rmcore.ops.dispatch import Backend
from rmcore.ops.weights import FeatureMap, HeadWeights

__all__ = ["Belief", "FitReport", "check_data", "fit", "fit_amplitude", "newton", "upgrade", "without_posterior"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitReport:
    """What a Newton fit did.

    ``log_posterior`` holds Σ log p(y|β) − s/2 ‖β‖² at each accepted β, ``decrements`` the squared Newton decrement
    gᵀP⁻¹g of each step, in nats; ``passes`` counts passes over the data, posterior pass included.
    """

    converged: bool
    passes: int
    log_posterior: tuple[float, ...]
    decrements: tuple[float, ...] = field(default=())


class Belief(NamedTuple):
    """What is known of β before new data: N(beta, precision⁻¹) with the posterior's precision."""

    beta: Tensor
    posterior: Posterior

    def empty_of_new_data(self, likelihood: reference.Likelihood) -> Posterior:
        """A copy of the posterior for new data to be added to, as curvature of ``likelihood``.

        A gaussian posterior counts every datum with weight 1; the logistic curvature of a datum is at most 1/4 of that
        (Böhning & Lindsay 1988), so Newton's method takes a quarter of it.
        """
        known = self.posterior
        bound = 0.25 if (known.likelihood, likelihood) == ("gaussian", "logistic") else 1.0
        gram = known.gram if bound == 1.0 else bound * known.gram
        return Posterior.from_gram(gram, known.count, ridge=known.ridge, likelihood=likelihood)


def fit(
    head: SNGPHead,
    hidden: Tensor,
    labels: Tensor,
    *,
    pairs: Tensor | None = None,
    dtype: torch.dtype | None = None,
    sample_weight: Tensor | None = None,
    max_passes: int = 30,
    tolerance: float = 1e-8,
    backend: Backend = "auto",
    progress: Callable[[str], None] | None = None,
    ranks: Ranks | None = None,
) -> tuple[FrozenHead, FitReport]:
    """Freeze the head's features and fit β and the posterior on them, in difference mode the row posterior too.

    Over several ``ranks`` each gives its own part of the data, which may be empty, and all get one head, the same to
    the bit: that of one process with all the data, rank 0's first, up to the order of the sums.

    Args:
        head: its W is used as it is; its length-scale is set by the median rule if still unset; its β is the start.
        hidden: (R, h) finite rows; in difference mode one a response, in concat mode one a pair.
        labels: (N,) in [0, 1], the probability that the pair's first response is better.
        pairs: (N, 2) int64 rows of ``hidden``; required in difference mode, refused in concat mode.
        dtype: serving dtype, None for the device's default.
        sample_weight: (N,) factors on each datum.
        max_passes: stop, with a warning, after this many Newton passes.
        tolerance: converged when half the squared Newton decrement, the nats still to gain, is below this times N.
        backend: of the accumulate passes.
        progress: called with a line of text after each pass, on rank 0.
        ranks: all of which call this, with heads that are alike; rank 0's W and start are taken.

    Returns:
        The frozen head and a report.

    Raises:
        InputError: shapes, labels or mode do not fit; no data.
        NonFiniteError: a hidden row holds NaN or Inf.
        FactorizationError: P is not positive definite; the message says what to change.
        RankError: another rank died, or raised one of these.
    """
    with working(ranks, "the fit"):
        return _fit(
            head,
            hidden,
            labels,
            pairs=pairs,
            dtype=dtype,
            sample_weight=sample_weight,
            max_passes=max_passes,
            tolerance=tolerance,
            backend=backend,
            progress=progress,
            ranks=ranks,
        )


def _fit(
    head: SNGPHead,
    hidden: Tensor,
    labels: Tensor,
    *,
    pairs: Tensor | None,
    dtype: torch.dtype | None,
    sample_weight: Tensor | None,
    backend: Backend,
    ranks: Ranks | None,
    **climb: Any,
) -> tuple[FrozenHead, FitReport]:
    check_data(head.config, hidden, labels, pairs, sample_weight, ranks=ranks)
    warn_if_degenerate(hidden, labels, pairs, ranks)
    if not math.isfinite(float(head.length_scale)) and head.config.features == "rff":
        one_length_scale(head, hidden, ranks)
    feature_map = one_feature_map(head, dtype, hidden, ranks)
    beta0 = float(head.beta0.detach())
    beta, posterior, report = newton(
        feature_map,
        hidden,
        labels,
        head.config,
        pairs=pairs,
        start=head.beta.detach(),
        beta0=beta0,
        sample_weight=sample_weight,
        backend=backend,
        ranks=ranks,
        **climb,
    )
    warn_if_undecided(beta, labels)
    rows = _row_posterior(head.config, feature_map, hidden, pairs, sample_weight, backend, ranks)
    frozen = one_head(lambda: FrozenHead(_resolved(head), feature_map, beta, beta0, posterior, rows=rows), ranks)
    with torch.no_grad():
        head.beta.copy_(frozen.beta)
        head.beta0.fill_(frozen.beta0)
    return frozen, report


@torch.no_grad()
def newton(
    feature_map: FeatureMap,
    hidden: Tensor,
    labels: Tensor,
    config: HeadConfig,
    *,
    pairs: Tensor | None = None,
    start: Tensor | None = None,
    beta0: float = 0.0,
    sample_weight: Tensor | None = None,
    max_passes: int = 30,
    tolerance: float = 1e-8,
    backend: Backend = "auto",
    progress: Callable[[str], None] | None = None,
    prior: Belief | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Posterior, FitReport]:
    """The MAP of β under its prior by damped Newton, and the posterior at it.

    A step is β ← β + t P⁻¹(Φᵀ(y−p) − S(β − m)) for the prior N(m, S⁻¹), by default N(0, I/s); t is halved while the log
    posterior falls, which the concave objective needs only far from its maximum. With ``prior`` this is one step of
    online Laplace (assumed-density filtering): what was known stays in as a quadratic, the new data count in full.

    Of several ranks rank 0 climbs, and the others give it their data's sums at each β that it tries, so nothing depends
    on their arithmetic being alike. A step is one reduction (:meth:`Posterior.summed`).

    Arguments as in :func:`fit`; ``start`` defaults to the prior's mean. → β (D,) float64, posterior, report.
    """
    device, ridge = hidden.device, config.ridge if prior is None else prior.posterior.ridge
    count = len(labels) if ranks is None else sum(ranks.counts(len(labels)))
    feature_map = feature_map.dequantized()  # once, not in every pass
    mean = torch.zeros(feature_map.num_features, dtype=torch.float64, device=device) if prior is None else prior.beta
    beta = mean.clone() if start is None else start.to(mean, copy=True)
    curvature = None if prior is None else prior.empty_of_new_data("logistic").precision

    def added(at: Tensor, likelihood: reference.Likelihood) -> tuple[Posterior, Tensor, float]:
        """P without a prior's, gradient and log-likelihood of the data of all ranks."""
        posterior = Posterior(feature_map.num_features, ridge=ridge, likelihood=likelihood, device=device)
        gradient, total = torch.zeros_like(mean), 0.0
        if len(labels):
            gradient, total = posterior.accumulate(
                hidden,
                labels,
                feature_map,
                at,
                pairs=pairs,
                sample_weight=sample_weight,
                beta0=beta0,
                backend=backend,
            )
        return (posterior, gradient, total) if ranks is None else posterior.summed(ranks, gradient, total)

    def evaluate(at: Tensor, likelihood: reference.Likelihood = "logistic") -> tuple[Posterior, Tensor, float]:
        if ranks is not None:
            ranks.share({"beta": at}, {"likelihood": likelihood})
        posterior, gradient, total = added(at, likelihood)
        if prior is not None:
            new, posterior = posterior, prior.empty_of_new_data(likelihood)
            posterior.merge(new)
        pull = ridge * at if curvature is None else curvature @ (at - mean)
        return posterior, gradient - pull, total - 0.5 * float((at - mean) @ pull)

    if ranks is not None and ranks.rank > 0:
        while (asked := ranks.share()).values["likelihood"] is not None:
            added(asked.tensors["beta"].to(device), asked.values["likelihood"])
        return _found(asked, config, device)
    climb = ascend(evaluate, beta, count, max_passes=max_passes, tolerance=tolerance, progress=progress)
    beta, posterior, passes = climb.at, climb.curvature, climb.passes
    if not climb.converged:
        left = climb.decrements[-1] if climb.decrements else 0
        log.warning("Newton did not converge in %d passes (decrement %.2e)", passes, left)
    if config.likelihood == "gaussian":
        posterior, _, _ = evaluate(beta, "gaussian")
        passes += 1
    posterior.factor()
    report = FitReport(climb.converged, passes, climb.values, climb.decrements)
    if ranks is not None:
        tensors = {"beta": beta, "gram": reference.pack_lower(posterior.gram)}
        ranks.share(tensors, {"likelihood": None, "count": posterior.count, "report": asdict(report)})
    return beta, posterior, report


def _found(told: Shared, config: HeadConfig, device: torch.device) -> tuple[Tensor, Posterior, FitReport]:
    """What rank 0 found, on another rank."""
    report = told.values["report"]
    gram = reference.unpack_lower(told.tensors["gram"].to(device), config.num_features)
    posterior = Posterior.from_gram(gram, told.values["count"], ridge=config.ridge, likelihood=config.likelihood)
    return (
        told.tensors["beta"].to(device),
        posterior,
        FitReport(report["converged"], report["passes"], tuple(report["log_posterior"]), tuple(report["decrements"])),
    )


def upgrade(
    hidden: Tensor,
    pairs: Tensor | None,
    beta: Tensor,
    beta0: float = 0.0,
    *,
    labels: Tensor | None = None,
    config: HeadConfig | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    ranks: Ranks | None = None,
) -> FrozenHead:
    """Posterior only: keep an existing scalar reward head as β, fit P around it (design 2.6).

    Args:
        hidden: (R, h) the inputs of the reward model's last linear layer, one row a response, or in concat mode, for a
            model that scores pairs, one a pair.
        pairs: (N, 2) int64, preferred row first; None in concat mode.
        beta: (h,) that layer's weight: scores are unchanged by construction.
        beta0: its bias.
        labels: (N,) in [0, 1]; default 1, the first of each pair is preferred.
        config: linear, h wide; default difference mode and ridge 1.
        dtype: serving dtype.
        backend: of the accumulate pass.
        ranks: each of which gives its own part of the data, as in :func:`fit`.

    Raises as :func:`fit`.
    """
    config = config or HeadConfig(hidden.shape[1], mode="concat" if pairs is None else "difference", features="linear")
    wanted = "concat" if pairs is None else "difference"
    if (config.mode, config.features, config.layer_size) != (wanted, "linear", None):
        reject("config", (config.mode, config.features, config.layer_size), f"{wanted} mode, linear, no layer")
    if labels is None:
        labels = torch.ones(len(hidden if pairs is None else pairs), dtype=torch.float32, device=hidden.device)
    if beta.shape != (config.hidden_size,):
        reject("beta", f"shape {tuple(beta.shape)}", f"({config.hidden_size},)")
    with working(ranks, "the upgrade"):
        check_data(config, hidden, labels, pairs, ranks=ranks)
        warn_if_degenerate(hidden, labels, pairs, ranks)
        head = SNGPHead(config).to(hidden.device)
        feature_map = one_feature_map(head, dtype, hidden, ranks)
        known = Posterior(config.num_features, ridge=config.ridge, likelihood=config.likelihood, device=hidden.device)
        offset = 0.0 if config.mode == "difference" else beta0  # a pair's difference has none
        if len(labels):
            known.accumulate(hidden, labels, feature_map, beta.double(), pairs=pairs, beta0=offset, backend=backend)
        posterior = known if ranks is None else known.summed(ranks)[0]
        rows = _row_posterior(config, feature_map, hidden, pairs, None, backend, ranks)
        return one_head(lambda: FrozenHead(config, feature_map, beta, beta0, posterior, rows=rows), ranks)


def without_posterior(beta: Tensor, beta0: float, config: HeadConfig) -> FrozenHead:
    """A reward model's scalar head in float32, unchanged, with the prior's variance ‖φ‖²/s and nothing fitted.

    Args:
        beta: (h,) the last linear layer's weight.
        beta0: its bias.
        config: linear, h wide. An amplitude of 0 makes u = 1 everywhere, which claims nothing.
    """
    feature_map = SNGPHead(config).to(beta.device).freeze_features(torch.float32)
    factor = torch.eye(config.num_features, dtype=torch.float64, device=beta.device) / math.sqrt(config.ridge)
    weights = HeadWeights.build(feature_map, beta.double(), beta0, factor, config.resolved_amplitude)
    return FrozenHead(config, feature_map, beta, beta0, None, weights)


def _row_posterior(
    config: HeadConfig,
    feature_map: FeatureMap,
    hidden: Tensor,
    pairs: Tensor | None,
    sample_weight: Tensor | None,
    backend: Backend,
    ranks: Ranks | None,
) -> RowPosterior | None:
    if pairs is None or config.row_ridge is None:
        return None
    counted = counted_rows(hidden, pairs, sample_weight)
    return RowPosterior.fit(feature_map, counted, config.row_ridge, backend=backend, ranks=ranks)


def _resolved(head: SNGPHead) -> HeadConfig:
    if head.config.features == "linear":
        return head.config
    return replace(head.config, length_scale=float(head.length_scale))


def check_data(
    config: HeadConfig,
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    sample_weight: Tensor | None = None,
    *,
    ranks: Ranks | None = None,
) -> None:
    """Raise InputError (NonFiniteError for hidden rows) unless the arguments are data as :func:`fit` describes them.

    Of several ``ranks`` some may have none, and all must have one configuration.
    """
    if ranks is not None:
        check_alike(config, ranks)
    if hidden.dim() != 2 or hidden.shape[1] != config.hidden_size:
        reject("hidden", f"shape {tuple(hidden.shape)}", f"(rows, {config.hidden_size})")
    if config.mode == "difference" and pairs is None:
        reject("pairs", "None", "an (N, 2) int64 tensor of rows, since the head is in difference mode")
    if config.mode == "concat" and pairs is not None:
        reject("pairs", "a tensor", "None, since a concat-mode row is already a pair")
    if not (len(labels) if ranks is None else any(ranks.counts(len(labels)))):
        reject("labels", "0 data", "at least one")
    if pairs is not None:
        if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
            reject("pairs", f"{tuple(pairs.shape)} {pairs.dtype}", "(N, 2) int64")
        if len(pairs) and (int(pairs.min()) < 0 or int(pairs.max()) >= len(hidden)):
            reject("pairs", f"indices {int(pairs.min())}..{int(pairs.max())}", f"row indices 0..{len(hidden) - 1}")
    count = len(hidden) if pairs is None else len(pairs)
    if labels.shape != (count,):
        reject("labels", f"shape {tuple(labels.shape)}", f"({count},)")
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        reject("labels", f"values in {float(labels.min())}..{float(labels.max())}", "probabilities in [0, 1]")
    if sample_weight is not None:
        if sample_weight.shape != (count,):
            reject("sample_weight", f"shape {tuple(sample_weight.shape)}", f"({count},)")
        if not bool(((sample_weight >= 0) & sample_weight.isfinite()).all()):
            low, high = float(sample_weight.min()), float(sample_weight.max())
            reject("sample_weight", f"values in {low}..{high}", "finite non-negative factors")
    check_finite(hidden)
