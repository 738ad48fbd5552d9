"""Backbones from folders and from the hub, by transformers: which commit, which attention, no code and no pickles."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from rmcore._base.errors import CheckpointError, reject
from rmcore.model.backbone_config import BackboneConfig
from rmcore.model.encoding.tree_attention import Kind
from rmcore.model.folder_files import BASE
from rmcore.model.hub import commit_of, files_of, folder_of, hub_failure
from rmcore.model.libraries import check_quantised, require_libraries

__all__ = [
    "FLOATS",
    "REMOTE_CODE",
    "UNREAD_TENSORS",
    "Options",
    "by_weight",
    "choose_attention",
    "configured",
    "gguf_named",
    "is_quantised",
    "load",
    "located",
    "read_model",
    "read_tokenizer",
    "tree_kinds",
    "with_base",
]

_logger = logging.getLogger(__name__)

REMOTE_CODE = "remote-code"
"""What stands for a family in the configuration of a model whose own code is run."""

_CLASSIFIER = "AutoModelForSequenceClassification"

UNREAD_TENSORS = (
    *("*rotary_emb.inv_freq", "*position_ids", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias"),
    "lm_head.weight",
)
"""Patterns of tensors that may be left over in a classifier's files: buffers of old versions, and the language model's
head, which its score does not go through."""


_POOLER = re.compile(r"(?:^|\.)pooler\.")
"""Of a body's tensors those that no state that is read here goes through."""
_LAYERED = re.compile(r"\.\d+\.")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that are what they say."""


def is_quantised(model: Any) -> bool:
    """Whether a model's weights are quantised (bitsandbytes, GPTQ, ...): those of a GGUF are floats by now."""
    told = getattr(getattr(model, "config", None), "quantization_config", None)
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    floats = all(p.dtype in FLOATS for p in model.parameters()) if getattr(model, "is_quantized", False) else True
    return bool(getattr(model, "is_quantized", False)) and not (floats and method in (None, "gguf"))


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


@dataclass(frozen=True)
class Options:
    """How files are fetched, and whether code that comes with a model may run.

    Attributes:
        cache_dir: where the hub's files are kept; None is huggingface_hub's cache.
        local_files_only: take what is in the cache, and do not ask the hub.
        trust_remote_code: run the Python files that come with a model. False never asks: such a model is an error.
        base_revision: of a folder with an adapter alone: the hub's commit of the model it belongs to.
    """

    cache_dir: str | Path | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    base_revision: str | None = None

    @property
    def hub(self) -> dict[str, Any]:
        """What huggingface_hub's functions take."""
        return {"cache_dir": self.cache_dir, "local_files_only": self.local_files_only}

    def of(self, config: BackboneConfig) -> dict[str, Any]:
        """What transformers' loaders take for a configuration."""
        revision = config.revision or self.base_revision
        return {**self.hub, "trust_remote_code": self.trust_remote_code, "revision": revision}


def with_base(
    files: Mapping[str, str], recorded: Mapping[str, str], options: Options
) -> tuple[dict[str, str], Options]:
    """Both with the commit of the model on the hub that an adapter belongs to, where it is one: the recorded one, else
    that of its default branch now. Raises CheckpointError.
    """
    name = files.get(BASE)
    if name is not None and any(file.startswith(f"{BASE}/") for file in recorded):
        raise CheckpointError(
            f"backbone: got an adapter of {name!r}, which was a folder when the model was saved, and is none from "
            f"{os.getcwd()!r}. Name it by its absolute path in adapter_config.json"
        )
    if name is None or importlib.util.find_spec("peft") is None:  # which loading says
        return dict(files), options
    known, _, commit = recorded.get(BASE, "").rpartition("@")
    if known != name:
        with _told(BackboneConfig(name)):
            commit = commit_of(name, None, **options.hub)
    return {**files, BASE: f"{name}@{commit}"}, replace(options, base_revision=commit)


def located(config: BackboneConfig, options: Options) -> BackboneConfig:
    """The configuration with its folder's absolute path, or with the hub's commit as revision. Raises CheckpointError.

    The commit comes first, so that tokenizer and weights cannot be of two.
    """
    folder = folder_of(config.name, config.revision)
    if folder is not None:
        config = replace(config, name=str(folder))
    else:
        with _told(config):
            config = replace(config, revision=commit_of(config.name, config.revision, **options.hub))
    files = files_of(config.name, config.revision, options.hub)
    require_libraries(config.name, files, gguf=config.gguf_file is not None)
    _check_index(config.name, files(_INDEX), folder)
    if config.gguf_file is not None and files(config.gguf_file) is None:
        raise CheckpointError(f"backbone: got {config.name!r} without {config.gguf_file}, expected that GGUF file")
    return config


