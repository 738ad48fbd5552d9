"""A tiny random model in every family's file layout, and its score written down again from the published description.

Nothing here is taken from ``rmcore.model.families``: names, shapes, pooling and arithmetic are those of the formats'
own code and cards. A body is transformers' own, so that a state is what the authors' code would have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.tiny_families import (
    HIDDEN,
    Layout,
    Score,
    Tensors,
    Tiny,
    add,
    drop,
    gemma_tokenizer,
    linear,
    llama3_tokenizer,
    made,
    plain_tokenizer,
    prompt_end,
    rename,
    set_config,
    small_body,
    tokens,
)
from torch import Tensor
from torch.nn import functional

__all__ = ["HIDDEN", "LAYOUTS", "Layout", "Tiny", "llama3_tokenizer", "small_body"]


# -- references ------------------------------------------------------------------------------------------------------


def _last_linear(name: str) -> Score:
    return lambda tensors, states, ids, tokenizer: linear(tensors, name, states[-1])[0]


def _mlp(first: str, second: str, activation: Callable[[Tensor], Tensor] = functional.relu) -> Score:
    return lambda tensors, states, ids, tokenizer: linear(
        tensors, second, activation(linear(tensors, first, states[-1]))
    )[0]


def _openrlhf(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    return (linear(tensors, "value_head", states[-1])[0] - 0.75) / 2.5


def _two(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    return linear(tensors, "score", states[-1]).mean()


def _llama_gate(tokenizer: Any, states: Tensor, ids: list[int]) -> Tensor:
    mark = tokens(tokenizer, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    return states[prompt_end(ids, mark)]


def _armorm(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    rewards = linear(tensors, "regression_layer", states[-1]) @ tensors["reward_transform_matrix"]
    x = _llama_gate(tokenizer, states, ids)
    for k in (0, 2):
        x = functional.relu(linear(tensors, f"gating.layers.{k}", x))
    gate = (linear(tensors, "gating.layers.4", x) / 5.0).softmax(-1) * tensors["gating.logit_scale"]
    return (gate * rewards).sum()


def _qrm(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    quantiles = linear(tensors, "regression_layer", states[-1]).view(4, 3)
    rewards = quantiles.mean(1) @ tensors["reward_transform_matrix"]
    mark = tokens(tokenizer, "<end_of_turn>\n<start_of_turn>model\n")
    x = states[prompt_end(ids, mark)]
    for k in (0, 3):
        x = functional.relu(linear(tensors, f"gating.layers.{k}", x))
        norm = {part: tensors[f"gating.layers.{k + 2}.{part}"] for part in ("weight", "bias", "running_mean")}
        spread = (tensors[f"gating.layers.{k + 2}.running_var"] + 1e-5).sqrt()
        x = (x - norm["running_mean"]) / spread * norm["weight"] + norm["bias"]
    gate = (linear(tensors, "gating.layers.6", x) / 10).softmax(-1) * tensors["gating.logit_scale"]
    return (gate * rewards).sum()


def _urm_gated(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    means = linear(tensors, "score", states[-1]).view(5, 2)[:, 0]
    x = functional.selu(linear(tensors, "weights.fc.0", states[-1]))
    x = functional.selu(linear(tensors, "weights.fc.2", x))
    return (means * linear(tensors, "weights.fc.4", x)).sum()


def _urm(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    means = linear(tensors, "score", states[-1]).view(5, 2)[:, 0]
    return (means * torch.tensor([0.3, 0.74, 0.46, 0.47, -0.33])).sum()


def _ldl(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    def through(layer: str, places: tuple[int, int, int]) -> Tensor:
        x = states[-1]
        for place in places[:-1]:
            x = functional.leaky_relu(linear(tensors, f"{layer}.network.{place}", x))
        return linear(tensors, f"{layer}.network.{places[-1]}", x)

    bins = through("regression_layer", (0, 2, 4)).view(-1, 10).softmax(-1)
    weights = (through("gating_layer", (0, 3, 6)) / 2.0).softmax(-1)
    return ((weights @ bins) * torch.linspace(0, 1, 10)).sum()


def _beaver(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    score = linear(tensors, "score_head", states[-1])[0]
    return (score - tensors["normalizer.mean"][0]) / (tensors["normalizer.var"][0].sqrt() + 1e-8)


def _beaver_cost(tensors: Tensors, states: Tensor, ids: list[int], tokenizer: Any) -> Tensor:
    return -linear(tensors, "score_head", states[-1])[0]


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


_NORM = {f"gating__layers__{k}__{part}": (8,) for k in (2, 5) for part in ("weight", "bias", "running_mean")}
_QRM = made(
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
_ARMORM = made(
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
_SCORE_MLP = made(
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
            made(1, score__weight=(1, HIDDEN)),
            _last_linear("score"),
            drop("score.weight"),
            r"score\.weight",
            config=_LABELS,
        ),
        Layout(
            "trl-two-labels",
            "Qwen2ForSequenceClassification",
            made(2, score__weight=(2, HIDDEN)),
            _two,
            set_config(id2label={"0": "angry", "1": "glad"}),
            "angry, glad",
            body="qwen2",
        ),
        Layout(
            "openrlhf",
            "RewardModel",
            made(3, value_head__weight=(1, HIDDEN)),
            _openrlhf,
            rename("value_head", "score"),
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
            drop("score.2.bias"),
            r"score\.2\.bias",
            config=_LABELS,
        ),
        Layout(
            "qwen-rm",
            "Qwen2ForRewardModel",
            _SCORE_MLP,
            _mlp("score.0", "score.2"),
            add("score.4.weight", 1, 1),
            r"score\.4\.weight",
            body="qwen2",
        ),
        Layout(
            "grm",
            "LlamaForCausalLM",
            made(5, v_head__summary__weight=(1, HIDDEN), v_head__summary__bias=(1,)),
            _last_linear("v_head.summary"),
            drop("v_head.summary.bias"),
            r"v_head\.summary\.bias",
            config={"vhead_layer_type": "linear", "vhead_num_neurons": 1024, "vhead_num_layers": 1},
        ),
        Layout(
            "grm-mlp",
            "GRewardModel",
            made(
                6,
                v_head__summary__0__weight=(12, HIDDEN),
                v_head__summary__0__bias=(12,),
                v_head__summary__2__weight=(1, 12),
                v_head__summary__2__bias=(1,),
            ),
            _mlp("v_head.summary.0", "v_head.summary.2"),
            set_config(vhead_num_neurons=1024),
            r"v_head\.summary\.0\.weight: got shape \(12, 16\)",
            config={"vhead_layer_type": "mlp", "vhead_num_neurons": 12, "vhead_num_layers": 1},
        ),
        Layout(
            "llama-factory",
            "LlamaForCausalLM",
            made(9, v_head__summary__weight=(1, HIDDEN), v_head__summary__bias=(1,)),
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
            add("reward_transform_matrix", 18, 18),
            r"reward_transform_matrix: got shape \(18, 18\)",
            config=_GATING,
        ),
        Layout(
            "qrm",
            "Gemma2ForRewardModelWithGating",
            _QRM,
            _qrm,
            drop("gating.layers.5.running_mean"),
            r"gating\.layers\.5\.running_mean",
            config={"num_objectives": 4, "num_quantiles": 3, "gating_hidden_dim": 8, "gating_n_hidden": 2},
            body="gemma2",
            tokenizer=gemma_tokenizer,
        ),
        Layout(
            "urm-gated",
            "LlamaForSequenceClassificationWithNormal_Weights",
            made(
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
            add("weights.fc.6.weight", 5, 5),
            r"weights\.fc\.6\.weight",
        ),
        Layout(
            "urm",
            "LlamaForSequenceClassificationWithNormal",
            made(11, score__weight=(10, HIDDEN)),
            _urm,
            add("score.weight", 8, HIDDEN),
            r"score\.weight: got shape \(8, 16\)",
        ),
        Layout(
            "ldl",
            "LDLRewardModel27B",
            made(
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
            made(13, regression_head__weight=(1, HIDDEN)),
            _last_linear("regression_head"),
            rename("model.", "base."),
            r"embed_tokens\.weight",
            text="Human: {prompt}\n\nAssistant: {response}",
            tokenizer=plain_tokenizer,
        ),
        Layout(
            "eurus",
            "EurusRewardModel",
            made(14, regression_head__weight=(1, HIDDEN)),
            _last_linear("regression_head"),
            set_config(reward_pooling="mean"),
            "reward_pooling",
            body="mistral",
            text="[INST] {prompt} [\\INST] {response}",
            tokenizer=plain_tokenizer,
        ),
        Layout(
            "internlm2",
            "InternLM2ForRewardModel",
            made(15, v_head__weight=(1, HIDDEN)),
            _last_linear("v_head"),
            lambda tiny: tiny.config.pop("reward_token_id"),
            "reward_token_id",
            finish=_fuse,
            end=_with_reward_token,
        ),
        Layout(
            "starling",
            "LlamaForSequenceClassification",
            made(16, v_head__weight=(1, HIDDEN)),
            _last_linear("v_head"),
            rename("v_head", "value"),
            r"score\.weight",
            config=_LABELS,
            prefix="transformer.",
        ),
        Layout(
            "beaver",
            "LlamaForScore",
            made(17, score_head__weight=(1, HIDDEN), score_head__bias=(1,)) | _NORMALIZER,
            _beaver,
            set_config(score_scale=2.0),
            "score_scale",
            config=_BEAVER | {"score_type": "reward", "do_normalize": True, "mean": [9.0], "var": [9.0]},
            text=_BEAVER_TEXT,
            tokenizer=plain_tokenizer,
            end=_with_eos,
        ),
        Layout(
            "beaver-cost",
            "LlamaForScore",
            made(18, score_head__weight=(1, HIDDEN), score_head__bias=(1,)) | _NORMALIZER,
            _beaver_cost,
            drop("score_head.weight"),
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
            drop("lm_head.weight"),
            r"lm_head\.weight",
            finish=lambda tiny: tiny.tensors.update(made(19, lm_head__weight=(tiny.config["vocab_size"], HIDDEN))),
            name="Llama-3.3-Nemotron-70B-Reward",
        ),
    )
}
