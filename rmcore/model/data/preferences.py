"""Preferences in the forms that people have them: each form is a name, the columns that tell it, and a reader.

A reader gives ``(prompt, better, worse, probability)`` as the row has them; what prompts and responses may be is
:mod:`rmcore._base.prompt`'s matter. Forms that hold no pairs are known too, to be refused by name.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

from rmcore._base.errors import InputError, reject
from rmcore._base.prompt import canonical_prompt, canonical_response, says_nothing
from rmcore.model.data.conversations import is_whole, split_conversations, with_roles
from rmcore.model.data.critiques import COLUMNS as CRITIQUE_COLUMNS
from rmcore.model.data.critiques import critiques_of_preference
from rmcore.model.training_pairs import Preference

__all__ = ["COLUMNS", "FORMS", "SUBSETS", "parse_preference", "parse_preferences", "says_otherwise", "unused_columns"]

Pair: TypeAlias = tuple[Any, Any, Any, float]


@dataclass(frozen=True)
class Form:
    """A form of preference data: it is a row's if all ``columns`` hold something."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Iterable[Pair]]


def parse_preference(value: Mapping[str, Any]) -> Preference:
    """The preference of a row that holds one; raises InputError saying which key is wrong."""
    found = parse_preferences(value)
    if len(found) != 1:
        raise InputError(f"chosen, rejected: got {len(found)} pairs, expected one. parse_preferences gives them all")
    return found[0]


def parse_preferences(value: Mapping[str, Any], *, critiques: bool = False) -> list[Preference]:
    """The preferences of one row, in any of :data:`FORMS`, their critiques too where asked for
    (:mod:`rmcore.model.data.critiques`); raises InputError saying which key is wrong.
    """
    form = _form_of(value)
    said = critiques_of_preference(value) if critiques else None
    for name in _MEDIA:
        if not says_nothing(value.get(name)):
            reject(name, "images, video or sound", "text only: what a response is about would be left out")
    found = [
        Preference(
            canonical_prompt(with_roles(prompt)),
            canonical_response(with_roles(better, "chosen"), "chosen"),
            canonical_response(with_roles(worse, "rejected"), "rejected"),
            probability,
            critiques=said,
        )
        for prompt, better, worse, probability in form.read(value)
    ]
    if said is not None and len(found) > 1:
        reject("critiques", f"those of one pair in a row of {len(found)} pairs", "a row a pair")
    return found


def unused_columns(value: Mapping[str, Any]) -> list[str]:
    """Columns of a row that say how much better a response is, or more about the prompt, and are not used."""
    read = {*_form_of(value).columns, "label"}
    found = [
        name
        for name, said in value.items()
        if isinstance(name, str)
        and name not in read
        and (_STRENGTH.search(name) or _CHOICE.search(name))
        and not says_nothing(said)
    ]
    found += [name for name in ("tools", "chat_template_kwargs") if not says_nothing(value.get(name))]
    return found + (["label"] if isinstance(value.get("label"), str) else [])


_STRENGTH = re.compile(
    r"(?:^|[_\-. ])(?:margins?|scores?|ratings?|rewards?|weights?|confidence|strength|probability|prob|probs)"
    r"(?:$|[_\-. ])",
    re.IGNORECASE,
)
"""Names of columns that say how much better a response is, such as margin, score_chosen and chosen-rating."""
_CHOICE = re.compile(
    r"(?:^|[_\-. ])(?:winner|preferred|preference|better|best|swapped|flipped|verdict|choice)(?:$|[_\-. ])",
    re.IGNORECASE,
)
"""Names of columns that say which response is better, beside chosen and rejected, which do."""


def says_otherwise(value: Mapping[str, Any]) -> str:
    """The columns of a row that say in numbers that rejected is better; empty where none do."""
    for chosen, rejected in _SCORES:
        pair = _number(value.get(chosen)), _number(value.get(rejected))
        if pair[0] is not None and pair[1] is not None and pair[0] < pair[1]:
            return f"{chosen} and {rejected}"
    margin = _number(value.get("margin"))
    return "margin" if margin is not None and margin < 0 else ""


