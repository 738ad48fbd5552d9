"""InternLM2's tensors as Llama's: the same transformer with other names, and q, k and v in one matrix.

``wqkv`` holds, for each key-value head, the query heads that share it, then its key and its value.
"""

from __future__ import annotations

import re

from torch import Tensor

from rmcore._base.errors import CheckpointError
from rmcore.model.families.tensors import TensorFiles

__all__ = ["as_llama"]

_NAMES = (
    (r"^tok_embeddings\.", "embed_tokens."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
)


def as_llama(files: TensorFiles, heads: int, key_value_heads: int) -> dict[str, Tensor]:
    """The body's tensors (those under ``model.``) by the names that ``LlamaModel`` has for them.

    Raises CheckpointError where ``wqkv`` does not divide into the heads of the configuration.
    """
    body: dict[str, Tensor] = {}
    for name in files.names:
        if not name.startswith("model."):
            continue
        tensor, own = files.read(name), name.removeprefix("model.")
        if ".attention.wqkv." not in own:
            for pattern, target in _NAMES:
                own = re.sub(pattern, target, own)
            body[own] = tensor
            continue
        shared = heads // key_value_heads
        if tensor.shape[0] % (key_value_heads * (shared + 2)):
            raise CheckpointError(f"{files.source}: {name}: got {tensor.shape[0]} rows for {heads} heads")
        parts = tensor.view(key_value_heads, shared + 2, -1, *tensor.shape[1:])
        for part, rows in (("q", parts[:, :shared]), ("k", parts[:, shared]), ("v", parts[:, shared + 1])):
            target = own.replace(".attention.wqkv.", f".self_attn.{part}_proj.")
            body[target] = rows.reshape(-1, *tensor.shape[1:]).contiguous()
    return body
