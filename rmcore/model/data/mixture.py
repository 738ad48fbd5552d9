"""Several sources of preferences as one set: weights, duplicates, held-out prompts, and a report of what went where.

Nothing is dropped silently: :class:`DataReport` counts what each source had, what was left out and why, and what of it
is trained on. What a backbone cannot learn from (over-long texts under ``no-reward``, responses that are equal to its
tokenizer) is known once texts are encoded: :meth:`DataReport.leave_out` takes it in.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

from rmcore._base.errors import reject
from rmcore._base.prompt import content_key
from rmcore.model.data import read_preferences
from rmcore.model.training_pairs import Preference

__all__ = ["DataReport", "DataSource", "SourceReport", "mix", "pair_said", "sources_of", "split_by_prompt"]


@dataclass(frozen=True)
class DataSource:
    """Where pairs come from, and how much they count.

    Attributes:
        path: a file, or ``hf://org/name``.
        weight: how often a pair is taken: 2 is each pair twice, 0.5 a random half of them. In a stream the share of
            pairs that come from here, against the other sources' weights.
        columns: other names of its columns.
        most: pairs taken of it at most, the first ones.
    """

    path: str
    weight: float = 1.0
    columns: Mapping[str, str] = field(default_factory=dict)
    most: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < 1e6:
            reject(f"{self.path}: weight", self.weight, "a positive number")
        if self.most is not None and (isinstance(self.most, bool) or self.most < 1):
            reject(f"{self.path}: most", self.most, "at least 1")


@dataclass
class SourceReport:
    """What became of a source's pairs: ``read`` = ``duplicates`` + distinct ones; ``taken`` to train on, by weight.

    ``left_out`` of those taken, and why: the model can learn nothing from them.
    """

    path: str
    weight: float
    read: int = 0
    duplicates: int = 0
    contradicted: int = 0
    taken: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class DataReport:
    """Of each source, and of the split: ``trained`` and ``held_out`` pairs, of so many ``prompts``.

    ``left_out`` of ``trained``, and why, whatever source they are of.
    """

    sources: list[SourceReport]
    trained: int = 0
    held_out: int = 0
    held_out_prompts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def begin(self, sources: list[SourceReport]) -> None:
        """Forget everything: another pass over these begins."""
        self.sources, self.trained, self.held_out, self.held_out_prompts = sources, 0, 0, 0
        self.left_out = Counter()

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Take in which of the pairs to train on, by their place in the mixture, were left out, and why."""
        ends = list(accumulate(found.taken for found in self.sources))
        for number, reason in reasons.items():
            self.left_out[reason] += 1
            if ends:
                self.sources[bisect_right(ends, number)].left_out[reason] += 1
        self.trained -= len(reasons)

    def to_dict(self) -> dict[str, Any]:
        """Names and numbers, for JSON."""
        own = {"left_out": dict(self.left_out)}
        return vars(self) | own | {"sources": [vars(one) | {"left_out": dict(one.left_out)} for one in self.sources]}

    def to_markdown(self) -> str:
        """A table, and what it means."""
        lines = [
            "| source | weight | read | duplicates, dropped | contradicted, kept | taken | of them left out |",
            "|---|---|---|---|---|---|---|",
        ]
        for one in self.sources:
            numbers = f"{one.read} | {one.duplicates} | {one.contradicted} | {one.taken} | {_told(one.left_out)}"
            lines.append(f"| {one.path} | {one.weight:g} | {numbers} |")
        prompts = f" ({self.held_out_prompts} prompts)" if self.held_out_prompts else ""
        told = f"{self.trained} pairs to train on, {self.held_out} held out{prompts}."
        if self.left_out:
            told += f" Left out, since nothing can be learned from them: {_told(self.left_out)}."
        return "\n".join([*lines, "", told]) if self.sources else told


