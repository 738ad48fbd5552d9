"""Which texts to encode as packed trees, how, and the trial that says whether the model allows it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import BackendError
from rmcore.model.encoding.architecture import longest_exact, text_config
from rmcore.model.encoding.packing import Pack, PrefixTree
from rmcore.model.encoding.tree_attention import Kind, Packing, explain
from rmcore.ops.dispatch import Explanation

__all__ = ["Kind", "PrefixSharing"]

log = logging.getLogger(__name__)

WORTH = 0.9
"""A tree is packed where its tokens are at most this share of its texts': texts that share little batch better."""


class PrefixSharing:
    """Decides for one backbone.

    Args:
        model: its Hugging Face model.
        packing: ``auto`` packs where it saves and the model allows it; ``flex`` and ``sdpa`` always pack, or raise;
            ``padded`` never.
        encode_pack: pooled states (n, h) of a pack's texts, and how many attention calls it took.
        encode_alone: pooled state (1, h) of one text, in a row of its own.
        layers: attention calls of a whole forward pass.
        max_length: most tokens of a text, None for no limit.
        kinds: the attentions that ``auto`` may choose from; None for all.
    """

    def __init__(
        self,
        model: Any,
        packing: Packing,
        *,
        encode_pack: Callable[[Pack, Sequence[Sequence[int]], Kind], tuple[Tensor, int]],
        encode_alone: Callable[[Sequence[int]], Tensor],
        layers: int,
        max_length: int | None,
        kinds: tuple[Kind, ...] | None = None,
    ) -> None:
        self.model = model
        self.packing = packing
        self._encode_pack = encode_pack
        self._encode_alone = encode_alone
        self._layers = layers
        self._max_length = max_length
        self._kinds = kinds
        self._static = explain(model, packing, kinds=kinds)
        self._chosen: Explanation | None = None
        self._told_window = False
        self._lock = threading.RLock()

    def explain(self) -> Explanation:
        """How shared prefixes are encoded (``flex``, ``sdpa`` or ``padded``), and why not otherwise.

        The first call tries the choice on a few made-up tokens, against the same texts in rows of their own.
        """
        with self._lock:
            if self._chosen is None:
                self._chosen = self._choose()
                if self._chosen.backend == "padded" and self.packing == "auto":
                    why = "; ".join(f"{name}: {reason}" for name, reason in self._chosen.reasons.items())
                    log.info("prefixes are not shared with %s: %s", type(self.model).__name__, why)
            return self._chosen

    def _choose(self) -> Explanation:
        told = explain(self.model, self.packing, kinds=self._kinds)
        while told.backend in ("flex", "sdpa"):
            kind: Kind = "flex" if told.backend == "flex" else "sdpa"
            why = self._trial(kind)
            if why is None:
                return told
            told = self._next(told, kind, why)
        return told

    def give_up(self, kind: Kind, why: str) -> Kind | None:
        """What comes after ``kind``, which failed on real texts; None for padded rows. Raises if it was asked for."""
        with self._lock:
            told = self.explain()
            if told.backend == kind:  # and no other thread has said so already
                told = self._chosen = self._next(told, kind, why)
        return self._kind(told)

    def _next(self, told: Explanation, kind: Kind, why: str) -> Explanation:
        reasons = {**told.reasons, kind: why}
        if self.packing != "auto":
            return Explanation("none", reasons)
        log.warning("packed trees do not run in %s with %s attention: %s", type(self.model).__name__, kind, why)
        further = kind == "flex" and (self._kinds is None or "sdpa" in self._kinds)
        return Explanation("sdpa" if further else "padded", reasons)

    def _kind(self, told: Explanation) -> Kind | None:
        if told.backend == "none":
            raise BackendError(f"packing: got {self.packing!r}, which cannot run here: {told.reasons[self.packing]}")
        if told.backend == "padded":
            return None
        return "flex" if told.backend == "flex" else "sdpa"

    def _trial(self, kind: Kind) -> str | None:
        """What goes wrong with four short texts of which three share tokens, or None."""
        vocabulary = int(text_config(self.model).vocab_size)
        n = 12 if kind == "flex" else 1  # as many as make it a case for flex
        made = [(31 * k * k + 17 * k + 5) % vocabulary for k in range(24 * n)]
        root, first, second, third, other = (
            made[a * n : b * n] for a, b in ((0, 6), (6, 9), (9, 14), (14, 18), (18, 24))
        )
        texts = [root + first, root + second, root + second + third, other]
        if self._max_length is not None and self._max_length < max(map(len, texts)):
            return f"only {self._max_length} positions"
        try:
            (pack,) = PrefixTree(texts, min_shared=2).packs(24 * n)
            texts = [texts[k] for k in pack.texts]
            with torch.inference_mode():
                packed, calls = self._encode_pack(pack, texts, kind)
                alone = torch.cat([self._encode_alone(text) for text in texts])
        except Exception as error:  # a compiler, a model of somebody's own: whatever it is, the plain path remains
            return (str(error).strip() or repr(error)).splitlines()[0][:200]
        if calls != self._layers:
            return f"{calls} of {self._layers} layers call the attention function that transformers looks up"
        apart = (packed - alone).norm(dim=1) / alone.norm(dim=1)
        allowed = 1e-3 if next(self.model.parameters()).dtype in (torch.float32, torch.float64) else 0.05
        if not bool((apart <= allowed).all()):
            return f"states differ from those of single texts by {float(apart.max()):.1e} of their norm"
        return None

    def split(self, ids: Sequence[Sequence[int]], max_tokens: int) -> tuple[Kind | None, list[Pack], list[int]]:
        """(how, packs, texts for padded rows) of distinct texts; packs number the texts as ``ids`` does.

        Raises BackendError where the packing asked for cannot run with this model.
        """
        everything = list(range(len(ids)))
        if self.packing == "padded" or (self.packing == "auto" and len(ids) < 2):
            return None, [], everything
        if self._static.backend not in ("flex", "sdpa") and self._kind(self.explain()) is None:
            return None, [], everything  # before a tree is built for nothing
        limit = longest_exact(self.model)
        fit = [k for k in everything if limit is None or len(ids[k]) <= limit]
        tree = PrefixTree([ids[k] for k in fit])
        always = self.packing != "auto"
        chosen: list[int] = []
        for texts, tokens in tree.roots():
            if always or tokens <= WORTH * sum(len(ids[fit[k]]) for k in texts):
                chosen += texts
        if not chosen:
            return None, [], everything
        kind = self._kind(self.explain())
        if kind is None:
            return None, [], everything
        if len(fit) < len(ids):
            self._tell_window(len(ids) - len(fit), limit)
        packs = [pack.renumbered(fit) for pack in tree.packs(max_tokens, chosen)]
        packed = {k for pack in packs for k in pack.texts}
        return kind, packs, [k for k in everything if k not in packed]

    def _tell_window(self, count: int, limit: int | None) -> None:
        if not self._told_window:
            self._told_window = True
            log.info("%d texts are longer than the sliding window of %s tokens and are not packed", count, limit)
