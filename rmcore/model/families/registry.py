"""The families there are. The first that claims a model has it, so the particular stand before the general.

Formats as of 2026-11: allenai/reward-bench (rewardbench/models), SGLang (llama_reward, qwen2_rm, internlm2_reward),
OpenRLHF (openrlhf/models/model.py), LLaMA-Factory, Safe RLHF, LLM-Blender, zankner/CLoud, and the models' own cards.
"""

from __future__ import annotations

from rmcore._base.errors import reject
from rmcore.model.families.spec import Append, Family, Gate, Head, Key, LastUnpadded, Match, Stack, Token

__all__ = ["FAMILIES", "family_of"]

_HIDDEN = Key("hidden_size")
_LM_HEAD = ("lm_head.weight",)
_ASSISTANT = Match(
    {
        "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
    }
)

_HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_ARMORM = (
    *(f"helpsteer-{name}" for name in _HELPSTEER),
    *("ultrafeedback-overall_score", "ultrafeedback-instruction_following", "ultrafeedback-truthfulness"),
    *("ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe", "prometheus-score"),
    *("argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style", "code-explanation"),
    *("code-instruction-following", "code-readability"),
)
"""The order of ArmoRM's card."""


def _turns(user: str, assistant: str, between: str) -> str:
    """A chat template of turns with these words before them, which are escaped as in a string of Jinja's."""
    return (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        f"{{{{ '{assistant}' + m['content'] }}}}{{% if not loop.last %}}{{{{ '{between}' }}}}{{% endif %}}"
        f"{{% else %}}{{{{ '{user}' + m['content'] }}}}{{% endif %}}{{% endfor %}}"
    )


