"""Texts and states for tests of backbones."""

from __future__ import annotations

import torch

from rmcore.model.backbone import Backbone
from rmcore.model.text import EncodedText

__all__ = ["TEXTS", "close", "encode"]


TEXTS = [
    ("the quick brown fox", "jumps over the lazy dog"),
    ("a", "b"),
    ("what is the capital of France?", "Paris is the capital of France. " * 4),
    ("numbers", "0 1 2 3 4 5 6 7 8 9"),
    ("", "good"),
]


def encode(backbone: Backbone, pairs=TEXTS) -> list[EncodedText]:
    return [backbone.encoder.encode(prompt, response) for prompt, response in pairs]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
