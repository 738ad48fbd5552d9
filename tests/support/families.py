"""A tiny random model in every family's file layout, and its score written down again from the published description.

Nothing here is taken from ``rmcore.model.families``: names, shapes, pooling and arithmetic are those of the formats'
own code and cards. A body is transformers' own, so that a state is what the authors' code would have.
"""

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

__all__ = ["HIDDEN", "LAYOUTS", "Layout", "Tiny", "llama3_tokenizer", "small_body"]

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


def _linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _made(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        for name, shape in shapes.items()
    }


def _prompt_end(ids: list[int], pattern: list[int]) -> int:
    return max(k for k in range(len(ids)) if ids[k : k + len(pattern)] == pattern)


def _tokens(tokenizer: Any, text: str) -> list[int]:
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


# -- references ------------------------------------------------------------------------------------------------------


def _last_linear(name: str) -> Score:
    return lambda tensors, states, ids, tokenizer: _linear(tensors, name, states[-1])[0]


def _mlp(first: str, second: str, activation: Callable[[Tensor], Tensor] = functional.relu) -> Score:
    return lambda tensors, states, ids, tokenizer: _linear(
        tensors, second, activation(_linear(tensors, first, states[-1]))
    )[0]


def _openrlhf(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    return (_linear(tensors, "value_head", states[-1])[0] - 0.75) / 2.5


def _two(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    return _linear(tensors, "score", states[-1]).mean()


def _llama_gate(tokenizer: Any, states: Tensor, ids: list[int]) -> Tensor:
    mark = _tokens(tokenizer, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    return states[_prompt_end(ids, mark)]


def _armorm(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    rewards = _linear(tensors, "regression_layer", states[-1]) @ tensors["reward_transform_matrix"]
    x = _llama_gate(tokenizer, states, ids)
    for k in (0, 2):
        x = functional.relu(_linear(tensors, f"gating.layers.{k}", x))
    gate = (_linear(tensors, "gating.layers.4", x) / 5.0).softmax(-1) * tensors["gating.logit_scale"]
    return (gate * rewards).sum()


def _qrm(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    quantiles = _linear(tensors, "regression_layer", states[-1]).view(4, 3)
    rewards = quantiles.mean(1) @ tensors["reward_transform_matrix"]
    mark = _tokens(tokenizer, "<end_of_turn>\n<start_of_turn>model\n")
    x = states[_prompt_end(ids, mark)]
    for k in (0, 3):
        x = functional.relu(_linear(tensors, f"gating.layers.{k}", x))
        norm = {part: tensors[f"gating.layers.{k + 2}.{part}"] for part in ("weight", "bias", "running_mean")}
        spread = (tensors[f"gating.layers.{k + 2}.running_var"] + 1e-5).sqrt()
        x = (x - norm["running_mean"]) / spread * norm["weight"] + norm["bias"]
    gate = (_linear(tensors, "gating.layers.6", x) / 10).softmax(-1) * tensors["gating.logit_scale"]
    return (gate * rewards).sum()


def _urm_gated(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    means = _linear(tensors, "score", states[-1]).view(5, 2)[:, 0]
    x = functional.selu(_linear(tensors, "weights.fc.0", states[-1]))
    x = functional.selu(_linear(tensors, "weights.fc.2", x))
    return (means * _linear(tensors, "weights.fc.4", x)).sum()


def _urm(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    means = _linear(tensors, "score", states[-1]).view(5, 2)[:, 0]
    return (means * torch.tensor([0.3, 0.74, 0.46, 0.47, -0.33])).sum()


def _ldl(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    def through(layer: str, places: tuple[int, int, int]) -> Tensor:
        x = states[-1]
        for place in places[:-1]:
            x = functional.leaky_relu(_linear(tensors, f"{layer}.network.{place}", x))
        return _linear(tensors, f"{layer}.network.{places[-1]}", x)

    bins = through("regression_layer", (0, 2, 4)).view(-1, 10).softmax(-1)
    weights = (through("gating_layer", (0, 3, 6)) / 2.0).softmax(-1)
    return ((weights @ bins) * torch.linspace(0, 1, 10)).sum()


def _beaver(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    score = _linear(tensors, "score_head", states[-1])[0]
    return (score - tensors["normalizer.mean"][0]) / (tensors["normalizer.var"][0].sqrt() + 1e-8)


def _beaver_cost(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    return -_linear(tensors, "score_head", states[-1])[0]


def _first_logit(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    return (tensors["lm_head.weight"] @ states[-1])[0]


# -- ends of texts, layouts ------------------------------------------------------------------------------------------


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _with_reward_token(ids: list[int], tokenizer: Any) -> list[int]:
    return [*ids, tokenizer.convert_tokens_to_ids("<|reward|>")]


def _fuse(tiny: Tiny) -> None:
    """InternLM2's names: each key-value head's queries, key and value stand together in wqkv."""
    renamed = {
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "mlp.gate_proj": "feed_forward.w1",
    }
    renamed |= {"post_attention_layernorm": "ffn_norm", "mlp.up_proj": "feed_forward.w3"}
    renamed |= {"mlp.down_proj": "feed_forward.w2", "embed_tokens": "tok_embeddings"}
    made = {}
    for name, tensor in tiny.tensors.items():
        if ".self_attn.q_proj." in name:
            q = tensor.view(2, 2, 4, HIDDEN)  # key-value head, query of it, head width, width
            k, v = (tiny.tensors[name.replace("q_proj", part)].view(2, 1, 4, HIDDEN) for part in ("k_proj", "v_proj"))
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat([q, k, v], 1).reshape(-1, HIDDEN)
        elif ".k_proj." not in name and ".v_proj." not in name:
            own = name
            for theirs, ours in renamed.items():
                own = own.replace(theirs, ours)
            made[own] = tensor
    tiny.tensors = made
    tiny.config |= {"model_type": "internlm2", "bias": False, "auto_map": {"AutoModel": "modeling_internlm2.X"}}
    tiny.config["reward_token_id"] = tiny.tokenizer.convert_tokens_to_ids("<|reward|>")


def _separate_head(tiny: Tiny) -> None:
    tiny.files["value_head.safetensors"] = {
        name: tiny.tensors.pop(name) for name in list(tiny.tensors) if "v_head" in name
    }


def _pt_files(tiny: Tiny) -> None:
    for layer in ("regression_layer", "gating_layer"):
        names = [name for name in tiny.tensors if name.startswith(layer)]
        tiny.files[f"{layer}.pt"] = {name.removeprefix(f"{layer}."): tiny.tensors.pop(name) for name in names}


def _drop(*names: str) -> Callable[[Tiny], object]:
    def spoil(tiny: Tiny) -> None:
        for name in names:
            del tiny.tensors[name]

    return spoil


def _add(name: str, *shape: int) -> Callable[[Tiny], object]:
    return lambda tiny: tiny.tensors.__setitem__(name, torch.zeros(shape))


def _set(**values: Any) -> Callable[[Tiny], object]:
    return lambda tiny: tiny.config.update(values)


def _rename(old: str, new: str) -> Callable[[Tiny], object]:
    def spoil(tiny: Tiny) -> None:
        tiny.tensors = {name.replace(old, new): tensor for name, tensor in tiny.tensors.items()}

    return spoil


_NORM = {f"gating__layers__{k}__{part}": (8,) for k in (2, 5) for part in ("weight", "bias", "running_mean")}
_QRM = _made(
    7,
    regression_layer__weight=(12, HIDDEN),
    reward_transform_matrix=(4, 4),
    gating__layers__0__weight=(8, HIDDEN),
    gating__layers__3__weight=(8, 8),
    gating__layers__6__weight=(4, 8),
    gating__layers__6__bias=(4,),
    **_NORM,
) | {
    "gating.logit_scale": torch.tensor([1.5]),
    **{f"gating.layers.{k}.running_var": torch.linspace(0.5, 2, 8) for k in (2, 5)},
    **{f"gating.layers.{k}.num_batches_tracked": torch.tensor(9) for k in (2, 5)},
}
_ARMORM = _made(
    8,
    regression_layer__weight=(19, HIDDEN),
    reward_transform_matrix=(19, 19),
    gating__layers__0__weight=(8, HIDDEN),
    gating__layers__0__bias=(8,),
    gating__layers__2__weight=(8, 8),
    gating__layers__2__bias=(8,),
    gating__layers__4__weight=(19, 8),
    gating__layers__4__bias=(19,),
) | {"gating.logit_scale": torch.tensor([1.25])}
_SCORE_MLP = _made(
    4, score__0__weight=(HIDDEN, HIDDEN), score__0__bias=(HIDDEN,), score__2__weight=(1, HIDDEN), score__2__bias=(1,)
)
_NORMALIZER = {
    "normalizer.mean": torch.tensor([0.4]),
    "normalizer.var": torch.tensor([2.25]),
    "normalizer.count": torch.tensor([12]),
}
_BEAVER = {"score_dim": 1, "bias": True, "normalizer_type": "ExponentialMovingAverage", "momentum": 0.9}
_BEAVER_TEXT = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
_LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_GATING = {"num_objectives": 19, "gating_hidden_dim": 8, "gating_n_hidden": 2, "gating_temperature": 5}

LAYOUTS: dict[str, Layout] = {
    layout.family: layout
    for layout in (
        Layout(
            "classifier",
            "LlamaForSequenceClassification",
            _made(1, score__weight=(1, HIDDEN)),
            _last_linear("score"),
            _drop("score.weight"),
            r"score\.weight",
            config=_LABELS,
        ),
        Layout(
            "trl-two-labels",
            "Qwen2ForSequenceClassification",
            _made(2, score__weight=(2, HIDDEN)),
            _two,
            _set(id2label={"0": "angry", "1": "glad"}),
            "angry, glad",
            body="qwen2",
        ),
        Layout(
            "openrlhf",
            "RewardModel",
            _made(3, value_head__weight=(1, HIDDEN)),
            _openrlhf,
            _rename("value_head", "score"),
            r"value_head\.weight",
            config={"value_head_prefix": "value_head", "normalize_reward": True, "mean": 0.75, "std": 2.5},
            text="{prompt}\n\n{response}",
            tokenizer=plain_tokenizer,
            end=_with_eos,
        ),
        Layout(
            "inf-orm",
            "INFORMForSequenceClassification",
            _SCORE_MLP,
            _mlp("score.0", "score.2"),
            _drop("score.2.bias"),
            r"score\.2\.bias",
            config=_LABELS,
        ),
        Layout(
            "qwen-rm",
            "Qwen2ForRewardModel",
            _SCORE_MLP,
            _mlp("score.0", "score.2"),
            _add("score.4.weight", 1, 1),
            r"score\.4\.weight",
            body="qwen2",
        ),
        Layout(
            "grm",
            "LlamaForCausalLM",
            _made(5, v_head__summary__weight=(1, HIDDEN), v_head__summary__bias=(1,)),
            _last_linear("v_head.summary"),
            _drop("v_head.summary.bias"),
            r"v_head\.summary\.bias",
            config={"vhead_layer_type": "linear", "vhead_num_neurons": 1024, "vhead_num_layers": 1},
        ),
        Layout(
            "grm-mlp",
            "GRewardModel",
            _made(
                6,
                v_head__summary__0__weight=(12, HIDDEN),
                v_head__summary__0__bias=(12,),
                v_head__summary__2__weight=(1, 12),
                v_head__summary__2__bias=(1,),
            ),
            _mlp("v_head.summary.0", "v_head.summary.2"),
            _set(vhead_num_neurons=1024),
            r"v_head\.summary\.0\.weight: got shape \(12, 16\)",
            config={"vhead_layer_type": "mlp", "vhead_num_neurons": 12, "vhead_num_layers": 1},
        ),
        Layout(
            "llama-factory",
            "LlamaForCausalLM",
            _made(9, v_head__summary__weight=(1, HIDDEN), v_head__summary__bias=(1,)),
            _last_linear("v_head.summary"),
            lambda tiny: tiny.files.clear(),
            "no family",
            finish=_separate_head,
        ),
        Layout(
            "armorm",
            "LlamaForRewardModelWithGating",
            _ARMORM,
            _armorm,
            _add("reward_transform_matrix", 18, 18),
            r"reward_transform_matrix: got shape \(18, 18\)",
            config=_GATING,
        ),
        Layout(
            "qrm",
            "Gemma2ForRewardModelWithGating",
            _QRM,
            _qrm,
            _drop("gating.layers.5.running_mean"),
            r"gating\.layers\.5\.running_mean",
            config={"num_objectives": 4, "num_quantiles": 3, "gating_hidden_dim": 8, "gating_n_hidden": 2},
            body="gemma2",
            tokenizer=gemma_tokenizer,
        ),
        Layout(
            "urm-gated",
            "LlamaForSequenceClassificationWithNormal_Weights",
            _made(
                10,
                score__weight=(10, HIDDEN),
                weights__fc__0__weight=(HIDDEN, HIDDEN),
                weights__fc__0__bias=(HIDDEN,),
                weights__fc__2__weight=(HIDDEN, HIDDEN),
                weights__fc__2__bias=(HIDDEN,),
                weights__fc__4__weight=(5, HIDDEN),
                weights__fc__4__bias=(5,),
            ),
            _urm_gated,
            _add("weights.fc.6.weight", 5, 5),
            r"weights\.fc\.6\.weight",
        ),
        Layout(
            "urm",
            "LlamaForSequenceClassificationWithNormal",
            _made(11, score__weight=(10, HIDDEN)),
            _urm,
            _add("score.weight", 8, HIDDEN),
            r"score\.weight: got shape \(8, 16\)",
        ),
        Layout(
            "ldl",
            "LDLRewardModel27B",
            _made(
                12,
                **{
                    f"{layer}__network__{k}__{part}": shape
                    for layer, outputs, places in (("regression_layer", 30, (0, 2, 4)), ("gating_layer", 3, (0, 3, 6)))
                    for k, size in zip(places, ((12, HIDDEN), (12, 12), (outputs, 12)), strict=True)
                    for part, shape in (("weight", size), ("bias", size[:1]))
                },
            ),
            _ldl,
            lambda tiny: tiny.files.update({"gating_layer.pt": Path("not only tensors")}),
            r"gating_layer\.pt",
            config={"num_objectives": 30, "softmax": True, "temperature": 2.0},
            body="gemma2",
            prefix="",
            tokenizer=gemma_tokenizer,
            finish=_pt_files,
        ),
        Layout(
            "ultrarm",
            "LlamaRewardModel",
            _made(13, regression_head__weight=(1, HIDDEN)),
            _last_linear("regression_head"),
            _rename("model.", "base."),
            r"embed_tokens\.weight",
            text="Human: {prompt}\n\nAssistant: {response}",
            tokenizer=plain_tokenizer,
        ),
        Layout(
            "eurus",
            "EurusRewardModel",
            _made(14, regression_head__weight=(1, HIDDEN)),
            _last_linear("regression_head"),
            _set(reward_pooling="mean"),
            "reward_pooling",
            body="mistral",
            text="[INST] {prompt} [\\INST] {response}",
            tokenizer=plain_tokenizer,
        ),
        Layout(
            "internlm2",
            "InternLM2ForRewardModel",
            _made(15, v_head__weight=(1, HIDDEN)),
            _last_linear("v_head"),
            lambda tiny: tiny.config.pop("reward_token_id"),
            "reward_token_id",
            finish=_fuse,
            end=_with_reward_token,
        ),
        Layout(
            "starling",
            "LlamaForSequenceClassification",
            _made(16, v_head__weight=(1, HIDDEN)),
            _last_linear("v_head"),
            _rename("v_head", "value"),
            r"score\.weight",
            config=_LABELS,
            prefix="transformer.",
        ),
        Layout(
            "beaver",
            "LlamaForScore",
            _made(17, score_head__weight=(1, HIDDEN), score_head__bias=(1,)) | _NORMALIZER,
            _beaver,
            _set(score_scale=2.0),
            "score_scale",
            config=_BEAVER | {"score_type": "reward", "do_normalize": True, "mean": [9.0], "var": [9.0]},
            text=_BEAVER_TEXT,
            tokenizer=plain_tokenizer,
            end=_with_eos,
        ),
        Layout(
            "beaver-cost",
            "LlamaForScore",
            _made(18, score_head__weight=(1, HIDDEN), score_head__bias=(1,)) | _NORMALIZER,
            _beaver_cost,
            _drop("score_head.weight"),
            r"score_head\.weight",
            config=_BEAVER | {"score_type": "cost", "do_normalize": False},
            text=_BEAVER_TEXT,
            tokenizer=plain_tokenizer,
            end=_with_eos,
        ),
        Layout(
            "nvidia-lm",
            "LlamaForCausalLM",
            {},
            _first_logit,
            _drop("lm_head.weight"),
            r"lm_head\.weight",
            finish=lambda tiny: tiny.tensors.update(_made(19, lm_head__weight=(tiny.config["vocab_size"], HIDDEN))),
            name="Llama-3.3-Nemotron-70B-Reward",
        ),
    )
}
