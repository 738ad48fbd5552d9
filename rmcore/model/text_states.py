"""The pooled states of many texts, computing little twice.

Texts are deduplicated, and what a cache holds is taken from it. A decoder's texts that begin alike are encoded as
packed trees (:mod:`rmcore.model.encoding.packing`), the rest sorted by length and padded, both within a token budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore.model.encoding.architecture import text_config
from rmcore.model.encoding.sharing import Kind, PrefixSharing
from rmcore.model.encoding.tree_attention import Packing, TreeAttentionError
from rmcore.model.encoding_stats import EncodingStats, length_batches
from rmcore.model.forward import ForwardPass
from rmcore.model.remote import RemoteModel
from rmcore.model.state_cache import StateCache

__all__ = ["TextStates"]

_REMOTE_TEXTS = 256
"""Texts between two reports of progress where states come from a server."""


class TextStates:
    """Runs one backbone's forward passes over texts.

    Args:
        forward: a forward pass.
        tokenizer: whose padding fills batches.
        packing: how shared beginnings are encoded; see :class:`~rmcore.model.backbone.Backbone`, as for the next two.
        tree_kinds: the attentions that ``packing="auto"`` may choose from; None for all.
        deterministic: with ``batch`` each text has a forward pass of its own.
        rows: of the model's embeddings; None where that is not known.
        max_length: most tokens of a text; None for no limit.
    """

    def __init__(
        self,
        forward: ForwardPass,
        tokenizer: Any,
        *,
        packing: Packing,
        tree_kinds: tuple[Kind, ...] | None,
        deterministic: str | None,
        rows: int | None,
        max_length: int | None,
    ) -> None:
        self._pass, self._tokenizer = forward, tokenizer
        self._rows, self._deterministic = rows, deterministic
        self.sharing = PrefixSharing(
            forward.model,
            packing,
            encode_pack=forward.encode_pack,
            encode_alone=lambda ids: self.padded([ids])[0],
            layers=forward.config.layer or int(getattr(text_config(forward.model), "num_hidden_layers", 0)),
            max_length=max_length,
            kinds=tree_kinds,
        )

    def of(
        self,
        texts: Sequence[tuple[int, ...] | None],
        call: EncodingStats,
        *,
        width: int,
        tokens_per_batch: int,
        cache: StateCache | None,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Pooled states (N, width) float32 on the model's device, one row a text, in order; NaN for unread texts.

        Args:
            texts: token ids; None for what is to be left unread. Equal ones are encoded once.
            call: what is done is added to it.
            width: of a text's state.
            tokens_per_batch: tokens of one forward pass, padding included.
            cache: where states are looked up and kept.
            progress: called with (tokens done, tokens in all) after each batch.

        Raises:
            InputError: a text without tokens.
            CheckpointError: a token that the model has not.
        """
        device = next(self._pass.model.parameters()).device
        distinct: dict[tuple[int, ...], int] = {}
        read = [k for k, text in enumerate(texts) if text is not None]
        rows = [distinct.setdefault(text, len(distinct)) for text in texts if text is not None]
        ids = list(distinct)
        if () in distinct:
            reject(f"texts[{read[rows.index(distinct[()])]}]", "no tokens at all", "at least one token")
        self._check_ids(ids)
        call.encoded += len(ids)
        call.tokens += sum(map(len, ids))
        pooled = torch.empty(len(ids), width, dtype=torch.float32, device=device)
        todo = list(range(len(ids)))
        if cache is not None:
            known, states = cache.read(ids)
            pooled[torch.tensor(known, dtype=torch.long, device=device)] = states.to(device)
            todo = sorted(set(todo) - set(known))
            call.cached += len(known)
        done = call.tokens - sum(len(ids[k]) for k in todo)
        with torch.inference_mode():
            for part, states in self._encode([ids[k] for k in todo], call, tokens_per_batch) if todo else ():
                batch = [todo[k] for k in part]
                pooled[torch.tensor(batch, device=device)] = states
                if cache is not None:
                    cache.write([ids[k] for k in batch], states)
                done += sum(len(ids[k]) for k in batch)
                if progress is not None:
                    progress(done, call.tokens)
        states = pooled[torch.tensor(rows, dtype=torch.long, device=device)]
        if len(read) < len(texts):
            every = torch.full((len(texts), width), torch.nan, dtype=torch.float32, device=device)
            every[torch.tensor(read, dtype=torch.long, device=device)] = states
            states = every
        return states

    def padded(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """Pooled states (n, width) of one padded forward pass, and its tokens, padding included."""
        longest = max(map(len, ids))
        padding = getattr(self._tokenizer, "pad_token_id", None) or 0
        if self._rows is not None and padding >= self._rows:
            padding = 0  # padding is masked, so that any id will do that the model knows
        input_ids = torch.full((len(ids), longest), padding, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, text in enumerate(ids):
            input_ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = next(self._pass.model.parameters()).device
        states = self._pass.pooled_states(input_ids.to(device), mask.to(device), full=True)
        return states.float(), input_ids.numel()

    def _check_ids(self, texts: Sequence[tuple[int, ...]]) -> None:
        most = max(map(max, texts), default=0)
        if self._rows is not None and most >= self._rows:
            name = self._tokenizer.convert_ids_to_tokens(most)
            raise CheckpointError(
                f"backbone: got token {most} ({name!r}) from the tokenizer, expected one of the model's {self._rows}. "
                "They are not of one model"
            )

    def _encode(
        self, ids: list[tuple[int, ...]], stats: EncodingStats, tokens_per_batch: int
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """(indices of texts, their pooled states) of one forward pass after another."""
        if isinstance(self._pass.model, RemoteModel) and self._pass.config.pooling == "last":
            for start in range(0, len(ids), _REMOTE_TEXTS):
                part = ids[start : start + _REMOTE_TEXTS]
                found, error = self._pass.model.states_so_far(part, every=False)
                stats.padded_tokens += sum(len(part[k]) for k in found)
                if found:  # of a server that is gone in the middle, what came is kept first
                    yield [start + k for k in found], torch.stack(list(found.values()))
                if error is not None:
                    raise error
            return
        if self._deterministic == "batch":
            for k, text in enumerate(ids):
                states, tokens = self.padded([text])
                stats.padded_tokens += tokens
                yield [k], states
            return
        kind, packs, padded = self.sharing.split(ids, tokens_per_batch)
        while packs and kind is not None:
            texts = [ids[text] for text in packs[0].texts]
            try:
                states, _ = self._pass.encode_pack(packs[0], texts, kind)
            except TreeAttentionError as error:
                kind = self.sharing.give_up(kind, str(error))
                continue
            pack = packs.pop(0)
            stats.packed_tokens += len(pack)
            yield pack.texts, states
        padded += [text for pack in packs for text in pack.texts]
        for batch in length_batches([len(ids[k]) for k in padded], tokens_per_batch):
            states, tokens = self.padded([ids[padded[k]] for k in batch])
            stats.padded_tokens += tokens
            yield [padded[k] for k in batch], states
