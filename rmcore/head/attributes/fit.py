"""Training an attribute head from cached hidden states, on a CPU in seconds.

Stage 1 (:func:`fit_attributes`) learns means and spread from labels, stage 2 (:func:`fit_gate`) the gate from
preference pairs with everything else frozen. :func:`fit_pairs` is PURM's: means and spread from pairs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rmcore._base.errors import NonFiniteError, reject
from rmcore.head.adam import Adam, cosine_rate
from rmcore.head.attributes.head import AttributeHead
from rmcore.head.attributes.losses import bradley_terry, gaussian_nll, pinball, purm_logit, sampled_mse
from rmcore.head.posterior import check_finite

__all__ = ["FitOptions", "Objective", "PairStates", "fit_attributes", "fit_gate", "fit_pairs"]

_RIDGE = 1e-3
_RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
_CHECKS = 20
_CONJUGATE_STEPS = 15

Objective: TypeAlias = Literal["mle", "regression", "pinball"]
Steps: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class FitOptions:
    """AdamW over mini-batches, its learning rate falling to 0 by a cosine.

    Attributes:
        steps: of the optimiser.
        batch_size: rows a step, drawn without repetition until all have been seen.
        lr: the first learning rate. Normals' means start at a ridge regression, so steps are for σ and the rest.
        weight_decay: AdamW's; of the value head in whitened coordinates.
        spread_prior: variance over the states that the prior of log σ gives it, for ``mle`` and from pairs alone; inf
            for none.
        mean_prior: likewise of the reward, from pairs alone.
        holdout: share of the rows kept out of training; of the weights at each twentieth of the steps those with the
            least loss on them are kept. 0 trains on all rows and keeps the last weights.
        seed: of the rows kept out, the mini-batches and sampled rewards.
    """

    steps: int = 1000
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.0
    spread_prior: float = 0.1
    mean_prior: float = 1.0
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                reject(name, getattr(self, name), "a positive whole number")
        if not (math.isfinite(self.lr) and self.lr > 0):
            reject("lr", self.lr, "a positive finite number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            reject("weight_decay", self.weight_decay, "a finite number, at least 0")
        for name in ("spread_prior", "mean_prior"):
            if not getattr(self, name) > 0:
                reject(name, getattr(self, name), "a positive number, or inf")
        if not 0 <= self.holdout < 1:
            reject("holdout", self.holdout, "a number in [0, 1)")


@dataclass(frozen=True)
class PairStates:
    """Cached states of P preference pairs.

    Attributes:
        chosen: (P, h).
        rejected: (P, h).
        gate: (P, h) states that a gate reads, as ArmoRM's reads the prompt's; None where it reads each response's own.
        weight: (P,) how much each counts; None for all alike.
        group: (P,) int64, of the prompt: pairs of one group are held out of training together, since what is learned of
            one tells of the others. None: each by itself.
    """

    chosen: Tensor
    rejected: Tensor
    gate: Tensor | None = None
    weight: Tensor | None = None
    group: Tensor | None = None

    @classmethod
    def of_labels(cls, hidden: Tensor, labels: Tensor, pairs: Tensor, group: Tensor | None = None) -> PairStates:
        """Pairs (N, 2) int64 of rows (R, h) whose first is better with probability ``labels`` (N,).

        A label strictly between 0 and 1 becomes both orders, weighted by it and its rest: its cross-entropy. Without
        ``group`` (N,), pairs that share rows, directly or by others, are one.
        """
        group = _connected(pairs, len(hidden)) if group is None else group
        first, second = hidden[pairs[:, 0]], hidden[pairs[:, 1]]
        if bool(((labels == 0) | (labels == 1)).all()):
            won = (labels == 1)[:, None]
            return cls(torch.where(won, first, second), torch.where(won, second, first), group=group)
        keep, chosen, rejected = torch.cat([labels, 1 - labels]), torch.cat([first, second]), torch.cat([second, first])
        counted = keep > 0
        return cls(chosen[counted], rejected[counted], weight=keep[counted], group=torch.cat([group, group])[counted])

    def __post_init__(self) -> None:
        if self.weight is not None and not (
            self.weight.shape == self.chosen.shape[:1] and bool((self.weight.isfinite() & (self.weight > 0)).all())
        ):
            reject("weight", f"shape {tuple(self.weight.shape)}", f"({len(self.chosen)},) positive finite numbers")
        if self.group is not None and (self.group.shape != self.chosen.shape[:1] or self.group.dtype != torch.int64):
            reject("group", f"{tuple(self.group.shape)} {self.group.dtype}", f"({len(self.chosen)},) int64")
        parts = {"chosen": self.chosen, "rejected": self.rejected, "gate": self.gate}
        for name, part in parts.items():
            if part is None:
                continue
            if part.dim() != 2 or part.shape != self.chosen.shape or not len(part):
                reject(name, f"shape {tuple(part.shape)}", f"(P, h), that of chosen {tuple(self.chosen.shape)}, P > 0")
            check_finite(part, name)


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
            _least_squares(weight, hidden, labels, *_split(len(hidden), options))
        penalty = _penalty(weight[1::2], len(hidden), options.spread_prior) if objective == "mle" else None

        def step_loss(at: Tensor) -> Tensor:
            found = loss(head.outputs(hidden[at]), labels[at])
            return found if penalty is None else found + penalty(weight[1::2])

        _train([weight], len(hidden), step_loss, options, progress)
        with torch.no_grad():
            value = float(loss(head.outputs(hidden), labels))
    return _finite(value)


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

    with _seeded_dropout(options.seed):
        gate.train()
        _train(gate.parameters(), len(chosen), loss, options, progress, pairs.group)
    gate.eval()
    with torch.no_grad():
        return _finite(float(loss(slice(None))))


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

        _train([weight], sides.shape[1], penalised, options, group=pairs.group)
        with torch.no_grad():
            value = float(loss(slice(None)))
    return _finite(value)


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


class _seeded_dropout:  # noqa: N801
    """Torch's global generator seeded inside, and as it was behind: dropout takes no generator of its own."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=[])
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        self._fork.__exit__(None, None, None)


