"""Training the layer W before β, by AdamW on the pairwise logistic loss (design 2.1), on states that stay as they are.

:func:`train_layer` takes seconds on a CPU. Head and backbone together are trained by
:class:`rmcore.integrations.trl.PairwiseRewardTrainer`. Both leave β near its MAP, not at it:
:func:`rmcore.head.fit.fit` comes after either, starts from their β, and gives the head its posterior.

The loss is Bradley & Terry's (1952): −[y log σ(g) + (1−y) log σ(−g)], g = g_first − g_second in difference mode and
the row's own logit in concat mode. β's prior s/2 ‖β‖² is in it, spread over the data, so training and fit climb the
same posterior. Every forward pass takes one step of power iteration on W and scales it to its norm bound (SNGP, Liu et
al. 2020, arXiv:2006.10108). AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmcore._base import lazy
from rmcore._base.errors import InputError, NonFiniteError, reject
from rmcore._base.progress import Progress
from rmcore.head.fit import check_data
from rmcore.head.ranks import Ranks, working
from rmcore.head.shards import one_layer, one_length_scale
from rmcore.head.sngp import SNGPHead
from rmcore.model.batches import Batches

__all__ = ["RunRecord", "TrainReport", "train_layer"]

log = logging.getLogger(__name__)

_SETTLE_ITERATIONS = 100
"""Power-iteration steps before the first optimiser step: one a step is loose until the vector has settled."""

_EVALUATION_ROWS = 4096


@dataclass(frozen=True)
class TrainReport:
    """What a training run did.

    ``losses`` holds the mean training loss of each epoch in nats a pair, as seen while training;
    ``validation_losses`` the held-out loss before the first epoch and after each one (empty without validation data);
    ``best_epoch`` the number of epochs after which the weights kept were taken: all of them without validation data, 0
    where none improved on the start.
    """

    losses: tuple[float, ...]
    validation_losses: tuple[float, ...]
    best_epoch: int
    steps: int


def train_layer(
    head: SNGPHead,
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None = None,
    *,
    epochs: int = 10,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    validation: tuple[Tensor, Tensor, Tensor | None] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> TrainReport:
    """Train W, b_s and β (and β₀ in concat mode) on fixed hidden states; call :func:`rmcore.head.fit.fit` afterwards.

    The head is changed in place and left in the train/eval mode it came in. Its length-scale is set by the median rule
    before the first step, if still unset, and stays: W learns against it. Same arguments, same machine: same weights.

    Args:
        head: a head with a layer (``layer_size``).
        hidden: (R, h) finite rows, any float dtype; in difference mode one a response, in concat mode one a pair.
        labels: (N,) in [0, 1], the probability that the pair's first response is better.
        pairs: (N, 2) int64 rows of ``hidden``; required in difference mode, refused in concat mode.
        epochs: passes over the data.
        batch_size: pairs of one optimiser step.
        lr: AdamW's learning rate.
        weight_decay: of W alone; β has its prior, biases have none.
        validation: held-out (hidden, labels, pairs); the weights of the epoch with the least loss there are kept.
        seed: of the order of the data.
        progress: called with ("training", steps done, steps in all) after each step.
        ranks: all of which call this, each with its part of the data (and of ``validation``), which may be empty. The
            steps are those of one process with all the data, whose gradients are added in rank order; the weights are
            rank 0's, to the bit.

    Returns:
        A :class:`TrainReport`, the same on all ranks.

    Raises:
        InputError: shapes, labels, mode or a setting do not fit; a head without a layer.
        NonFiniteError: a hidden row holds NaN or Inf, or the loss became so; the head is back at its best weights, or
            at its first without validation data.
        RankError: another rank died, or raised one of these.
    """
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay}
    with working(ranks, "the training"):
        return _train_layer(head, hidden, labels, pairs, validation, seed, progress, ranks, **settings)


def _train_layer(
    head: SNGPHead,
    hidden: Tensor,
    labels: Tensor,
    pairs: Tensor | None,
    validation: tuple[Tensor, Tensor, Tensor | None] | None,
    seed: int,
    progress: Progress | None,
    ranks: Ranks | None,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
) -> TrainReport:
    if head.weight is None:
        reject(
            "head", "layer_size=None", "a head with a layer to train", "Use rmcore.head.fit.fit, which finds β directly"
        )
    check_data(head.config, hidden, labels, pairs, ranks=ranks)
    if hidden.device != head.beta.device:
        reject("hidden", f"device {hidden.device}", f"the head's device {head.beta.device}")
    _check_positive(epochs=epochs, batch_size=batch_size, lr=lr)
    _check_not_negative(weight_decay=weight_decay)
    if validation is not None:
        try:
            check_data(head.config, *validation, ranks=ranks)
        except InputError as error:
            raise InputError(f"validation: {error}") from error
    _prepare(head, hidden, ranks)
    groups = _head_groups(head, lr, weight_decay)
    optimizer = torch.optim.AdamW(groups)
    parameters = [p for group in groups for p in group["params"]]
    run = RunRecord([head], keep=True)
    generator = torch.Generator().manual_seed(seed)
    batches = Batches(len(labels), ranks)
    total = epochs * math.ceil(batches.count / batch_size)
    with _training(head):
        if validation is not None:
            run.validate(_head_loss(head, *validation, ranks))
        for _ in range(epochs):
            losses = []
            for index, size in batches.epoch(batch_size, generator, hidden.device):
                rows = index if pairs is None else pairs[index].flatten()
                if len(index):
                    loss = _loss(head, hidden[rows], labels[index], pairs is not None) * (len(index) / size)
                else:
                    loss = head(hidden[rows].to(head.beta.dtype)).sum()  # 0, and a step of power iteration as elsewhere
                optimizer.zero_grad(set_to_none=True)
                first = ranks is None or ranks.rank == 0  # the prior is one datum, not one a rank
                torch.autograd.backward(loss + _prior(head, batches.count) if first else loss)
                losses.append(batches.summed(parameters, loss.detach()) * size)
                optimizer.step()
                run.steps += 1
                if progress is not None:
                    progress("training", run.steps, total)
            run.finish_epoch(float(torch.stack(losses).sum()) / batches.count)
            if validation is not None:
                run.validate(_head_loss(head, *validation, ranks))
    report = run.report()
    one_layer(head, ranks)
    return report


# -- loss ------------------------------------------------------------------------------------------------------------


def _loss(head: SNGPHead, rows: Tensor, labels: Tensor, difference: bool) -> Tensor:
    """Mean logistic loss of (N,) labels; rows (N, h), or (2N, h) with each pair's two rows together."""
    g = head(rows.to(head.beta.dtype))
    if difference:
        g = g[0::2] - g[1::2]
    return nn.functional.binary_cross_entropy_with_logits(g, labels.to(g))


