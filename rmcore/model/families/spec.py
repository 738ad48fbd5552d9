"""How a family of published reward models is written down: which states are pooled, which tensors play which part.

A :class:`Family` is data. :mod:`rmcore.model.families.registry` holds all of them,
:class:`rmcore.model.families.head.RewardHead` computes what they say, and the table of the documentation is written
from them.

Every family's score has one form. The pooled states (n, S, h) enter a stack of linear layers, whose last one's input is
the feature φ; its outputs become attributes, and the attributes a score by fixed weights or by a gate. Where the score
is linear in φ it is β·φ + β₀, and nothing more is needed; elsewhere it is known as a number r beside φ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeAlias

from rmcore._base.errors import CheckpointError
from rmcore.ops.reference import OrderMean

__all__ = [
    "Activation",
    "Append",
    "Family",
    "Gate",
    "Head",
    "Key",
    "Last",
    "LastUnpadded",
    "Match",
    "Pool",
    "Size",
    "Stack",
    "Token",
]

Activation: TypeAlias = Literal["relu", "selu", "tanh", "leaky_relu"]


@dataclass(frozen=True)
class Key:
    """A value that ``config.json`` gives; ``default`` where it does not, None for a key that must be there."""

    name: str
    default: Any = None

    def of(self, config: Mapping[str, Any]) -> Any:
        """The value. Raises CheckpointError where a configuration lacks one that has no default."""
        value = config.get(self.name, self.default)
        if value is None:
            raise CheckpointError(f"config.json: got no {self.name!r}, which says how the reward model's head is made")
        return value


Size: TypeAlias = "int | Key | None"
"""A width: a number, one that the configuration gives, or None for what the tensors say."""


# -- which states ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Last:
    """The last token that is attended to."""

    def __str__(self) -> str:
        return "last token"


@dataclass(frozen=True)
class LastUnpadded:
    """The last token whose id is not the padding token's, as transformers' classifiers of decoders read it."""

    def __str__(self) -> str:
        return "last token that is not the padding token"


@dataclass(frozen=True)
class Match:
    """The first token of the last place where a text's tokens are, by the model type of the body."""

    texts: Mapping[str, str]

    def __str__(self) -> str:
        return "token before the assistant's last turn"


@dataclass(frozen=True)
class Token:
    """The token whose id the configuration gives."""

    key: Key
    name: str

    def __str__(self) -> str:
        return f"`{self.name}`"


Pool: TypeAlias = "Last | LastUnpadded | Match | Token"


@dataclass(frozen=True)
class Append:
    """What every text ends with: the token of a configuration key, or with None the end of sequence."""

    key: Key | None = None


# -- which tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Linear layers, all but the last with an activation behind them. The last one's input is φ.

    Attributes:
        name: of the layers' tensors, without ``.weight``. ``{}`` stands for the place in the original's module list;
            without it there is the one layer of that name.
        out: outputs of the last layer.
        depth: layers before the last.
        hidden: their outputs.
        parts: what stands in place of ``{}`` for each layer; otherwise multiples of ``step``, after ``start``.
        norm: batch normalisation behind each hidden activation, this many places after its linear layer.
        bias: whether the last layer has one; the configuration may say, and None takes it where there is one.
        hidden_bias: likewise of the others.
        rows: which outputs are taken, and with what factor, of a language model's head: a number or a token's text.
        tied: name of the tensor that stands in for a missing weight where the configuration ties embeddings.
        also: other names, where the configuration does not give the one it could.
    """

    name: str | Key
    out: Size = 1
    depth: int | Key = 0
    hidden: Size = None
    activation: Activation = "relu"
    start: int = 0
    step: int = 2
    parts: tuple[str, ...] = ()
    norm: int | None = None
    bias: bool | Key | None = None
    hidden_bias: bool | None = True
    rows: tuple[tuple[float, int | str], ...] = ()
    tied: str = ""
    also: tuple[str, ...] = ()

    def names(self, config: Mapping[str, Any], present: Collection[str] = ()) -> list[str]:
        """The layers' names in order, given the tensors there are."""
        name = self.name if isinstance(self.name, str) else str(self.name.of(config))
        if isinstance(self.name, Key) and self.name.name not in config and f"{name}.weight" not in present:
            name = next((other for other in self.also if f"{other}.weight" in present), name)
        depth = self.depth if isinstance(self.depth, int) else int(self.depth.of(config))
        places = self.parts or tuple(str(self.start + self.step * k) for k in range(depth + 1))
        return [name.replace("{}", place) for place in places] if "{}" in name else [name]


@dataclass(frozen=True)
class Gate:
    """Attribute weights w(x) from a pooled state.

    Attributes:
        stack: its layers.
        state: which of the family's states enters.
        softmax: whether the weights are a softmax of the outputs, or the configuration's word for it.
        temperature: divides the outputs first, where there is a softmax.
        scale: a tensor of one number, which multiplies the weights.
    """

    stack: Stack
    state: int = 0
    softmax: bool | Key = False
    temperature: float | Key = 1.0
    scale: str = ""


