"""Which models and texts may share prefixes, and what an encoder chooses."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import shutil
import threading
from typing import Any

import pytest
import torch
import transformers as t
from support.trees import COMMON, Ids, groups, make, one_at_a_time, relative, text

from rmcore._base.errors import BackendError, InputError
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.encoding import sharing, tree_attention
from rmcore.model.encoding.architecture import longest_exact, unfit
from rmcore.model.encoding.packing import PrefixTree
from rmcore.model.encoding.tree_attention import TreeAttentionError, attending, explain

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
