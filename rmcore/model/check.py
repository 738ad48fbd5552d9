"""Does rmcore score as the model's own code does? Tokens, padding, batches and shared prefixes, row by row.

The reference is the model's own forward pass on the tokenizer's own ids, one text at a time and unpadded: a
classifier's logit, else the states of the body, pooled here once more. Everything else is held against it: how rmcore
computes (one text, padded batches, packed prefix trees), and how the model's own code answers in padded batches, which
says how far rounding alone goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import RmcoreError, reject
from rmcore._base.prompt import Prompt, Response
from rmcore.model.agreement import SAMPLES, TokenDifference, comparable, token_difference
from rmcore.model.backbone import Backbone, Pooling
from rmcore.model.encoding.architecture import text_config
from rmcore.model.remote import ServerKind
from rmcore.model.reward_model import RewardModel
from rmcore.model.template_date import reads_clock
from rmcore.model.text import EncodedText, Segment
from rmcore.model.training_pairs import Preference

__all__ = ["CheckReport", "ParityRow", "check_model", "sample_preferences", "served"]

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Allowed difference of scores that are about 1; of larger ones as much more. Rounding alone, through some layers."""

_MOST_TEXTS = 16
"""Texts of one padded batch of the model's own."""


@dataclass(frozen=True)
class ParityRow:
    """One way to compute the scores, held against the reference.

    Attributes:
        name: the way.
        worst: greatest difference of a score, None where it was not asked.
        text: number of that text.
        decides: whether it counts for the verdict; the model's own batches do not.
        note: why it was not asked, or what there is to know.
    """

    name: str
    worst: float | None = None
    text: int = 0
    decides: bool = True
    note: str = ""


@dataclass
class CheckReport:
    """What :func:`check_model` found.

    Attributes:
        texts: how many were scored.
        largest: greatest reference score, in size.
        tolerance: the difference that is allowed.
        rows: the ways to compute.
        tokens: the first token that differs, and the number of its text; None if none does.
        compared: texts whose tokens could be asked of the tokenizer's own call.
        facts: about the template, the tokenizer and the model, by name.
    """

    texts: int
    largest: float
    tolerance: float
    rows: list[ParityRow] = field(default_factory=list)
    tokens: tuple[int, TokenDifference] | None = None
    compared: int = 0
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Same tokens, and no score of rmcore's further off than allowed."""
        off = [row for row in self.rows if row.decides and row.worst is not None and not row.worst <= self.tolerance]
        return self.tokens is None and not off

    def to_markdown(self) -> str:
        """Tables and the verdict."""
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.facts.items()), ""]
        lines += ["| scores against the model's own forward pass, one text at a time | worst difference | text |"]
        lines += ["|---|---:|---:|"]
        for row in self.rows:
            worst = "not asked" if row.worst is None else f"{row.worst:.1e}"
            name = f"{row.name} ({row.note})" if row.note else row.name
            lines.append(f"| {name} | {worst} | {'' if row.worst is None else row.text} |")
        told = "none" if self.tokens is None else f"text {self.tokens[0]}, {self.tokens[1].told}"
        lines += ["", f"First token that differs ({self.compared} of {self.texts} texts compared): {told}."]
        lines += [f"Scores are up to {self.largest:.3g}; allowed are {self.tolerance:.1e}.", ""]
        lines += [f"**{'PASS' if self.passed else 'FAIL'}**"]
        return "\n".join(lines)


def sample_preferences() -> list[Preference]:
    """Preferences for a model of which nobody brought any: they show template habits, and share prompts."""
    users = [(prompt, response) for prompt, response in SAMPLES if prompt[0]["role"] == "user"]  # type: ignore[index]
    return [
        Preference(prompt, response, other)
        for prompt, response in users
        for other in (f"{response} And more of it.", "I do not know.\n")
    ]


