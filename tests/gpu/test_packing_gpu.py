"""Packed trees on a GPU: FlexAttention and scaled_dot_product_attention against rows of single texts."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import transformers

from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.encoding.packing import PrefixTree
from rmcore.model.encoding.tree_attention import _compiled, block_mask_of
from rmcore.model.text import EncodedText, Segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPE = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1}


class Ids:
    """A tokenizer for texts that are token ids already."""

    pad_token_id = 0
    eos_token_id = None
    chat_template = None

    def __call__(self, _text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1]}


def make(dtype: torch.dtype, packing: Any, tokens_per_batch: int = 8192) -> Backbone:
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(**SHAPE, attn_implementation="sdpa")).to("cuda", dtype)
    config = BackboneConfig(pooling="mean")
    return Backbone(model.eval(), Ids(), config, packing=packing, tokens_per_batch=tokens_per_batch)


def groups(seed: int, sizes: tuple[int, ...], longest: int) -> list[EncodedText]:
    rng = random.Random(seed)

    def drawn() -> tuple[int, ...]:
        return tuple(rng.randrange(1, 1000) for _ in range(rng.randrange(20, longest)))

    texts = []
    for k in sizes:
        x, ys = Segment("prompt", drawn()), [drawn() for _ in range(k)]
        texts += [
            EncodedText((x, Segment("first", a), Segment("second", b)), 1) for a, b in itertools.permutations(ys, 2)
        ]
    return texts


def one_at_a_time(backbone: Backbone, texts: list[EncodedText]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([backbone._states.padded([text.ids])[0] for text in texts])


@pytest.mark.parametrize("packing", ["flex", "sdpa"])
def test_fp32_states_are_those_of_single_texts(packing):
    backbone = make(torch.float32, packing)
    for seed, sizes, longest in ((0, (4, 3), 100), (1, (6,), 300), (2, (2,), 40)):
        texts = groups(seed, sizes, longest)
        alone = one_at_a_time(backbone, texts)
        assert ((backbone.hidden(texts) - alone).norm(dim=1) / alone.norm(dim=1)).max() < 1e-3


@pytest.mark.parametrize("packing", ["flex", "sdpa"])
def test_bf16_is_within_twice_the_error_of_two_plain_runs(packing):
    texts = groups(3, (5, 4), 200)
    padded = make(torch.bfloat16, "padded")
    alone, batched = one_at_a_time(padded, texts), padded.hidden(texts)
    exact = make(torch.float32, "padded")
    exact.model.load_state_dict(padded.model.state_dict())
    truth = exact.hidden(texts)
    error = max(float((run - truth).norm()) for run in (alone, batched))
    tree = make(torch.bfloat16, packing).hidden(texts)
    assert float((tree - alone).norm()) <= 2 * error
    assert float((tree - truth).norm()) <= 1.2 * error


def test_auto_takes_flex_and_repeats_its_bits():
    backbone = make(torch.bfloat16, "auto")
    texts = groups(4, (6, 3), 150)
    assert backbone.explain().backend == "flex"
    assert torch.equal(backbone.hidden(texts), backbone.hidden(texts))
    assert backbone.stats.packed_tokens > 0


def test_packs_of_many_lengths_share_a_kernel():
    attend = _compiled()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(12):
        (pack,) = PrefixTree([t.ids for t in groups(seed, (3, 2), 60 + 20 * seed)]).packs(10**6)
        q, k, v = (torch.randn(1, 4, len(pack), 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        attend(q, k, v, block_mask=block_mask_of(pack, q.device), scale=0.125)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_peak_memory_is_the_padded_paths_or_less():
    texts = groups(5, (8,), 400)
    peaks = {}
    for packing in ("padded", "flex", "sdpa"):
        backbone = make(torch.bfloat16, packing)
        backbone.hidden(texts)
        torch.cuda.reset_peak_memory_stats()
        backbone.hidden(texts)
        peaks[packing] = torch.cuda.max_memory_allocated()
        del backbone
    assert peaks["flex"] <= 1.05 * peaks["padded"]
    assert peaks["sdpa"] <= 1.05 * peaks["padded"]
