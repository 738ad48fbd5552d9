"""What is made ready before training: a head that fits, adapters, no parameter that no gradient can reach."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import torch

from rmcore._base.errors import InputError, reject
from rmcore.head.config import HeadConfig
from rmcore.head.sngp import SNGPHead
from rmcore.model.backbone import Backbone
from rmcore.model.encoding.architecture import block

__all__ = ["check_sharding", "check_trainable", "freeze_unread", "head_for", "with_adapters"]

log = logging.getLogger(__name__)


def with_adapters(backbone: Backbone, peft_config: Any) -> Any:
    """The backbone's model with PEFT adapters, which alone are to be trained. Raises InputError without peft."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("peft_config: got one, expected peft to be installed: pip install 'rmcore[train]'")
    from peft import get_peft_model, prepare_model_for_kbit_training

    if hasattr(backbone.model, "peft_config"):
        reject("peft_config", "one for a model that has adapters", "None, or the model before adapters")
    model = backbone.model
    if backbone.quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        _unpack(model)
    return get_peft_model(model, peft_config)


def _unpack(model: Any) -> None:
    """Keep bitsandbytes' 4-bit layers in the form that has a gradient.

    On CPUs with bf16 arithmetic a forward pass in eval mode packs their weights anew, for a product without a backward
    pass; gradients would then go around these layers, with a warning at most (bitsandbytes 0.50).
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        module.support_avx512bf16_for_cpu = False
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            module.weight.data, module.weight.quant_state = unpacked(module.weight.data, state)


def freeze_unread(backbone: Backbone) -> None:
    """Freeze what a state does not depend on, which DDP would wait for: layers behind, poolers, final layers."""
    unread: list[Any] = []
    if backbone.config.kind == "base":
        unread += [module for name, module in backbone.model.named_modules() if name.rpartition(".")[2] == "pooler"]
    final = getattr(backbone, "final_linear", None)
    if final is not None:
        unread.append(final)
    if backbone.config.layer is not None:
        last = block(backbone.model, backbone.config.layer)
        layers = next(m for m in backbone.model.modules() if isinstance(m, torch.nn.ModuleList) and last in list(m))
        unread += list(layers)[list(layers).index(last) + 1 :]
    for module in unread:
        module.requires_grad_(False)


def check_trainable(backbone: Backbone) -> None:
    """Raise InputError where nothing can be trained, or not in its dtype; bfloat16 weights are warned about."""
    if backbone.quantised and not hasattr(backbone.model, "peft_config"):
        reject("peft_config", "None for quantised weights", "adapters, which are trained in their place")
    dtypes = {p.dtype for p in backbone.model.parameters() if p.requires_grad}
    if not dtypes:
        reject(
            "backbone",
            "no parameter that requires grad",
            "something to train",
            "Use rmcore.model.training.train_layer for the head",
        )
    if torch.float16 in dtypes:
        reject("backbone", "trainable parameters in float16", "float32", "Load it with dtype=torch.float32")
    if torch.bfloat16 in dtypes:
        log.warning("trainable parameters are bfloat16, which rounds small updates away; float32 trains better")


def head_for(given: SNGPHead | HeadConfig | dict[str, Any] | None, backbone: Backbone) -> SNGPHead:
    """The head that is trained on this backbone: given, or made of its configuration or fields of one.

    Raises InputError where it is not as wide as the backbone's states.
    """
    if given is None or isinstance(given, dict):
        given = HeadConfig(**{"hidden_size": backbone.hidden_size, **(given or {})})
    if isinstance(given, HeadConfig):
        given = SNGPHead(given)
    if given.config.hidden_size != backbone.hidden_size:
        reject("head.hidden_size", given.config.hidden_size, f"the backbone's {backbone.hidden_size}")
    return given


def check_sharding(args: Any, *, fsdp: bool) -> None:
    """Raise InputError where a launcher or the arguments asked for FSDP and accelerate has not set it up.

    It shards over what it knows as accelerators: on CPUs it would keep the whole model on each process, without a word.
    """
    if (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true") and not fsdp:
        import accelerate

        where = "on CPUs" if args.use_cpu else "in one process, or without an accelerator"
        reject(
            "fsdp",
            f"it {where}, where accelerate {accelerate.__version__} leaves the model whole",
            "several processes with a GPU each, started by accelerate launch or torchrun",
        )
