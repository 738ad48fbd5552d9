"""share: the head's part of a whole scoring step, hidden states at hand and behind a backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from rmcore import ops

from .harness import left_out, time_calls
from .peers import PEERS, make_problem, ours
from .rows import (
    absent_row,
    random_rows,
)
from .setup import Row, Setup

__all__ = ["share"]


def share(setup: Setup) -> Iterator[Row]:
    """The head's part of a step that scores 64 pairs, for hidden states at hand and behind a backbone."""
    pairs, tokens = 64, 256 if setup.device.type == "cuda" else 32
    shape, hidden_size, run = _backbone(setup, pairs, tokens)
    h, d = hidden_size, setup.sizes[0][1]
    dtype = setup.dtypes[0]
    problem = make_problem(h, d, setup.device, dtype)
    weights = ours(problem)
    x = random_rows(pairs, h, setup.device, dtype)
    setup.note(f"share: {shape}")
    backbone = time_calls([run], setup.device, budget_s=setup.budget_s, min_samples=3)
    heads: list[tuple[str, Callable[[], object]]] = [("rmcore", partial(ops.score, x, weights))]
    for peer in PEERS:
        if not peer.compiled:
            kept = peer.weights(problem)
            heads.append((peer.name, partial(peer.run, x, *kept)))
    for name, call in heads:
        if why := left_out(call, setup.device):
            yield absent_row(name, dtype, why, h, d, pairs, "share")
            continue
        timing = time_calls([call], setup.device, budget_s=setup.budget_s / 2)
        part = timing.median / (timing.median + backbone.median)
        yield {
            "suite": "share",
            "variant": name,
            "h": h,
            "d": d,
            "rows": pairs,
            "tokens_per_pair": tokens,
            "backbone": shape,
            "backbone_s": backbone.median,
            "median_s": timing.median,
            "share_behind_backbone": part,
            "share_hidden_at_hand": 1.0,
        }


def _backbone(setup: Setup, pairs: int, tokens: int) -> tuple[str, int, Callable[[], object]]:
    from transformers import LlamaConfig, LlamaModel

    if setup.device.type == "cuda":
        name, dtype = "Llama-3.1-8B shape, random weights, bf16", torch.bfloat16
        shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        shape |= {"num_key_value_heads": 8}
    else:
        name, dtype = "SmolLM2-135M shape, random weights, fp32", torch.float32
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        shape |= {"num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=32000, **shape)
    with torch.device(setup.device):
        model = LlamaModel(config).to(dtype).eval()
    ids = torch.randint(0, 32000, (pairs, tokens), device=setup.device)

    def run() -> object:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).last_hidden_state

    return f"{name}, {pairs} × {tokens} tokens", int(shape["hidden_size"]), run
