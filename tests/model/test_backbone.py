"""Pooled hidden states against one text at a time through transformers; batching that changes nothing but speed."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from support.backbones import TEXTS, close, encode
from support.models import own_inputs

from rmcore._base.errors import InputError
from rmcore.model.backbone import Backbone
from rmcore.model.encoding_stats import EncodingStats, length_batches
from rmcore.model.text import EncodedText, Segment

BASES = ["bert", "llama", "qwen2", "qwen3", "roberta"]


def raw(*ids: int) -> EncodedText:
    return EncodedText((Segment("first", tuple(ids)),) if ids else (), len(ids))


def alone(backbone: Backbone, text: EncodedText, **kwargs):
    with torch.no_grad():
        return backbone.model(**own_inputs(backbone, text), **kwargs)


# -- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_pooled_states_equal_one_text_at_a_time(make_backbone, base, pooling):
    backbone = make_backbone(base, pooling=pooling)
    texts = encode(backbone)
    pick = {"last": lambda s: s[-1], "mean": lambda s: s.mean(0), "first": lambda s: s[0]}[pooling]
    expected = [pick(alone(backbone, text).last_hidden_state[0]) for text in texts]
    ours = backbone.hidden(texts)
    assert ours.dtype == torch.float32
    assert ours.shape == (len(texts), backbone.hidden_size)
    close(ours, torch.stack(expected))


def test_two_texts_in_berts_own_form(make_backbone):
    backbone = make_backbone("bert", pooling="mean", single_template="{prompt}[SEP]{first}")
    rows = backbone.hidden(encode(backbone))
    for row, (prompt, response) in zip(rows, TEXTS, strict=True):
        theirs = backbone.tokenizer(prompt, response, return_tensors="pt", return_token_type_ids=True)
        assert len(set(theirs["token_type_ids"][0].tolist())) == 2
        with torch.no_grad():
            close(row, backbone.model(**theirs).last_hidden_state[0].mean(0))


def test_a_response_cannot_forge_a_separator(make_backbone):
    backbone = make_backbone("bert", single_template="{prompt}[SEP]{first}")
    text = backbone.encoder.encode("a [SEP] b", "c [SEP] d")
    assert text.ids.count(backbone.tokenizer.sep_token_id) == 2


@pytest.mark.parametrize("base", ["bert", "llama", "qwen3"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_layer_equals_transformers_hidden_state(make_backbone, base, layer, pooling):
    backbone = make_backbone(base, pooling=pooling, layer=layer)
    texts = encode(backbone)
    states = [alone(backbone, text, output_hidden_states=True).hidden_states[layer][0] for text in texts]
    close(backbone.hidden(texts), torch.stack([s.mean(0) if pooling == "mean" else s[-1] for s in states]))


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_blocks_after_the_layer_do_not_run(make_backbone, base):
    backbone = make_backbone(base, pooling="mean", layer=2)
    blocks = backbone.model.encoder.layer if base == "bert" else backbone.model.layers
    calls = [0] * len(blocks)

    def count(k):
        def hook(*_):
            calls[k] += 1

        return hook

    for k, block in enumerate(blocks):
        block.register_forward_hook(count(k))
    backbone.hidden(encode(backbone))
    assert calls == [1, 1, 0]


def test_the_forward_hook_is_gone_afterwards(make_backbone):
    backbone = make_backbone("llama", pooling="mean", layer=1)
    backbone.hidden(encode(backbone))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())
    assert alone(backbone, encode(backbone)[0]).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("layer", [0, 4])
def test_a_layer_the_model_does_not_have(make_backbone, layer):
    with pytest.raises(InputError, match="layer"):
        make_backbone("llama", layer=layer)


def test_model_is_left_in_eval_and_no_graph_is_kept(make_backbone):
    backbone = make_backbone("bert", pooling="mean")
    hidden = backbone.hidden(encode(backbone))
    assert not backbone.model.training
    assert not hidden.requires_grad
    assert not hidden.is_inference()  # a trainer may use it in its own graph
    assert torch.equal(hidden, backbone.hidden(encode(backbone)))  # and no dropout


def test_pooled_states_keep_the_graph_for_finetuning(make_backbone):
    for kind in ("llama", "llama-classifier"):
        backbone = make_backbone(kind)
        ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        backbone.pooled_states(ids, mask).sum().backward()
        assert any(p.grad is not None for p in backbone.model.parameters())


# -- batching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["bert", "llama", "qwen3", "llama-classifier", "bert-classifier"])
def test_batch_composition_changes_nothing(make_backbone, base):
    pooling = {} if base.endswith("classifier") else {"pooling": "mean"}
    wide, narrow = make_backbone(base, **pooling), make_backbone(base, tokens_per_batch=1, **pooling)
    texts = encode(wide)
    close(wide.hidden(texts), narrow.hidden(texts))
    order = [3, 0, 4, 2, 1]
    close(wide.hidden([texts[k] for k in order]), wide.hidden(texts)[order])


def test_order_is_restored_after_sorting_by_length(make_backbone):
    backbone = make_backbone("llama", tokens_per_batch=64)
    pairs = [("x", "0 1 2 3 4 5 6 7 8 9"[: 1 + 2 * k] + " fox" * (k % 3)) for k in (7, 0, 3, 9, 1, 5, 2)]
    texts = encode(backbone, pairs)
    close(backbone.hidden(texts), torch.cat([backbone.hidden([text]) for text in texts]))


def test_equal_texts_are_encoded_once(make_backbone):
    backbone = make_backbone("bert", pooling="mean")
    texts = encode(backbone)
    hidden = backbone.hidden([*texts, *texts, texts[0]])
    assert torch.equal(hidden[:5], hidden[5:10])
    assert torch.equal(hidden[0], hidden[10])
    assert (backbone.stats.texts, backbone.stats.encoded) == (11, 5)
    assert backbone.stats.tokens == sum(map(len, texts))
    backbone.hidden(texts)
    assert (backbone.stats.texts, backbone.stats.encoded) == (16, 10)


def test_no_texts_at_all(make_backbone):
    backbone = make_backbone("llama", length_feature=1.0)
    assert backbone.hidden([]).shape == (0, 33)
    assert backbone.stats == EncodingStats()


def spy_on_batches(backbone: Backbone) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    backbone.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def mixed_lengths(seed: int, count: int = 200, longest: int = 120) -> list[EncodedText]:
    rng = random.Random(seed)
    return [raw(*(rng.randrange(5, 200) for _ in range(rng.randrange(1, longest)))) for _ in range(count)]


def test_token_budget_is_obeyed_and_padding_is_small(make_backbone):
    backbone = make_backbone("llama", tokens_per_batch=1024)
    shapes = spy_on_batches(backbone)
    backbone.hidden(mixed_lengths(0))
    assert all(rows * length <= 1024 for rows, length in shapes)
    assert backbone.stats.padded_tokens == sum(rows * length for rows, length in shapes)
    # Random batches of these lengths would pad to twice the tokens.
    assert backbone.stats.tokens <= backbone.stats.padded_tokens <= 1.1 * backbone.stats.tokens


def test_one_text_larger_than_the_budget_still_runs(make_backbone):
    backbone = make_backbone("llama", tokens_per_batch=10)
    shapes = spy_on_batches(backbone)
    backbone.hidden([raw(*range(5, 55)), raw(5, 6), raw(7, 8), raw(9), raw(10, 11, 12, 13, 14)])
    assert shapes == [(1, 50), (2, 5), (2, 2)]


def test_length_batches_by_hand():
    assert list(length_batches([3, 9, 1, 9, 4], 18)) == [[1, 3], [4, 0, 2]]
    assert list(length_batches([3, 9, 1, 9, 4], 1)) == [[1], [3], [4], [0], [2]]
    assert list(length_batches([], 8)) == []


def test_progress_counts_tokens_to_the_last(make_backbone):
    backbone = make_backbone("llama", tokens_per_batch=300)
    seen: list[tuple[int, int]] = []
    backbone.hidden(mixed_lengths(1, 40), progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
    assert seen[-1] == (backbone.stats.tokens, backbone.stats.tokens)


def test_bit_identical_from_call_to_call(make_backbone):
    backbone = make_backbone("qwen3", tokens_per_batch=256)
    texts = mixed_lengths(2, 50)
    assert torch.equal(backbone.hidden(texts), backbone.hidden(texts))


@pytest.mark.parametrize("kind", ["llama", "llama-classifier"])
def test_two_threads_at_once(make_backbone, kind):
    layer = {} if kind.endswith("classifier") else {"pooling": "mean", "layer": 2}
    backbone = make_backbone(kind, tokens_per_batch=64, **layer)
    batches = [mixed_lengths(seed, 20, 30) for seed in range(4)]
    expected = [backbone.hidden(batch) for batch in batches]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(5):
            if not torch.equal(backbone.hidden(batches[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-classifier", "bert-classifier", "roberta-classifier"])
def test_weight_times_state_plus_bias_is_the_models_own_score(make_backbone, kind):
    backbone = make_backbone(kind)
    texts = encode(backbone)
    weight, bias = backbone.scalar_head()
    ours = backbone.hidden(texts) @ weight + bias
    theirs = torch.stack([alone(backbone, text).logits[0, 0] for text in texts])
    assert theirs.std() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_text_that_ends_in_the_padding_token_scores_as_in_transformers(make_backbone):
    """Where eos doubles as padding, transformers reads the last token that is *not* it."""
    backbone = make_backbone("llama-classifier")
    pad = backbone.tokenizer.pad_token_id
    texts = [raw(5, 6, 7, pad), raw(8, 9, pad, pad), raw(5, 6, 7), raw(pad, 5)]
    weight, bias = backbone.scalar_head()
    theirs = torch.stack([alone(backbone, text).logits[0, 0] for text in texts])
    torch.testing.assert_close(backbone.hidden(texts) @ weight + bias, theirs, rtol=1e-5, atol=1e-5)


def test_a_classifier_without_a_padding_token_is_still_batched(make_backbone):
    backbone = make_backbone("llama-classifier", model={"pad_token_id": None})
    shapes = spy_on_batches(backbone)
    texts = encode(backbone)
    weight, bias = backbone.scalar_head()
    ours = backbone.hidden(texts) @ weight + bias
    assert len(shapes) == 1
    theirs = torch.stack([alone(backbone, text).logits[0, 0] for text in texts])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_scalar_head_wants_one_label(make_backbone):
    with pytest.raises(InputError, match="3 labels"):
        make_backbone("bert-classifier", model={"num_labels": 3}).scalar_head()
    with pytest.raises(InputError, match="classifier"):
        make_backbone("bert").scalar_head()


# -- length ----------------------------------------------------------------------------------------------------------


def test_length_feature_is_the_last_column(make_backbone):
    plain, more = make_backbone("bert", pooling="mean"), make_backbone("bert", pooling="mean", length_feature=0.5)
    texts = encode(more)
    hidden = more.hidden(texts)
    assert hidden.shape[1] == more.hidden_size == plain.hidden_size + 1
    assert torch.equal(hidden[:, :-1], plain.hidden(texts))
    counts = torch.tensor([t.content_tokens for t in texts], dtype=torch.float32)
    close(hidden[:, -1], 0.5 * (torch.log1p(counts) - 5))


def test_length_feature_counts_what_was_cut(make_backbone):
    backbone = make_backbone("llama", length_feature=1.0, max_length=20, overlong="truncate-right")
    text = backbone.encoder.encode("the fox", "good " * 50)
    assert text.cut_tokens > 0
    close(backbone.hidden([text])[:, -1], torch.log1p(torch.tensor([float(text.content_tokens)])) - 5)
    assert (backbone.stats.truncated_texts, backbone.stats.cut_tokens) == (1, text.cut_tokens)


def test_equal_tokens_of_different_length_before_the_cut(make_backbone):
    backbone = make_backbone("llama", length_feature=1.0, max_length=20, overlong="truncate-right")
    texts = [backbone.encoder.encode("the fox", "good " * k) for k in (50, 60)]
    assert texts[0].ids == texts[1].ids
    hidden = backbone.hidden(texts)
    assert backbone.stats.encoded == 1
    assert torch.equal(hidden[0, :-1], hidden[1, :-1])
    assert hidden[0, -1] < hidden[1, -1]


def test_truncation_is_logged(make_backbone, caplog):
    backbone = make_backbone("llama", max_length=20, overlong="truncate-prompt-left")
    backbone.hidden([backbone.encoder.encode("the fox " * 20, "good"), backbone.encoder.encode("a", "b")])
    assert "1 of 2 texts" in caplog.text
    assert "truncate-prompt-left" in caplog.text


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["bert", "llama", "roberta"])
def test_the_models_positions_are_the_limit_and_all_of_them_work(make_backbone, base):
    backbone = make_backbone(base, model={"max_position_embeddings": 32}, overlong="truncate-right")
    # RoBERTa's positions start behind its padding index, so it has two fewer than its config says.
    assert backbone.encoder.max_length == (30 if base == "roberta" else 32)
    text = backbone.encoder.encode("the fox " * 30, "good")
    assert len(text) == backbone.encoder.max_length
    assert backbone.hidden([text]).isfinite().all()


def test_asking_for_more_positions_than_there_are(make_backbone):
    with pytest.raises(InputError, match="256 positions"):
        make_backbone("llama", max_length=257)
    assert make_backbone("llama", max_length=256).encoder.max_length == 256


@pytest.mark.parametrize("others", [(), (raw(5, 6, 7),)], ids=["alone", "among others"])
@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_a_text_without_tokens(make_backbone, pooling, others):
    backbone = make_backbone("llama", pooling=pooling)
    with pytest.raises(InputError, match="no tokens"):
        backbone.hidden([*others, raw()])