@dataclass(frozen=True)
class Head:
    """From pooled states to a score.

    Attributes:
        values: the layers.
        terms: sums of (sign, states put side by side) that enter the layers; ((1, (0,)),) is the first state alone.
        attributes: what the outputs are. ``outputs``: the attributes themselves. ``normal``: means and log standard
            deviations in turn. ``quantiles``: ``per`` of them an attribute, whose mean counts. ``bins``: ``per``
            logits an attribute, of which a softmax makes a distribution over [0, 1].
        per: outputs an attribute.
        transform: a tensor (attributes, attributes) that the attributes are multiplied by from the right.
        weights: fixed ones, ``mean``, a gate, or None for the one attribute there is.
        normaliser: ``mean-std`` is OpenRLHF's, ``beaver`` that of Safe RLHF.
        sign: −1 where less is better.
        dtype: arithmetic of the head: the body's, or float32 where the original computes it so.
        names: of the attributes, where a model has as many.
    """

    values: Stack
    terms: tuple[tuple[int, tuple[int, ...]], ...] = ((1, (0,)),)
    attributes: Literal["outputs", "normal", "quantiles", "bins"] = "outputs"
    per: int | Key = 1
    transform: str = ""
    weights: tuple[float, ...] | Literal["mean"] | Gate | None = None
    normaliser: Literal["", "mean-std", "beaver"] = ""
    sign: Literal[1, -1] = 1
    dtype: Literal["body", "float32"] = "body"
    names: tuple[str, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether the score is linear in φ with weights that no state decides."""
        return self.attributes != "bins" and not isinstance(self.weights, Gate)


@dataclass(frozen=True)
class Family:
    """One format.

    Attributes:
        name: what ``family=`` and ``--family`` take.
        models: published examples.
        head: from states to score; None where transformers' own classifier class has it.
        states: the states that are pooled, in the order ``head`` counts them.
        shown: the head in a few words, for tables.
        status: what has been shown of it, for tables.
        architectures: patterns of ``config.json``'s ``architectures`` that are this family's.
        keys: configuration keys that are this family's alone, or ``key=value``: one that is there decides.
        tensors: tensors (patterns) that decide where architecture and keys do not.
        model_types: the bodies of which those tensors decide; empty for any.
        repositories: patterns of the model's own name, in lower case, where nothing in the files tells it from a
            language model.
        body: prefix of the body's tensors; models saved without it are read too.
        files: further files with tensors: (name, prefix of its tensors). ``.pt`` files are read with weights_only.
        ignored: patterns of tensors that the score does not use.
        language: the language model's output weights, which write what the score is read behind (CLoud's critiques).
        known: configuration keys that the family reads or that change nothing.
        body_types: model types of ``config.json`` that stand for one of transformers'.
        body_from: configuration key with the folder or hub name that has the body's configuration.
        convert: a layout of the body's tensors that has to be rewritten.
        append: what every text ends with.
        chat_template: of a tokenizer that has none, or, of a pairwise family, of every one. A pair is three messages
            then: what was said so far, and the two responses.
        user_turn: the chat template is the content of a single user turn of the tokenizer's own one, without a further
            start of sequence.
        pairwise: scores a pair, not a response.
        order_mean: of a pairwise family, what its authors average over the two orders of a pair.
        ranked: of a pairwise family, whether they give each response of a group a score, the mean of its pairs'.
        pair_form: how a conversation becomes those three texts (:mod:`rmcore.model.families.pairs`).
    """

    name: str
    models: tuple[str, ...]
    head: Head | None
    shown: str
    states: tuple[Pool, ...] = (Last(),)
    status: str = "tiny models in its layout"
    architectures: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()
    body: str = "model."
    files: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    language: str = ""
    known: tuple[str, ...] = ()
    body_types: Mapping[str, str] = field(default_factory=dict)
    body_from: str = ""
    convert: Literal["", "internlm2"] = ""
    append: Append | None = None
    chat_template: str = ""
    user_turn: bool = False
    pairwise: bool = False
    order_mean: OrderMean = "logits"
    ranked: bool = False
    pair_form: Literal["", "pairrm", "turns"] = ""

    @property
    def read_keys(self) -> set[str]:
        """Configuration keys that say something to this family."""
        own = {key.partition("=")[0] for key in self.keys}
        return {*own, *self.known, self.body_from, *_keys_in((self.head, self.states, self.append))}


def _keys_in(value: Any) -> set[str]:
    if isinstance(value, Key):
        return {value.name}
    if is_dataclass(value):
        value = tuple(getattr(value, f.name) for f in fields(value))
    return set().union(*map(_keys_in, value)) if isinstance(value, tuple) else set()
