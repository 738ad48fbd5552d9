"""Training an attribute head from cached hidden states, on a CPU in seconds.

Stage 1 (:func:`fit_attributes`) learns means and spread from labels, stage 2 (:func:`fit_gate`) the gate from
preference pairs with everything else frozen. :func:`fit_pairs` is PURM's: means and spread from pairs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.attributes.head import AttributeHead
from rmcore.head.attributes.losses import bradley_terry, gaussian_nll, pinball, purm_logit, sampled_mse
from rmcore.head.attributes.optimise import FitOptions, Steps, finite_loss, seeded_dropout, split_rows, train
from rmcore.head.attributes.pair_states import PairStates
from rmcore.head.posterior import check_finite

__all__ = ["FitOptions", "Objective", "PairStates", "default_options", "fit_attributes", "fit_gate", "fit_pairs"]

_RIDGE = 1e-3
_RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
_CONJUGATE_STEPS = 15

Objective: TypeAlias = Literal["mle", "regression", "pinball"]


def default_options(spread: Literal["normal", "quantiles"]) -> FitOptions:
    """Of stage 1. Quantiles have no closed start and take longer steps."""
    return FitOptions() if spread == "normal" else FitOptions(lr=1e-2)


def fit_attributes(
    head: AttributeHead,
    hidden: Tensor,
    labels: Tensor,
    *,
    objective: Objective | None = None,
    options: FitOptions | None = None,
    progress: Steps | None = None,
) -> float:
    """Stage 1: train the value head in place; the gate stays.

    The states are whitened while training, so that the learning rate means the same for every backbone. With ``mle``
    log σ has a normal prior around its start, of ``options.spread_prior``: few rows for the width of their states
    would otherwise let σ go to nothing at some of them.

    Args:
        head: to train.
        hidden: (N, h) states.
        labels: (N, A), NaN where nobody labelled; a row without any is left out.
        objective: ``mle`` (Eq. 4) is what keeps σ; ``regression`` (Eq. 5) drives it to nothing; ``pinball`` is of
            quantiles. None: ``mle``, or ``pinball`` for a head of quantiles.
        options: None for the defaults.
        progress: called with (steps done, steps in all).

    Returns:
        The loss over all labelled rows after training.

    Raises:
        InputError: shapes that do not fit, an attribute without a label, an infinite label, another head's objective.
        NonFiniteError: states that are not finite, or a training that diverged.
    """
    options = options or default_options(head.config.spread)
    objective = objective or ("mle" if head.config.spread == "normal" else "pinball")
    loss = _objective(head, objective, torch.Generator().manual_seed(options.seed))
    wanted = (len(hidden), len(head.config.names))
    if tuple(labels.shape) != wanted:
        reject("labels", f"shape {tuple(labels.shape)}", f"{wanted}")
    head.check_states("hidden", hidden)
    check_finite(hidden)
    known = ~labels.isnan()
    if bool(labels.isinf().any()):
        reject("labels", "an infinite one", "finite numbers, or NaN for none")
    for name, some in zip(head.config.names, known.any(0).tolist(), strict=True):
        if not some:
            reject("labels", f"none of {name!r}", "at least one of each attribute")
    rows = known.any(1)
    weight = head.value.weight
    hidden, labels = hidden[rows].to(weight), labels[rows].to(weight)
    with _whitened(head, hidden) as whiten:
        hidden = whiten(hidden)
        if head.config.spread == "normal":
            _least_squares(weight, hidden, labels, *split_rows(len(hidden), options))
        penalty = _penalty(weight[1::2], len(hidden), options.spread_prior) if objective == "mle" else None

        def step_loss(at: Tensor) -> Tensor:
            found = loss(head.outputs(hidden[at]), labels[at])
            return found if penalty is None else found + penalty(weight[1::2])

        train([weight], len(hidden), step_loss, options, progress)
        with torch.no_grad():
            value = float(loss(head.outputs(hidden), labels))
    return finite_loss(value)


def fit_gate(
    head: AttributeHead, pairs: PairStates, *, options: FitOptions | None = None, progress: Steps | None = None
) -> float:
    """Stage 2: train the gate in place by Bradley-Terry on Σ w_k(x) μ_k (Eq. 6); the value head stays as it is.

    Args:
        head: with a gate.
        pairs: whose chosen responses should win.
        options: None for 1,000 steps of 256 pairs at a learning rate of 1e-3, as ArmoRM's.
        progress: called with (steps done, steps in all).

    Returns:
        The loss over all pairs after training.

    Raises:
        InputError: a head without gate, states of another width.
        NonFiniteError: a training that diverged.
    """
    gate = head.gate
    if gate is None:
        reject("head", "one without gate", "AttributeConfig(gate=GateConfig(...))")
    options = options or FitOptions(lr=1e-3)
    weight = head.value.weight
    chosen, rejected = pairs.chosen.to(weight), pairs.rejected.to(weight)
    shared, counted = (None if part is None else part.to(weight) for part in (pairs.gate, pairs.weight))
    with torch.no_grad():
        means = head.means(chosen), head.means(rejected)

    def loss(at: Tensor | slice) -> Tensor:
        if shared is not None:
            logit = (gate(shared[at]) * (means[0][at] - means[1][at])).sum(1)
        else:
            logit = (gate(chosen[at]) * means[0][at]).sum(1) - (gate(rejected[at]) * means[1][at]).sum(1)
        return bradley_terry(logit, None if counted is None else counted[at])

    with seeded_dropout(options.seed):
        gate.train()
        train(gate.parameters(), len(chosen), loss, options, progress, pairs.group)
    gate.eval()
    with torch.no_grad():
        return finite_loss(float(loss(slice(None))))


def fit_pairs(head: AttributeHead, pairs: PairStates, *, options: FitOptions | None = None) -> float:
    """Train means and log σ in place from pairs alone, as PURM does: −log E σ(r_c − r_r), rewards normal.

    The reward's variance is Σ w² σ², with the weights as they are. Means and log σ have normal priors around their
    start, of ``options.mean_prior`` and ``spread_prior``: pairs say little of a single answer's σ, and few pairs little
    of wide states. So heads of other starts are draws around their anchors (Pearce et al. 2020), and one that starts at
    means of 0 is the most probable one.

    Args:
        head: of normals; PURM's has one attribute with the weight 1.
        pairs: whose chosen responses should win.
        options: None for the defaults at a learning rate of 1e-2.

    Returns:
        The loss over all pairs after training.

    Raises:
        InputError: a head of quantiles, states of another width.
        NonFiniteError: a training that diverged.
    """
    if head.config.spread != "normal":
        reject("head", "one of quantiles", "spread='normal'")
    options = options or FitOptions(lr=1e-2)
    head.check_states("pairs", pairs.chosen)
    weight = head.value.weight
    sides = torch.stack([pairs.chosen, pairs.rejected]).to(weight)
    counted = None if pairs.weight is None else pairs.weight.to(weight)
    with torch.no_grad():
        gates = torch.stack([head.attribute_weights(side, pairs.gate) for side in sides])
    with _whitened(head, sides.flatten(0, 1)) as whiten:
        sides = whiten(sides.flatten(0, 1)).view_as(sides)
        priors = [
            _penalty(weight[k::2], sides.shape[1], variance)
            for k, variance in enumerate((options.mean_prior, options.spread_prior))
        ]

        def loss(at: Tensor | slice) -> Tensor:
            (c, r), (wc, wr) = (head.outputs(sides[0, at]), head.outputs(sides[1, at])), gates[:, at]
            difference = (wc * c[..., 0]).sum(1) - (wr * r[..., 0]).sum(1)
            variance = (wc * c[..., 1].exp()).square().sum(1) + (wr * r[..., 1].exp()).square().sum(1)
            return bradley_terry(purm_logit(difference, variance), None if counted is None else counted[at])

        def penalised(at: Tensor) -> Tensor:
            return loss(at) + priors[0](weight[0::2]) + priors[1](weight[1::2])

        train([weight], sides.shape[1], penalised, options, group=pairs.group)
        with torch.no_grad():
            value = float(loss(slice(None)))
    return finite_loss(value)


def _penalty(start: Tensor, rows: int, variance: float) -> Callable[[Tensor], Tensor]:
    """−log N(w; start, variance / h) of whitened weights (..., h), over the number of rows, as the loss is."""
    start = start.detach().clone()
    factor = start.shape[-1] / (2 * rows * variance)
    return lambda weight: factor * (weight - start).square().sum()


def _objective(
    head: AttributeHead, objective: Objective, generator: torch.Generator
) -> Callable[[Tensor, Tensor], Tensor]:
    known = {"mle": "normal", "regression": "normal", "pinball": "quantiles"}
    if known.get(objective) != head.config.spread:
        fitting = [name for name, spread in known.items() if spread == head.config.spread]
        reject("objective", repr(objective), f"{' or '.join(map(repr, fitting))} for spread={head.config.spread!r}")
    if objective == "pinball":
        return pinball
    if objective == "mle":
        return lambda outputs, labels: gaussian_nll(outputs[..., 0], outputs[..., 1], labels)

    def regression(outputs: Tensor, labels: Tensor) -> Tensor:
        noise = torch.randn(labels.shape, generator=generator).to(outputs)
        return sampled_mse(outputs[..., 0], outputs[..., 1], labels, noise)

    return regression


# -- coordinates and start of the value head --------------------------------------------------------------------------


class _whitened:  # noqa: N801  # a context, named like one
    """The value head for L⁻¹ x, with L Lᵀ = XᵀX / N + ε I, and back: inside, the same function of other coordinates.

    AdamW goes as fast in every direction there, and a direction in which no state lies keeps its random start, by
    which an ensemble's members disagree. ε is a share (h / N)², between a thousandth and all, of the mean square of an
    entry: with few rows a direction that is small in all of them is not small in others, and AdamW's steps there, which
    do not shrink with the gradient, must not be blown up.
    """

    def __init__(self, head: AttributeHead, hidden: Tensor) -> None:
        x = hidden.double()
        gram = x.T @ x / len(x)
        level = float(gram.diagonal().mean())
        if level == 0:
            reject("hidden", "zeros", "states that differ from 0")
        share = min(max(_RIDGE, (x.shape[1] / len(x)) ** 2), 1.0)
        gram.diagonal().add_(share * level)
        self._weight, self._factor = head.value.weight, torch.linalg.cholesky(gram)

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            self._weight.copy_(self._weight.double() @ self._factor)
        return lambda x: torch.linalg.solve_triangular(self._factor, x.double().T, upper=False).T.to(x)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            found = torch.linalg.solve_triangular(self._factor, self._weight.double(), upper=False, left=False)
            self._weight.copy_(found)


@torch.no_grad()
def _least_squares(weight: Tensor, hidden: Tensor, labels: Tensor, held: Tensor, rows: Tensor) -> None:
    """Means by ridge regression of what their random start leaves over: conjugate gradients, whitened states.

    The penalty is that of least error on the rows held out: states wider than there are rows would otherwise be fitted
    to the last label. Without such rows it is the width over their number, or ``_RIDGE`` where there are many.
    """
    for k in range(labels.shape[1]):
        known = ~labels[:, k].isnan()
        x, y = (part[rows][known[rows]].double() for part in (hidden, labels[:, k]))
        unseen, wanted = (part[held][known[held]].double() for part in (hidden, labels[:, k]))
        if not len(x):
            continue
        ratio = x.shape[1] / len(x)
        ridges = _RIDGES if len(unseen) else (ratio if ratio > 0.1 else _RIDGE,)
        start = weight[2 * k].double()
        found = [_ridge_regression(x, y, start, ridge) for ridge in ridges]
        errors = torch.stack([(unseen @ one - wanted).square().sum() for one in found])
        weight[2 * k].copy_(found[int(errors.argmin())])


def _ridge_regression(x: Tensor, y: Tensor, start: Tensor, ridge: float) -> Tensor:
    """(h,) weights near ``start``."""
    found, residual = start, x.T @ (y - x @ start) / len(x)
    direction = residual.clone()
    for _ in range(_CONJUGATE_STEPS):
        square = residual @ residual
        if float(square) < 1e-12:
            break
        image = x.T @ (x @ direction) / len(x) + ridge * direction
        step = square / (direction @ image)
        found = found + step * direction
        residual = residual - step * image
        direction = residual + (residual @ residual / square) * direction
    return found