_BEAVER = (
    "{{ bos_token + 'BEGINNING OF CONVERSATION: ' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' + m['content'] + eos_token }}{% else %}{{ 'USER: ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)

_PAIRRM = (
    "{% for m in messages %}{{ (sep_token if loop.index0 else '') + cls_token }}"
    "{{ ['<|source|>', '<|candidate1|>', '<|candidate2|>'][loop.index0] + m['content'] }}{% endfor %}{{ sep_token }}"
)
_RLHFLOW_PAIR = (
    "{% for m in messages %}{{ ['[CONTEXT] ', ' [RESPONSE A] ', ' [RESPONSE B] '][loop.index0] + m['content'] }}"
    "{% endfor %}{{ ' \\n' }}"
)

CLASSIFIER = Family(
    name="classifier",
    models=("Skywork/Skywork-Reward-V2-Qwen3-8B", "sfairXC/FsfairX-LLaMA3-RM-v0.1", "OpenAssistant/reward-model-*"),
    head=None,
    states=(LastUnpadded(),),
    shown="the class's own, one output",
    architectures=("*ForSequenceClassification",),
)

TWO_LABELS = Family(
    name="trl-two-labels",
    models=("models saved by TRL between #4577 and #5066",),
    head=None,
    states=(LastUnpadded(),),
    shown="the class's own, mean of two outputs that one loss trained",
    architectures=("*ForSequenceClassification",),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="openrlhf",
        models=("OpenRLHF/Llama-3-8b-rm-mixture", "OpenRLHF/Llama-3-8b-rm-700k"),
        head=Head(Stack(Key("value_head_prefix", "score"), also=("value_head",), bias=False), normaliser="mean-std"),
        shown="linear; (r - mean) / std where `normalize_reward`",
        architectures=("RewardModel",),
        keys=("value_head_prefix", "normalize_reward"),
        tensors=("value_head.weight",),
        ignored=_LM_HEAD,
        known=("mean", "std"),
        append=Append(),
    ),
    Family(
        name="grm",
        models=("Ray2333/GRM-Gemma2-2B-sftreg", "Ray2333/GRM-llama3-8B-distill"),
        head=Head(Stack("v_head.summary", bias=True)),
        shown="linear with bias",
        keys=("vhead_layer_type=linear",),
        ignored=_LM_HEAD,
        known=("vhead_num_neurons", "vhead_num_layers", "summary_dropout_prob"),
    ),
    Family(
        name="grm-mlp",
        models=("Ray2333/GRM-llama3-8B-sftreg",),
        head=Head(
            Stack(
                "v_head.summary.{}",
                depth=Key("vhead_num_layers", 1),
                hidden=Key("vhead_num_neurons", 1024),
                bias=True,
            )
        ),
        shown="MLP, ReLU",
        architectures=("GRewardModel",),
        keys=("vhead_layer_type=mlp",),
        tensors=("v_head.summary.0.weight",),
        ignored=_LM_HEAD,
        known=("summary_dropout_prob",),
    ),
    Family(
        name="llama-factory",
        models=("models of LLaMA-Factory's stage rm",),
        head=Head(Stack("v_head.summary", bias=True), dtype="float32"),
        shown="linear with bias, in `value_head.safetensors`",
        tensors=("v_head.summary.weight",),
        files=(("value_head.safetensors", ""),),
        ignored=_LM_HEAD,
    ),
    Family(
        name="inf-orm",
        models=("infly/INF-ORM-Llama3.1-70B",),
        head=Head(Stack("score.{}", depth=1, hidden=_HIDDEN, bias=True)),
        shown="MLP, ReLU",
        architectures=("INFORMForSequenceClassification",),
    ),
    Family(
        name="qwen-rm",
        models=("Qwen/Qwen2.5-Math-RM-72B", "Qwen/WorldPM-72B"),
        head=Head(Stack("score.{}", depth=1, hidden=_HIDDEN, bias=True)),
        shown="MLP, ReLU",
        architectures=("Qwen2ForRewardModel", "Qwen3ForRewardModel"),
        tensors=("score.0.weight", "score.2.weight"),
        ignored=_LM_HEAD,
        body_types={"qwen2_rm": "qwen2"},
    ),
    Family(
        name="qrm",
        models=("nicolinho/QRM-Llama3.1-8B", "nicolinho/QRM-Gemma-2-27B"),
        head=Head(
            Stack("regression_layer", out=None, bias=False),
            attributes="quantiles",
            per=Key("num_quantiles"),
            transform="reward_transform_matrix",
            weights=Gate(
                Stack(
                    "gating.layers.{}",
                    out=Key("num_objectives", 19),
                    depth=Key("gating_n_hidden", 3),
                    hidden=Key("gating_hidden_dim", 1024),
                    step=3,
                    norm=2,
                    bias=True,
                    hidden_bias=False,
                ),
                state=1,
                softmax=True,
                temperature=Key("gating_temperature", 10.0),
                scale="gating.logit_scale",
            ),
            dtype="float32",
            names=_ARMORM,
        ),
        states=(LastUnpadded(), _ASSISTANT),
        shown="mean of quantiles, transform matrix, gate with batch norm",
        keys=("num_quantiles",),
    ),
    Family(
        name="armorm",
        models=("RLHFlow/ArmoRM-Llama3-8B-v0.1",),
        head=Head(
            Stack("regression_layer", out=Key("num_objectives", 19), bias=False),
            transform="reward_transform_matrix",
            weights=Gate(
                Stack(
                    "gating.layers.{}",
                    out=Key("num_objectives", 19),
                    depth=Key("gating_n_hidden", 3),
                    hidden=Key("gating_hidden_dim", 1024),
                    bias=True,
                ),
                state=1,
                softmax=True,
                temperature=Key("gating_temperature", 10.0),
                scale="gating.logit_scale",
            ),
            names=_ARMORM,
        ),
        states=(LastUnpadded(), _ASSISTANT),
        shown="attributes, transform matrix, gate",
        architectures=("*ForRewardModelWithGating",),
        tensors=("regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"),
    ),
    Family(
        name="urm-gated",
        models=("LxzGordon/URM-LLaMa-3.1-8B",),
        head=Head(
            Stack("score", out=10, bias=False),
            attributes="normal",
            per=2,
            weights=Gate(Stack("weights.fc.{}", out=5, depth=2, hidden=_HIDDEN, activation="selu", bias=True)),
            names=_HELPSTEER,
        ),
        states=(LastUnpadded(),),
        shown="means of 5 normals, gate on the same state",
        architectures=("LlamaForSequenceClassificationWithNormal_Weights",),
        tensors=("score.weight", "weights.fc.0.weight"),
    ),
    Family(
        name="urm",
        models=("LxzGordon/URM-LLaMa-3-8B",),
        head=Head(
            Stack("score", out=10, bias=False),
            attributes="normal",
            per=2,
            weights=(0.3, 0.74, 0.46, 0.47, -0.33),
            names=_HELPSTEER,
        ),
        states=(LastUnpadded(),),
        shown="means of 5 normals, fixed weights",
        architectures=("LlamaForSequenceClassificationWithNormal",),
    ),
    Family(
        name="ldl",
        models=("ShikaiChen/LDL-Reward-Gemma-2-27B-v0.1",),
        head=Head(
            Stack("regression_layer.network.{}", out=None, depth=2, activation="leaky_relu", bias=True),
            attributes="bins",
            per=10,
            weights=Gate(
                Stack("gating_layer.network.{}", out=None, depth=2, activation="leaky_relu", step=3, bias=True),
                softmax=Key("softmax", False),
                temperature=Key("temperature", 1.0),
            ),
            dtype="float32",
        ),
        states=(LastUnpadded(),),
        shown="MLP to distributions over 10 bins, gate on the same state",
        architectures=("LDLRewardModel*",),
        tensors=("regression_layer.network.0.weight", "gating_layer.network.0.weight"),
        files=(("regression_layer.pt", "regression_layer."), ("gating_layer.pt", "gating_layer.")),
        body="",
        known=("num_objectives",),
    ),
    Family(
        name="eurus",
        models=("openbmb/Eurus-RM-7b",),
        head=Head(Stack("regression_head", bias=False)),
        shown="linear",
        architectures=("EurusRewardModel",),
        tensors=("regression_head.weight",),
        model_types=("mistral",),
        chat_template=_turns("[INST] ", " [\\\\INST] ", ""),
    ),
    Family(
        name="ultrarm",
        models=("openbmb/UltraRM-13b",),
        head=Head(Stack("regression_head", bias=False)),
        shown="linear",
        architectures=("LlamaRewardModel",),
        tensors=("regression_head.weight",),
        model_types=("llama",),
        chat_template=_turns("Human: ", "\\n\\nAssistant: ", "\\n\\n"),
    ),
    Family(
        name="internlm2",
        models=("internlm/internlm2-7b-reward", "internlm/internlm2-20b-reward"),
        head=Head(Stack("v_head", bias=False)),
        shown="linear, on an appended reward token",
        architectures=("InternLM2ForRewardModel",),
        body_types={"internlm2": "llama"},
        convert="internlm2",
        known=("bias", "attn_implementation"),
        append=Append(Key("reward_token_id")),
    ),
    Family(
        name="starling",
        models=("Nexusflow/Starling-RM-34B", "berkeley-nest/Starling-RM-7B-alpha"),
        head=Head(Stack("v_head", bias=False)),
        shown="linear",
        tensors=("transformer.embed_tokens.weight", "v_head.weight"),
        body="transformer.",
    ),
    Family(
        name="beaver-cost",
        models=("PKU-Alignment/beaver-7b-v1.0-cost",),
        head=Head(Stack("score_head", bias=Key("bias", False)), normaliser="beaver", sign=-1),
        shown="linear, minus the cost; normaliser where `do_normalize`",
        keys=("score_type=cost",),
        known=("score_dim", "bias", "do_normalize", "normalizer_type", "momentum", "mean", "var"),
        append=Append(),
        chat_template=_BEAVER,
    ),
    Family(
        name="beaver",
        models=("PKU-Alignment/beaver-7b-v1.0-reward",),
        head=Head(Stack("score_head", bias=Key("bias", False)), normaliser="beaver"),
        shown="linear; normaliser where `do_normalize`",
        keys=("score_type=reward",),  # nothing else tells it from a cost, whose sign is the other one
        known=("score_dim", "bias", "do_normalize", "normalizer_type", "momentum", "mean", "var"),
        append=Append(),
        chat_template=_BEAVER,
    ),
    Family(
        name="cloud",
        models=("ankner/Llama3-8B-CLoud-RM",),
        head=Head(
            Stack("reward_head.{}", depth=1, hidden=_HIDDEN, activation="tanh", parts=("dense", "out_proj"), bias=True)
        ),
        shown="MLP, tanh, behind a critique",
        architectures=("CLoudRewardModel",),
        tensors=("reward_head.dense.weight", "reward_head.out_proj.weight"),
        body="reward_base_model.model.",
        ignored=("reward_base_model.lm_head.weight",),
        language="reward_base_model.lm_head.weight",
        known=("feedback_method",),
        body_from="base_model_name_or_path",
    ),
    Family(
        name="nvidia-lm",
        models=("nvidia/Llama-3.3-Nemotron-70B-Reward", "nvidia/Llama-3.1-Nemotron-70B-Reward-HF"),
        head=Head(Stack("lm_head", out=None, bias=False, rows=((1.0, 0),), tied="model.embed_tokens.weight")),
        shown="logit of token 0",
        repositories=("*nemotron*reward*",),
    ),
    Family(
        name="pairrm",
        models=("llm-blender/PairRM-hf",),
        head=Head(
            Stack(
                "head_layer.{}",
                out=Key("n_tasks", 1),
                depth=1,
                hidden=_HIDDEN,
                activation="tanh",
                start=1,
                step=3,
                bias=True,
            ),
            terms=((1, (0, 1)), (-1, (0, 2))),
            weights="mean",
        ),
        states=(
            Token(Key("source_prefix_id"), "<|source|>"),
            Token(Key("cand1_prefix_id"), "<|candidate1|>"),
            Token(Key("cand2_prefix_id"), "<|candidate2|>"),
        ),
        shown="MLP, tanh, on prompt and candidate; first less second",
        architectures=("DebertaV2PairRM",),
        tensors=("head_layer.1.weight", "head_layer.4.weight"),
        body="pretrained_model.",
        known=("cand_prefix_id", "drop_out"),
        chat_template=_PAIRRM,
        pair_form="pairrm",
        pairwise=True,
        ranked=True,
    ),
    Family(
        name="rlhflow-pair",
        models=("RLHFlow/pair-preference-model-LLaMA3-8B",),
        head=Head(
            Stack("lm_head", out=None, bias=False, rows=((1.0, "A"), (-1.0, "B")), tied="model.embed_tokens.weight")
        ),
        shown="logit of `A` less that of `B`; mean of both orders' probabilities",
        repositories=("*pair-preference-model*",),
        chat_template=_RLHFLOW_PAIR,
        user_turn=True,
        pair_form="turns",
        pairwise=True,
        order_mean="probabilities",
    ),
    TWO_LABELS,
    CLASSIFIER,
)


def family_of(name: str) -> Family:
    """The family called ``name``; raises InputError for one there is not."""
    found = {family.name: family for family in FAMILIES}.get(name)
    if found is None:
        reject("family", repr(name), f"one of {', '.join(sorted(family.name for family in FAMILIES))}")
    return found