def _connected(pairs: Tensor, rows: int) -> Tensor:
    """(N,) int64 of pairs (N, 2): the connected part of the graph of rows that a pair is in."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = pairs.cpu().numpy().T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(rows, rows))
    return torch.from_numpy(connected_components(graph, directed=False)[1])[pairs[:, 0].cpu()].long()


def _split(count: int, options: FitOptions, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rows kept out, rows to train on), by the seed; whole groups, as many as stay within the share."""
    generator = torch.Generator().manual_seed(options.seed)
    if group is None:
        rows = torch.randperm(count, generator=generator)
        split = int(options.holdout * count)
        return rows[:split], rows[split:]
    _, number, sizes = group.cpu().unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(sizes), generator=generator)
    out = order[sizes[order].cumsum(0) <= options.holdout * count]
    held = torch.isin(number, out)
    mixed = torch.randperm(count, generator=generator)
    return mixed[held[mixed]], mixed[~held[mixed]]


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


def _train(
    parameters: Iterable[Tensor],
    count: int,
    loss: Callable[[Tensor], Tensor],
    options: FitOptions,
    progress: Steps | None = None,
    group: Tensor | None = None,
) -> None:
    parameters = list(parameters)
    device = parameters[0].device
    # With β₂ = 0.999 the first gradients, which go as exp(−2 log σ), would set the pace of all that follow.
    adam = Adam(parameters, options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay)
    generator = torch.Generator().manual_seed(options.seed + 1)
    held, rows = _split(count, options, group)
    held, split = held.to(device), len(held)
    batch, every = min(options.batch_size, len(rows)), max(options.steps // _CHECKS, 1)
    order, best, kept = torch.empty(0, dtype=torch.long), math.inf, [p.detach().clone() for p in parameters]
    for step in range(1, options.steps + 1):
        if len(order) < batch:
            order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
        at, order = order[:batch].to(device), order[batch:]
        gradients = torch.autograd.grad(loss(at), parameters)
        adam.step(gradients, cosine_rate(options.lr, step - 1, options.steps))
        told = step % every == 0 or step == options.steps
        if told and progress is not None:
            progress(step, options.steps)
        if split and told:
            with torch.no_grad():
                value = float(loss(held))
            if value < best:
                best, kept = value, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, one in zip(parameters, kept, strict=True):
            if split:
                parameter.copy_(one)
    if split:
        _finite(best)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NonFiniteError(f"training: got a loss of {value}, expected a finite one. Lower lr, or set weight_decay")
    return value
