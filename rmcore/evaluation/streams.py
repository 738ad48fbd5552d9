"""Labelled pairs to train on and to test on: from a folder of preference data, or from this project's examples.

A *stream* is a list of test pairs as a trainer would meet them: in distribution, or mixed half and half with pairs
unlike the training data. The data folder is described in its own README; the example file in ``examples/README.md``.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rmcore._base.errors import DataError
from rmcore._base.prompt import Prompt, Response
from rmcore.model.data import read_lines
from rmcore.model.training_pairs import Preference

__all__ = ["Corpus", "ExampleGroup", "Stream", "StreamPair", "find_data", "load_corpus", "load_test_pairs"]

T = TypeVar("T")

JUDGE = "gpt-4"
"""Whose recorded verdicts stand for the judge where the data has them, asked in both orders."""
ONE_ORDER_JUDGE = "gpt-3.5-turbo"
"""Whose recorded verdicts stand for it where there are only these, asked in one order."""


@dataclass(frozen=True, slots=True)
class StreamPair:
    """A pair of a stream, to test on; what a model is trained on is a ``Preference``.

    ``label`` is 1 where ``first`` is better, 0 where ``second`` is.

    ``verdicts`` are recorded judge verdicts by order, from the first response's side: (asked first-second, asked
    second-first), ``win``, ``loss``, ``tie`` or None; the pair of them is None where no judge was recorded.
    """

    prompt: Prompt
    first: Response
    second: Response
    label: float
    source: str
    verdicts: tuple[str | None, str | None] | None = None

    def swapped(self) -> StreamPair:
        """The same pair with its responses exchanged."""
        other = {"win": "loss", "loss": "win"}
        verdicts = self.verdicts and tuple(other.get(v or "", v) for v in reversed(self.verdicts))
        return replace(self, first=self.second, second=self.first, label=1 - self.label, verdicts=verdicts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stream:
    """Test pairs under a name."""

    name: str
    title: str
    pairs: tuple[StreamPair, ...]


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """One prompt with K responses, the pairs' recorded verdicts and an honest ranking (best first)."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]
    ranking: tuple[int, ...]
    verdicts: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Corpus:
    """Training preferences and everything streams are drawn from.

    ``parts`` maps a name to test pairs; ``mixes`` lists (name, title, parts): one part is taken whole, two are mixed
    half and half.
    """

    name: str
    train: tuple[Preference, ...]
    parts: dict[str, tuple[StreamPair, ...]]
    mixes: tuple[tuple[str, str, tuple[str, ...]], ...]
    groups: tuple[ExampleGroup, ...] = ()
    published: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Stream → (base accuracy, uplift by u at 10 / 25 / 45%), in percent and points, as the data's README gives them
    for a plain fp64 implementation."""

    def share(self, fraction: float, seed: int) -> Corpus:
        """The same corpus with this share of the training pairs and of each part, drawn at random."""
        rng = np.random.default_rng(seed)

        def drawn(pairs: Sequence[T]) -> tuple[T, ...]:
            kept = rng.permutation(len(pairs))[: math.ceil(fraction * len(pairs))]
            return tuple(pairs[k] for k in sorted(kept.tolist()))

        parts = {name: drawn(part) for name, part in self.parts.items()}
        return replace(self, train=drawn(self.train), parts=parts)

    def streams(self, seed: int) -> list[Stream]:
        """The streams for a seed: mixed parts are subsampled to equal size and shuffled."""
        rng = np.random.default_rng(seed)
        result = []
        for name, title, parts in self.mixes:
            if len(parts) == 1:
                result.append(Stream(name, title, self.parts[parts[0]]))
                continue
            size = min(len(self.parts[part]) for part in parts)
            drawn = [self.parts[part][k] for part in parts for k in rng.permutation(len(self.parts[part]))[:size]]
            result.append(Stream(name, title, tuple(drawn[k] for k in rng.permutation(len(drawn)))))
        return result


def find_data(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The data folder: the argument, else ``RMCORE_DATA``, else None. Raises DataError for one that is not there."""
    name = given or os.environ.get("RMCORE_DATA")
    if not name:
        return None
    path = Path(name)
    if not path.is_dir():
        raise DataError(f"data: got {str(path)!r}, expected a folder")
    return path


def load_corpus(data: Path | None) -> Corpus:
    """The corpus of a data folder, or this project's examples where ``data`` is None."""
    return _load_folder(data) if data is not None else _load_examples(_examples_file())


