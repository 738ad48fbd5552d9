"""Loading a family's model: transformers reads the body, its head is read by name, and nothing may be left over."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rmcore._base.errors import CheckpointError
from rmcore.model.backbone_config import BackboneConfig
from rmcore.model.families.detect import check_config, detect, leftover
from rmcore.model.families.head import RewardHead
from rmcore.model.families.internlm2 import as_llama
from rmcore.model.families.pairs import pair_template
from rmcore.model.families.pooling import Pooler
from rmcore.model.families.registry import FAMILIES, family_of
from rmcore.model.families.spec import Family
from rmcore.model.families.tensors import Checkpoint, TensorFiles
from rmcore.model.hub import folder_of
from rmcore.model.libraries import is_classifier_adapter
from rmcore.model.loading import REMOTE_CODE, Options, by_weight, gguf_named, located, read_model, read_tokenizer

__all__ = ["Loaded", "config_for", "load_family"]


@dataclass(frozen=True)
class Loaded:
    """A body, its tokenizer, and what a :class:`~rmcore.model.Backbone` needs to read scores from it.

    ``head_tensors`` reads the head's tensors again, CLoud's language head among them, and ``head_keys`` holds its part
    of ``config.json``, for saving.
    """

    config: BackboneConfig
    model: Any
    tokenizer: Any
    attention: tuple[str, str]
    head: RewardHead
    pooler: Pooler
    head_tensors: Callable[[], dict[str, torch.Tensor]]
    head_keys: Mapping[str, Any]


def config_for(config: BackboneConfig, options: Options) -> BackboneConfig:
    """``config`` with the kind and family of the model it names.

    ``config.family`` is taken at its word; otherwise the model's files say. With ``trust_remote_code`` a model of no
    family is one whose own code is run: a classifier.

    Raises:
        CheckpointError: no such model, or none of the families' formats.
        InputError: a family there is not.
    """
    if gguf_named(config).gguf_file is not None:
        raise CheckpointError(f"backbone: got {config.name!r}, a GGUF file, expected a reward model: that has no head")
    config = located(config, options)
    checkpoint = _checkpoint(config, options)
    if config.family is None and is_classifier_adapter(config.name, checkpoint.file):
        return replace(config, kind="classifier", pooling="classifier", family="classifier", append_eos=False)
    family = family_of(config.family) if config.family is not None else None
    if family is None:
        values, files = checkpoint.config(), checkpoint.tensors()
        for known in FAMILIES:
            checkpoint.further(files, known)
        family = detect(config.name, values, files)
        if family is None:
            if options.trust_remote_code and values.get("auto_map"):
                return replace(config, kind="classifier", pooling="classifier", family=REMOTE_CODE, append_eos=False)
            raise _unknown(config.name, values, files)
    if family.head is None:  # the others are checked where they are loaded
        values = checkpoint.config()
        check_config(values, _body_config(family, values, options), family)
    kind: Any = "classifier" if family.head is None else "reward"
    changes: dict[str, Any] = {"kind": kind, "pooling": kind, "family": family.name, "append_eos": False}
    if family.pairwise:
        changes["chat"] = "always"
    return replace(config, **changes)


def load_family(
    config: BackboneConfig, device: torch.device, dtype: torch.dtype, attn_implementation: str, options: Options
) -> Loaded:
    """Load the model of a configuration with ``kind="reward"``. Raises CheckpointError, naming what is wrong."""
    config = located(config, options)
    assert config.family is not None
    family = family_of(config.family)
    if family.head is None:
        raise CheckpointError(f"backbone: got family {family.name!r} with kind 'reward', expected kind 'classifier'")
    checkpoint = _checkpoint(config, options)
    values, files = checkpoint.config(), checkpoint.tensors()
    checkpoint.further(files, family)
    body = _body_config(family, values, options)
    check_config(values, body, family)
    values = {"hidden_size": body.hidden_size, **values}
    tokenizer = read_tokenizer(config, options)

    if family.pairwise:
        tokenizer.chat_template = pair_template(family, tokenizer)
    elif family.chat_template and not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = family.chat_template

    def token_id(text: str) -> int:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise CheckpointError(f"backbone: got a tokenizer that makes {len(ids)} tokens of {text!r}, expected one")
        return int(ids[0])

    head = RewardHead(family.head, files, values, int(body.hidden_size), family=family.name, token_id=token_id)
    more: dict[str, Any] = {"config": body}
    loader, name = "AutoModel", config.name
    rewritten = family.convert == "internlm2" and any(".attention.wqkv." in tensor for tensor in files.names)
    if rewritten:
        loader, more["name"] = "LlamaModel", None
        more["state_dict"] = as_llama(files, body.num_attention_heads, body.num_key_value_heads)
    elif family.body and any(tensor.startswith(family.body) for tensor in files.names):
        more["key_mapping"] = {"^" + re.escape(family.body): ""}
    with _quiet():  # its report of tensors left over is of the head's, which are read here
        model, info, attention = read_model(loader, config, device, dtype, attn_implementation, options, **more)
    _check_body(name, info)
    outside = [tensor for tensor in info["unexpected_keys"] if tensor not in files.extra]
    if rewritten:
        outside += [tensor for tensor in files.names if not tensor.startswith("model.")]
    leftover(sorted({*outside, *files.extra}), head.used, family)
    pooler = Pooler(family, values, tokenizer, body.model_type)
    head = head.to(device, dtype)
    keys = {key: values[key] for key in sorted(family.read_keys) if key in values}
    own = functools.partial(_own_tensors, head, files, family.language)
    return Loaded(config, model, tokenizer, attention, head, pooler, own, keys)


def _own_tensors(head: RewardHead, files: TensorFiles, language: str) -> dict[str, torch.Tensor]:
    """The head's tensors, and the language model's output weights where its critiques are part of the model."""
    more = {language: files.read(language)} if language in files else {}
    return {**head.tensors(files), **more}


def _checkpoint(config: BackboneConfig, options: Options) -> Checkpoint:
    return Checkpoint(config.name, config.revision, folder_of(config.name, config.revision), options.hub)


def _body_config(family: Family, values: Mapping[str, Any], options: Options) -> Any:
    """The body's configuration, an object of transformers; the model's own class of it is not asked."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = {k: v for k, v in values.items() if k not in ("auto_map", "architectures", "torch_dtype", "dtype")}
    if family.body_from and "hidden_size" not in own:
        base = own.get(family.body_from)
        if not isinstance(base, str):
            raise CheckpointError(f"config.json: got no {family.body_from!r}, which names the body's configuration")
        there = _checkpoint(located(BackboneConfig(base), options), options).config()
        own = {**there, **{k: v for k, v in own.items() if k != "model_type"}}
        own = {k: v for k, v in own.items() if k not in ("auto_map", "architectures", "torch_dtype", "dtype")}
    model_type = str(own.get("model_type"))
    model_type = family.body_types.get(model_type, model_type)
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"config.json: got model_type {model_type!r}, which transformers does not know")
    if family.convert == "internlm2" and "bias" in own:
        own["attention_bias"] = bool(own["bias"])
    try:
        return CONFIG_MAPPING[model_type].from_dict({**own, "model_type": model_type})
    except Exception as error:  # each configuration class checks in its own way
        first = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise CheckpointError(f"config.json: not a configuration of {model_type!r} ({first})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_body(name: str, info: Mapping[str, Any]) -> None:
    missing = by_weight(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"backbone: got {name!r} without {', '.join(missing[:4])}{more}, which its body wants: nothing is made up"
        )


def _unknown(name: str, values: Mapping[str, Any], files: TensorFiles) -> CheckpointError:
    architectures = ", ".join(map(str, values.get("architectures") or ())) or "none"
    layered = re.compile(r"\.\d+\.")
    outside = [n for n in files.names if not layered.search(n)][:8]
    code = " It brings code of its own, which runs with trust_remote_code=True only." if values.get("auto_map") else ""
    return CheckpointError(
        f"backbone: got {name!r}, which is of no family of reward models that is known here (architectures "
        f"{architectures}; tensors outside the layers: {', '.join(outside)}). `rmcore families` lists those there are; "
        f"family= names one.{code}"
    )
