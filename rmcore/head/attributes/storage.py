"""Attribute heads in a folder of one's own: ``rmcore.json`` and one safetensors file for all of them. No pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, InputError, reject
from rmcore._base.files import atomic_folder, digest_file
from rmcore.head.attributes.head import AttributeConfig, AttributeHead
from rmcore.head.checkpoint import CONFIG_FILE, check_digest, read_config, write_config

__all__ = ["head_tensors", "heads_of", "load_attributes", "save_attributes"]

KIND = "attributes"
TENSOR_FILE = "attributes.safetensors"


def save_attributes(heads: Sequence[AttributeHead], path: str | os.PathLike[str]) -> None:
    """Write one head or an ensemble's. Raises InputError for none, or a folder that is somebody else's."""
    from safetensors.torch import save_file

    if not heads:
        reject("heads", "none", "at least one")
    tensors = head_tensors(heads)
    with atomic_folder(path, marker=CONFIG_FILE) as folder:
        save_file(tensors, folder / TENSOR_FILE)
        values = {"heads": [head.config.to_dict() for head in heads], "sha256": digest_file(folder / TENSOR_FILE)}
        write_config(folder, {"kind": KIND, KIND: values})


def head_tensors(heads: Sequence[AttributeHead]) -> dict[str, Tensor]:
    """All heads' tensors by the number of the head and their names, on the CPU."""
    return {
        f"{k}.{name}": tensor.detach().cpu().contiguous()
        for k, head in enumerate(heads)
        for name, tensor in head.state_dict().items()
    }


def heads_of(configs: Sequence[AttributeConfig], tensors: Mapping[str, Tensor]) -> tuple[AttributeHead, ...]:
    """The inverse of :func:`head_tensors`, for serving. Raises RuntimeError for tensors missing or of other shapes."""
    heads = tuple(AttributeHead(one) for one in configs)
    for k, head in enumerate(heads):
        own = f"{k}."
        head.load_state_dict({n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)})
        head.eval()
    return heads


def load_attributes(path: str | os.PathLike[str]) -> tuple[AttributeHead, ...]:
    """Read what :func:`save_attributes` wrote, on the CPU.

    Raises CheckpointError for a truncated, altered, foreign or newer file, or one whose parts do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, file = read_config(path), Path(path) / TENSOR_FILE
    values = config.get(KIND)
    if config.get("kind") != KIND or not isinstance(values, dict):
        raise CheckpointError(f"path: got {str(path)!r} of kind {config.get('kind')!r}, expected {KIND!r}")
    if not file.is_file() or digest_file(file) != values.get("sha256"):
        raise CheckpointError(f"{file}: missing, or its contents differ from the sha256 in {CONFIG_FILE}")
    try:
        tensors = load_file(file)
        configs = [AttributeConfig.from_dict(one) for one in values["heads"]]
        heads = heads_of(configs, tensors)
    except (SafetensorError, InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: got heads that do not fit together ({error})") from error
    stray = [
        name for name in tensors if not name.partition(".")[0].isdecimal() or int(name.partition(".")[0]) >= len(heads)
    ]
    if not heads or stray or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckpointError(f"{file}: got no heads, tensors of none ({stray[:3]}), or values that are not finite")
    check_digest(path, config)
    return heads