def check_model(
    model: RewardModel,
    preferences: Sequence[Preference] | None = None,
    *,
    tolerance: float | None = None,
    remote: Backbone | None = None,
) -> CheckReport:
    """Hold a model's scores against its own forward pass.

    Args:
        model: any that :meth:`RewardModel.from_pretrained` loads.
        preferences: texts like those it will score; None for :func:`sample_preferences`.
        tolerance: allowed difference of scores; None is a little more than the rounding of the model's dtype.
        remote: the same backbone with states from a server (:meth:`Backbone.from_server`), to be held against it too.

    Raises InputError for an empty list of preferences, or texts that the model cannot take.
    """
    items = sample_preferences() if preferences is None else preferences
    if not items:
        reject("preferences", "an empty list", "at least one pair")
    backbone = model.backbone
    asked: list[tuple[Prompt, tuple[Response, ...]]] = []
    for item in items:
        if model.mode == "difference":
            asked += [(item.prompt, (item.chosen,)), (item.prompt, (item.rejected,))]
        else:
            asked += [(item.prompt, (item.chosen, item.rejected)), (item.prompt, (item.rejected, item.chosen))]
    texts = [backbone.encoder.encode(prompt, *responses) for prompt, responses in asked]
    read = [k for k, text in enumerate(texts) if not text.unread]
    asked, texts = [asked[k] for k in read], [texts[k] for k in read]
    own = [_own_text(backbone, text, *answer) for text, answer in zip(texts, asked, strict=True)]
    reference = torch.cat([_own_scores(model, [text], "right") for text in own])
    largest = float(reference.abs().max())
    dtype = next(backbone.model.parameters()).dtype
    rounding = 5e-2 if backbone.quantised else _TOLERANCE.get(dtype, 5e-2)  # 8 bits depend on a batch's outliers
    allowed = rounding * max(1.0, largest) if tolerance is None else tolerance
    report = CheckReport(len(texts), largest, allowed, facts=_facts(backbone, asked[0]))
    for number, (prompt, responses) in enumerate(asked):
        if len(responses) == 1 and not texts[number].cut_tokens:
            report.compared += comparable(backbone.encoder, prompt, responses[0])
            found = token_difference(backbone.encoder, prompt, responses[0])
            if found is not None and report.tokens is None:
                report.tokens = (number, found)
    report.rows = [
        *_ways(model, texts, reference),
        *_own_ways(model, own, reference),
        *([] if remote is None else [_held("rmcore, states from the server", model, remote, texts, reference)]),
    ]
    return report


def served(backbone: Backbone, url: str, server: ServerKind = "vllm", **kwargs: Any) -> Backbone:
    """``backbone`` with states from a server that has the same model; raises as :meth:`Backbone.from_server`.

    Of a classifier the server gives the state of the last token, which is what enters the head of a decoder.
    """
    own = backbone.config
    pooling: Pooling = own.pooling if own.kind == "base" else "last"
    config = replace(own, name="", revision=None, kind="base", family=None, pooling=pooling)
    return Backbone.from_server(url, tokenizer=backbone.tokenizer, server=server, config=config, **kwargs)


def _ways(model: RewardModel, texts: list[EncodedText], reference: Tensor) -> list[ParityRow]:
    backbone = model.backbone
    padded = backbone.with_packing("padded")
    alone = torch.cat([padded.hidden([text]) for text in texts])
    rows = [_row("rmcore, one text a batch", model.row_scores(alone), reference)]
    rows.append(_held("rmcore, padded batches", model, padded, texts, reference))
    shared = backbone.with_packing("auto")
    row = _held("rmcore, shared prefixes", model, shared, texts, reference)
    told = shared.explain()
    if shared.stats.packed_tokens:
        note = f"{told.backend}: {shared.stats.computed_tokens} of {shared.stats.tokens} tokens computed"
    else:
        note = "; ".join(told.reasons.values()) if told.backend == "padded" else "these texts share too little"
        note = "one text a pass" if backbone.deterministic == "batch" else note
        row = ParityRow(row.name)
    return [*rows, ParityRow(row.name, row.worst, row.text, note=note)]


def _own_ways(model: RewardModel, own: Sequence[EncodedText], reference: Tensor) -> list[ParityRow]:
    rows = []
    for side in ("right", "left"):
        name = f"the model's own code, batches padded {side}"
        try:
            batches = [own[k : k + _MOST_TEXTS] for k in range(0, len(own), _MOST_TEXTS)]
            scores = torch.cat([_own_scores(model, batch, side) for batch in batches])
        except (RmcoreError, ValueError, RuntimeError, IndexError) as error:  # no padding token, say
            rows.append(ParityRow(name, decides=False, note=(str(error) or repr(error)).splitlines()[0][:120]))
            continue
        row = _row(name, scores, reference)
        rows.append(ParityRow(row.name, row.worst, row.text, decides=False))
    return rows


def _held(name: str, model: RewardModel, backbone: Backbone, texts: list[EncodedText], reference: Tensor) -> ParityRow:
    return _row(name, model.row_scores(backbone.hidden(texts)), reference)


def _row(name: str, scores: Tensor, reference: Tensor) -> ParityRow:
    apart = (scores.double().cpu() - reference).abs().nan_to_num(nan=torch.inf)
    return ParityRow(name, float(apart.max()), int(apart.argmax()))