def _prior(head: SNGPHead, count: int) -> Tensor:
    return head.config.ridge / (2 * count) * head.beta.square().sum()


@torch.no_grad()
def _head_loss(
    head: SNGPHead, hidden: Tensor, labels: Tensor, pairs: Tensor | None, ranks: Ranks | None = None
) -> float:
    """Mean loss of all ranks' data in eval mode; the head is left in training mode."""
    head.eval()
    total = 0.0
    for index in torch.arange(len(labels), device=hidden.device).split(_EVALUATION_ROWS) if len(labels) else ():
        rows = index if pairs is None else pairs[index].flatten()
        total += float(_loss(head, hidden[rows], labels[index], pairs is not None)) * len(index)
    head.train()
    if ranks is None:
        return total / len(labels)
    loss, count = ranks.total(torch.tensor([total, len(labels)], dtype=torch.float64)).tolist()
    return loss / count


# -- the head --------------------------------------------------------------------------------------------------------


def _head_groups(head: SNGPHead, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [] if head.weight is None else [head.weight]
    others = [p for p in (head.bias, head.beta, head.beta0) if p is not None and p.requires_grad]
    return [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": lr, "weight_decay": 0.0},
    ]


def _has_length_scale(head: SNGPHead) -> bool:
    return head.config.features != "rff" or math.isfinite(float(head.length_scale))


@torch.no_grad()
def _prepare(head: SNGPHead, hidden: Tensor, ranks: Ranks | None) -> None:
    """Set the length-scale, if unset, and let the power iteration settle, so that the first W̄ is under its bound."""
    if not _has_length_scale(head):
        one_length_scale(head, hidden, ranks)
    head.step_power_iteration(_SETTLE_ITERATIONS)
    one_layer(head, ranks)


# -- bookkeeping -----------------------------------------------------------------------------------------------------


class RunRecord:
    """Losses so far, and a copy of the weights to go back to: the start, then those of the least validation loss.

    Args:
        modules: whose weights.
        keep: copy those of the start too, for a run that diverges.
    """

    def __init__(self, modules: Sequence[nn.Module], *, keep: bool) -> None:
        self.modules = modules
        self.steps = 0
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.best_epoch = 0
        self.best: list[dict[str, Tensor]] = self._copy() if keep else []

    def finish_epoch(self, loss: float) -> None:
        """An epoch's mean training loss; raises NonFiniteError, with the weights put back, where it is none."""
        if not math.isfinite(loss):
            self.restore()
            raise _diverged(f"loss {loss}", self.steps)
        self.losses.append(loss)
        log.info("epoch %d: loss %.4f", len(self.losses), loss)

    def validate(self, loss: float) -> None:
        """A held-out loss; the weights are copied where it is the least so far."""
        if self.validation and loss < min(self.validation):
            self.best, self.best_epoch = self._copy(), len(self.losses)
        self.validation.append(loss)
        log.info("after epoch %d: validation loss %.4f", len(self.losses), loss)

    def restore(self) -> None:
        """Put the best weights so far back."""
        if self.best:
            for module, state in zip(self.modules, self.best, strict=True):
                module.load_state_dict(state, strict=False)

    def report(self) -> TrainReport:
        """What the run did; with validation data the best weights are put back."""
        if self.validation:
            self.restore()
        best = self.best_epoch if self.validation else len(self.losses)
        return TrainReport(tuple(self.losses), tuple(self.validation), best, self.steps)

    def _copy(self) -> list[dict[str, Tensor]]:
        # What cannot change need not be copied: a frozen backbone under adapters is most of the bytes.
        kept = []
        for module in self.modules:
            names = {name for name, p in module.named_parameters() if p.requires_grad}
            names |= {name for name, _ in module.named_buffers()}
            state = module.state_dict()
            kept.append({n: state[n].detach().to("cpu", copy=True) for n in names if n in state})
        return kept


@contextmanager
def _training(*modules: nn.Module) -> Iterator[None]:
    """Training mode inside; back to the mode each module was in."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.train()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def _diverged(what: str, steps: int) -> NonFiniteError:
    return NonFiniteError(f"loss: got {what} after {steps} steps, expected finite values. Lower the learning rate")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            reject(name, value, "a positive number")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            reject(name, value, "a non-negative number")


__getattr__, __dir__, _ = lazy.attach(
    __name__, {}, {"finetune": "rmcore.integrations.training.finetune, on transformers' Trainer"}
)
