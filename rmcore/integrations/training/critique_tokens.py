"""The critiques' token loss beside the reward's, out of one forward pass, and a merged language model to go on with.

CLoud (Ankner et al. 2024, arXiv:2408.11791) has a language head on the body that the reward head reads. Here that head
stays as it is and the body learns: its adapters alone, which is the recipe here; or a whole body, and where its
embeddings are the head, the head with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import reject
from rmcore.integrations.training.cloud import critique_nll
from rmcore.model.backbone import Backbone
from rmcore.model.language_model import language_head, language_model

__all__ = ["CritiqueTokens", "save_language_model"]


class CritiqueTokens:
    """Losses of the critiques' tokens of a batch, and their mean since it was last asked for.

    Args:
        backbone: with its adapters, if there are any.
        accelerator: of accelerate, which knows the ranks.

    Raises InputError for a backbone whose last layer is not what is read, or whose language head is trained in parts of
    which each rank has one.
    """

    def __init__(self, backbone: Backbone, accelerator: Any) -> None:
        config = backbone.config
        if config.kind != "base" and config.family != "cloud":
            reject("critiques", f"token losses for a backbone of kind {config.kind!r}", "kind 'base', or a CLoud model")
        if config.layer is not None:
            reject(
                "critiques", f"token losses at layer {config.layer}", "the last layer, which the language head reads"
            )
        self.backbone, self.accelerator = backbone, accelerator
        tied, tensors = language_head(backbone)
        weight, self.bias = tensors["weight"], tensors.get("bias")
        self.live = tied and weight.requires_grad
        if self.live and str(accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED"):
            reject("use_peft", "false, with sharded embeddings that are the language head", "true, or DDP")
        # A copy, since what adapters leave frozen may be sharded under FSDP.
        self._weight = None if self.live else weight.detach().clone()
        self._sums: dict[bool, Tensor] = {}

    @property
    def weight(self) -> Tensor:
        """(V, h) of the language head."""
        if self._weight is not None:
            return self._weight
        return language_head(self.backbone)[1]["weight"]

    def nll(self, states: Tensor, inputs: Mapping[str, Tensor], *, training: bool) -> Tensor:
        """(B, 2) mean −log p a token, of states (2B, T, h) or of a packed row's (1, ΣT, h); 0 without a critique."""
        critique = inputs["critique"].bool()
        if self._weight is not None and self._weight.device != states.device:
            self._weight = self._weight.to(states.device)
        given = (states, self.weight, inputs["input_ids"], critique)
        if "ends" in inputs:
            ends = inputs["ends"]
            text = torch.bucketize(torch.arange(states.shape[1], device=ends.device), ends, right=True)
            found = critique_nll(*given, bias=self.bias, owner=text, count=len(ends))
            there = torch.zeros_like(found).index_add_(0, text, critique[0].to(found.dtype)) > 0
        else:
            found = critique_nll(*given, bias=self.bias)
            there = critique.any(1)
        sums = torch.stack([found.detach()[there].sum(), there.sum().to(found.dtype)]).double().cpu()
        self._sums[training] = self._sums.get(training, torch.zeros(2, dtype=torch.float64)) + sums
        return found.view(-1, 2)

    def mean(self, *, training: bool) -> float | None:
        """The mean over critiques of all ranks since the last call, which every rank makes; None without any."""
        sums = self._sums.pop(training, torch.zeros(2, dtype=torch.float64))
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.float().to(self.accelerator.device), "sum").cpu()
        return float(sums[0] / sums[1]) if sums[1] else None


def save_language_model(backbone: Backbone, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the language model as transformers has it, LoRA adapters merged into its weights, with the tokenizer.

    ``rmcore critique --generate``, ``rmcore train --backbone`` and every server take the folder. The backbone is left
    as it was.

    Args:
        backbone: trained or not.
        folder: where to.
        weights: the body's, where they are gathered from several processes.

    Raises InputError for adapters that are no plain LoRA.
    """
    shell = language_model(backbone)
    own = dict(backbone.model.state_dict() if weights is None else weights)
    if hasattr(backbone.model, "peft_config"):
        own = _merged(backbone.model, own)
    state = {f"{shell.base_model_prefix}.{name}": tensor for name, tensor in own.items()}
    tied, head = language_head(backbone)
    name = next(name for name, module in shell.named_modules() if module is shell.get_output_embeddings())
    state |= {f"{name}.{part}": tensor for part, tensor in head.items() if not (tied and part == "weight")}
    shell.save_pretrained(folder, state_dict={key: value.detach().contiguous() for key, value in state.items()})
    backbone.tokenizer.save_pretrained(folder)


def _merged(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W + s·B·A for each adapted weight, under the names of the model without adapters."""
    (adapter,) = model.peft_config
    if model.peft_config[adapter].peft_type.value != "LORA" or getattr(model.peft_config[adapter], "use_dora", False):
        reject("peft_config", "adapters that are no plain LoRA", "LoRA, or merge them yourself")
    prefix = "base_model.model." if hasattr(model, "get_base_model") else ""  # transformers' own adapters have none
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        short = name.removeprefix(prefix)
        if ".lora_" in short:
            continue
        place, dot, part = short.rpartition(".base_layer.")
        if not dot:
            found[short] = tensor
            continue
        found[f"{place}.{part}"] = tensor
        a = weights.get(f"{prefix}{place}.lora_A.{adapter}.weight")
        if part == "weight" and a is not None:
            b, module = weights[f"{prefix}{place}.lora_B.{adapter}.weight"], modules[prefix + place]
            delta = module.scaling[adapter] * (b.float() @ a.float())
            delta = delta.T if getattr(module, "fan_in_fan_out", False) else delta
            found[f"{place}.{part}"] = (tensor.float() + delta.to(tensor.device)).to(tensor.dtype)
    return found