_SCORES = [
    names
    for word in ("score", "rating", "reward")
    for names in ((f"{word}_chosen", f"{word}_rejected"), (f"chosen_{word}", f"rejected_{word}"))
] + [("chosen-rating", "rejected-rating"), ("score_w", "score_l")]
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def _form_of(value: Mapping[str, Any]) -> Form:
    for form in FORMS:
        if all(value.get(name) is not None for name in form.columns):
            return form
    if "chosen" in value or "rejected" in value:
        return _TRL
    for names, what in _NO_PAIRS.items():
        if all(name in value for name in names):
            raise InputError(f"chosen: missing; the row is {what}")
    raise InputError(
        f"chosen: missing; expected keys prompt, chosen, rejected (found {sorted(map(str, value))[:12]}), or the form "
        f"of {', '.join(dict.fromkeys(form.name for form in FORMS if form is not _TRL))}. Other names can be mapped: "
        "--columns prompt=question chosen=good"
    )


# -- readers ---------------------------------------------------------------------------------------------------------


def _chosen_rejected(value: Mapping[str, Any]) -> Iterator[Pair]:
    for key in ("chosen", "rejected"):
        if key not in value:
            raise InputError(f"{key}: missing; expected keys prompt, chosen, rejected (found {sorted(value)[:8]})")
    prompt, chosen, rejected = value.get("prompt"), value["chosen"], value["rejected"]
    yield from _several(prompt, chosen, rejected, _probability(value))


def _several(prompt: Any, chosen: Any, rejected: Any, probability: float) -> Iterator[Pair]:
    """One pair, or where both are lists of responses (RewardBench 2) every chosen one with every rejected one."""
    given = {"chosen": chosen, "rejected": rejected}
    for name, value in given.items():
        if isinstance(value, (list, tuple)) and not value:
            reject(name, "an empty list", "a response, or at least one in a list of them")
    lists = [name for name, value in given.items() if _is_list_of_responses(value)]
    if len(lists) == 1:
        other = "rejected" if lists[0] == "chosen" else "chosen"
        reject(lists[0], f"a list of responses beside one response in {other}", "lists in both, or a response in both")
    if lists:
        for better, worse in itertools.product(chosen, rejected):
            yield (*split_conversations(prompt, better, worse), probability)
    else:
        yield (*split_conversations(prompt, chosen, rejected), probability)


def _is_list_of_responses(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, (str, list, tuple)) for item in value)
    )


