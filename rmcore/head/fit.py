"""Fitting a head: β to its MAP by Newton's method, and with it the Laplace posterior (design 2.4).

Three ways, all ending at a :class:`~rmcore.head.FrozenHead` whose posterior belongs to the β it serves:

- :func:`fit`: features as they are; β by Newton/IRLS with the same ``accumulate`` pass that builds P (about 6 passes);
- :func:`rmcore.model.training.train_layer` / ``finetune`` first: W (and the backbone) by AdamW, then :func:`fit`;
- :func:`upgrade`: β is an existing reward model's scalar head and stays; only P is fitted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.ascent import ascend
from rmcore.head.config import HeadConfig
from rmcore.head.degenerate import warn_if_degenerate
from rmcore.head.frozen import FrozenHead
from rmcore.head.posterior import Posterior, check_finite
from rmcore.head.rows import RowPosterior, counted_rows
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
) -> tuple[FrozenHead, FitReport]:
    """Freeze the head's features and fit β and the posterior on them, in difference mode the row posterior too.

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
        progress: called with a line of text after each pass.

    Returns:
        The frozen head and a report.

    Raises:
        InputError: shapes, labels or mode do not fit; no data.
        NonFiniteError: a hidden row holds NaN or Inf.
        FactorizationError: P is not positive definite; the message says what to change.
    """
    check_data(head.config, hidden, labels, pairs, sample_weight)
    warn_if_degenerate(hidden, labels, pairs)
    if not math.isfinite(float(head.length_scale)) and head.config.features == "rff":
        head.set_length_scale(hidden)
    feature_map = head.freeze_features(dtype, calibration=hidden)
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
        max_passes=max_passes,
        tolerance=tolerance,
        backend=backend,
        progress=progress,
    )
    with torch.no_grad():
        head.beta.copy_(beta)
    rows = _row_posterior(head.config, feature_map, hidden, pairs, sample_weight, backend)
    return FrozenHead(_resolved(head), feature_map, beta, beta0, posterior, rows=rows), report


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
) -> tuple[Tensor, Posterior, FitReport]:
    """The MAP of β under its prior by damped Newton, and the posterior at it.

    A step is β ← β + t P⁻¹(Φᵀ(y−p) − S(β − m)) for the prior N(m, S⁻¹), by default N(0, I/s); t is halved while the log
    posterior falls, which the concave objective needs only far from its maximum. With ``prior`` this is one step of
    online Laplace (assumed-density filtering): what was known stays in as a quadratic, the new data count in full.

    Arguments as in :func:`fit`; ``start`` defaults to the prior's mean. → β (D,) float64, posterior, report.
    """
    device, ridge = hidden.device, config.ridge
    feature_map = feature_map.dequantized()  # once, not in every pass
    mean = torch.zeros(feature_map.num_features, dtype=torch.float64, device=device) if prior is None else prior.beta
    beta = mean.clone() if start is None else start.to(mean, copy=True)
    curvature = None if prior is None else prior.empty_of_new_data("logistic").precision

    def evaluate(at: Tensor, likelihood: reference.Likelihood = "logistic") -> tuple[Posterior, Tensor, float]:
        if prior is None:
            posterior = Posterior(feature_map.num_features, ridge=ridge, likelihood=likelihood, device=device)
        else:
            posterior = prior.empty_of_new_data(likelihood)
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
        pull = ridge * at if curvature is None else curvature @ (at - mean)
        return posterior, gradient - pull, total - 0.5 * float((at - mean) @ pull)

    climb = ascend(evaluate, beta, len(labels), max_passes=max_passes, tolerance=tolerance, progress=progress)
    beta, posterior, passes = climb.at, climb.curvature, climb.passes
    if not climb.converged:
        left = climb.decrements[-1] if climb.decrements else 0
        log.warning("Newton did not converge in %d passes (decrement %.2e)", passes, left)
    if config.likelihood == "gaussian":
        posterior, _, _ = evaluate(beta, "gaussian")
        passes += 1
    posterior.factor()
    return beta, posterior, FitReport(climb.converged, passes, climb.values, climb.decrements)


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

    Raises as :func:`fit`.
    """
    config = config or HeadConfig(hidden.shape[1], mode="concat" if pairs is None else "difference", features="linear")
    wanted = "concat" if pairs is None else "difference"
    if (config.mode, config.features, config.layer_size) != (wanted, "linear", None):
        reject("config", (config.mode, config.features, config.layer_size), f"{wanted} mode, linear, no layer")
    if labels is None:
        labels = torch.ones(len(hidden if pairs is None else pairs), dtype=torch.float32, device=hidden.device)
    check_data(config, hidden, labels, pairs)
    warn_if_degenerate(hidden, labels, pairs)
    if beta.shape != (config.hidden_size,):
        reject("beta", f"shape {tuple(beta.shape)}", f"({config.hidden_size},)")
    head = SNGPHead(config).to(hidden.device)
    feature_map = head.freeze_features(dtype, calibration=hidden)
    posterior = Posterior(config.num_features, ridge=config.ridge, likelihood=config.likelihood, device=hidden.device)
    offset = 0.0 if config.mode == "difference" else beta0  # a pair's difference has none
    posterior.accumulate(hidden, labels, feature_map, beta.double(), pairs=pairs, beta0=offset, backend=backend)
    rows = _row_posterior(config, feature_map, hidden, pairs, None, backend)
    return FrozenHead(config, feature_map, beta, beta0, posterior, rows=rows)


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


