"""Tiny tokenizers and models made on the spot, a head whose numbers can be done by hand, and judges that misbehave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from rmcore.head import FrozenHead, HeadConfig, SNGPHead
from rmcore.head.posterior import Posterior
from rmcore.judge.base import Pair, Verdict
from rmcore.model import Preference, RewardModel
from rmcore.model.backbone import Backbone, BackboneConfig

CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs home",
    "a good answer is short, correct and polite; a bad answer is long and wrong",
    "what is the capital of France? Paris is the capital of France.",
    "user assistant system Response A Response B ### \n\n numbers 0 1 2 3 4 5 6 7 8 9",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen's: a default system prompt, a last assistant turn that is treated apart. As Mistral's: roles must alternate.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a good model.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.last %}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "{{ message['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}</s>{% endif %}{% endfor %}"
)
DROPS_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


def _wrap(tokenizer: Tokenizer, **kwargs: Any) -> Any:
    import transformers  # seconds, which a process that runs no model need not pay

    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


# Vocabularies are built, not trained: the trainers break ties by hash order, which differs from run to run.
def _byte_level(specials: list[str]) -> Tokenizer:
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted({word for line in CORPUS for word, _ in cutter.pre_tokenize_str(line)})
    merges = list(dict.fromkeys((word[:k], word[k]) for word in words for k in range(1, len(word))))
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _bert_tokenizer() -> Any:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    cutter = pre_tokenizers.BertPreTokenizer()
    words = sorted({word.lower() for line in CORPUS for word, _ in cutter.pre_tokenize_str(line)})
    letters = sorted({letter for word in words for letter in word})
    tokens = dict.fromkeys([*specials, *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {token: k for k, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return _wrap(
        tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _llama_tokenizer(chat_template: str | None = None) -> Any:
    tokenizer = _byte_level(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = _wrap(tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = chat_template
    return wrapped


def _chatml_tokenizer(chat_template: str | None = CHATML) -> Any:
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    wrapped = _wrap(tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    wrapped.chat_template = chat_template
    return wrapped


def _roberta_tokenizer() -> Any:
    tokenizer = _byte_level(["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return _wrap(tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bert": _bert_tokenizer,
    "llama": _llama_tokenizer,
    "mistral": lambda: _llama_tokenizer(MISTRAL),
    "chatml": _chatml_tokenizer,
    "qwen": lambda: _chatml_tokenizer(QWEN),
    "drops-system": lambda: _chatml_tokenizer(DROPS_SYSTEM),
    "no-template": lambda: _chatml_tokenizer(None),
    "roberta": _roberta_tokenizer,
}


@pytest.fixture(scope="session")
def tokenizer_for() -> Callable[[str], Any]:
    """A tokenizer by name, made once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = TOKENIZERS[name]()
        return made[name]

    return get


