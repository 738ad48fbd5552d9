"""The tiny model of the server's benchmarks and tests: words for good, bad and neither, and a head that tells them
apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rmcore.model import Preference, RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

__all__ = ["BLAME", "NEUTRAL", "PRAISE", "TinySize", "liking_praise", "tiny_encoder", "tiny_model", "word_tokenizer"]

PRAISE = ["good", "clear", "right", "exact", "helpful", "kind"]
BLAME = ["bad", "vague", "wrong", "rude", "lazy", "odd"]
NEUTRAL = ["red", "blue", "green", "tree", "house", "river", "stone", "cloud"]
_CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}[EOS]\n{% endfor %}"


@dataclass(frozen=True)
class TinySize:
    """How large: of the encoder, of the pairs it is fitted to (neutral words in each response), of its head."""

    hidden: int = 64
    layers: int = 4
    heads: int = 4
    positions: int = 128
    pairs: int = 100
    filler: int = 3
    features: int = 128


def word_tokenizer(words: Sequence[str], special: Sequence[str] = ("[PAD]", "[UNK]", "[EOS]"), **named: Any) -> Any:
    """A token a word; unknown ones are all the same to it. ``named`` as of ``PreTrainedTokenizerFast``."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: k for k, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - no secret
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **named})


def tiny_encoder(seed: int, vocabulary: int, size: TinySize) -> Any:
    """A random encoder."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=2 * size.hidden,
        max_position_embeddings=size.positions,
        pad_token_id=0,
    )
    return transformers.BertModel(config).eval()


def liking_praise(backbone: Backbone, seed: int, size: TinySize, neutral: Sequence[str] = NEUTRAL) -> RewardModel:
    """Difference mode: a head that likes praise, fitted on the backbone's states."""
    rng = random.Random(seed)
    items = [
        Preference(
            " ".join(rng.sample(neutral, 3)),
            " ".join([*rng.sample(PRAISE, 3), *rng.sample(neutral, size.filler)]),
            " ".join([*rng.sample(BLAME, 3), *rng.sample(neutral, size.filler)]),
        )
        for _ in range(size.pairs)
    ]
    return RewardModel.fit(backbone, items, mode="difference", num_features=size.features, kernel_scale=3.0)[0]


def tiny_model(seed: int, *, chat: bool = False) -> RewardModel:
    """A random encoder with a head that likes praise. Its tokenizer has a chat template on request."""
    size = TinySize()
    tokenizer = word_tokenizer([*PRAISE, *BLAME, *NEUTRAL])
    tokenizer.chat_template = _CHAT if chat else None
    encoder = tiny_encoder(seed, len(tokenizer), size)
    backbone = Backbone(encoder, tokenizer, BackboneConfig(pooling="mean", max_length=size.positions))
    return liking_praise(backbone, seed, size)
