"""Tiny bodies and tokenizers that families of reward models are made of, and what their layouts say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from support.models import TOKENIZERS, _byte_level, _wrap
from torch import Tensor
from torch.nn import functional

__all__ = [
    "HIDDEN",
    "Layout",
    "Score",
    "Tensors",
    "Tiny",
    "add",
    "drop",
    "gemma_tokenizer",
    "linear",
    "llama3_tokenizer",
    "made",
    "plain_tokenizer",
    "prompt_end",
    "rename",
    "set_config",
    "small_body",
    "tokens",
]

HIDDEN = 16
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)


def llama3_tokenizer() -> Any:
    specials = ["<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reward|>"]
    made = _wrap(_byte_level(specials), pad_token="<|pad|>", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    made.chat_template = LLAMA3
    return made


def gemma_tokenizer() -> Any:
    specials = ["<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
    made = _wrap(_byte_level(specials), pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = GEMMA
    return made


def plain_tokenizer() -> Any:
    return TOKENIZERS["llama"]()


Tensors = dict[str, Tensor]
Score = Callable[[Tensors, Tensor, list[int], Any], Tensor]
"""(all tensors of the files, states (T, h) of one text, its ids, the tokenizer) → its score."""


def linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def made(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        for name, shape in shapes.items()
    }


def prompt_end(ids: list[int], pattern: list[int]) -> int:
    return max(k for k in range(len(ids)) if ids[k : k + len(pattern)] == pattern)


def tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class Tiny:
    """One model's parts before they are written."""

    tensors: Tensors
    config: dict[str, Any]
    tokenizer: Any
    body: Any
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """As its authors publish it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        for name, value in self.files.items():
            torch.save(value, folder / name) if name.endswith(".pt") else save_file(value, folder / name)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder

    @property
    def everything(self) -> Tensors:
        """All tensors by name, those of further files after their file's name."""
        found = dict(self.tensors)
        for name, value in self.files.items():
            prefix = name.removesuffix("pt") if name.endswith(".pt") else ""
            found |= {prefix + key: tensor for key, tensor in value.items()}
        return found


@dataclass(frozen=True)
class Layout:
    """A family's layout.

    Attributes:
        family: its name in the registry.
        architecture: of ``config.json``.
        head: its tensors.
        score: the reference.
        config: further keys.
        body: ``llama``, ``mistral``, ``qwen2`` or ``gemma2``.
        prefix: of the body's tensors.
        fault: what is planted: a function that spoils the parts.
        told: what the error then names.
        end: what a text ends with in the authors' code, given its ids and the tokenizer.
        tokenizer: makes it.
        text: a text without chat template, from prompt and response.
        finish: last changes to the parts.
        width: the body's width; states of it enter the head.
    """

    family: str
    architecture: str
    head: Tensors
    score: Score
    fault: Callable[[Tiny], object]
    told: str
    config: dict[str, Any] = field(default_factory=dict)
    body: str = "llama"
    prefix: str = "model."
    end: Callable[[list[int], Any], list[int]] = lambda ids, _: ids
    tokenizer: Callable[[], Any] = llama3_tokenizer
    text: str = ""
    finish: Callable[[Tiny], object] = lambda tiny: None
    name: str = "model"

    def make(self) -> Tiny:
        """The parts, always the same."""
        tokenizer = self.tokenizer()
        body = small_body(self.body, tokenizer)
        tensors = {self.prefix + key: value.clone() for key, value in body.state_dict().items()}
        config = {**body.config.to_dict(), "architectures": [self.architecture], **self.config}
        tiny = Tiny(tensors | self.head, config, tokenizer, body)
        self.finish(tiny)
        return tiny

    def ids(self, tiny: Tiny, prompt: str, response: str) -> list[int]:
        """What the authors' code feeds its body."""
        if self.text:
            ids = tiny.tokenizer(self.text.format(prompt=prompt, response=response))["input_ids"]
        else:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids = tiny.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        return self.end(list(ids), tiny.tokenizer)

    @torch.no_grad()
    def reference(self, tiny: Tiny, prompt: str, response: str) -> float:
        """Its score by the published description, alone and without padding."""
        ids = self.ids(tiny, prompt, response)
        states = tiny.body(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return float(self.score(tiny.everything, states, ids, tiny.tokenizer))


def small_body(kind: str, tokenizer: Any) -> Any:
    t = transformers
    common = {"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "num_hidden_layers": 2, "intermediate_size": 24}
    common |= {"num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id}
    decoder = common | {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    if kind == "mistral":
        model = t.MistralModel(t.MistralConfig(**decoder, sliding_window=None))
    elif kind == "qwen2":
        model = t.Qwen2Model(t.Qwen2Config(**decoder))
    elif kind == "gemma2":
        model = t.Gemma2Model(t.Gemma2Config(**decoder, head_dim=4))
    else:
        model = t.LlamaModel(t.LlamaConfig(**decoder))
    for parameter in model.parameters():  # states as far apart as a trained model's
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def drop(*names: str) -> Callable[[Tiny], object]:
    def spoil(tiny: Tiny) -> None:
        for name in names:
            del tiny.tensors[name]

    return spoil


def add(name: str, *shape: int) -> Callable[[Tiny], object]:
    return lambda tiny: tiny.tensors.__setitem__(name, torch.zeros(shape))


def set_config(**values: Any) -> Callable[[Tiny], object]:
    return lambda tiny: tiny.config.update(values)


def rename(old: str, new: str) -> Callable[[Tiny], object]:
    def spoil(tiny: Tiny) -> None:
        tiny.tensors = {name.replace(old, new): tensor for name, tensor in tiny.tensors.items()}

    return spoil
