"""A tiny encoder on disk and preferences that it can learn, for the command line and the data readers.

transformers is imported by the fixtures: every process of a run reads this file, and few make a model.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedTokenizerFast

PRAISE = ["good", "clear", "right", "exact", "helpful", "kind"]
BLAME = ["bad", "vague", "wrong", "rude", "lazy", "odd"]
NEUTRAL = ["red", "blue", "green", "tree", "house", "river"]


def _tokenizer() -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [" ".join(PRAISE + BLAME + NEUTRAL)], trainers.WordLevelTrainer(special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _config() -> BertConfig:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=1,
    )


@pytest.fixture(scope="session")
def backbone_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(_config()).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("reward model")
    torch.manual_seed(1)
    BertForSequenceClassification(_config()).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where transformers keeps copies of code that comes with a model, for one test alone.

    It puts the folder at the end of ``sys.path``, and what the copies import of each other is looked for along that
    path: a folder of an earlier test's that is still there would be asked first.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    others = [place for place in sys.path if place and (Path(place) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in others])

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    yield tmp_path / "modules"
    forget()


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Chosen responses hold praise, rejected ones the contrary, among neutral words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        filler = rng.sample(NEUTRAL, 2)
        rows.append(
            {
                "prompt": " ".join(rng.sample(NEUTRAL, 3)),
                "chosen": " ".join([*rng.sample(PRAISE, 3), *filler]),
                "rejected": " ".join([*rng.sample(BLAME, 3), *filler]),
            }
        )
    return rows
