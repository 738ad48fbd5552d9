"""Options of ``rmcore train`` that do not go together, found before anything is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rmcore._base.errors import reject
from rmcore.cli.ranks import many_processes
from rmcore.cli.train.ai_labels import parse_weight
from rmcore.cli.train.attributes import AttributeOptions
from rmcore.cli.train.config import RunSettings
from rmcore.cli.train.options import HeadOptions, RecipeOptions

if TYPE_CHECKING:
    from rmcore.head.ranks import Ranks

__all__ = ["check_options"]


def check_options(
    head: HeadOptions,
    recipe: RecipeOptions,
    by_attributes: AttributeOptions,
    settings: RunSettings,
    preferences: str | None,
    ranks: Ranks | None,
    *,
    finetunes: bool,
) -> None:
    """Raises InputError, by the options' names, for what cannot be done together or at all."""
    further = recipe.estimators(head.mode)
    if by_attributes.attributes is None and by_attributes != AttributeOptions():
        reject("--pairs, --members and what goes with them", "without --attributes", "together with it")
    if settings.arguments and not finetunes:
        reject("--config", f"{sorted(settings.arguments)} without training", "num_train_epochs or max_steps too")
    if further and (ranks is not None or recipe.ai_labels is not None):
        reject("--uncertainty", "with --ai-labels or several processes", "one process, and people's labels alone")
    if further and finetunes and many_processes():
        reject("--uncertainty", "with several processes", "one process")
    if (settings.datasets is not None or settings.held_out is not None) and ranks is not None:
        reject("datasets, held_out", f"with {ranks.size} processes and no backbone to train", "one process")
    _check_epochs(head, recipe, finetunes=finetunes)
    _check_ai_labels(recipe, ranks, finetunes=finetunes)
    if recipe.critiques:
        _check_critiques(head, recipe, by_attributes, ranks, further, finetunes=finetunes)
    head.config()
    if by_attributes.attributes is not None:
        _check_alone(recipe, settings, ranks, further, finetunes=finetunes)
        if preferences is None:
            reject("preferences", "none", "at least one")


def _check_epochs(head: HeadOptions, recipe: RecipeOptions, *, finetunes: bool) -> None:
    if recipe.epochs and head.layer_size is None:
        reject("--epochs", recipe.epochs, "0 without --layer-size, since there is no layer to train")
    if recipe.tune and (recipe.epochs or finetunes):
        reject("--tune", "with --epochs or --finetune-epochs", "it alone: layers are trained for one configuration")
    for option, count in (("--epochs", recipe.epochs), ("--finetune-epochs", recipe.finetune_epochs)):
        if count < 0:
            reject(option, count, "0 or more")
    if not (math.isfinite(recipe.lr_backbone) and recipe.lr_backbone > 0):
        reject("--lr-backbone", recipe.lr_backbone, "a positive number")


def _check_ai_labels(recipe: RecipeOptions, ranks: Ranks | None, *, finetunes: bool) -> None:
    if recipe.ai_labels is not None and ranks is not None:
        reject("--ai-labels", f"with {ranks.size} processes", "one process, or no labels of a judge")
    if recipe.ai_labels is not None and (recipe.epochs or finetunes):
        reject("--ai-labels", "with --epochs or --finetune-epochs", "it alone: weights are tried on fixed states")
    parse_weight(recipe.ai_weight)
    if recipe.ai_labels is None and recipe.ai_weight != "auto":
        reject("--ai-weight", "without --ai-labels", "together with it")


def _check_critiques(
    head: HeadOptions,
    recipe: RecipeOptions,
    by_attributes: AttributeOptions,
    ranks: Ranks | None,
    further: list[str],
    *,
    finetunes: bool,
) -> None:
    others = (recipe.tune, recipe.epochs, further, recipe.ai_labels, by_attributes.attributes, ranks)
    if any(other not in (None, False, 0, []) for other in others):
        reject(
            "--critiques",
            "with --tune, --epochs, --uncertainty, --ai-labels, --attributes or several processes",
            "it alone, or with a backbone that is trained",
        )
    if head.mode == "concat" and finetunes:
        reject("--critiques", "with --mode concat and a backbone to train", "--mode difference")


def _check_alone(
    recipe: RecipeOptions, settings: RunSettings, ranks: Ranks | None, further: list[str], *, finetunes: bool
) -> None:
    others = (
        recipe.tune,
        recipe.epochs,
        finetunes,
        further,
        recipe.calibrate,
        recipe.ai_labels,
        settings.datasets,
        settings.held_out,
    )
    if any(other not in (None, 0, False, []) for other in others) or ranks is not None:
        what = (
            "--tune, --epochs, --finetune-epochs, --calibrate, --uncertainty, --ai-labels, --config's data or "
            "several processes"
        )
        reject("--attributes", f"with {what}", "alone")
