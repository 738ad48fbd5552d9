"""MC dropout through a backbone (Gal & Ghahramani 2016): T passes, each under masks of its own.

This costs what it says: T forward passes of the backbone for every text, where dropout before a head's last layer
(:class:`rmcore.head.estimators.Dropout`) costs one product. And it is for a backbone that has dropout: BERT's kin,
GPT-2, GPT-NeoX, Phi; Llama, Qwen, Mistral and Gemma have none to draw.

A mask is a draw of the *network*: one Bernoulli vector a layer and pass, as wide as what the layer drops, the same for
all tokens and all texts (the tied masks of Gal & Ghahramani 2016b, which drop rows of weight matrices). So the draws go
by seed alone. Batches, padding and packed trees change nothing but rounding, equal texts have equal states, and what
two responses share under a mask is not in the variance of their difference. Training draws a mask a token instead, of
which a mean over tokens sees next to nothing. Dropped attention probabilities (T × T, as many as a text has tokens)
belong to no weight and stay as they are.

The model is never in training mode: masks are multiplied by hooks that go when the pass ends, so that everything else,
batch norms say, is as in serving, and other threads wait meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore._base.prompt import Prompt, Response
from rmcore.head.estimators import PairEstimate
from rmcore.head.estimators.samples import sampled_estimate
from rmcore.model.backbone import Backbone
from rmcore.model.reward_model import RewardModel
from rmcore.model.text import EncodedText

__all__ = ["dropout_layers", "dropout_pairs", "dropout_states"]

_STATES = 3
"""Dimensions of states (batch, tokens, width); attention probabilities have four."""


def dropout_layers(backbone: Backbone, rate: float | None = None) -> dict[str, float]:
    """Name → rate of the backbone's dropout layers.

    Args:
        backbone: whose model is looked at.
        rate: in the place of each layer's own; None leaves those out whose own is 0.

    Raises InputError where there is none, as with Llama, and for a server's body.
    """
    if rate is not None and not 0 < rate < 1:
        reject("rate", rate, "a share strictly between 0 and 1, or None")
    if backbone.remote:
        reject("backbone", "one on a server", "a body in this process, whose layers can be masked")
    found = {
        name: module.p if rate is None else rate
        for name, module in backbone.model.named_modules()
        if isinstance(module, torch.nn.modules.dropout._DropoutNd)
    }
    found = {name: p for name, p in found.items() if p > 0}
    if not found:
        name = type(backbone.model).__name__
        reject("backbone", f"{name}, which has no dropout", "one that has, or dropout over its states ('dropout')")
    return found


def dropout_states(
    backbone: Backbone,
    texts: Sequence[EncodedText],
    *,
    passes: int = 20,
    rate: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Pooled states of each pass: (T, N, h) float32 on the model's device, rows as of :meth:`Backbone.hidden`.

    The cache of states is neither read nor written.

    Args:
        backbone: in eval mode, and left as it is.
        texts: encoded texts.
        passes: T ≥ 1.
        rate: the share that is dropped; None for each layer's own.
        seed: of the masks: pass t of a seed has the same whatever the texts, and however many passes there are.
        progress: called with (passes done, T) after each.

    Raises:
        InputError: a backbone without dropout, one on a server, or one whose dropout the layer that is read does not
            come after.
    """
    if passes < 1:
        reject("passes", passes, "at least 1")
    layers = dropout_layers(backbone, rate)
    found = []
    for number in range(passes):
        masks = _Masks(seed, number, layers)
        with _masked(backbone, masks):
            found.append(backbone.hidden(texts))
        texts = [replace(text, limit=None) for text in texts]  # that some were cut is told once
        if not masks.drawn and any(not text.unread for text in texts):
            reject("backbone", f"dropout in {sorted(layers)[:3]}, none of it before its states", "one that has")
        if progress is not None:
            progress(number + 1, passes)
    return torch.stack(found)


def dropout_pairs(
    model: RewardModel,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Response]],
    *,
    passes: int = 20,
    rate: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PairEstimate:
    """All pairs of groups by the model's head on :func:`dropout_states`: moments over the T passes (difference mode).

    Arguments as of :meth:`RewardModel.score` and :func:`dropout_states`; T ≥ 2. The variance is epistemic, and that of
    the backbone alone: the head's own posterior is not in it.

    Raises InputError as :func:`dropout_states`, and for a model in concat mode.
    """
    if model.mode != "difference":
        reject("model", "one in concat mode", "one in difference mode")
    if passes < 2:
        reject("passes", passes, "at least 2: one has no variance")
    groups = model.encode_groups(prompts, responses)
    texts = [text for group in groups for text in group]
    states = dropout_states(model.backbone, texts, passes=passes, rate=rate, seed=seed, progress=progress)
    rewards = torch.stack([model.row_scores(rows) for rows in states], 1)
    return sampled_estimate(rewards, torch.tensor([len(group) for group in groups]))


class _Masks:
    """The masks of one pass, made when a layer is first met."""

    def __init__(self, seed: int, number: int, layers: dict[str, float]) -> None:
        self.seed, self.number, self.layers = seed, number, layers
        self.drawn: dict[tuple[str, int], Tensor] = {}

    def of(self, name: str, like: Tensor) -> Tensor:
        """(width,) of a layer: 0, or 1 / (1 − rate), in the dtype and on the device of what it drops."""
        key = name, like.shape[-1]
        if key not in self.drawn:
            told = hashlib.sha256(f"{self.seed} {self.number} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(told[:8], "little", signed=True))
            kept = torch.rand(like.shape[-1], generator=generator) >= self.layers[name]
            self.drawn[key] = kept.to(like) / (1 - self.layers[name])
        return self.drawn[key]

    def hook(self, name: str) -> Callable[..., Tensor | None]:
        """The hook of a layer, which lets everything through by itself in eval mode."""

        def masked(_module: object, _inputs: Any, output: Tensor) -> Tensor | None:
            return output * self.of(name, output) if output.dim() <= _STATES else None

        return masked


@contextmanager
def _masked(backbone: Backbone, masks: _Masks) -> Iterator[None]:
    """Inside, this thread's forward passes are masked; those of others wait."""
    modules = dict(backbone.model.named_modules())
    with backbone.alone():
        handles = [modules[name].register_forward_hook(masks.hook(name)) for name in masks.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
