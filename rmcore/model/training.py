"""Training what comes before β: the layer W, and the backbone, by AdamW on the pairwise logistic loss (design 2.1).

:func:`train_layer` trains a head on hidden states that stay as they are, :func:`finetune` trains head and backbone
together. Both leave β near its MAP, not at it: :func:`rmcore.head.fit.fit` comes after either, starts from their β, and
gives the head its posterior.

The loss is Bradley & Terry's (1952): −[y log σ(g) + (1−y) log σ(−g)], g = g_first − g_second in difference mode and
the row's own logit in concat mode. β's prior s/2 ‖β‖² is in it, spread over the data, so training and fit climb the
same posterior. Every forward pass takes one step of power iteration on W and scales it to its norm bound (SNGP, Liu et
al. 2020, arXiv:2006.10108). AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rmcore import ops
from rmcore._base.errors import InputError, NonFiniteError, reject
from rmcore.head.fit import check_data
from rmcore.head.sngp import SNGPHead
from rmcore.model.backbone import Backbone
from rmcore.model.reward_model import Preference, Progress, encode_preferences, preference_texts
from rmcore.model.text import EncodedText

__all__ = ["TrainReport", "finetune", "train_layer"]

log = logging.getLogger(__name__)

_SETTLE_ITERATIONS = 100
"""Power-iteration steps before the first optimiser step: one a step is loose until the vector has settled."""

_EVALUATION_ROWS = 4096
_LENGTH_SCALE_PAIRS = 1024


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

    Returns:
        A :class:`TrainReport`.

    Raises:
        InputError: shapes, labels, mode or a setting do not fit; a head without a layer.
        NonFiniteError: a hidden row holds NaN or Inf, or the loss became so; the head is back at its best weights, or
            at its first without validation data.
    """
    if head.weight is None:
        reject(
            "head", "layer_size=None", "a head with a layer to train", "Use rmcore.head.fit.fit, which finds β directly"
        )
    check_data(head.config, hidden, labels, pairs)
    if hidden.device != head.beta.device:
        reject("hidden", f"device {hidden.device}", f"the head's device {head.beta.device}")
    _check_positive(epochs=epochs, batch_size=batch_size, lr=lr)
    _check_not_negative(weight_decay=weight_decay)
    if validation is not None:
        try:
            check_data(head.config, *validation)
        except InputError as error:
            raise InputError(f"validation: {error}") from error
    _prepare(head, hidden)
    optimizer = torch.optim.AdamW(_head_groups(head, lr, weight_decay))
    run = _Run([head], keep=True)
    generator = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(labels) / batch_size)
    with _training(head):
        if validation is not None:
            run.validate(_head_loss(head, *validation))
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator).to(hidden.device)
            losses = []
            for index in torch.split(order, batch_size):
                rows = index if pairs is None else pairs[index].flatten()
                loss = _loss(head, hidden[rows], labels[index], pairs is not None)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss + _prior(head, len(labels)))
                optimizer.step()
                losses.append(loss.detach() * len(index))
                run.steps += 1
                if progress is not None:
                    progress("training", run.steps, total)
            run.finish_epoch(float(torch.stack(losses).sum()) / len(labels))
            if validation is not None:
                run.validate(_head_loss(head, *validation))
    return run.report()


