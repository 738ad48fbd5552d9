"""The tokens of a long text's pieces are those of the text, for every tokenizer that is cut at all."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.chat_templates import CHAT_MODELS
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from rmcore.model.encoding import pieces
from rmcore.model.encoding.pieces import pieces_of, splits_at_spaces
from rmcore.model.text import TextEncoder, TextLimit

LETTERS = [chr(code) for code in range(65, 123) if chr(code).isalpha()]
PARTS = [
    "a b",
    " a",
    "a ",
    "A b\n",
    "b  a",
    "it's a",
    " \n",
    "12 a",
    "a 1",
    "é b",
    "中 文",
    "中文",
    "▁",
    "a▁b",
    " ",
    "\n",
]
MARKS = ["a\u0301 b", "<|im_end|>", "</s>", "<s> a", "\ufb01 a", "[MASK] a", ".", "ß a", "\u200b", "🦊 x y"]
texts = st.lists(st.sampled_from(PARTS + MARKS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)).map(
    "".join
)


def bpe(words: list[str], *, space: str = "▁", **how: Any) -> Tokenizer:
    merges = list(dict.fromkeys((word[:k], word[k]) for word in words for k in range(1, len(word))))
    tokens = dict.fromkeys(["<unk>", *LETTERS, space, "\n", ".", *(a + b for a, b in merges)])
    return Tokenizer(models.BPE({t: k for k, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, **how))


def unigram() -> Tokenizer:
    scored = [("<unk>", 0.0), ("▁", -3.0), *((letter, -4.0) for letter in LETTERS), ("▁a", -3.5), ("ab", -5.0)]
    return Tokenizer(models.Unigram(scored, unk_id=0))


def made(model: Tokenizer, before: Any = None, normal: Any = None, after: Any = None, tokens: Any = ()) -> Any:
    if before is not None:
        model.pre_tokenizer = before
    if normal is not None:
        model.normalizer = normal
    if after is not None:
        model.post_processor = after
    model.add_tokens(list(tokens))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model)


def byte_level(**how: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | how)


META, REPLACE = functools.partial(pre_tokenizers.Metaspace, replacement="▁"), normalizers.Replace(" ", "▁")
BYTES = ["ab", "aĠb", "Ġa", "Ġab"]
CUT = {
    "words": lambda: made(bpe(["ab"]), pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), META()])),
    "bert": lambda: made(bpe(["ab"]), pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
    "unigram": lambda: made(unigram(), META(), normalizers.Sequence([normalizers.NFKC()])),
    "gpt2": lambda: made(bpe(BYTES, space="Ġ"), byte_level(), after=processors.ByteLevel(trim_offsets=False)),
    "roberta": lambda: made(
        bpe(BYTES, space="Ġ"),
        byte_level(add_prefix_space=True),
        after=processors.RobertaProcessing(("<unk>", 0), ("<unk>", 0), add_prefix_space=False),
    ),
    "merges of one text": lambda: made(bpe(["ab", "▁a", "▁▁", "ab."]), normal=REPLACE),
    "words kept whole": lambda: made(bpe(["ab", "▁ab"]), META(prepend_scheme="first", split=False)),
    "spaces as tokens": lambda: made(bpe(["ab"]), normal=REPLACE, tokens=["  ", AddedToken("\n\n"), AddedToken("<x>")]),
}
WHOLE = {
    "a merge over a space": lambda: made(bpe(["a▁b"]), normal=REPLACE),
    "a word that is a token": lambda: made(bpe(["ab"], ignore_merges=True), normal=REPLACE),
    "dropout": lambda: made(bpe(["ab"], dropout=0.5), normal=REPLACE),
    "a space before each text": lambda: made(
        bpe(["ab"]), normal=normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])
    ),
    "spaces taken off": lambda: made(bpe(["ab"]), META(), normalizers.Strip()),
    "an unknown pattern": lambda: made(bpe(BYTES, space="Ġ"), pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")),
    "one of several unknown": lambda: made(
        bpe(BYTES, space="Ġ"), pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{L}+ \p{L}+"), "isolated")
    ),
    "letters by script": lambda: made(unigram(), pre_tokenizers.UnicodeScripts()),
    "a token of two words": lambda: made(bpe(BYTES, space="Ġ"), byte_level(), tokens=["a b"]),
    "a token that takes in spaces": lambda: made(
        bpe(BYTES, space="Ġ"), byte_level(), tokens=[AddedToken("ab", rstrip=True)]
    ),
    "a token for words alone": lambda: made(
        bpe(BYTES, space="Ġ"), byte_level(), tokens=[AddedToken("ab", single_word=True)]
    ),
    "offsets by a text's beginning": lambda: made(
        bpe(BYTES, space="Ġ"), byte_level(add_prefix_space=True), after=processors.ByteLevel(trim_offsets=True)
    ),
}


@pytest.fixture(scope="module")
def tokenizers_cut() -> dict[str, Any]:
    found = {name: make() for name, make in {**CHAT_MODELS, **CUT}.items()}
    return {name: tokenizer for name, tokenizer in found.items() if splits_at_spaces(tokenizer)}


def test_which_are_cut(tokenizers_cut):
    # Llama 2's old form puts a space before every text that it is given.
    assert tokenizers_cut.keys() == {*CHAT_MODELS, *CUT} - {"llama2", "phi3", "zephyr"}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_cut(name):
    assert not splits_at_spaces(WHOLE[name]())


def test_of_what_cannot_be_looked_into_nothing_is_known():
    tokenizer = bpe(["ab"])
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    added: dict[int, Any] = {}
    in_python = SimpleNamespace(is_fast=True, backend_tokenizer=tokenizer, added_tokens_decoder=added)
    assert not splits_at_spaces(in_python)
    assert not splits_at_spaces(object())


@given(text=texts)
@settings(max_examples=60, deadline=None)
@example(text="a b a b it's a b c")
@example(text="a  b c d\n\n e f")
@example(text="<s> a b</s> a b <s>a b")
@example(text=" a b \u0301c d")
def test_tokens_are_those_of_the_whole(tokenizers_cut, text):
    cuts = [k for k in range(1, len(text)) if pieces._PLACE.match(text, k)]
    for name, tokenizer in tokenizers_cut.items():
        for special in (False, True):
            how = {"add_special_tokens": False, "return_offsets_mapping": True, "split_special_tokens": special}
            whole = tokenizer(text, **how)
            found: list[tuple[int, tuple[int, int]]] = []
            for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
                part = tokenizer(text[start:end], **how)
                moved = [(a + start, b + start) for a, b in part["offset_mapping"]]
                found += zip(part["input_ids"], moved, strict=True)
            assert found == list(zip(whole["input_ids"], whole["offset_mapping"], strict=True)), name


@given(text=texts, size=st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_pieces_are_the_text(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LARGE", size)
        patch.setattr(pieces, "PIECE", size)
        found = list(pieces_of(text, True))
    assert "".join(piece for _, piece in found) == text
    assert all(text[start:].startswith(piece) for start, piece in found)
    assert all(pieces._PLACE.match(text, start) for start, _ in found[1:])
    assert list(pieces_of(text, False)) == [(0, text)]


@pytest.mark.parametrize("family", ["qwen3", "gemma", "mistral", "llama2"])
def test_a_text_is_encoded_the_same_in_pieces(family, monkeypatch):
    prompt = [{"role": "user", "content": "it's a b <|im_end|> c d\ud83d e f \u4e2d g h " * 5}]
    limits = [TextLimit(None), *(TextLimit(40, policy) for policy in ("truncate-right", "truncate-longest"))]
    tokenizer = CHAT_MODELS[family]()

    def encoded() -> list[Any]:
        encoder = TextEncoder(tokenizer)
        plain = TextEncoder(tokenizer, chat="never")
        return [one.encode(prompt, "x y z w v " * 9, limit=limit) for limit in limits for one in (encoder, plain)]

    whole = encoded()
    seen: list[str] = []
    monkeypatch.setattr(pieces, "LARGE", 8)
    monkeypatch.setattr(pieces, "PIECE", 8)
    real = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **how: seen.append(text) or real(self, text, **how)
    )
    assert encoded() == whole
    assert (max(map(len, seen)) < 60) == (family != "llama2")
