"""How far a policy has come: its preference over a reference policy's answers to the same prompts.

Pairwise rewards sum to about 0 in every group, whatever the policy has learned, so their mean shows no progress. What
does is p̃ of the policy's responses against fixed answers. It is read off the head alone: no pair goes to a judge, no
router sees one, and the rewards do not change.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from rmcore._base.errors import DataError, reject
from rmcore._base.prompt import Canonical, Prompt, Response, canonical_response, content_key
from rmcore.engine.engine import RewardEngine
from rmcore.engine.group_score import GroupScore
from rmcore.engine.routing import NeverRoute
from rmcore.model.text import OverlongPolicy

__all__ = ["Answers", "OverReference", "ReferenceAnswers", "ReferenceSource", "preference_over_reference"]

log = logging.getLogger(__name__)

Answers: TypeAlias = tuple[Canonical, ...]
"""A reference policy's answers to one prompt; () where it has none."""

ReferenceSource: TypeAlias = str | os.PathLike[str] | Callable[[Any], Response | None]

COLUMN = "reference_completion"


@dataclass(frozen=True, slots=True)
class OverReference:
    """Responses against reference answers, by the head alone.

    Attributes:
        preference: mean p̃, logits; NaN where nothing could be compared.
        win_rate: share of the comparisons with p̃ > 0, those at 0 counted half.
        share: of the prompts, those that were compared; the others have no answer, or could not be scored.
    """

    preference: float
    win_rate: float
    share: float

    def metrics(self) -> dict[str, float]:
        """By the names they are logged under; without the figures that do not exist."""
        found = {"reference_share": self.share}
        if self.share:
            found |= {"preference_over_reference": self.preference, "win_rate_over_reference": self.win_rate}
        return found


class ReferenceAnswers:
    """Where a reference policy's answers are.

    Args:
        source: the name of a dataset column, one answer a row; a file (``Path``) in the groups format, whose responses
            are the answers to its prompt; or a function from a prompt to an answer, or to None where there is none.
            None: the column ``reference_completion``, where the data has it.

    Raises:
        InputError: none of these, or no such file.
    """

    def __init__(self, source: ReferenceSource | None = None) -> None:
        if source is not None and not isinstance(source, (str, os.PathLike)) and not callable(source):
            reject("reference", type(source).__name__, "a column's name, the Path of a file, or a function")
        if isinstance(source, os.PathLike) and not Path(source).is_file():
            reject("reference", repr(os.fspath(source)), "a file of groups, {'prompt', 'responses'} a line")
        self.source = source
        self._known: dict[Hashable, Answers] | None = None

    def find(self, prompts: Sequence[Canonical], columns: Mapping[str, Sequence[Any]]) -> list[Answers] | None:
        """The answers to each row's prompt; None where nothing was said about references at all.

        Raises:
            InputError: no such column, or an answer that is no response.
            DataError: the file has a bad line.
        """
        source = self.source
        if source is None or isinstance(source, str):
            name = COLUMN if source is None else source
            if name not in columns and source is None:
                return None
            return _of_column(name, columns, len(prompts))
        keys = [content_key(prompt) for prompt in prompts]
        if isinstance(source, os.PathLike):
            if self._known is None:
                self._known = _of_file(Path(source))
            return [self._known.get(key, ()) for key in keys]
        asked = {
            key: _one(source(prompt), "reference") for key, prompt in dict(zip(keys, prompts, strict=True)).items()
        }
        return [asked[key] for key in keys]


async def preference_over_reference(
    engine: RewardEngine,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Response]],
    references: Sequence[Answers],
    *,
    max_length: int | None = None,
    overlong: OverlongPolicy | None = None,
) -> OverReference:
    """Compare responses with reference answers, by the engine's head as it is now.

    Args:
        engine: whose model, backend and orders are used; its judge, router and learner are left alone.
        prompts: one a group.
        responses: the policy's, K ≥ 1 a prompt.
        references: the answers to each prompt.
        max_length: most tokens of a text, as in ``engine.score``, as is the next.
        overlong: what happens to longer ones.

    Pairs without a preference (over-long under ``no-reward``, equal when cut) are left out. A prompt without an
    answer, and one that cannot be scored, lowers ``share``; the latter is logged. Raises InputError for an engine of a
    head alone, which scores no texts.
    """
    if engine.model is None:
        reject("engine.model", "a FrozenHead", "a RewardModel to score texts")
    alone = RewardEngine(engine.model, None, NeverRoute(), orders=engine.orders, backend=engine.backend)
    asked, groups, wanted = [], [], []
    for k, answers in enumerate(references):
        if not answers:
            continue
        own = list(responses[k])
        if alone.head.config.mode == "difference":  # each text once; pairs cost next to nothing
            asked.append(k)
            groups.append([*own, *answers])
            wanted.append((slice(0, len(own)), slice(len(own), None)))
        else:  # each pair is a forward pass of its own, so only those that are wanted
            for text in own:
                for answer in answers:
                    asked.append(k)
                    groups.append([text, answer])
                    wanted.append((slice(0, 1), slice(1, 2)))
    if not groups:
        return OverReference(math.nan, math.nan, 0.0)
    limit: dict[str, Any] = {"max_length": max_length, "overlong": overlong}
    scores = await alone.score_async([prompts[k] for k in asked], groups, on_error="return", **limit)
    found, failed = [], dict[int, Exception]()
    for k, (rows, against), outcome in zip(asked, wanted, scores.outcomes(), strict=True):
        if isinstance(outcome, GroupScore):
            known = outcome.preference[rows, against].flatten()
            found.append(known[~known.isnan()])
        else:
            failed[k] = outcome
    if failed:
        log.warning(
            "%d prompts could not be compared with their reference: %s", len(failed), next(iter(failed.values()))
        )
    compared = len(set(asked) - failed.keys())
    if not found:
        return OverReference(math.nan, math.nan, 0.0)
    values = torch.cat(found)
    wins = (values > 0).double() + 0.5 * (values == 0).double()
    return OverReference(float(values.mean()), float(wins.mean()), compared / len(prompts))


def _of_column(name: str, columns: Mapping[str, Sequence[Any]], count: int) -> list[Answers]:
    if name not in columns:
        reject("reference", repr(name), f"a column of the data, which has {sorted(columns)}")
    values = columns[name]
    if len(values) != count:
        reject(name, f"{len(values)} values", f"{count}, one a row")
    return [_one(value, f"{name}[{k}]") for k, value in enumerate(values)]


def _of_file(path: Path) -> dict[Hashable, Answers]:
    from rmcore.model.data import read_groups

    found: dict[Hashable, tuple[Answers, int]] = {}
    for group in read_groups(path):
        before, line = found.setdefault(content_key(group.prompt), (group.responses, group.line))
        if list(map(content_key, before)) != list(map(content_key, group.responses)):
            raise DataError(f"the prompt of line {line} again, with other answers", source=str(path), line=group.line)
    return {key: answers for key, (answers, _) in found.items()}


def _one(value: Response | None, where: str) -> Answers:
    return () if value is None else (canonical_response(value, where),)
