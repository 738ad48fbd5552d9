"""Models of a hub that is this machine."""

from __future__ import annotations

import pytest
import torch

from rmcore import Backbone, RewardEngine, RewardModel
from rmcore.integrations.training.prepare import with_adapters

__all__ = ["PROMPTS", "RESPONSES", "TOKEN", "load", "scores", "with_lora"]


PROMPTS, RESPONSES = ["red tree"], [["good clear house", "bad vague river", "blue"]]
TOKEN = "hf_" + "made" * 4


def scores(model: RewardModel) -> torch.Tensor:
    return RewardEngine(model).score(PROMPTS, RESPONSES)[0].preference


def load(name: str, **options: object) -> RewardModel:
    return RewardModel.from_pretrained(name, device="cpu", **options)  # type: ignore[arg-type]


def with_lora(name: str) -> Backbone:
    """A backbone with an adapter that changes something."""
    peft = pytest.importorskip("peft")
    backbone = Backbone.from_pretrained(name, device="cpu", pooling="mean")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    backbone.model = with_adapters(backbone, lora)
    backbone.model.eval()
    return backbone
