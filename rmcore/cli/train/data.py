"""What ``rmcore train`` reads: preferences, those held out, and a judge's; and what it says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rmcore._base.errors import reject
from rmcore._base.files import write_atomic
from rmcore.cli.console import notes
from rmcore.cli.ranks import check_count, main_process, part_of
from rmcore.cli.train.config import RunSettings
from rmcore.cli.train.options import HeadOptions, RecipeOptions

if TYPE_CHECKING:
    from rmcore.head.ranks import Ranks
    from rmcore.model.data.mixture import DataReport
    from rmcore.model.training_pairs import Preference

__all__ = ["TrainingData", "read_data", "tell_data"]


@dataclass
class TrainingData:
    """What there is to learn from.

    Attributes:
        items: pairs; of this process, where there are several.
        held_out: pairs that are not trained on, likewise.
        held_out_count: of all processes.
        judged: a judge's pairs.
        report: what was read and left out, where a configuration names sources.
    """

    items: list[Preference]
    held_out: list[Preference]
    held_out_count: int
    judged: list[Preference]
    report: DataReport | None


def read_data(
    preferences: str | None,
    columns: dict[str, str],
    head: HeadOptions,
    recipe: RecipeOptions,
    settings: RunSettings,
    ranks: Ranks | None,
    *,
    finetunes: bool,
) -> TrainingData:
    """Read all of it; raises InputError or DataError where there is nothing, or nothing that fits the options."""
    from rmcore.head.ranks import working
    from rmcore.model.data import read_preferences

    named = preferences is not None
    with working(ranks, "reading"):
        reading = partial(read_preferences, columns=columns, part=part_of(ranks), critiques=recipe.critiques)
        items = list(reading(preferences)) if preferences else []
        held_out = [] if recipe.calibrate is None else list(reading(recipe.calibrate))
    if named or settings.datasets is None:
        check_count("preferences", len(items), ranks)
    report = None
    held_out_count = 0 if recipe.calibrate is None else check_count("--calibrate", len(held_out), ranks)
    if settings.datasets is not None or settings.held_out is not None:
        items, unseen_prompts, report = _prepared(
            settings, items if named else None, head.seed, critiques=recipe.critiques
        )
        held_out = unseen_prompts if recipe.calibrate is None else held_out
        held_out_count = len(held_out)
    judged = [] if recipe.ai_labels is None else list(read_preferences(recipe.ai_labels, columns))
    if recipe.ai_labels is not None and not judged:
        reject("--ai-labels", "no lines", "at least one")
    if recipe.critiques:
        if not (finetunes and settings.streaming) and not any(item.critiques for item in items):
            reject("--critiques", "preferences without critiques", "a column critiques", "rmcore critique writes one")
        if head.mode == "concat":
            from rmcore.model.critiqued_data import behind_critiques

            items, held_out = behind_critiques(items), behind_critiques(held_out)
    return TrainingData(items, held_out, held_out_count, judged, report)


def _prepared(
    settings: RunSettings, pairs: Sequence[Preference] | None, seed: int, *, critiques: bool = False
) -> tuple[list[Preference], list[Preference], DataReport]:
    """(train, held out, report) of a configuration's sources, or of ``pairs``; of a stream the held-out ones alone."""
    from rmcore.model.data.mixture import DataReport, mix, sources_of, split_by_prompt
    from rmcore.model.data.stream import held_out_pairs

    share = settings.held_out
    if settings.datasets is None:
        assert share is not None
        return split_by_prompt(pairs or [], share, seed=seed)
    if pairs is not None:
        reject("datasets", "beside preferences on the command line", "one of them")
    sources = sources_of(settings.datasets)
    if not settings.streaming:
        return mix(sources, held_out=share, seed=seed, critiques=critiques)
    most = settings.held_out_pairs
    held = [] if share is None else held_out_pairs(sources, share, most, seed=seed, critiques=critiques)
    return [], held, DataReport([])


def tell_data(report: DataReport | None, settings: RunSettings) -> None:
    """Say what became of the data, and write it where the configuration wants it: the main process alone."""
    if report is None or not main_process():
        return
    notes.print(report.to_markdown(), markup=False, highlight=False)
    if settings.data_report is not None:
        write_atomic(settings.data_report, json.dumps(report.to_dict(), indent=2) + "\n")
