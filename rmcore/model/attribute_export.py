"""A model of HelpSteer2's attributes trained here, as a folder in URM's published layout: body, tokenizer and head."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rmcore._base.errors import reject
from rmcore.head.attributes.published import write_published
from rmcore.head.estimators import URM, URME
from rmcore.model.agreement import require_same_tokens
from rmcore.model.reward_model import RewardModel

__all__ = ["export_urm"]

_QUESTION = {"role": "user", "content": "What is the capital of France?"}


def export_urm(model: RewardModel, path: str | os.PathLike[str], *, member: int | None = None) -> None:
    """Write a model's URM head with its body in the published layout, which RewardModel.from_pretrained opens too.

    Args:
        model: with the estimator ``urm`` or ``urme``, over a Llama whose last token's state is pooled.
        path: a new or empty folder.
        member: which head of ``urme``, from 0; needed there, since the layout holds one.

    Raises:
        InputError: a model that the layout cannot hold, and why.
        CheckpointError: its texts become other tokens than the tokenizer's own chat template makes.
    """
    found = next((e for e in model.estimators.values() if isinstance(e, (URM, URME))), None)
    if found is None:
        reject("model", f"estimators {list(model.estimators)}", "one with 'urm' or 'urme': rmcore train --attributes")
    if len(found.heads) > 1 and (member is None or not 0 <= member < len(found.heads)):
        reject("member", member, f"0 to {len(found.heads) - 1}: the layout holds one head")
    config = model.backbone.config
    wanted = {"kind": "base", "pooling": "last", "layer": None, "length_feature": 0.0}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            reject("model", f"a backbone with {name}={getattr(config, name)!r}", f"{value!r}, as URM's")
    if not model.backbone.encoder.has_chat_template:
        reject("model", "a tokenizer without chat template", "one with: URM's texts are conversations")
    require_same_tokens(model.backbone.encoder, [([_QUESTION], "Paris.")])
    with tempfile.TemporaryDirectory() as base:
        model.backbone.save(Path(base) / "body")
        write_published(found.heads[member or 0], Path(base) / "body", path)