def finetune(
    backbone: Backbone,
    head: SNGPHead,
    preferences: Sequence[Preference],
    *,
    epochs: int = 1,
    batch_pairs: int = 16,
    accumulation: int = 1,
    lr_backbone: float = 2e-5,
    lr_head: float = 1e-3,
    weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
    warmup: float = 0.1,
    autocast: torch.dtype | None = None,
    validation: Sequence[Preference] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    report_loss: Callable[[float], None] | None = None,
) -> TrainReport:
    """Train a backbone and a head together on preferences; fit the head on the new hidden states afterwards.

    Whatever of ``backbone.model`` requires grad is trained, so frozen layers and adapters work by themselves. Both are
    changed in place; the backbone is in eval mode at the end, whatever happens. The head's length-scale is set by the
    median rule on the first states, if still unset, and stays. The learning rate rises over ``warmup`` and then falls
    linearly to zero. ``model.gradient_checkpointing_enable()`` beforehand saves memory.

    Args:
        backbone: a backbone on the head's device, its trainable parameters in float32 (bfloat16 loses small updates
            and is warned about; float16 is refused).
        head: a head as wide as the backbone's states. Its own layer is optional here.
        preferences: training pairs; in concat mode each is used in both orders.
        epochs: passes over the data.
        batch_pairs: pairs of one forward pass.
        accumulation: forward passes of one optimiser step.
        lr_backbone: learning rate of the backbone at its peak.
        lr_head: learning rate of W, b_s and β at its peak.
        weight_decay: of the matrices of backbone and W; β has its prior, vectors have none.
        max_grad_norm: gradients are scaled down to this norm, over all parameters.
        warmup: share of the steps over which the learning rate rises.
        autocast: arithmetic of the backbone's forward pass, such as ``torch.bfloat16``; None leaves it alone. The head
            runs in float32 in any case.
        validation: held-out pairs; the weights of the epoch with the least loss there are kept.
        seed: of the order of the data and of dropout. The global random state is left as it was.
        progress: called with ("encoding" or "finetuning", done, in all).
        report_loss: called after each step, before ``progress``, with the mean loss of the epoch so far.

    Returns:
        A :class:`TrainReport`.

    Raises:
        InputError: no preferences, a text too long, or settings that do not fit.
        NonFiniteError: loss or gradient became NaN or Inf; the weights are the best so far where there is validation
            data, else those of the step before.
    """
    if not preferences:
        reject("preferences", "an empty list", "at least one pair")
    if head.config.hidden_size != backbone.hidden_size:
        reject("head.hidden_size", head.config.hidden_size, f"the backbone's {backbone.hidden_size}")
    if head.beta.device != backbone.device:
        reject("head", f"device {head.beta.device}", f"the backbone's device {backbone.device}")
    _check_positive(
        epochs=epochs,
        batch_pairs=batch_pairs,
        accumulation=accumulation,
        lr_backbone=lr_backbone,
        lr_head=lr_head,
        max_grad_norm=max_grad_norm,
    )
    _check_not_negative(weight_decay=weight_decay)
    if not 0 <= warmup < 1:
        reject("warmup", warmup, "a share of the steps in [0, 1)")
    groups = _backbone_groups(backbone, lr_backbone, weight_decay)
    texts, labels = preference_texts(backbone, preferences, head.config.mode)
    count = len(texts) // 2  # pairs without signal are left out

    _prepare(head, None if _has_length_scale(head) else _first_states(backbone, head, preferences, progress))
    groups += _head_groups(head, lr_head, weight_decay)
    optimizer = torch.optim.AdamW(groups)
    parameters = [p for group in groups for p in group["params"]]
    per_step = batch_pairs * accumulation
    total = epochs * math.ceil(count / per_step)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_then_linear(total, warmup))
    run = _Run([backbone.model, head], keep=validation is not None)

    def validate() -> None:
        if validation is None:
            return
        backbone.model.eval()
        data = encode_preferences(backbone, validation, head.config.mode, progress=progress)
        run.validate(_head_loss(head, *data))
        backbone.model.train()

    generator = torch.Generator().manual_seed(seed)
    backbone.model.eval()  # the mode that _training goes back to
    with _training(backbone.model, head), _seeded(seed, backbone.device):
        validate()
        for _ in range(epochs):
            seen, pairs_seen = 0.0, 0
            for step in torch.split(torch.randperm(count, generator=generator), per_step):
                optimizer.zero_grad(set_to_none=True)
                for part in torch.split(step, batch_pairs):
                    rows = torch.stack([2 * part, 2 * part + 1], dim=1).flatten()
                    states = _states(backbone, [texts[r] for r in rows.tolist()], autocast)
                    target = labels[part] if head.config.mode == "difference" else labels[rows]
                    loss = _loss(head, states, target, head.config.mode == "difference")
                    torch.autograd.backward(loss * (len(part) / len(step)))
                    seen += float(loss.detach()) * len(part)
                torch.autograd.backward(_prior(head, len(labels)))
                norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
                if not (math.isfinite(norm) and math.isfinite(seen)):
                    run.restore()
                    raise _diverged(f"gradient norm {norm}, loss {seen}", run.steps)
                optimizer.step()
                schedule.step()
                run.steps += 1
                pairs_seen += len(step)
                if report_loss is not None:
                    report_loss(seen / pairs_seen)
                if progress is not None:
                    progress("finetuning", run.steps, total)
            run.finish_epoch(seen / count)
            validate()
    return run.report()


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
def _head_loss(head: SNGPHead, hidden: Tensor, labels: Tensor, pairs: Tensor | None) -> float:
    """Mean loss in eval mode; the head is left in training mode."""
    head.eval()
    total = 0.0
    for index in torch.split(torch.arange(len(labels), device=hidden.device), _EVALUATION_ROWS):
        rows = index if pairs is None else pairs[index].flatten()
        total += float(_loss(head, hidden[rows], labels[index], pairs is not None)) * len(index)
    head.train()
    return total / len(labels)


