"""The tiny model of the server's benchmarks: words for good, bad and neither, and a head that tells them apart."""

from __future__ import annotations

import random

import torch

from rmcore.model import Preference, RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

__all__ = ["BLAME", "NEUTRAL", "PRAISE", "tiny_model"]

PRAISE = ["good", "clear", "right", "exact", "helpful", "kind"]
BLAME = ["bad", "vague", "wrong", "rude", "lazy", "odd"]
NEUTRAL = ["red", "blue", "green", "tree", "house", "river", "stone", "cloud"]
_CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}[EOS]\n{% endfor %}"


def tiny_model(seed: int, *, chat: bool = False) -> RewardModel:
    """A random encoder with a head that likes praise; unknown words are all the same to it. Its tokenizer has a chat
    template on request.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *PRAISE, *BLAME, *NEUTRAL])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - no secret
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        eos_token="[EOS]",  # noqa: S106
    )
    wrapped.chat_template = _CHAT if chat else None
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    encoder = transformers.BertModel(config).eval()
    backbone = Backbone(encoder, wrapped, BackboneConfig(pooling="mean", max_length=128))
    rng = random.Random(seed)
    items = [
        Preference(
            " ".join(rng.sample(NEUTRAL, 3)),
            " ".join([*rng.sample(PRAISE, 3), *rng.sample(NEUTRAL, 3)]),
            " ".join([*rng.sample(BLAME, 3), *rng.sample(NEUTRAL, 3)]),
        )
        for _ in range(100)
    ]
    model, _ = RewardModel.fit(backbone, items, mode="difference", num_features=128, kernel_scale=3.0)
    return model