def _model(kind: str, tokenizer: Any, **overrides: Any) -> Any:
    import transformers as t

    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    common |= {"intermediate_size": 48, "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 256}
    common |= {"attn_implementation": "sdpa"}
    decoder = {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, **common}
    torch.manual_seed(0)
    if kind == "bert":
        return t.BertModel(t.BertConfig(**common | overrides)).eval()
    if kind == "llama":
        return t.LlamaModel(t.LlamaConfig(**decoder | overrides)).eval()
    if kind == "qwen2":
        return t.Qwen2Model(t.Qwen2Config(**decoder | overrides)).eval()
    if kind == "qwen3":
        return t.Qwen3Model(t.Qwen3Config(**decoder | {"head_dim": 8} | overrides)).eval()
    if kind == "bert-classifier":
        model = t.BertForSequenceClassification(t.BertConfig(**{"num_labels": 1} | common | overrides))
    elif kind == "llama-classifier":
        model = t.LlamaForSequenceClassification(t.LlamaConfig(**{"num_labels": 1} | decoder | overrides))
    elif kind == "roberta":
        return t.RobertaModel(t.RobertaConfig(**common | overrides)).eval()
    else:
        model = t.RobertaForSequenceClassification(t.RobertaConfig(**{"num_labels": 1} | common | overrides))
    # Scores as far apart as a trained reward model's, a bias that is not zero.
    for linear in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        torch.nn.init.normal_(linear.weight, std=0.2)
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias, std=0.2)
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(kind, tokenizer, **config)``: a small random model, always the same."""
    return _model


@pytest.fixture(scope="session")
def make_backbone(tokenizer_for) -> Callable[..., Backbone]:
    """``make_backbone(kind, tokenizer=..., model={...}, tokens_per_batch=..., **config)``."""
    usual = {"bert": "bert", "qwen2": "chatml", "qwen3": "qwen", "roberta": "roberta"}

    def make(
        kind: str,
        *,
        tokenizer: str = "",
        model: dict[str, Any] | None = None,
        tokens_per_batch: int = 8192,
        packing: Any = "auto",
        **config: Any,
    ) -> Backbone:
        base = kind.removesuffix("-classifier")
        chosen = tokenizer_for(tokenizer or usual.get(base, "llama"))
        if kind.endswith("classifier"):
            config = {"kind": "classifier", "pooling": "classifier", **config}
        return Backbone(
            _model(kind, chosen, **model or {}),
            chosen,
            BackboneConfig(**config),
            tokens_per_batch=tokens_per_batch,
            packing=packing,
        )

    return make


def own_inputs(backbone: Backbone, text: Any) -> dict[str, Tensor]:
    """A text as transformers' model takes it, alone: ids and, of BERT's two texts, the types the tokenizer gives."""
    ids = torch.tensor([text.ids])
    if backbone.model.config.model_type != "bert":
        return {"input_ids": ids}
    behind = (ids == backbone.tokenizer.sep_token_id).long().cumsum(1).roll(1, 1)
    behind[:, 0] = 0
    return {"input_ids": ids, "token_type_ids": behind.clamp(max=1)}


# -- a head to do by hand --------------------------------------------------------------------------------------------


def _hand_head(
    beta: Sequence[float], mode: str = "difference", *, ridge: float = 1.0, amplitude: float = 3.0, beta0: float = 0.0
) -> FrozenHead:
    config = HeadConfig(len(beta), mode=mode, features="linear", ridge=ridge, amplitude=amplitude)
    feature_map = SNGPHead(config).freeze_features(torch.float32)
    return FrozenHead(config, feature_map, torch.tensor(beta), beta0, Posterior(len(beta), ridge=ridge))


@pytest.fixture(scope="session")
def hand_head() -> Callable[..., FrozenHead]:
    """φ = x, nothing learnt: g = β·x, v = ‖x‖² / ridge, u = √(1 + amplitude · v)."""
    return _hand_head


class TableText(tuple[str, ...]):
    """Texts that stand in for an encoded one."""

    __slots__ = ()
    unread = False

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(map(str, self))

    @property
    def equal_responses(self) -> bool:
        return len(self) == 3 and self[1] == self[2]


class TableModel(RewardModel):
    """A reward model whose backbone is a table from text to hidden state."""

    def __init__(self, head: FrozenHead, table: Callable[..., Sequence[float]]) -> None:
        self.head = head
        self.backbone: Any = SimpleNamespace(tokens_per_batch=8192, deterministic=None, tells_spread=False)
        self.estimators = {}
        self.table = table

    def encode_group(self, prompt, responses, *, orders="both", limit=None, compared=None) -> list[Any]:
        """Tuples of texts stand in for encoded texts: their length, 2 or 3, counts as tokens."""
        if self.mode == "difference":
            return [TableText((prompt, a)) for a in responses]
        numbers = range(len(responses))
        ordered = itertools.permutations(numbers, 2) if orders == "both" else itertools.combinations(numbers, 2)
        wanted = None if compared is None else {tuple(pair) for pair in compared(len(responses)).tolist()}
        there = [(i, j) for i, j in ordered if wanted is None or (min(i, j), max(i, j)) in wanted]
        return [TableText((prompt, responses[i], responses[j])) for i, j in there]

    def hidden_rows(self, groups, *, progress=None, stats=None) -> Tensor:
        rows: list[Any] = []
        for group in groups:
            rows += [self.table(*text) for text in group]
            if progress is not None:
                progress("encoding", len(rows), sum(map(len, groups)))
        if stats is not None:
            stats.texts += len(rows)
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), self.head.config.hidden_size)


@pytest.fixture(scope="session")
def table_model() -> type[TableModel]:
    return TableModel


# -- judges ----------------------------------------------------------------------------------------------------------


class ScriptedJudge:
    """Answers by a function of the pair, and remembers what it was asked."""

    def __init__(self, answer: Callable[[Pair], Any]) -> None:
        self.answer = answer
        self.calls: list[list[Pair]] = []

    async def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        self.calls.append(list(pairs))
        return [self.answer(pair) for pair in pairs]

    @property
    def asked(self) -> list[tuple[str, str]]:
        return [(pair.first, pair.second) for call in self.calls for pair in call]


@pytest.fixture(scope="session")
def scripted_judge() -> type[ScriptedJudge]:
    return ScriptedJudge


# -- preferences -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def preferences() -> list[Preference]:
    """Trivially learnable: the better response says "good", the worse one "bad"."""
    nouns = ["dog", "fox", "answer", "model", "capital", "number", "home", "user"]
    return [
        Preference(f"tell me about the {noun} {k}", f"a good {noun} is {tail}", f"a bad {noun} is {tail}")
        for k, noun in enumerate(nouns)
        for tail in ("quick", "the lazy brown one", "short and polite")
    ]