def _told(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "0"


def sources_of(given: Any) -> list[DataSource]:
    """Sources from configuration: names, or mappings with DataSource's fields; raises InputError naming a wrong one."""
    if not isinstance(given, list) or not given:
        reject("datasets", type(given).__name__, "a list of files or hf:// names, or of mappings with a path")
    found = []
    for k, one in enumerate(given):
        if isinstance(one, str):
            one = {"path": one}
        known = {"path", "weight", "columns", "most"}
        if not isinstance(one, Mapping) or "path" not in one or set(one) - known:
            reject(
                f"datasets[{k}]", repr(one)[:80], f"a name, or a mapping with path and of {', '.join(sorted(known))}"
            )
        found.append(DataSource(**one))
    return found


def mix(
    sources: Sequence[DataSource], *, held_out: float | None = None, seed: int = 0, critiques: bool = False
) -> tuple[list[Preference], list[Preference], DataReport]:
    """(train, held out, report) of all sources' pairs: distinct ones, then the split, then weights of those to train.

    A pair whose prompt, responses and label have been seen, in this source or one before it, is a duplicate and left
    out. One that was seen with another label, or the other way round, is kept and counted: people disagree.
    ``held_out`` as :func:`split_by_prompt`; ``critiques`` reads the responses' critiques too.

    Raises DataError for a row that is no preference; InputError where no pair is left.
    """
    seen: dict[tuple[Any, ...], set[float]] = {}
    distinct: list[list[Preference]] = []
    report = DataReport([])
    for source in sources:
        found = SourceReport(source.path, source.weight)
        own: list[Preference] = []
        for item in islice(read_preferences(source.path, source.columns, critiques=critiques), source.most):
            found.read += 1
            key, label = pair_said(item)
            said = seen.setdefault(key, set())
            if label in said:
                found.duplicates += 1
                continue
            found.contradicted += bool(said)
            said.add(label)
            own.append(item)
        distinct.append(own)
        report.sources.append(found)
    if not any(distinct):
        reject("datasets", "no pairs", "at least one")
    chosen: set[str] = set()
    if held_out is not None:
        chosen = _held_out_prompts((item for own in distinct for item in own), held_out, seed)
    train: list[Preference] = []
    for k, (found, own) in enumerate(zip(report.sources, distinct, strict=True)):
        left = [item for item in own if _prompt(item) not in chosen]
        taken = _weighed(left, found.weight, random.Random(f"{seed}-{k}"))
        found.taken = len(taken)
        train += taken
    held = [item for own in distinct for item in own if _prompt(item) in chosen]
    report.trained, report.held_out, report.held_out_prompts = len(train), len(held), len(chosen)
    return train, held, report


def split_by_prompt(
    pairs: Sequence[Preference], share: float, *, seed: int = 0
) -> tuple[list[Preference], list[Preference], DataReport]:
    """(train, held out, report): a random ``share`` of the prompts, with all of their pairs, is held out.

    Raises InputError where nothing would be held out, or nothing left to train on.
    """
    chosen = _held_out_prompts(pairs, share, seed)
    held = [item for item in pairs if _prompt(item) in chosen]
    train = [item for item in pairs if _prompt(item) not in chosen]
    return train, held, DataReport([], len(train), len(held), len(chosen))


def _prompt(item: Preference) -> str:
    return repr(content_key(item.prompt))


def _held_out_prompts(pairs: Iterable[Preference], share: float, seed: int) -> set[str]:
    if not 0 < share < 1:
        reject("held_out", share, "a share of the prompts in (0, 1)")
    prompts = sorted({_prompt(item) for item in pairs})
    count = round(share * len(prompts))
    if not 0 < count < len(prompts):
        reject("held_out", f"{share} of {len(prompts)} prompts", "a share that leaves prompts on both sides")
    return set(random.Random(seed).sample(prompts, count))


def pair_said(item: Preference) -> tuple[tuple[Any, ...], float]:
    """The pair, whichever response was chosen, and how probable it is that one of them is better."""
    prompt, a, b = (content_key(text) for text in (item.prompt, item.chosen, item.rejected))
    turned = repr(a) > repr(b)
    return (prompt, b, a) if turned else (prompt, a, b), 1 - item.label if turned else item.label


def _weighed(pairs: list[Preference], weight: float, draw: random.Random) -> list[Preference]:
    whole = int(weight)
    more = round((weight - whole) * len(pairs))
    chosen = set(draw.sample(range(len(pairs)), more))
    return [item for k, item in enumerate(pairs) for _ in range(whole + (k in chosen))]
