"""A backbone's weights and tokenizer in a folder, from which the same configuration loads them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore.model.families.load import Loaded
from rmcore.model.families.tensors import EMBEDDED_HEAD, LANGUAGE_HEAD
from rmcore.model.remote import RemoteModel

__all__ = ["save_backbone"]


def save_backbone(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    published: Loaded | None,
    language_head: Mapping[str, Tensor] | None,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """Write into a new folder.

    Args:
        folder: where to.
        model: the Hugging Face model; of one with PEFT adapters those alone are written.
        tokenizer: its tokenizer.
        published: what else belongs to a published reward model.
        language_head: the language model's output weights, where they are kept.
        state_dict: the weights, where they are gathered from several processes.

    Raises InputError for a server's body and for quantised weights, which are where they came from; CheckpointError
    where transformers refuses, as it does for adapters beside an old peft.
    """
    from safetensors.torch import save_file

    if isinstance(model, RemoteModel):
        reject("backbone", "'embed' for hidden states from a server", "'name', and the server again when it loads")
    if getattr(model, "is_quantized", False) and not hasattr(model, "peft_config"):
        reject("backbone", "'embed' for quantised weights", "'name', which loads them from where they are")
    try:
        model.save_pretrained(folder, **({} if state_dict is None else {"state_dict": dict(state_dict)}))
    except ValueError as error:  # of adapters, where peft is older than transformers wants it for saving
        raise CheckpointError(f"backbone: got weights that transformers cannot save ({error})") from error
    tokenizer.save_pretrained(folder)
    if language_head is not None and published is None:
        kept = {f"lm_head.{name}": tensor.contiguous() for name, tensor in language_head.items()}
        save_file(kept, folder / LANGUAGE_HEAD)
    if published is not None:
        head = {name: tensor.contiguous() for name, tensor in published.head_tensors().items()}
        save_file(head, folder / EMBEDDED_HEAD)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = {**published.head_keys, **config}  # transformers leaves some out: temperature, say
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
