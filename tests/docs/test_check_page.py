"""The reports of docs/check.md are those that ``rmcore check`` prints of the same models, but for rounding."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from support.chat_templates import CHAT_MODELS
from support.models import TOKENIZERS
from support.pages import ROOT
from typer.testing import CliRunner

from rmcore.cli import app


def padded(family: str) -> Any:
    """The family's tokenizer with a padding token, without which a model's own code takes no batches."""
    tokenizer = CHAT_MODELS[family]()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


COMMON = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96, "num_labels": 1}
DECODER = COMMON | {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": None, "eos_token_id": None}
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "Qwen 3 (think blocks, shared prefixes)": ("Qwen3", DECODER, CHAT_MODELS["qwen3"]),
    "Gemma 2 (trims texts, sliding window)": ("Gemma2", DECODER | {"sliding_window": 32}, lambda: padded("gemma")),
    "BERT (two texts with token types)": ("Bert", COMMON, TOKENIZERS["bert"]),
}
"""By the page's headings: transformers' class, what its configuration says, its tokenizer."""


def report(folder: Path, heading: str) -> str:
    """What the command prints of a random model."""
    kind, given, make = MODELS[heading]
    tokenizer = make()
    more = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**given, **more)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    for parameter in model.parameters():  # scores as far apart as a trained model's
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = CliRunner().invoke(app, ["check", str(folder), "--device", "cpu", "-o", str(folder / "report.md")])
    assert done.exit_code == 0, done.output
    return (folder / "report.md").read_text(encoding="utf-8")


def without_rounding(text: str) -> str:
    """``text`` with its differences as the word for what they are."""
    text = re.sub(r"\| (\d\.\de[-+]\d\d) \| \d+ \|", lambda m: f"| {'tiny' if float(m[1]) < 1e-4 else 'large'} |", text)
    return re.sub(r"up to [\d.]+; allowed are [\d.e+-]+", "up to x", text)


def test_the_pages_reports_are_the_commands(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    for heading in MODELS:
        _, _, rest = page.partition(f"### {heading}\n\n")
        shown = rest.partition("**PASS**")[0] + "**PASS**\n"
        printed = report(tmp_path / heading.split()[0], heading)
        assert without_rounding(shown) == without_rounding(printed), printed
