"""Models, texts and groups for tests of packed trees."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor

from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.text import EncodedText, Segment

__all__ = ["COMMON", "MODELS", "Ids", "groups", "make", "one_at_a_time", "relative", "text"]


COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # so that attention is far from uniform and a wrong mask far from right
}
MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: t.LlamaModel(t.LlamaConfig(**COMMON | k)),
    "llama3-rope": lambda **k: t.LlamaModel(
        t.LlamaConfig(
            **COMMON
            | {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            }
            | k
        )
    ),
    "qwen2": lambda **k: t.Qwen2Model(t.Qwen2Config(**COMMON | k)),
    "qwen3": lambda **k: t.Qwen3Model(t.Qwen3Config(**COMMON | k)),
    "mistral": lambda **k: t.MistralModel(t.MistralConfig(**COMMON | {"sliding_window": None} | k)),
    "mistral-window": lambda **k: t.MistralModel(t.MistralConfig(**COMMON | {"sliding_window": 512} | k)),
    "gemma": lambda **k: t.GemmaModel(t.GemmaConfig(**COMMON | k)),
    "gemma2": lambda **k: t.Gemma2Model(
        t.Gemma2Config(
            **COMMON | {"sliding_window": 512, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0} | k
        )
    ),
    "gemma3": lambda **k: t.Gemma3TextModel(
        t.Gemma3TextConfig(**COMMON | {"sliding_window": 512, "query_pre_attn_scalar": 8, "num_hidden_layers": 7} | k)
    ),
    "gpt2": lambda **k: t.GPT2Model(
        t.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, pad_token_id=0, **k)
    ),
    "mixtral": lambda **k: t.MixtralModel(t.MixtralConfig(**COMMON | {"num_local_experts": 4} | k)),
}


class Ids:
    """A tokenizer for texts that are token ids already."""

    pad_token_id = 0
    eos_token_id = None
    chat_template = None

    def __call__(self, _text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1]}


def make(kind: str, *, dtype: torch.dtype = torch.float32, tokens_per_batch: int = 8192, **config: Any) -> Backbone:
    torch.manual_seed(0)
    options = config.pop("model", {})
    packing = config.pop("packing", "auto")
    model = MODELS[kind](attn_implementation="eager" if kind == "gemma2" else "sdpa", **options)
    return Backbone(
        model.to(dtype).eval(), Ids(), BackboneConfig(**config), tokens_per_batch=tokens_per_batch, packing=packing
    )


def text(*parts: list[int]) -> EncodedText:
    return EncodedText(tuple(Segment("prompt", tuple(part)) for part in parts), 1)


def groups(seed: int, sizes: tuple[int, ...] = (4, 1, 3), longest: int = 60) -> list[EncodedText]:
    """Concat-mode texts of groups of mixed sizes and lengths, a single response's text among them."""
    rng = random.Random(seed)

    def drawn(low: int = 3) -> list[int]:
        return [rng.randrange(1, 300) for _ in range(rng.randrange(low, longest))]

    found = []
    for k in sizes:
        x, ys = drawn(20), [drawn() for _ in range(k)]
        found += [text(x, a, b) for a, b in itertools.permutations(ys, 2)] or [text(x, ys[0])]
    return found


def one_at_a_time(backbone: Backbone, texts: list[EncodedText]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([backbone._states.padded([text.ids])[0] for text in texts])


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())
