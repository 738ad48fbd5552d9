"""The language model that a backbone's body belongs to: its output weights found by name, and ``generate``.

A reward model that writes the critiques it reads (CLoud) has two heads on one body. The reward's is rmcore's or the
family's; the language model's is read here: the embeddings where the configuration ties them (SmolLM2, small Qwen3),
else ``lm_head.weight`` of the checkpoint, in a published CLoud model below ``reward_base_model``. A head that is
nowhere is an error: transformers would make one up.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from rmcore._base.errors import CheckpointError, reject
from rmcore.model.backbone import Backbone
from rmcore.model.encoding.architecture import sees_the_past_alone, text_config
from rmcore.model.families.registry import family_of
from rmcore.model.families.tensors import LANGUAGE_HEAD, Checkpoint, TensorFiles
from rmcore.model.hub import folder_of
from rmcore.model.loading import Options

__all__ = ["language_head", "language_model"]

log = logging.getLogger(__name__)


def language_model(backbone: Backbone, options: Options | None = None) -> Any:
    """A causal language model, with ``generate``, whose body **is** the backbone's: trained together, moved together.

    Adapters on the body are in it. Its output weights are :func:`language_head`'s.

    Raises InputError for a body that no causal language model of transformers has, CheckpointError as
    :func:`language_head`.
    """
    shell, body = _shell(backbone)
    setattr(shell, shell.base_model_prefix, body)
    head = shell.get_output_embeddings()
    tied, tensors = language_head(backbone, options)
    for name in ("weight", "bias"):
        if getattr(head, name, None) is not None:
            value = tensors[name]
            setattr(head, name, value if tied and name == "weight" else nn.Parameter(value, requires_grad=False))
    left = [name for name, tensor in (*shell.named_parameters(), *shell.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"backbone: got {backbone.config.name!r}, whose language model wants {left[0]} too: nothing is made up"
        )
    named = backbone.config.name and backbone.config.gguf_file is None
    path = _checkpoint(backbone, options or Options()).file("generation_config.json") if named else None
    if path is not None:
        from transformers import GenerationConfig

        shell.generation_config = GenerationConfig.from_pretrained(path.parent)
    return shell.eval()


def language_head(backbone: Backbone, options: Options | None = None) -> tuple[bool, dict[str, Tensor]]:
    """(whether tied, ``weight`` (V, h) and ``bias`` (V,) where there is one) of the language model's output.

    A tied weight is the embeddings' own parameter; others are read from the checkpoint, in the body's dtype and on its
    device, once.

    Raises InputError for a server's body or one that is no decoder, CheckpointError where the checkpoint has none.
    """
    shell, body = _shell(backbone)
    head = shell.get_output_embeddings()
    if bool(getattr(text_config(body), "tie_word_embeddings", False)):
        return True, {"weight": body.get_input_embeddings().weight}
    if backbone.language_head is None:
        own = next(name for name, module in shell.named_modules() if module is head)
        wanted = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
        backbone.language_head = _read(backbone, own, wanted, options or Options())
    return False, backbone.language_head


def _shell(backbone: Backbone) -> tuple[Any, Any]:
    """(a causal model without weights, the body without what wraps it)."""
    if backbone.remote:
        reject("backbone", "one on a server", "one in this process, or the server as a critic (--judge-url)")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    body = backbone.model.get_base_model() if hasattr(backbone.model, "get_base_model") else backbone.model
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(body.config), None)
    if kind is None or backbone.config.kind == "classifier" or not sees_the_past_alone(body):
        reject("backbone", f"{type(body).__name__}, kind {backbone.config.kind!r}", "a decoder's body, kind 'base'")
    with torch.device("meta"):
        shell = kind(body.config)
    if type(getattr(shell, shell.base_model_prefix)) is not type(body):
        reject("backbone", type(body).__name__, f"the body of {kind.__name__}")
    return shell, body


def _read(backbone: Backbone, own: str, wanted: dict[str, tuple[int, ...]], options: Options) -> dict[str, Tensor]:
    config = backbone.config
    if not config.name:
        reject("backbone", "one without a name, whose output weights are not its embeddings", "one from_pretrained")
    if config.gguf_file is not None:
        raise CheckpointError(
            f"backbone: got {config.gguf_file!r} with output weights of its own, expected tied ones, or the model as "
            "safetensors: of a GGUF file the body alone is read"
        )
    checkpoint = _checkpoint(backbone, options)
    extra = checkpoint.file(LANGUAGE_HEAD)  # of a folder of rmcore's, whose body may be adapters alone
    files = TensorFiles(config.name) if extra is not None else checkpoint.tensors()
    if extra is not None:
        files.add(extra)
    language = "" if config.family is None else family_of(config.family).language
    prefixes = ["", *([language.removesuffix("lm_head.weight")] if language else [])]
    found = {}
    for name, shape in wanted.items():
        names = [f"{prefix}{own}.{name}" for prefix in prefixes]
        there = next((one for one in names if one in files), None)
        if there is None:
            raise CheckpointError(
                f"backbone: got {config.name!r} without {names[-1]}, expected the language model's output weights, or "
                "a configuration that ties them to the embeddings. It has a body that reads critiques, and writes none"
            )
        if files.shape(there) != shape:
            raise CheckpointError(f"backbone: got {there} of shape {files.shape(there)}, expected {shape}")
        found[name] = files.read(there).to(backbone.device, backbone.model.dtype)
    return found


def _checkpoint(backbone: Backbone, options: Options) -> Checkpoint:
    config = backbone.config
    return Checkpoint(config.name, config.revision, folder_of(config.name, config.revision), options.hub)