@torch.no_grad()
def fit_amplitude(head: FrozenHead, logit: Tensor, variance: Tensor, labels: Tensor) -> FrozenHead:
    """The same head with the amplitude a ≥ 0 that minimises the held-out NLL of σ(g / √(1 + a v)).

    Args:
        head: a frozen head.
        logit: (N,) g of held-out pairs.
        variance: (N,) v of the same pairs.
        labels: (N,) in [0, 1].

    The NLL is unimodal in log a for all practical data; a grid brackets it and golden section refines it. A held-out
    set the head gets mostly wrong wants a → ∞ (say nothing); the search stops at 10⁴ / median v and logs a warning.
    """
    g, v, y = logit.double(), variance.double(), labels.double()
    if not len(g):
        reject("logit", "0 held-out pairs", "at least one")

    def nll(amplitude: float) -> float:
        return -float(reference.log_likelihood(g / torch.sqrt(1 + amplitude * v), y).mean())

    middle = float(v.median())
    if middle <= 0:
        reject("variance", "a median of 0", "held-out pairs with positive variance")
    grid = [10 ** (e / 4) / middle for e in range(-16, 17)]
    best = min(range(len(grid)), key=lambda i: nll(grid[i]))
    if best == len(grid) - 1:
        log.warning("held-out data wants the largest amplitude tried: the head is no better than chance there")
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-6:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if nll(math.exp(left)) <= nll(math.exp(right)):
            high = right
        else:
            low = left
    amplitude = math.exp((low + high) / 2)
    amplitude = 0.0 if nll(0.0) <= nll(amplitude) else amplitude
    if amplitude == 0:
        wrong = int((((g > 0) != (y > 0.5)) & (y != 0.5)).sum())
        log.warning(
            "the %d held-out pairs, %d of them wrong, want no uncertainty at all: amplitude 0 makes u = 1 everywhere, "
            "so no router that goes by u can choose",
            len(g),
            wrong,
        )
    config = replace(head.config, amplitude=amplitude)
    weights = replace(head.weights, amplitude=amplitude)
    return FrozenHead(config, head.feature_map, head.beta, head.beta0, head.posterior, weights, rows=head.rows)


def _row_posterior(
    config: HeadConfig,
    feature_map: FeatureMap,
    hidden: Tensor,
    pairs: Tensor | None,
    sample_weight: Tensor | None,
    backend: Backend,
) -> RowPosterior | None:
    if pairs is None or config.row_ridge is None:
        return None
    return RowPosterior.fit(feature_map, counted_rows(hidden, pairs, sample_weight), config.row_ridge, backend=backend)


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
) -> None:
    """Raise InputError (NonFiniteError for hidden rows) unless the arguments are data as :func:`fit` describes them."""
    if hidden.dim() != 2 or hidden.shape[1] != config.hidden_size:
        reject("hidden", f"shape {tuple(hidden.shape)}", f"(rows, {config.hidden_size})")
    if config.mode == "difference" and pairs is None:
        reject("pairs", "None", "an (N, 2) int64 tensor of rows, since the head is in difference mode")
    if config.mode == "concat" and pairs is not None:
        reject("pairs", "a tensor", "None, since a concat-mode row is already a pair")
    if not len(labels):
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
