"""A Hugging Face backbone as a function from encoded texts to pooled hidden states.

What is computed of them, and what is not computed twice, is in :mod:`rmcore.model.text_states`; one forward pass in
:mod:`rmcore.model.forward`. transformers is imported on first use.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.head.attributes.scores import AttributeScores
from rmcore.model.agreement import require_same_tokens
from rmcore.model.backbone_config import BackboneConfig, Pooling
from rmcore.model.backbone_head import BackboneHead
from rmcore.model.backbone_loading import BackboneLoading, Deterministic
from rmcore.model.backbone_saving import save_backbone
from rmcore.model.encoding.architecture import (
    block,
    embedding_rows,
    final_linear,
    pair_separator,
    position_limit,
    takes_two_texts,
    text_config,
)
from rmcore.model.encoding.limits import check_positions
from rmcore.model.encoding.packing import Pack
from rmcore.model.encoding.sharing import Kind
from rmcore.model.encoding.tree_attention import Packing
from rmcore.model.encoding_stats import EncodingStats, warn_of_cuts
from rmcore.model.families.load import Loaded
from rmcore.model.families.pairs import PairTextEncoder
from rmcore.model.forward import ForwardPass
from rmcore.model.loading import REMOTE_CODE, choose_attention, is_quantised
from rmcore.model.remote import RemoteModel
from rmcore.model.state_cache import StateCache
from rmcore.model.template_date import reads_clock
from rmcore.model.text import EncodedText, OverlongPolicy, PairTemplate, TextEncoder, TextLimit
from rmcore.model.text_states import TextStates
from rmcore.ops.dispatch import Explanation

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Deterministic",
    "Pooling",
    "choose_attention",
]


class Backbone(BackboneLoading, BackboneHead):
    """A model, its tokenizer and a pooling rule. Build it with :meth:`from_pretrained`.

    Args:
        model: a Hugging Face model in eval mode.
        tokenizer: its fast tokenizer.
        config: what a text's hidden state is.
        tokens_per_batch: tokens of one forward pass, padding included.
        attention: the ``attn_implementation`` of padded forward passes in use and why, for reports.
        packing: how shared beginnings are encoded: ``auto`` packs them where that saves and is exact, ``flex`` and
            ``sdpa`` always pack, with that attention or an error, ``padded`` gives every text a row of its own.
        tree_kinds: the attentions that ``packing="auto"`` may choose from; None for all.
        files: sha256 of each file the model and its tokenizer come from, where that is a folder.
        published: what else was loaded of a published reward model, with ``kind="reward"``.
        deterministic: with ``batch`` a text's state has the same bits whatever it is batched with: each text has a
            forward pass of its own, unpadded, and shares no prefix. None: batches, where bits may differ by rounding.

    Attributes:
        state_cache: where encoded states are kept and looked up; None, the default, keeps none.
        language_head: the language model's output weights, once they were asked for and where they are not the
            embeddings (:mod:`rmcore.model.language_model`); :meth:`save` keeps them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: BackboneConfig,
        *,
        tokens_per_batch: int = 8192,
        attention: tuple[str, str] = ("", ""),
        packing: Packing = "auto",
        tree_kinds: tuple[Kind, ...] | None = None,
        files: Mapping[str, str] | None = None,
        published: Loaded | None = None,
        deterministic: Deterministic | None = None,
    ) -> None:
        if deterministic not in (None, "batch"):
            reject("deterministic", repr(deterministic), "'batch' or None")
        if tokens_per_batch < 1:
            reject("tokens_per_batch", tokens_per_batch, "at least 1")
        if (published is None) != (config.kind != "reward"):
            reject("published", published, "what load_family gives, exactly with kind='reward'")
        if config.date is None and reads_clock(tokenizer):
            config = replace(config, date=datetime.date.today().isoformat())
        self.tokenizer = tokenizer
        self.config = config
        self.tokens_per_batch = tokens_per_batch
        self.attention = attention
        self.stats = EncodingStats()
        self.files = dict(files or {})
        self.state_cache: StateCache | None = None
        self.language_head: dict[str, Tensor] | None = None
        self.positions = position_limit(model)
        check_positions(config.max_length, self.positions)
        self.published = published
        self.deterministic = deterministic
        self.encoder = self._text_encoder(model)
        separator = pair_separator(model, tokenizer)
        if separator is not None and not config.split_special_tokens:
            reject("split_special_tokens", False, "True with token types, which a separator in a text would shift")
        require_same_tokens(self.encoder)
        self.rows = embedding_rows(model)
        outputs = 1 if config.family == REMOTE_CODE else None
        self._pass = ForwardPass(
            model,
            config,
            final_linear=final_linear(model, outputs) if config.kind == "classifier" else None,
            separator=separator,
            published=published,
        )
        if config.layer is not None:
            block(model, config.layer)
        self._tree_kinds = tree_kinds
        self._lock = threading.Lock()
        self._loaded = self._weights_version()
        self._states = TextStates(
            self._pass,
            tokenizer,
            packing=packing,
            tree_kinds=tree_kinds,
            rows=self.rows,
            max_length=self.positions or self.encoder.max_length,
            deterministic=deterministic,
        )

    def _text_encoder(self, model: Any) -> TextEncoder:
        """What makes tokens of texts; of pairs of them where the model reads two at a time."""
        config = self.config
        encoder = (PairTextEncoder if self.pairwise else TextEncoder)(
            self.tokenizer,
            template=PairTemplate(config.single_template, config.pair_template),
            chat=config.chat,
            two_texts=takes_two_texts(model, self.tokenizer),
            split_special_tokens=config.split_special_tokens,
            append_eos=config.append_eos if config.append_eos is not None else config.pooling == "last",
            max_length=config.max_length or self._content_positions(),
            overlong=config.overlong,
            date=config.date,
            positions=self.positions,
        )
        if isinstance(encoder, PairTextEncoder) and self.published is not None:
            encoder.form = self.published.pooler.family.pair_form
        return encoder

    def with_packing(self, packing: Packing) -> Backbone:
        """The same model with shared beginnings encoded another way, and counts of its own."""
        return Backbone(
            self.model,
            self.tokenizer,
            self.config,
            tokens_per_batch=self.tokens_per_batch,
            attention=self.attention,
            packing=packing,
            tree_kinds=self._tree_kinds,
            files=self.files,
            published=self.published,
            deterministic=self.deterministic,
        )

    @property
    def model(self) -> Any:
        """The Hugging Face model, in eval mode unless it is being trained."""
        return self._pass.model

    @model.setter
    def model(self, model: Any) -> None:
        self._pass.model = model

    @property
    def final_linear(self) -> torch.nn.Linear | None:
        """A classifier's last linear layer, whose input is the state that is read; None of other kinds."""
        return self._pass.final_linear

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def hidden_size(self) -> int:
        """Width of the pooled states, the length feature included."""
        if self.published is not None:
            width = self.published.head.width
        elif self._pass.final_linear is not None:
            width = self._pass.final_linear.in_features
        else:
            width = text_config(self.model).hidden_size
        return int(width) + (self.config.length_feature != 0)

    @property
    def remote(self) -> bool:
        """Whether its states come from a server (:meth:`from_server`)."""
        return isinstance(self.model, RemoteModel)

    @property
    def quantised(self) -> bool:
        """Whether its weights are quantised (bitsandbytes, GPTQ, ...): its arithmetic is coarser than its dtype."""
        return is_quantised(self.model)

    @property
    def changed(self) -> bool:
        """Whether weights were trained or replaced since the model was loaded."""
        return self._weights_version() != self._loaded

    @property
    def identity(self) -> str | None:
        """A digest of all that decides the state of a sequence of token ids; None where that is not known.

        It covers the files or the hub's commit, the pooling, and the arithmetic: dtype, device, attention, versions.
        """
        source = self.files or ([self.config.name, self.config.revision] if self.config.revision else None)
        if source is None or self.changed:
            return None
        import transformers

        config = self.config
        state = (
            config.kind,
            config.family,
            config.pooling,
            config.layer,
            self._pass.separator,
            self.packing,
            self.deterministic,
            *self.attention,
            *([] if config.gguf_file is None else [config.gguf_file]),
            *(["gate"] if self.published is not None and self._row_width != self.published.head.width else []),
        )
        arithmetic = (str(self.model.dtype), self.device.type, torch.__version__, transformers.__version__)
        text = json.dumps([1, source, state, arithmetic], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _weights_version(self) -> tuple[int, int]:
        # torch counts the writes to each tensor; tensors made in inference mode have no count and no training.
        parameters = list(self.model.parameters()) if hasattr(self.model, "parameters") else []
        return len(parameters), sum(0 if p.is_inference() else p._version for p in parameters)

    @property
    def packing(self) -> Packing:
        """How shared beginnings were asked to be encoded."""
        return self._states.sharing.packing

    def text_limit(self, max_length: int | None = None, overlong: OverlongPolicy | None = None) -> TextLimit:
        """The limit of texts with some of it given, the rest as configured; raises InputError for an impossible one."""
        own = self.encoder.limit
        limit = TextLimit(max_length or own.max_length, overlong or own.overlong)
        if max_length is not None:
            TextLimit(max_length)  # 0, say
            check_positions(max_length, self.positions)
        return limit

    def use_state_cache(self) -> None:
        """Keep encoded states in the cache folder, and take what is there (:mod:`rmcore.model.state_cache`)."""
        self.state_cache = StateCache.default(self.identity, self._row_width)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, forward passes of other threads wait, and states are neither taken from the cache nor kept there.

        For who changes, for a while, what the model computes.
        """
        self.explain()  # its trial takes the locks the other way round
        with self._pass.lock:
            kept, self.state_cache = self.state_cache, None
            try:
                yield
            finally:
                self.state_cache = kept

    def explain(self) -> Explanation:
        """How shared beginnings are encoded (``flex``, ``sdpa``, ``padded``), and why not otherwise.

        The first call may run the model on a few made-up tokens, to see that a packed tree changes nothing.
        """
        return self._states.sharing.explain()

    def save(self, folder: Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write weights and tokenizer into a new folder, from which the same configuration loads them again.

        Of a model with PEFT adapters those alone are written, with the name of what they belong to. ``state_dict`` is
        for weights that are gathered from several processes.

        Raises InputError for a server's body and for quantised weights, which are where they came from;
        CheckpointError where transformers refuses, as it does for adapters beside an old peft.
        """
        save_backbone(
            folder,
            self.model,
            self.tokenizer,
            published=self.published,
            language_head=self.language_head,
            state_dict=state_dict,
        )

    def hidden(
        self,
        texts: Sequence[EncodedText],
        *,
        progress: Callable[[int, int], None] | None = None,
        stats: EncodingStats | None = None,
    ) -> Tensor:
        """Pooled hidden states (N, h) float32 on the model's device, one row a text, in order; NaN for unread texts.

        Args:
            texts: encoded texts; equal ones are encoded once.
            progress: called with (tokens done, tokens in all) after each batch.
            stats: what this call did is added to it. ``self.stats`` counts all calls, of all threads.
        """
        return self._narrow(self._rows(texts, progress, stats), texts)

    def hidden_and_attributes(
        self,
        texts: Sequence[EncodedText],
        *,
        progress: Callable[[int, int], None] | None = None,
        stats: EncodingStats | None = None,
    ) -> tuple[Tensor, AttributeScores | None]:
        """:meth:`hidden`, and of the same forward passes the attributes of a reward model that has several."""
        rows = self._rows(texts, progress, stats)
        hidden = self._narrow(rows, texts)
        if self.published is None:
            return hidden, None
        found = self.published.head.attributes(rows)
        unread = torch.tensor([text.unread for text in texts], dtype=torch.bool)
        return hidden, None if found is None else found.masked(unread)

    @property
    def _row_width(self) -> int:
        """Width of what a forward pass gives of a text, and of what is kept of it."""
        if self.published is not None:
            return self.published.head.full_width
        return self.hidden_size - (self.config.length_feature != 0)

    def _narrow(self, rows: Tensor, texts: Sequence[EncodedText]) -> Tensor:
        width = self.hidden_size - (self.config.length_feature != 0)
        return self.add_length_feature(rows[:, :width].contiguous(), texts)

    def _rows(
        self,
        texts: Sequence[EncodedText],
        progress: Callable[[int, int], None] | None,
        stats: EncodingStats | None,
    ) -> Tensor:
        call = EncodingStats(
            texts=len(texts),
            truncated_texts=sum(text.cut_tokens > 0 for text in texts),
            cut_tokens=sum(text.cut_tokens for text in texts),
            unread_texts=sum(text.unread for text in texts),
        )
        states = self._states.of(
            [None if text.unread else self.input_ids(text) for text in texts],
            call,
            width=self._row_width,
            tokens_per_batch=self.tokens_per_batch,
            cache=None if self.changed else self.state_cache,
            progress=progress,
        )
        with self._lock:  # reading, adding and writing back is not one step
            self.stats.add(call)
        if stats is not None:
            stats.add(call)
        warn_of_cuts(texts, call)
        return states

    def add_length_feature(self, pooled: Tensor, texts: Sequence[EncodedText]) -> Tensor:
        """Append the configured length feature to pooled rows (N, h')."""
        return self.append_lengths(pooled, torch.tensor([text.content_tokens for text in texts]))

    def append_lengths(self, pooled: Tensor, content_tokens: Tensor) -> Tensor:
        """:meth:`add_length_feature` of rows whose texts' content tokens are counted already (B,)."""
        if self.config.length_feature == 0:
            return pooled
        counts = content_tokens.to(device=pooled.device, dtype=torch.float32)
        feature = self.config.length_feature * (torch.log1p(counts) - 5)
        return torch.cat([pooled, feature[:, None]], dim=1)

    def model_inputs(self, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """What the model's forward takes for a batch (B, T) and its mask."""
        return self._pass.model_inputs(input_ids, mask)

    def pooled_states(
        self, input_ids: Tensor, attention_mask: Tensor, *, full: bool = False, through: Any = None
    ) -> Tensor:
        """Pool a right-padded batch (B, T) → (B, h'), as :meth:`ForwardPass.pooled_states` does."""
        return self._pass.pooled_states(input_ids, attention_mask, full=full, through=through)

    def token_states(self, input_ids: Tensor, attention_mask: Tensor, *, through: Any = None) -> Tensor:
        """States (B, T, h) of all tokens, the first half of :meth:`pooled_states`."""
        return self._pass.token_states(input_ids, attention_mask, through=through)

    def pool(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, h) → (B, h'), the second half of :meth:`pooled_states`."""
        return self._pass.pool(states, input_ids, attention_mask)

    def tree_states(self, pack: Pack, *, through: Any = None) -> Tensor:
        """States (1, T, h) of a packed tree's tokens, as :meth:`ForwardPass.tree_states` does."""
        return self._pass.tree_states(pack, through=through)

    def pool_tree(self, states: Tensor, pack: Pack, texts: Sequence[Sequence[int]]) -> Tensor:
        """(1, T, h) → (n, h') of the texts a pack completes, as :meth:`ForwardPass.pool_tree` does."""
        return self._pass.pool_tree(states, pack, texts)