def _openai(value: Mapping[str, Any]) -> Iterator[Pair]:
    given = value["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        reject("input", type(given).__name__, "an object with messages")
    yield given["messages"], value["preferred_output"], value["non_preferred_output"], _probability(value)


def _ranked(value: Mapping[str, Any]) -> Iterator[Pair]:
    """NeMo RL: completions with ranks, the lowest is the best; equal ranks are an even pair."""
    completions = value["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        reject("completions", type(completions).__name__, "a list of at least two, each with a rank and a completion")
    for k, item in enumerate(completions):
        if not isinstance(item, Mapping) or "completion" not in item:
            reject(f"completions[{k}]", type(item).__name__, "an object with a rank and a completion")
        rank = item.get("rank")
        if _number(rank) is None:
            reject(f"completions[{k}].rank", repr(rank)[:40], "a finite number, the lowest for the best")
    for one, other in itertools.combinations(completions, 2):
        better, worse = (one, other) if one["rank"] <= other["rank"] else (other, one)
        even = one["rank"] == other["rank"]
        yield value["context"], better["completion"], worse["completion"], 0.5 if even else 1.0


def _swift(value: Mapping[str, Any]) -> Iterator[Pair]:
    """ms-swift: a conversation with the better answer at its end, and the worse one or a whole conversation beside."""
    messages = with_roles(value["messages"], "messages")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        reject("messages", type(messages).__name__, "a list of messages")
    if value.get("rejected_messages") is not None:
        yield (*split_conversations(None, messages, value["rejected_messages"]), _probability(value))
        return
    # The answer is what follows the last question, tool calls and all.
    size = max((k for k, message in enumerate(messages) if message.get("role") in ("user", "system")), default=-1) + 1
    if not 0 < size < len(messages):
        reject("messages", f"{len(messages)} without a question and an answer", "a question, then the chosen answer")
    rejected = value["rejected_response"]
    for worse in rejected if _is_list_of_responses(rejected) else [rejected]:
        yield messages[:size], messages[size:], worse, _probability(value)


def _sharegpt(value: Mapping[str, Any]) -> Iterator[Pair]:
    turns = value["conversations"]
    if not isinstance(turns, list):
        reject("conversations", type(turns).__name__, "a list of turns")
    yield _with_system(value, turns), value["chosen"], value["rejected"], _probability(value)


def _alpaca(value: Mapping[str, Any]) -> Iterator[Pair]:
    parts = [part for part in (value["instruction"], value.get("input")) if part]
    if not all(isinstance(part, str) for part in parts):
        reject("instruction", "no text", "text")
    turns: list[Any] = []
    for k, turn in enumerate(value.get("history") or []):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            reject(f"history[{k}]", type(turn).__name__, "a list of a question and its answer")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = {"role": "user", "content": "\n".join(parts)}
    yield _with_system(value, [*turns, question]), value["chosen"], value["rejected"], _probability(value)


def _orca(value: Mapping[str, Any]) -> Iterator[Pair]:
    turns = [{"role": "user", "content": value["question"]}]
    yield from _several(_with_system(value, turns), value["chosen"], value["rejected"], _probability(value))


def _before(column: str) -> Callable[[Mapping[str, Any]], Iterator[Pair]]:
    """A reader of rows whose prompt, a text or messages, stands in another column, unless the responses hold it."""

    def read(value: Mapping[str, Any]) -> Iterator[Pair]:
        prompt = with_roles(value[column], column)
        if any(is_whole(with_roles(value[name], name)) for name in ("chosen", "rejected")):
            prompt = None
        elif isinstance(prompt, list) or (value.get("system") and prompt):
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            prompt = _with_system(value, turns)
        yield from _several(prompt or None, value["chosen"], value["rejected"], _probability(value))

    return read


def _argilla(value: Mapping[str, Any]) -> Iterator[Pair]:
    named = {**value, "chosen": value["chosen_response"], "rejected": value["rejected_response"]}
    yield from _alpaca(named)


def _with_system(value: Mapping[str, Any], turns: list[Any]) -> list[Any]:
    system = value.get("system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _two(first: str, second: str, prompt: str | None, verdict: str, better: Mapping[Any, float | None]) -> Any:
    """A reader of rows with two responses and a column that says which is better, by what it may hold."""

    def read(value: Mapping[str, Any]) -> Iterator[Pair]:
        said = value[verdict]
        if isinstance(said, bool) or not isinstance(said, (str, int)) or said not in better:
            reject(verdict, repr(said)[:40], f"one of {', '.join(map(repr, better))}")
        shown = value[first], value[second]
        probability = better[said]
        question, one, other = split_conversations(None if prompt is None else value[prompt], *shown)
        if probability is not None and probability < 0.5:
            one, other = other, one
        yield question, one, other, 0.5 if probability == 0.5 else 1.0

    return read


_ARENA = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}
_HELPSTEER = {**{-k: 1.0 for k in (3, 2, 1)}, 0: 0.5, **dict.fromkeys((1, 2, 3), 0.0)}

_TRL = Form("TRL", ("prompt", "chosen", "rejected"), _chosen_rejected)

FORMS = (
    _TRL,
    Form("OpenAI", ("input", "preferred_output", "non_preferred_output"), _openai),
    Form("NeMo RL", ("context", "completions"), _ranked),
    Form("ms-swift", ("messages", "rejected_messages"), _swift),
    Form("ms-swift", ("messages", "rejected_response"), _swift),
    Form("LLaMA-Factory (ShareGPT)", ("conversations", "chosen", "rejected"), _sharegpt),
    Form("LLaMA-Factory (Alpaca)", ("instruction", "chosen", "rejected"), _alpaca),
    Form("Orca pairs", ("question", "chosen", "rejected"), _orca),
    Form("Axolotl", ("messages", "chosen", "rejected"), _before("messages")),
    Form("Axolotl", ("conversation", "chosen", "rejected"), _before("conversation")),
    Form("Axolotl (Argilla)", ("instruction", "chosen_response", "rejected_response"), _argilla),
    Form("OpenRLHF", ("input", "chosen", "rejected"), _before("input")),
    Form("TRL without prompt", ("chosen", "rejected"), _chosen_rejected),
    Form(
        "HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        _two("response1", "response2", "context", "overall_preference", _HELPSTEER),
    ),
    Form(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        _two("human_ref_A", "human_ref_B", "history", "labels", {1: 1.0, 0: 0.0}),
    ),
    Form(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "better_response_id"),
        _two("response_0", "response_1", "prompt", "better_response_id", {0: 1.0, 1: 0.0}),
    ),
    Form(
        "Chatbot Arena",
        ("conversation_a", "conversation_b", "winner"),
        _two("conversation_a", "conversation_b", None, "winner", _ARENA),
    ),
)
"""Tried in this order."""

_NO_PAIRS = {
    ("completion", "label"): "unpaired (KTO): one response and whether it is good, and no other to compare it with",
    ("completions", "labels"): "stepwise supervision: steps and whether they are right, no pair of responses",
    ("prompt", "responses"): "a group of responses, as rmcore score reads them, without a preference",
    ("prompt", "answers"): "a list of ranked answers (Nectar): write its pairs out as prompt, chosen and rejected",
    ("instruction", "completions"): "raw UltraFeedback: take HuggingFaceH4/ultrafeedback_binarized, which has pairs",
    ("prompt", "generations"): "distilabel's generations with ratings: write its pairs out as chosen and rejected",
    (
        "prompt",
        "response",
        "helpfulness",
    ): "one response with attributes (HelpSteer2), for rmcore train --attributes",
    ("response_A", "response_B"): "JudgeBench's: rmcore benchmark reads it; or write chosen and rejected",
    ("response_a", "response_b"): "two responses and who won (Chatbot Arena): write the winner as chosen",
    ("answer_0", "answer_1"): "two answers with scores (WebGPT comparisons): write the better as chosen",
    ("summaries", "choice"): "two summaries and a choice (summarize-from-feedback): write the better as chosen",
    ("prompt", "completion"): "for supervised fine-tuning, with one response a prompt",
    ("messages",): "one conversation (supervised fine-tuning), without a rejected answer",
}

SUBSETS = ("subset", "section")
"""Columns that say which part of its data a row is of, for reports by part."""

COLUMNS = frozenset(
    {
        *SUBSETS,
        *CRITIQUE_COLUMNS,
        "label",
        "system",
        "history",
        "id",
        "responses",
        *(name for form in FORMS for name in form.columns),
    }
)
"""Every name that a column can be mapped to."""


def _probability(value: Mapping[str, Any]) -> float:
    """How probable it is that ``chosen`` is better: ``label``, which is no other column's 0 and 1."""
    label = value.get("label")
    if label is None:
        return 1.0
    if isinstance(label, str):
        if not _names_a_side(label) and not _is_number(label):
            return 1.0  # a word: who labelled, say; told as unused
        reject("label", f"{label!r:.40}, a text", "a number in [0.5, 1]")
    number = _number(label)
    if number is None or number > 1:
        reject("label", _short(label), "a number in [0.5, 1]: how probable it is that chosen is better")
    if number < 0.5:
        reject(
            "label",
            _short(label),
            "a number in [0.5, 1]",
            "Below it, rejected would be the better one: exchange them, or leave the column out if it says otherwise",
        )
    return number


_SIDES = "chosen rejected win won wins winner loss lose lost loses loser tie tied draw equal same both neither bothbad"
_SIDES += " true false yes no a b 0 1 2 i ii one two left right first second 1st 2nd good bad better worse best worst"
_SIDES += " preferred"
_FILLERS = "is are was than the very much slightly significantly more less or and model response answer assistant"
_FILLERS += " completion output candidate option text system"
_WORDS = re.compile(r"[^\W_]+")
_SIDE = frozenset(_SIDES.split())
_OF_A_SIDE = _SIDE | frozenset(_FILLERS.split())


def _names_a_side(label: str) -> bool:
    """Whether a text says which response is better: ``b``, ``A>>B``, ``model_a``, ``Tie (bothbad)``, ``response 1``.

    It must not be passed over as if it named a person.
    """
    words = set(_WORDS.findall(label.lower()))
    return bool(words & _SIDE) and words <= _OF_A_SIDE


def _is_number(text: str) -> bool:
    """Whether a text is one in any spelling: ``0.3``, ``nan``, ``75%``, ``0,75``, ``½``, other scripts' digits."""
    try:
        float(text)
    except ValueError:
        return any(sign.isnumeric() for sign in text) and not any(sign.isalpha() for sign in text)
    return True


def _number(value: Any) -> float | None:
    """A finite number, also one of numpy or of a decimal column; None for anything else, True and False too."""
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    try:
        return repr(value)[:40]
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} too long to show"
