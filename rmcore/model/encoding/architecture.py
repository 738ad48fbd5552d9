"""What has to be known of a Hugging Face model: its parts and limits, and whether texts may share prefixes in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from rmcore._base.errors import reject

__all__ = [
    "block",
    "embedding_rows",
    "final_linear",
    "longest_exact",
    "pair_separator",
    "position_limit",
    "sees_the_past_alone",
    "takes_two_texts",
    "text_config",
    "unfit",
]


def text_config(model: Any) -> Any:
    """The configuration of the model's decoder over text."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def sees_the_past_alone(model: Any) -> bool:
    """Whether each token's attention goes to itself and to those before it: a decoder."""
    config = text_config(model)
    causal = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    closed = getattr(config, "is_causal", None) is False or getattr(config, "use_bidirectional_attention", None)
    return bool(causal) and all(causal) and not closed


def unfit(model: Any) -> str | None:
    """Why a token's state does not depend on the tokens before it and on its own position alone; None if it does.

    Judged by configuration and structure. A model that passes may still surprise, so
    :class:`rmcore.model.encoding.sharing.PrefixSharing` tries before it relies on the answer.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if getattr(config, "alibi", False):
        return "ALiBi: its attention takes distances in the row, not positions"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of kind {', '.join(sorted(kinds))}, which see more or less than the tokens before"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids"
    if not sees_the_past_alone(model):
        return "attention that is not causal (an encoder)"
    dynamic = _rope_types(config) & {"dynamic", "longrope"}
    if dynamic:
        return f"{min(dynamic)} rotary embeddings, which depend on the longest text of a batch"
    return None


def longest_exact(model: Any) -> int | None:
    """Tokens of the longest text that no sliding window cuts; None for no limit."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return None
    return int(window)


def _rope_types(config: Any) -> set[str]:
    found: set[str] = set()
    for name in ("rope_parameters", "rope_scaling"):
        values = getattr(config, name, None)
        # One set of parameters, or one a kind of layer.
        for entry in [values, *(values.values() if isinstance(values, dict) else ())]:
            if isinstance(entry, dict):
                found.add(str(entry.get("rope_type", entry.get("type", "default"))))
    return found


def pair_separator(model: Any, tokenizer: Any) -> int | None:
    """The token behind which a model of BERT's kind expects token type 1; None for a model without token types."""
    types = getattr(text_config(model), "type_vocab_size", None) or 0
    if types < 2 or "token_type_ids" not in inspect.signature(model.forward).parameters:
        return None
    separator: int | None = getattr(tokenizer, "sep_token_id", None)
    two = tokenizer("a", "b", return_token_type_ids=True)
    if two["input_ids"].count(separator) > 1 and not any(two["token_type_ids"]):
        return None  # this one gives two texts one type
    return separator


def takes_two_texts(model: Any, tokenizer: Any) -> bool:
    """Whether a model is an encoder whose tokenizer puts a separator between two texts."""
    separator = getattr(tokenizer, "sep_token_id", None)
    causal = any(getattr(module, "is_causal", None) is True for module in model.modules())
    if separator is None or causal or getattr(model.config, "is_encoder_decoder", False):
        return False
    two: list[int] = tokenizer("a", "b")["input_ids"]
    return two.count(separator) > tokenizer("a")["input_ids"].count(separator)


def embedding_rows(model: Any) -> int | None:
    """How many token ids a model has states for; None if it does not say."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return None if rows is None else int(rows)


def position_limit(model: Any) -> int | None:
    """The longest input in tokens, None where the architecture sets no limit."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin number positions from behind the padding index, so those before it are lost.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(limit) - int(module.padding_idx) - 1
    return int(limit)


def block(model: Any, layer: int) -> torch.nn.Module:
    """The module whose output is hidden state ``layer``: the transformer's block list is the one of its own length."""
    count = text_config(model).num_hidden_layers
    lists: Iterable[torch.nn.ModuleList] = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    blocks = next((m for m in lists if len(m) == count), None)
    if blocks is None or layer > count:
        reject("layer", layer, f"between 1 and {count} of a model whose blocks are a list")
    return blocks[layer - 1]


def final_linear(model: Any, outputs: int | None = None) -> torch.nn.Linear:
    """A classifier's last linear layer: the one whose outputs are its labels, or as many as ``outputs``."""
    labels = outputs or model.config.num_labels
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == labels]
    if not linears:
        reject("model", type(model).__name__, "a classifier that ends in a linear layer with num_labels outputs")
    return linears[-1]
