"""What training a backbone takes: parameters, memory, FLOP and hours, before anything is loaded (``rmcore plan``).

Read from the configuration alone. Parameters are counted on a model without storage. Activations are counted, not
guessed: a model of one and of two layers runs on fake tensors, with the arithmetic that training has, and what autograd
would keep is added up, so any architecture that transformers knows is planned as it is. The rest is arithmetic:

    memory  = weights + 16-bit copies + gradients + AdamW + activations + what backward holds besides + the head
    FLOP    = tokens · (forward + backward [+ forward again, with activation checkpointing] + one posterior pass)
    forward = 2 · parameters outside the embedding + 2 · layers · length · width (causal attention; both products)

What it does not know: fragmentation, CUDA's own context (about 0.5 GB), NCCL's buffers, other processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError, reject
from rmcore._base.numbers import COUNT, Within, check_numbers

__all__ = ["Plan", "PlanConfig", "Strategy", "plan_training"]

Strategy: TypeAlias = Literal["ddp", "fsdp", "zero3"]

_ADAM = 8
_GRAD = 4


@dataclass(frozen=True)
class PlanConfig:
    """What is to be trained, and how.

    Attributes:
        mode: ``difference`` (two texts a pair) or ``concat`` (two orders, each of prompt and both responses).
        gpus: how many; a model is sharded over them with ``fsdp`` and ``zero3``, and whole on each with ``ddp``.
        prompt, response: tokens, about.
        pairs: of an epoch, and ``epochs``.
        batch: pairs of one forward pass on a GPU.
        bf16: arithmetic of the forward pass; weights stay in float32.
        checkpointing: activations of a layer are computed again in its backward pass.
        lora: rank of adapters on all linear layers, None to train everything.
        frozen_bytes: bytes of a weight that adapters are on: 2 in bfloat16, 0.55 in 4 bits with their scales.
        layer_size, features: of the head.
        peak_tflops: of a GPU in the arithmetic that is used.
        mfu: share of it that is reached.
    """

    mode: Literal["difference", "concat"] = "difference"
    gpus: int = 1
    strategy: Strategy = "ddp"
    prompt: int = 256
    response: int = 384
    pairs: int = 80_000
    epochs: float = 1.0
    batch: int = 4
    bf16: bool = True
    checkpointing: bool = False
    lora: int | None = None
    frozen_bytes: float = 2.0
    layer_size: int | None = 1024
    features: int = 2048
    peak_tflops: float = 989.0
    mfu: float = 0.4

    def __post_init__(self) -> None:
        named = ("gpus", "prompt", "response", "pairs", "epochs", "batch", "features", "peak_tflops", "mfu")
        check_numbers(self, Within(above=0), *named, "frozen_bytes", expected="a positive number")
        check_numbers(self, COUNT, "lora", "layer_size", expected="at least 1, or None")
        if self.mfu > 1:
            reject("mfu", self.mfu, "a share of the peak, at most 1")
        if self.strategy not in ("ddp", "fsdp", "zero3"):
            reject("strategy", repr(self.strategy), "'ddp', 'fsdp' or 'zero3'")

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.prompt + self.response * (2 if self.mode == "concat" else 1)


@dataclass(frozen=True)
class Plan:
    """Bytes on a GPU, and work of all of them.

    Attributes:
        parameters: of the backbone, and ``trained`` of them.
        weights, copies, gradients, optimiser, activations, transient, head: bytes; copies are the 16-bit weights that
            autocast or a sharded forward pass holds, transient what backward holds at once beside activations.
        flop: of the whole run, the posterior's pass included.
        steps: forward passes of a GPU.
        hours: at the stated share of the peak.
    """

    parameters: int
    trained: int
    weights: float
    copies: float
    gradients: float
    optimiser: float
    activations: float
    transient: float
    head: float
    flop: float
    steps: int
    hours: float

    @property
    def memory(self) -> float:
        """Peak bytes: at the start of backward activations are whole, at its end gradients."""
        fixed = self.weights + self.copies + self.optimiser + self.head
        return fixed + max(self.activations + self.transient, self.gradients)

    def to_markdown(self) -> str:
        """A table."""
        rows = [("weights", self.weights), ("16-bit copies", self.copies), ("gradients", self.gradients)]
        rows += [("AdamW", self.optimiser), ("activations", self.activations), ("backward, besides", self.transient)]
        rows += [("head with its optimiser", self.head)]
        lines = ["| on each GPU | GB |", "|---|---|", *(f"| {name} | {bytes_ / 1e9:.2f} |" for name, bytes_ in rows)]
        lines.append(f"| **peak** | **{self.memory / 1e9:.2f}** |")
        share = "all" if self.trained >= self.parameters else f"{self.trained / 1e6:.1f} M"
        lines.append(
            f"\n{self.parameters / 1e9:.3g} G parameters, {share} trained; {self.flop:.3g} FLOP, {self.steps} forward "
            f"passes a GPU, {self.hours:.3g} hours"
        )
        return "\n".join(lines)


def plan_training(backbone: Any, config: PlanConfig) -> Plan:
    """The plan for a backbone: a transformers configuration, or the name of one.

    Raises CheckpointError where there is no such configuration.
    """
    described = _described(backbone)
    layers = int(described.num_hidden_layers)
    parameters, embedding, linear = _counted(described)
    texts = 2 * config.batch
    one, two = (_activations(described, k, texts, config) for k in (1, 2))
    a_layer, outside = two - one, 2 * one - two
    width = int(described.hidden_size)
    tokens = texts * config.length
    residuals = layers * 4 * tokens * width  # float32, as embeddings are, whatever the arithmetic of the layers
    activations = outside + (residuals + a_layer if config.checkpointing else layers * a_layer)
    trained = parameters if config.lora is None else config.lora * linear
    shards = 1 if config.strategy == "ddp" else config.gpus
    frozen = 0.0 if config.lora is None else parameters * config.frozen_bytes
    weights = (4 * trained if config.lora is None else 4 * trained + frozen) / shards
    gradients = _GRAD * trained / shards
    if config.gpus > 1 and config.strategy == "ddp":
        gradients *= 2  # and DDP's buckets
    # The widest activation and its gradient twice over: of the product that backward is at, and of what it came from.
    inner = int(getattr(described, "intermediate_size", None) or 4 * width)
    transient = 2 * (2 if config.bf16 else 4) * tokens * max(inner, width)
    head = 16.0 * ((config.layer_size or 0) * width + 2 * config.features)
    head += 4.0 * config.features * (config.layer_size or width)  # Ω
    per_token = 2 * (parameters - embedding) + 2 * layers * config.length * width
    passes = (2 if config.lora is not None else 3) + (1 if config.checkpointing else 0)
    all_tokens = 2 * config.length * config.pairs
    flop = per_token * all_tokens * (passes * config.epochs + 1)
    return Plan(
        parameters=parameters,
        trained=trained,
        weights=weights,
        copies=_copies(parameters, layers, embedding, config),
        gradients=gradients,
        optimiser=_ADAM * trained / shards,
        activations=float(activations),
        transient=float(transient),
        head=head,
        flop=float(flop),
        steps=math.ceil(config.pairs * config.epochs / (config.batch * config.gpus)),
        hours=flop / (config.gpus * config.peak_tflops * 1e12 * config.mfu) / 3600,
    )


def _copies(parameters: int, layers: int, embedding: int, config: PlanConfig) -> float:
    """16-bit weights that exist beside float32 ones, or whole layers that a sharded model gathers."""
    block = (parameters - embedding) / layers
    if config.strategy != "ddp" and config.gpus > 1:
        size = 2 if config.bf16 or config.lora is not None else 4
        return size * (2 * block + embedding)  # this layer and the next one, and the embedding
    if config.lora is not None or not config.bf16:
        return 0.0
    return 2.0 * (parameters - embedding)  # autocast keeps what it has cast until the step's end


def _described(backbone: Any) -> Any:
    if not isinstance(backbone, str):
        return backbone
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"backbone: got {backbone!r}, which has no configuration ({error})") from error
    return found.get_text_config()


def _counted(described: Any) -> tuple[int, int, int]:
    """(parameters, those of the input embedding, inputs plus outputs of all linear layers)."""
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(described)
    parameters = sum(p.numel() for p in model.parameters())
    embedding = int(model.get_input_embeddings().weight.numel())
    linear = sum(m.in_features + m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    return parameters, embedding, linear


def _activations(described: Any, layers: int, texts: int, config: PlanConfig) -> int:
    """Bytes that autograd keeps of ``texts`` texts' forward pass through a model of so many layers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModel

    small = type(described).from_dict({**described.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    small.use_cache = False
    with FakeTensorMode():
        model = AutoModel.from_config(small).train()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        if config.lora is not None:
            # Frozen weights keep no inputs; a gradient still passes through them to the adapters of layers before.
            model.requires_grad_(False)
            model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
        ids = torch.zeros(texts, config.length, dtype=torch.long)
        kept = _Kept(p.untyped_storage() for p in model.parameters())
        arithmetic = torch.autocast("cpu", torch.bfloat16) if config.bf16 else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor), arithmetic:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if config.bf16:
        kept.bytes -= 2 * sum(m.weight.numel() for m in linear)  # what autocast has cast, which is not activations
    if config.lora is not None:  # their inputs, twice through dropout, and what is between A and B
        size = 2 if config.bf16 else 4
        kept.bytes += sum(size * ids.numel() * (m.in_features + config.lora) for m in linear)
    return kept.bytes


class _Kept:
    """Bytes of what autograd keeps beside the parameters, each storage once."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        self.bytes = 0
        self._seen = {storage._cdata: storage for storage in parameters}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, so that no other one is given its place
            self.bytes += storage.nbytes()
        return tensor