def load_test_pairs(folder: Path, name: str) -> tuple[StreamPair, ...]:
    """All pairs of one file of a data folder, ``pandalm`` say, to test on."""
    return _oriented([row for _, row in read_lines(folder / f"{name}.jsonl.gz")])


def _load_folder(folder: Path) -> Corpus:
    rows = {name: [row for _, row in read_lines(folder / f"{name}.jsonl.gz")] for name in ("autoj", "llmbar", "xstest")}
    held_out = {row["prompt"] for part in rows.values() for row in part if row["split"] != "train"}
    train = tuple(
        Preference(row["prompt"], row["chosen"], row["rejected"])
        for row in rows["autoj"]
        if row["split"] == "train" and row["prompt"] not in held_out
    )
    return Corpus(
        name="preference data",
        train=train,
        parts={
            "id": _oriented([row for row in rows["autoj"] if row["split"] == "id_test"]),
            "llmbar": _oriented(rows["llmbar"]),
            "xstest": _oriented(rows["xstest"]),
        },
        mixes=(
            ("id_test", "in distribution (Auto-J)", ("id",)),
            ("llmbar", "half adversarial (LLMBar)", ("id", "llmbar")),
            ("xstest", "half safety (XSTest)", ("id", "xstest")),
        ),
        published={
            "id_test": (69.0, 0.2, 1.0, 2.4),
            "llmbar": (50.0, 1.4, 3.9, 6.9),
            "xstest": (56.0, 2.6, 3.9, 4.9),
        },
    )


def _oriented(rows: Sequence[dict[str, Any]]) -> tuple[StreamPair, ...]:
    pairs = []
    for row in rows:
        verdicts = _recorded(row.get("judges") or {})
        pair = StreamPair(row["prompt"], row["chosen"], row["rejected"], 1.0, row["source"], verdicts)
        # The better response must not always come first, or a judge's and a head's position bias would be invisible.
        pairs.append(pair.swapped() if hashlib.sha256(row["id"].encode()).digest()[0] % 2 else pair)
    return tuple(pairs)


def _recorded(judges: dict[str, int | None]) -> tuple[str | None, str | None] | None:
    # Keys are JUDGE/PROMPT/ORDER; 1 = agreed with the label (chosen), 0 = did not, null = tie or no verdict.
    names = {key.lower(): value for key, value in judges.items()}
    orders = [names.get(f"{JUDGE}/vanilla/{order}", "missing") for order in ("ab", "ba")]
    if "missing" in orders:
        if ONE_ORDER_JUDGE not in names:
            return None
        orders = [names[ONE_ORDER_JUDGE]] * 2
    words = [{1: "win", 0: "loss"}.get(v) if isinstance(v, int) else None for v in orders]
    return words[0], words[1]


def _examples_file() -> Path:
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "examples", here.parent / "examples"):
        if (folder / "preferences.jsonl").is_file():
            return folder / "preferences.jsonl"
    raise DataError("examples: no preferences.jsonl beside the package. Give a data folder with --data or RMCORE_DATA")


def _load_examples(file: Path) -> Corpus:
    train: list[Preference] = []
    parts: dict[str, list[StreamPair]] = {"test": [], "adversarial": []}
    groups = []
    for number, row in read_lines(file):
        try:
            group = ExampleGroup(
                row["id"],
                row["prompt"],
                tuple(row["responses"]),
                tuple(row["ranking"]),
                tuple((v["pair"][0], v["pair"][1], v["verdict"]) for v in row["verdicts"]),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"not an example group ({error!r})", source=str(file), line=number) from error
        position = {response: rank for rank, response in enumerate(group.ranking)}
        for i, j, verdict in group.verdicts:
            first_better = position[i] < position[j]
            if row["split"] == "train":
                better, worse = (i, j) if first_better else (j, i)
                train.append(Preference(group.prompt, group.responses[better], group.responses[worse]))
            else:
                parts[row["split"]].append(
                    StreamPair(
                        group.prompt,
                        group.responses[i],
                        group.responses[j],
                        float(first_better),
                        row["domain"],
                        (verdict, verdict),
                    )
                )
        if row["split"] != "train":
            groups.append(group)
    return Corpus(
        name="examples",
        train=tuple(train),
        parts={name: tuple(pairs) for name, pairs in parts.items()},
        mixes=(
            ("test", "in distribution", ("test",)),
            ("mixed", "half polished but wrong", ("test", "adversarial")),
        ),
        groups=tuple(groups),
    )