# -- the model's own code --------------------------------------------------------------------------------------------


def _own_text(backbone: Backbone, text: EncodedText, prompt: Prompt, responses: tuple[Response, ...]) -> EncodedText:
    """A text of the tokenizer's own ids, where it has a call for that."""
    if len(responses) > 1 or text.cut_tokens or not comparable(backbone.encoder, prompt, responses[0]):
        return text
    ids = tuple(backbone.encoder.template_ids(prompt, responses[0]))
    return EncodedText((Segment("prompt", ids),), text.content_tokens)


def _own_scores(model: RewardModel, texts: Sequence[EncodedText], side: str) -> Tensor:
    """(N,) float64 scores by one forward pass over a padded batch."""
    backbone = model.backbone
    given = [backbone.input_ids(text) for text in texts]
    pad = text_config(backbone.model).pad_token_id
    if backbone.config.kind == "classifier" and pad is None and len(given) > 1:
        reject("padding token", "none", "one, for a batch")
    longest = max(map(len, given))
    ids = torch.full((len(given), longest), 0 if pad is None else int(pad))
    mask = torch.zeros_like(ids)
    places = [range(longest - len(one), longest) if side == "left" else range(len(one)) for one in given]
    for row, (one, place) in enumerate(zip(given, places, strict=True)):
        ids[row, place.start : place.stop] = torch.tensor(one)
        mask[row, place.start : place.stop] = 1
    inputs = backbone.model_inputs(ids.to(backbone.device), mask.to(backbone.device))
    with torch.inference_mode():
        if backbone.config.kind == "classifier":
            return backbone.model(**inputs).logits.double().mean(1).cpu()
        layer = backbone.config.layer
        found = backbone.model(**inputs, output_hidden_states=layer is not None)
        states = found.last_hidden_state if layer is None else found.hidden_states[layer]
        rows = [
            _pooled(backbone, states[row, p.start : p.stop], one)
            for row, (p, one) in enumerate(zip(places, given, strict=True))
        ]
        return model.row_scores(backbone.add_length_feature(torch.stack(rows), texts)).double().cpu()


def _pooled(backbone: Backbone, states: Tensor, ids: Sequence[int]) -> Tensor:
    """(h',) the pooled state of one text from the states (T, h) of its tokens."""
    if backbone.published is not None:
        found = states[torch.tensor(backbone.published.pooler.positions(list(ids)), device=states.device)]
        return backbone.published.head.rows(found[None])[0]
    if backbone.config.pooling == "mean":
        return states.float().mean(0)
    return states[-1 if backbone.config.pooling == "last" else 0].float()


# -- facts -----------------------------------------------------------------------------------------------------------


def _facts(backbone: Backbone, first: tuple[Prompt, tuple[Response, ...]]) -> dict[str, str]:
    tokenizer, encoder, config = backbone.tokenizer, backbone.encoder, backbone.config
    dtype = str(next(backbone.model.parameters()).dtype).removeprefix("torch.")
    facts = {
        "model": f"{type(backbone.model).__name__}, {dtype}"
        + (", quantised" if backbone.quantised else "")
        + (f", family {config.family}" if config.family else ""),
        "attention": backbone.attention[0] or "not told",
        "tokenizer": type(tokenizer).__name__,
        "texts": "rmcore's own form",
    }
    if encoder.follows_tokenizer(first[0]):
        facts["texts"] = (
            "tokenizer(prompt, response)" if not encoder.has_chat_template else "the tokenizer's chat template"
        )
    if encoder.has_chat_template:
        ids = encoder.template_ids("hello", "good")
        bos = tokenizer.bos_token_id
        count = 0 if bos is None else next((k for k, i in enumerate(ids) if i != bos), len(ids))
        trims = ids == encoder.template_ids("hello", " good\n")
        facts["template"] = f"{count} bos, {'trims' if trims else 'keeps'} spaces around a response"
        if reads_clock(tokenizer):
            facts["template"] += f", told that it is {config.date}"
        facts["special tokens in texts"] = "ordinary text" if config.split_special_tokens else "special tokens"
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    told = "none" if pad is None else f"{pad}{', the eos token' if pad == eos else ''}"
    beyond = pad is not None and backbone.rows is not None and pad >= backbone.rows
    facts["padding token"] = told + (", beyond the embedding" if beyond else "")
    facts["positions"] = "no limit" if backbone.positions is None else str(backbone.positions)
    return facts
