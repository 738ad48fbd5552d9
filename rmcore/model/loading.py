"""Backbones from folders and from the hub, by transformers: which commit, which attention, no code and no pickles."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import Any

import torch

from rmcore._base.errors import CheckpointError, reject
from rmcore.model.backbone_config import BackboneConfig
from rmcore.model.encoding.tree_attention import Kind
from rmcore.model.hub import commit_of, folder_of, hub_failure

__all__ = ["choose_attention", "configured", "load", "tree_kinds"]


def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The attention implementation for a device and dtype, and why."""
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "flash-attn is not installed"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa", "flash-attn needs an NVIDIA GPU of compute capability 8.0 or later"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"flash-attn needs float16 or bfloat16, not {dtype}"
    return "flash_attention_2", "flash-attn is installed and usable"


_TREE_KINDS: dict[str, tuple[Kind, ...] | None] = {"auto": None, "sdpa": ("sdpa",), "flex_attention": ("flex",)}


def tree_kinds(attn_implementation: str) -> tuple[Kind, ...] | None:
    """Which attentions over packed trees go with an attention implementation that was asked for; None for any."""
    return _TREE_KINDS.get(attn_implementation, ())


def configured(config: BackboneConfig | str, fields_given: dict[str, Any]) -> BackboneConfig:
    """The configuration of a name and further fields; raises InputError for a field there is not."""
    if "attention" in fields_given:
        reject("attention", repr(fields_given["attention"]), "attn_implementation, as transformers calls it")
    if "token" in fields_given or "use_auth_token" in fields_given:
        reject("token", "one as an argument", "HF_TOKEN in the environment, or `hf auth login`")
    if not isinstance(config, str):
        if fields_given:
            reject("kwargs", sorted(fields_given), "none beside a BackboneConfig")
        return config
    return BackboneConfig.from_dict({"name": config, **fields_given})


def load(
    config: BackboneConfig, device: torch.device, dtype: torch.dtype, attn_implementation: str, options: dict[str, Any]
) -> tuple[BackboneConfig, Any, Any, tuple[str, str]]:
    """Load what a configuration names, with transformers.

    Args:
        config: its name and revision say what.
        device: chooses the attention where that is ``auto``; the model is not moved.
        dtype: of the model.
        attn_implementation: as transformers calls it, or ``auto``.
        options: cache_dir, local_files_only and trust_remote_code, for each of transformers' loaders.

    Returns:
        (config with the folder's absolute path or the hub's commit, model, tokenizer, attention in use and why).

    Raises CheckpointError.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    folder = folder_of(config.name, config.revision)
    if folder is not None:
        config = replace(config, name=str(folder))
    auto = attn_implementation == "auto"
    attention = choose_attention(device, dtype) if auto else (attn_implementation, "asked for")
    loader = AutoModelForSequenceClassification if config.kind == "classifier" else AutoModel
    try:
        if folder is None:  # the commit first, so that tokenizer and weights cannot be of two
            config = replace(config, revision=commit_of(config.name, config.revision, **_hub_options(options)))
        options = {**options, "revision": config.revision}
        tokenizer = AutoTokenizer.from_pretrained(config.name, **options)
        read = functools.partial(
            loader.from_pretrained,
            config.name,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
        try:
            model, info = read(attn_implementation=attention[0])
        except ValueError as error:
            if not auto or "attention" not in str(error).lower():
                raise
            attention = ("eager", f"this model does not support {attention[0]}")
            model, info = read(attn_implementation="eager")
    except Exception as error:  # a hub, a damaged file, a config from elsewhere: the loader raises many kinds
        told = None if folder is not None else hub_failure(error, config.name, config.revision)
        raise told or CheckpointError(
            f"backbone: got {config.name!r}, which transformers cannot load: {_reason(error)}"
        ) from error
    if config.kind == "classifier" and info["missing_keys"]:
        raise CheckpointError(
            f"backbone: got {config.name!r} without {', '.join(sorted(info['missing_keys'])[:4])}, expected a "
            "trained reward model"
        )
    return config, model, tokenizer, attention


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("cache_dir", "local_files_only")}


def _reason(error: Exception) -> str:
    text = str(error).strip() or repr(error)
    if "custom code" in text or "trust_remote_code" in text:
        return "it needs Python files that come with it, which run with trust_remote_code=True only"
    if isinstance(error, OSError) and "safetensors" in text:
        return "it has no safetensors file, and weights in other formats may run code, so they are not read"
    return text.splitlines()[0][:300]
