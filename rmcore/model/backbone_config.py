"""What decides a text's hidden state, as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

from rmcore._base.errors import reject
from rmcore._base.numbers import COUNT, Within, check_numbers
from rmcore.model.template_date import parse_date
from rmcore.model.text import OverlongPolicy, PairTemplate

__all__ = ["BackboneConfig", "Pooling"]

Pooling: TypeAlias = Literal["last", "mean", "first", "classifier", "reward"]

_OWN_POOLING = ("classifier", "reward")  # kinds that say themselves where their states are


@dataclass(frozen=True)
class BackboneConfig:
    """Everything that decides what a text's hidden state is, all of it JSON.

    Attributes:
        name: hub name or folder; empty when embedded in the model's own folder.
        revision: branch, tag or commit on the hub, None for the default branch and for folders. A loaded backbone
            has the commit here.
        gguf_file: a GGUF file of that folder or repository, whose weights are dequantised; the path of such a file as
            ``name`` is the same. Base models only, since the format has no place for a decoder's reward head.
        kind: ``base`` loads AutoModel, ``classifier`` AutoModelForSequenceClassification (an upgraded reward model),
            ``reward`` a published reward model of one of the families (:mod:`rmcore.model.families`).
        pooling: ``last`` token, ``mean`` of the tokens, ``first`` token ([CLS]), or the kind's name, ``classifier`` or
            ``reward``: the input of the reward model's own last linear layer.
        family: which family it is, exactly with kind ``reward``; of a classifier, how its outputs make a score.
        layer: pool the output of this layer (1 = first block) instead of the last hidden state; later layers are
            skipped.
        length_feature: appends one feature, length_feature · (log1p(content tokens) − 5), where not 0.
        max_length: most tokens of a text; None takes the model's position limit.
        overlong: policy for longer texts.
        chat, split_special_tokens: see :class:`rmcore.model.text.TextEncoder`.
        append_eos: end plain texts with eos; None does so for ``last`` pooling.
        single_template, pair_template: see :class:`rmcore.model.text.PairTemplate`. With the default a response to a
            model of BERT's kind is ``tokenizer(prompt, response)``, token types included. In a template of one's own
            what follows the first separator gets token type 1.
        date: YYYY-MM-DD, what a chat template that asks for the day is told; None takes the day the backbone is first
            loaded, which the loaded backbone has here.
    """

    name: str = ""
    revision: str | None = None
    kind: Literal["base", "classifier", "reward"] = "base"
    pooling: Pooling = "last"
    family: str | None = None
    layer: int | None = None
    length_feature: float = 0.0
    max_length: int | None = None
    overlong: OverlongPolicy = "error"
    chat: Literal["auto", "always", "never"] = "auto"
    split_special_tokens: bool = True
    append_eos: bool | None = None
    single_template: str = PairTemplate.single
    pair_template: str = PairTemplate.pair
    date: str | None = None
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("base", "classifier", "reward"):
            reject("kind", repr(self.kind), "'base', 'classifier' or 'reward'")
        if self.pooling not in ("last", "mean", "first", "classifier", "reward"):
            reject("pooling", repr(self.pooling), "last, mean, first, classifier or reward")
        if (self.kind in _OWN_POOLING or self.pooling in _OWN_POOLING) and self.pooling != self.kind:
            reject("pooling", self.pooling, f"the kind's name with kind='classifier' or 'reward' (it is {self.kind!r})")
        if (self.kind == "reward" and self.family is None) or (self.kind == "base" and self.family is not None):
            reject("family", self.family, f"one with kind='reward', none with kind='base' (it is {self.kind!r})")
        if self.gguf_file is not None and self.kind != "base":
            reject("gguf_file", repr(self.gguf_file), f"None with kind={self.kind!r}: a GGUF file has no reward head")
        check_numbers(self, COUNT, "layer", expected="a layer from 1 of a base model, or None")
        if self.layer is not None and self.kind != "base":
            reject("layer", self.layer, "a layer from 1 of a base model, or None")
        if not isinstance(self.split_special_tokens, bool):
            reject("split_special_tokens", repr(self.split_special_tokens)[:80], "true or false")
        check_numbers(self, Within(), "length_feature")
        check_numbers(self, COUNT, "max_length")
        if self.date is not None:
            parse_date(self.date)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, ``gguf_file`` only where there is one."""
        values = asdict(self)
        if self.gguf_file is None:
            del values["gguf_file"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneConfig:
        """From :meth:`to_dict`; an unknown key is rejected by name."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            reject("backbone config", f"unknown keys {sorted(unknown)}", "keys of BackboneConfig")
        return cls(**values)
