"""Models of no family whose own code is run: their scores must be what rmcore reads, or they are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError

__all__ = ["check_own_scores"]

_SAMPLES = (("What is the capital of France?", "Paris."), ("Tell me about dogs.", "They bark, and some of them swim."))


@torch.inference_mode()
def check_own_scores(backbone: Any) -> None:
    """Hold the score that the last linear layer gives against the model's own output, on two texts.

    Raises CheckpointError where they differ: something stands behind that layer, a gate or a normaliser say.
    """
    texts = [backbone.encoder.encode(prompt, response) for prompt, response in _SAMPLES]
    weight, bias = backbone.scalar_head()
    ours = (backbone.hidden(texts) @ weight + bias).cpu()
    theirs = torch.stack([_own(backbone, text.ids) for text in texts]).cpu()
    allowed = 1e-4 if backbone.model.dtype in (torch.float32, torch.float64) else 0.05
    if not bool(((ours - theirs).abs() <= allowed * theirs.abs().clamp_min(1)).all()):
        raise CheckpointError(
            f"backbone: got a model whose own code says {[round(x, 4) for x in theirs.tolist()]} where its last linear "
            f"layer gives {[round(x, 4) for x in ours.tolist()]}, expected a score that comes of that layer"
        )


def _own(backbone: Any, ids: tuple[int, ...]) -> Tensor:
    input_ids = torch.tensor([ids], device=backbone.device)
    output = backbone.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    found = next((getattr(output, name) for name in ("logits", "score", "scores") if hasattr(output, name)), None)
    found = output[0] if found is None else found
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise CheckpointError(
            "backbone: got a model whose own code gives a text more than one number, expected a score"
        )
    return found.float().flatten()[0]