# -- the backbone ----------------------------------------------------------------------------------------------------


def _states(backbone: Backbone, texts: Sequence[EncodedText], autocast: torch.dtype | None) -> Tensor:
    """Pooled states (N, h) float32 with their graph, the length feature included."""
    device = backbone.device
    ids = [torch.tensor(backbone.input_ids(text), dtype=torch.long) for text in texts]
    padding = getattr(backbone.tokenizer, "pad_token_id", None) or 0
    input_ids = pad_sequence(ids, batch_first=True, padding_value=padding).to(device)
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(device)
    with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        states = backbone.pooled_states(input_ids, mask)
    return backbone.add_length_feature(states.float(), texts)


def _first_states(
    backbone: Backbone, head: SNGPHead, preferences: Sequence[Preference], progress: Progress | None
) -> Tensor:
    backbone.model.eval()
    sample = preferences[:: math.ceil(len(preferences) / _LENGTH_SCALE_PAIRS)]
    return encode_preferences(backbone, sample, head.config.mode, progress=progress)[0]


def _backbone_groups(backbone: Backbone, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [p for p in backbone.model.parameters() if p.requires_grad]
    if not trainable:
        reject("backbone", "no parameter that requires grad", "something to train", "Use train_layer for the head")
    dtypes = {p.dtype for p in trainable}
    if torch.float16 in dtypes:
        reject("backbone", "trainable parameters in float16", "float32", "Load it with dtype=torch.float32")
    if torch.bfloat16 in dtypes:
        log.warning("trainable parameters are bfloat16, which rounds small updates away; float32 trains better")
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
    ]


def _warm_then_linear(total: int, warmup: float) -> Any:
    rising = round(total * warmup)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (total - step) / max(total - rising, 1)

    return factor


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
def _prepare(head: SNGPHead, hidden: Tensor | None) -> None:
    """Set the length-scale, if unset, and let the power iteration settle, so that the first W̄ is under its bound."""
    if hidden is not None and not _has_length_scale(head):
        head.set_length_scale(hidden)
    if head.weight is not None:
        _, vector = ops.power_iteration(head.weight.detach(), head.right_vector, _SETTLE_ITERATIONS)
        head.right_vector.copy_(vector)


# -- bookkeeping -----------------------------------------------------------------------------------------------------


class _Run:
    """Losses so far, and a copy of the weights to go back to: the start, then those of the least validation loss."""

    def __init__(self, modules: Sequence[nn.Module], *, keep: bool) -> None:
        self.modules = modules
        self.steps = 0
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.best_epoch = 0
        self.best: list[dict[str, Tensor]] = self._copy() if keep else []

    def finish_epoch(self, loss: float) -> None:
        if not math.isfinite(loss):
            self.restore()
            raise _diverged(f"loss {loss}", self.steps)
        self.losses.append(loss)
        log.info("epoch %d: loss %.4f", len(self.losses), loss)

    def validate(self, loss: float) -> None:
        if self.validation and loss < min(self.validation):
            self.best, self.best_epoch = self._copy(), len(self.losses)
        self.validation.append(loss)
        log.info("after epoch %d: validation loss %.4f", len(self.losses), loss)

    def restore(self) -> None:
        if self.best:
            for module, state in zip(self.modules, self.best, strict=True):
                module.load_state_dict(state, strict=False)

    def report(self) -> TrainReport:
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


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global random state seeded inside, as dropout reads it, and untouched outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