_INDEX = "model.safetensors.index.json"
_FLOAT_NAMES = ("F64", "F32", "F16", "BF16")


def _check_numbers(source: BackboneConfig, model: Any, options: Options) -> None:
    """Raise CheckpointError for weights that are whole numbers or bytes, and which no configuration says to scale.

    transformers would take them for what they are: 8-bit weights, say, without their scales.
    """
    from safetensors import SafetensorError, safe_open

    files = files_of(source.name, source.revision, options.hub)
    index = files(_INDEX)
    names = ["model.safetensors"] if index is None else sorted(set(_json(index)["weight_map"].values()))
    own = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for path in filter(None, map(files, names)):
        try:
            with safe_open(path, framework="pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError):  # loading has read it
            continue
        for name, kind in kinds.items():
            if kind not in _FLOAT_NAMES and any(name[at:] in own for at in _beginnings(name)):
                raise CheckpointError(
                    f"backbone: got {source.name!r} with {name} in {kind} and no quantization_config that says what "
                    "that stands for, expected floating-point weights"
                )


def _beginnings(name: str) -> list[int]:
    """Where a tensor's name may begin without the prefix of a model around the body."""
    return [0, *(found.end() for found in re.finditer(r"\.", name))]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _check_index(name: str, index: Path | None, folder: Path | None) -> None:
    """Raise CheckpointError for an index whose shards are other files than safetensors beside it, or not there.

    transformers takes a shard's format from its name, and would read a pickle, or a file anywhere on the machine.
    """
    if index is None:
        return
    try:
        placed = _json(index)["weight_map"]
        shards = sorted(set(placed.values()))
    except (ValueError, OSError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files ({error!r})") from error
    for shard in shards:
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"backbone: got {name!r} with the shard {shard!r} in {_INDEX}, expected safetensors files: weights in "
                "other formats may run code, so they are not read"
            )
        if os.path.isabs(shard) or ".." in Path(shard).parts:
            raise CheckpointError(
                f"backbone: got {name!r} with the shard {shard!r} in {_INDEX}, expected files of its own folder"
            )
        if folder is not None and not (folder / shard).is_file():
            raise CheckpointError(f"backbone: got {name!r} without {shard}, which {_INDEX} names")


def gguf_named(config: BackboneConfig) -> BackboneConfig:
    """``config`` with folder and ``gguf_file`` where its name is the path of a GGUF file."""
    path = Path(os.path.expanduser(config.name))
    if path.suffix != ".gguf" or not path.is_file():
        return config
    return replace(config, name=str(path.resolve().parent), gguf_file=path.name)


def read_tokenizer(config: BackboneConfig, options: Options) -> Any:
    """The tokenizer of a located configuration. Raises CheckpointError."""
    from transformers import AutoTokenizer

    with _told(config):
        files = files_of(config.name, config.revision, options.hub)
        own = config.gguf_file is None or files("tokenizer.json") is not None  # a GGUF's is put together from parts
        more = {} if own else {"gguf_file": config.gguf_file}
        return AutoTokenizer.from_pretrained(config.name, **options.of(config), **more)


def read_model(
    loader: str,
    source: BackboneConfig,
    device: torch.device,
    dtype: torch.dtype,
    attn_implementation: str,
    options: Options,
    **more: Any,
) -> tuple[Any, dict[str, Any], tuple[str, str]]:
    """(model, what transformers says of missing and left-over tensors, attention in use and why).

    Args:
        loader: transformers' class, ``AutoModel`` say.
        source: a located configuration.
        device: chooses the attention where that is ``auto``; the model is not moved.
        dtype: of the model.
        attn_implementation: as transformers calls it, or ``auto``.
        options: how files are fetched.
        **more: further arguments of ``from_pretrained``; ``name`` in place of the configuration's.

    Raises CheckpointError.
    """
    import transformers

    auto = attn_implementation == "auto"
    attention = choose_attention(device, dtype) if auto else (attn_implementation, "asked for")
    # Tensors of another shape are told of here, by name, which transformers leaves to a report among its warnings.
    arguments: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
    arguments["ignore_mismatched_sizes"] = True
    if source.gguf_file is not None:
        arguments |= {"gguf_file": source.gguf_file, "use_safetensors": None}
    read = functools.partial(
        getattr(transformers, loader).from_pretrained,
        more.pop("name", source.name),
        **arguments,
        **options.of(source),
        **more,
    )
    with _told(source):
        try:
            model, info = read(attn_implementation=attention[0])
        except ValueError as error:
            if not auto or "attention" not in str(error).lower():
                raise
            attention = ("eager", f"this model does not support {attention[0]}")
            model, info = read(attn_implementation="eager")
    check_quantised(source.name, model)
    if source.gguf_file is None and not is_quantised(model):
        _check_numbers(source, model, options)
    if getattr(model.config, "return_dict", True) is False:
        model.config.return_dict = True  # how its outputs are held, which a configuration of old may say
    for name, found, wanted in sorted(info.get("mismatched_keys", ())):
        raise CheckpointError(
            f"backbone: got {source.name!r} with {name} of shape {tuple(found)}, which its configuration wants "
            f"{tuple(wanted)}"
        )
    return model, info, attention


def load(
    config: BackboneConfig, device: torch.device, dtype: torch.dtype, attn_implementation: str, options: Options
) -> tuple[BackboneConfig, Any, Any, tuple[str, str]]:
    """Load what a configuration names, with transformers: a base model, or a classifier with its own head.

    Arguments as of :func:`read_model`.

    Returns:
        (config with the folder's absolute path or the hub's commit, model, tokenizer, attention in use and why).

    Raises CheckpointError.
    """
    config = located(config, options)
    tokenizer = read_tokenizer(config, options)
    loader = _CLASSIFIER if config.kind == "classifier" else "AutoModel"
    if config.family == REMOTE_CODE:
        loader = _own_loader(config, options)
    model, info, attention = read_model(loader, config, device, dtype, attn_implementation, options)
    missing = info["missing_keys"]
    if config.kind != "classifier":
        own = {name for name, _ in model.named_buffers()}  # which a model computes by itself
        missing = [name for name in missing if name not in own and not _POOLER.search(name)]
    if missing and (config.gguf_file is not None or config.kind != "classifier"):
        raise CheckpointError(
            f"backbone: got {config.gguf_file or config.name!r} without {', '.join(by_weight(missing)[:4])}, which its "
            "body wants: nothing is made up"
        )
    if config.kind != "classifier":
        inner = [name for name in info["unexpected_keys"] if _LAYERED.search(name)]
        inner = [name for name in inner if not any(fnmatch(name, pattern) for pattern in UNREAD_TENSORS)]
        if inner:
            _logger.warning(
                "%s: %s has no use for %d tensors of its layers, which are not computed: %s",
                config.name,
                type(model).__name__,
                len(inner),
                ", ".join(sorted(inner)[:4]),
            )
    if config.kind == "classifier":
        if info["missing_keys"]:
            raise CheckpointError(
                f"backbone: got {config.name!r} without {', '.join(by_weight(info['missing_keys'])[:4])}, expected a "
                "trained reward model"
            )
        left = [name for name in info["unexpected_keys"] if not any(fnmatch(name, p) for p in UNREAD_TENSORS)]
        if left:
            raise CheckpointError(
                f"backbone: got {config.name!r} with tensors that {type(model).__name__} has no use for: "
                f"{', '.join(sorted(left)[:6])}. Something of this model would not be computed"
            )
    return config, model, tokenizer, attention


def _own_loader(config: BackboneConfig, options: Options) -> str:
    """Under which of transformers' classes a model registers its own; that of classifiers where there is choice."""
    from transformers import AutoConfig

    with _told(config):
        own = getattr(AutoConfig.from_pretrained(config.name, **options.of(config)), "auto_map", None) or {}
    return "AutoModel" if "AutoModel" in own and "AutoModelForSequenceClassification" not in own else _CLASSIFIER


def by_weight(names: Iterable[str]) -> list[str]:
    """Names of tensors, those of no numbered layer first: they tell most."""
    return sorted(names, key=lambda name: (re.search(r"\.\d+\.", name) is not None, name))


@contextmanager
def _told(config: BackboneConfig) -> Iterator[None]:
    """Whatever a loader raises, which is of many kinds (a hub, a damaged file, a config), as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        on_hub = folder_of(config.name, config.revision) is None
        told = hub_failure(error, config.name, config.revision) if on_hub else None
        raise told or CheckpointError(
            f"backbone: got {config.name!r}, which transformers cannot load: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).strip() or repr(error)
    if "custom code" in text or "trust_remote_code" in text:
        return "it needs Python files that come with it, which run with trust_remote_code=True only"
    if isinstance(error, OSError) and "safetensors" in text:
        return "it has no safetensors file, and weights in other formats may run code, so they are not read"
    return text.splitlines()[0][:300]
