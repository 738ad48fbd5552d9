"""A Hugging Face backbone as a function from encoded texts to pooled hidden states, with little padding.

Texts are deduplicated, sorted by length and batched by a token budget; a chosen layer stops the forward pass there.
transformers is imported on first use.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore.errors import CheckpointError, reject
from rmcore.text import EncodedText, OverlongPolicy, PairTemplate, TextEncoder

__all__ = ["Backbone", "BackboneConfig", "EncodingStats", "Pooling", "choose_attention", "length_batches"]

log = logging.getLogger(__name__)

Pooling: TypeAlias = Literal["last", "mean", "first", "classifier"]


@dataclass(frozen=True)
class BackboneConfig:
    """Everything that decides what a text's hidden state is, all of it JSON.

    Attributes:
        name: hub name or folder; empty when embedded in the model's own folder.
        revision: hub revision, None for the default branch.
        kind: ``base`` loads AutoModel, ``classifier`` AutoModelForSequenceClassification (an upgraded reward model).
        pooling: ``last`` token, ``mean`` of the tokens, ``first`` token ([CLS]), or ``classifier``: the input of the
            reward model's own last linear layer.
        layer: pool the output of this layer (1 = first block) instead of the last hidden state; later layers are
            skipped.
        length_feature: appends one feature, length_feature · (log1p(content tokens) − 5), where not 0.
        max_length: most tokens of a text; None takes the model's position limit.
        overlong: policy for longer texts.
        chat: see :class:`rmcore.text.TextEncoder`.
        append_eos: end plain texts with eos; None does so for ``last`` pooling.
        single_template, pair_template: see :class:`rmcore.text.PairTemplate`.
    """

    name: str = ""
    revision: str | None = None
    kind: Literal["base", "classifier"] = "base"
    pooling: Pooling = "last"
    layer: int | None = None
    length_feature: float = 0.0
    max_length: int | None = None
    overlong: OverlongPolicy = "error"
    chat: Literal["auto", "always", "never"] = "auto"
    append_eos: bool | None = None
    single_template: str = PairTemplate.single
    pair_template: str = PairTemplate.pair

    def __post_init__(self) -> None:
        if self.kind not in ("base", "classifier"):
            reject("kind", repr(self.kind), "'base' or 'classifier'")
        if self.pooling not in ("last", "mean", "first", "classifier"):
            reject("pooling", repr(self.pooling), "last, mean, first or classifier")
        if (self.pooling == "classifier") != (self.kind == "classifier"):
            reject("pooling", self.pooling, f"'classifier' exactly with kind='classifier' (kind is {self.kind!r})")
        if self.layer is not None and (self.layer < 1 or self.kind == "classifier"):
            reject("layer", self.layer, "a layer from 1 of a base model, or None")
        if not math.isfinite(self.length_feature):
            reject("length_feature", self.length_feature, "a finite number")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneConfig:
        """From :meth:`to_dict`; an unknown key is rejected by name."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            reject("backbone config", f"unknown keys {sorted(unknown)}", "keys of BackboneConfig")
        return cls(**values)


@dataclass
class EncodingStats:
    """What encoding did so far: texts seen, distinct texts encoded, tokens, padding, and what truncation took."""

    texts: int = 0
    encoded: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    truncated_texts: int = 0
    cut_tokens: int = 0

    def add(self, other: EncodingStats) -> None:
        """Add another's counts to these."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, each at most ``max_tokens`` when padded (or one text)."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    start = 0
    while start < len(order):
        count = max(1, max_tokens // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count


def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The attention implementation for a device and dtype, and why."""
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "flash-attn is not installed"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa", "flash-attn needs an NVIDIA GPU of compute capability 8.0 or later"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"flash-attn needs float16 or bfloat16, not {dtype}"
    return "flash_attention_2", "flash-attn is installed and usable"


class _EnoughError(Exception):
    """Carries a layer's output out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Backbone:
    """A model, its tokenizer and a pooling rule. Build it with :meth:`from_pretrained`.

    Args:
        model: a Hugging Face model in eval mode.
        tokenizer: its fast tokenizer.
        config: what a text's hidden state is.
        tokens_per_batch: padded tokens of one forward pass.
        attention: the implementation in use and why, for reports.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: BackboneConfig,
        *,
        tokens_per_batch: int = 8192,
        attention: tuple[str, str] = ("", ""),
    ) -> None:
        if tokens_per_batch < 1:
            reject("tokens_per_batch", tokens_per_batch, "at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.tokens_per_batch = tokens_per_batch
        self.attention = attention
        self.stats = EncodingStats()
        limit = _position_limit(model)
        if config.max_length is not None and limit is not None and config.max_length > limit:
            reject("max_length", config.max_length, f"at most the model's {limit} positions")
        append_eos = config.append_eos if config.append_eos is not None else config.pooling == "last"
        self.encoder = TextEncoder(
            tokenizer,
            template=PairTemplate(config.single_template, config.pair_template),
            chat=config.chat,
            append_eos=append_eos,
            max_length=config.max_length or limit,
            overlong=config.overlong,
        )
        self._final_linear = _final_linear(model) if config.kind == "classifier" else None
        if config.layer is not None:
            _blocks(model, config.layer)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        config: BackboneConfig | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        tokens_per_batch: int = 8192,
        **kwargs: Any,
    ) -> Backbone:
        """Load a backbone by hub name or folder.

        Args:
            config: a name, or a :class:`BackboneConfig`.
            device: None takes CUDA if there is one.
            dtype: None takes bfloat16 on a GPU, float32 on a CPU.
            attention: ``auto``, or what transformers calls ``attn_implementation``.
            tokens_per_batch: padded tokens of one forward pass.
            kwargs: fields of :class:`BackboneConfig` where ``config`` is a name.

        Raises:
            CheckpointError: the name cannot be loaded; the message carries the loader's reason.
        """
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

        if isinstance(config, str):
            config = BackboneConfig(name=config, **kwargs)
        elif kwargs:
            reject("kwargs", sorted(kwargs), "none beside a BackboneConfig")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        loader = AutoModelForSequenceClassification if config.kind == "classifier" else AutoModel
        choice = choose_attention(device, dtype) if attention == "auto" else (attention, "asked for")
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.name, revision=config.revision)
            load = functools.partial(
                loader.from_pretrained, config.name, revision=config.revision, dtype=dtype, output_loading_info=True
            )
            try:
                model, info = load(attn_implementation=choice[0])
            except ValueError as error:
                if attention != "auto" or "attention" not in str(error).lower():
                    raise
                choice = ("eager", f"this model does not support {choice[0]}")
                model, info = load(attn_implementation="eager")
        except Exception as error:  # a hub, a damaged file, a config from elsewhere: the loader raises many kinds
            reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
            raise CheckpointError(f"backbone: got {config.name!r}, which transformers cannot load: {reason}") from error
        if config.kind == "classifier" and info["missing_keys"]:
            raise CheckpointError(
                f"backbone: got {config.name!r} without {', '.join(sorted(info['missing_keys'])[:4])}, expected a "
                "trained reward model"
            )
        model.to(device).eval()
        return cls(model, tokenizer, config, tokens_per_batch=tokens_per_batch, attention=choice)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def hidden_size(self) -> int:
        """Width of the pooled states, the length feature included."""
        width = (
            self._final_linear.in_features if self._final_linear is not None else _text_config(self.model).hidden_size
        )
        return int(width) + (self.config.length_feature != 0)

    def scalar_head(self) -> tuple[Tensor, float]:
        """(weight (h,), bias) of a reward model's last linear layer, for :func:`rmcore.fit.upgrade`."""
        if self._final_linear is None:
            reject("kind", self.config.kind, "'classifier'")
        if self._final_linear.out_features != 1:
            reject("model", f"{self._final_linear.out_features} labels", "a reward model with one")
        bias = self._final_linear.bias
        return self._final_linear.weight[0].detach().float(), 0.0 if bias is None else float(bias[0].detach())

    def hidden(
        self,
        texts: Sequence[EncodedText],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Pooled hidden states (N, h) float32 on the model's device, one row a text, in order.

        Args:
            texts: encoded texts; equal ones are encoded once.
            progress: called with (tokens done, tokens in all) after each batch.
        """
        distinct: dict[tuple[int, ...], int] = {}
        rows = [distinct.setdefault(text.ids, len(distinct)) for text in texts]
        ids = list(distinct)
        if () in distinct:
            reject(f"texts[{rows.index(distinct[()])}]", "no tokens at all", "at least one token")
        stats = EncodingStats(
            texts=len(texts),
            encoded=len(ids),
            tokens=sum(map(len, ids)),
            truncated_texts=sum(text.cut_tokens > 0 for text in texts),
            cut_tokens=sum(text.cut_tokens for text in texts),
        )
        width = self.hidden_size - (self.config.length_feature != 0)
        pooled = torch.empty(len(ids), width, dtype=torch.float32, device=self.device)
        done = 0
        with torch.inference_mode():
            for batch in length_batches([len(i) for i in ids], self.tokens_per_batch):
                states, padded = self._forward([ids[k] for k in batch])
                pooled[torch.tensor(batch, device=self.device)] = states
                done += sum(len(ids[k]) for k in batch)
                stats.padded_tokens += padded
                if progress is not None:
                    progress(done, stats.tokens)
        self.stats.add(stats)
        if stats.truncated_texts:
            log.warning(
                "%d of %d texts were longer than %s tokens; the policy %r cut %d tokens",
                stats.truncated_texts,
                stats.texts,
                self.encoder.max_length,
                self.config.overlong,
                stats.cut_tokens,
            )
        return self.add_length_feature(pooled[torch.tensor(rows, dtype=torch.long, device=self.device)], texts)

    def add_length_feature(self, pooled: Tensor, texts: Sequence[EncodedText]) -> Tensor:
        """Append the configured length feature to pooled rows (N, h')."""
        if self.config.length_feature == 0:
            return pooled
        counts = torch.tensor([text.content_tokens for text in texts], dtype=torch.float32, device=pooled.device)
        feature = self.config.length_feature * (torch.log1p(counts) - 5)
        return torch.cat([pooled, feature[:, None]], dim=1)

    def pooled_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool a right-padded batch (B, T) → (B, h'), keeping the graph if grad is on. No length feature."""
        if self._final_linear is not None:
            return self._classifier_input(input_ids, attention_mask)
        last = attention_mask.sum(1) - 1
        states = self._states(input_ids, attention_mask).float()
        if self.config.pooling == "mean":
            mask = attention_mask[..., None].to(states.dtype)
            return (states * mask).sum(1) / mask.sum(1)
        index = last if self.config.pooling == "last" else torch.zeros_like(last)
        return states[torch.arange(len(states), device=states.device), index]

    def _forward(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        longest = max(map(len, ids))
        padding = getattr(self.tokenizer, "pad_token_id", None) or 0
        input_ids = torch.full((len(ids), longest), padding, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, text in enumerate(ids):
            input_ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        return self.pooled_states(input_ids.to(self.device), mask.to(self.device)).float(), input_ids.numel()

    def _states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        if self.config.layer is None:
            return self.model(**self._inputs(input_ids, mask)).last_hidden_state
        block = _blocks(self.model, self.config.layer)
        return self._stopped(block.register_forward_hook, input_ids, mask)

    def _classifier_input(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        assert self._final_linear is not None
        states = self._stopped(self._final_linear.register_forward_pre_hook, input_ids, mask).float()
        if states.dim() == 2:
            return states
        # Decoders score every position; transformers reads the last one that is not the padding token, which a real
        # token may be too where eos doubles as padding.
        pad = _text_config(self.model).pad_token_id
        scored = mask if pad is None else mask * (input_ids != pad)
        last = (scored * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]

    def _inputs(self, input_ids: Tensor, mask: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if getattr(_text_config(self.model), "use_cache", None) is not None:
            inputs["use_cache"] = False
        return inputs

    def _stopped(self, register: Callable[[Any], Any], input_ids: Tensor, mask: Tensor) -> Tensor:
        """Run the model only until a hook that ``register`` sets fires; what the hook saw (output, or input before)."""

        def stop(_module: object, inputs: Any, *output: Any) -> None:
            seen = output[0] if output else inputs
            raise _EnoughError(seen[0] if isinstance(seen, tuple) else seen)

        with self._lock:  # the hook is set on the model itself, so one caller at a time
            handle = register(stop)
            try:
                self.model(**self._inputs(input_ids, mask))
            except _EnoughError as enough:
                return enough.hidden
            finally:
                handle.remove()
        raise CheckpointError(f"backbone: a layer of {type(self.model).__name__} that is to be read never ran")


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _position_limit(model: Any) -> int | None:
    """The longest input in tokens, None where the architecture sets no limit."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin number positions from behind the padding index, so those before it are lost.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(limit) - int(module.padding_idx) - 1
    return int(limit)


def _blocks(model: Any, layer: int) -> torch.nn.Module:
    """The module whose output is hidden state ``layer``: the transformer's block list is the one of its own length."""
    count = _text_config(model).num_hidden_layers
    lists: Iterable[torch.nn.ModuleList] = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    blocks = next((m for m in lists if len(m) == count), None)
    if blocks is None or layer > count:
        reject("layer", layer, f"between 1 and {count} of a model whose blocks are a list")
    return blocks[layer - 1]


def _final_linear(model: Any) -> torch.nn.Linear:
    labels = model.config.num_labels
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == labels]
    if not linears:
        reject("model", type(model).__name__, "a classifier that ends in a linear layer with num_labels outputs")
    return linears[-1]
