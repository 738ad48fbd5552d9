"""A reward model as one folder: head, error prior and estimators in safetensors, the rest in ``rmcore.json``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rmcore._base.errors import CheckpointError, InputError, reject
from rmcore.head import checkpoint
from rmcore.head.estimators import PairEstimator, read_estimators, write_estimators
from rmcore.head.frozen import FrozenHead
from rmcore.model.backbone import Backbone, BackboneConfig
from rmcore.model.error_prior import ErrorPrior, read_error_prior, write_error_prior
from rmcore.model.folder_files import BASE, folder_digests
from rmcore.model.uncertainties import find_estimator

__all__ = ["ModelParts", "check_width", "read_model", "write_model"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a folder holds. The names are those of :class:`~rmcore.model.reward_model.RewardModel`."""

    backbone: Backbone
    head: FrozenHead
    error_prior: ErrorPrior | None
    estimators: dict[str, PairEstimator]
    uncertainty: str | None
    critiqued: bool | None


def write_model(
    model: ModelParts,
    folder: Path,
    *,
    embed: bool,
    include_posterior: bool,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model's files into an empty folder.

    Args:
        model: what to write; an ``uncertainty`` that it has.
        folder: where to.
        embed: the backbone's weights and tokenizer too, not only where to load it from.
        include_posterior: keep the posterior, so that the head can learn further.
        state_dict: with ``embed`` the backbone's weights, where they are gathered from several processes.

    Raises InputError for a backbone that nobody could load by its name: one without, or changed since.
    """
    config = model.backbone.config
    if not embed and not config.name and not model.backbone.remote:
        reject("backbone", "'name' for a backbone that came without one", "'embed'")
    if not embed and model.backbone.changed:
        reject("backbone", "'name' for weights that were trained since they were loaded", "'embed'")
    head = checkpoint.write_head(model.head, folder, include_posterior=include_posterior)
    files = model.backbone.files
    if embed:
        model.backbone.save(folder / "backbone", state_dict=state_dict)
        files = folder_digests(folder / "backbone")
        if BASE in files:  # of an adapter: on the hub, at the commit it was loaded from
            base = f"{config.name}@{config.revision}" if config.revision else model.backbone.files.get(BASE, "")
            if base.rpartition("@")[0] == files.pop(BASE):
                files[BASE] = base
        if config.revision is None:  # a path of this machine is nobody else's business
            config = replace(config, name="")
    values = {"kind": "model", "head": head, "backbone": config.to_dict(), "embedded": embed}
    if files:
        values["backbone_files"] = files
    if model.backbone.positions is not None:  # so that a limit beyond it is refused before anything is loaded
        values["positions"] = model.backbone.positions
    if model.error_prior is not None:
        values["error_prior"] = write_error_prior(model.error_prior, folder)
    if model.estimators:
        values["estimators"] = write_estimators(model.estimators, folder)
    if model.uncertainty is not None:
        values["uncertainty"] = model.uncertainty
    if model.critiqued is not None:
        values["critiqued"] = model.critiqued
    checkpoint.write_config(folder, values)


def read_model(
    folder: Path,
    name: str,
    *,
    backbone: Backbone | None,
    limits: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> ModelParts:
    """Read what :func:`write_model` wrote.

    Args:
        folder: where it is.
        name: what the user called it, for messages.
        backbone: use this one instead of loading the one recorded.
        limits: ``max_length`` and ``overlong`` where they are not those it was saved with.
        loading: further arguments of :meth:`Backbone.from_pretrained`.

    Raises CheckpointError for anything truncated, foreign or inconsistent, InputError for ``limits`` that the backbone
    cannot have.
    """
    values = checkpoint.read_config(folder)
    if values.get("kind") != "model":
        raise CheckpointError(f"path: got {name!r}, which holds a {values.get('kind')}, expected a model")
    head = checkpoint.read_head(folder, values.get("head"), "cpu")
    critiqued = values.get("critiqued")
    if critiqued not in (None, True, False):
        raise CheckpointError(f"{name}: got critiqued: {critiqued!r:.40}, expected true or false")
    known = values.get("error_prior")
    prior = None if known is None else read_error_prior(folder, known, head.config.hidden_size)
    try:
        estimators = read_estimators(folder, values.get("estimators", {}))
        uncertainty = values.get("uncertainty")
        find_estimator(uncertainty, head, estimators)
    except (InputError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{name}: got an estimators section that does not fit ({error})") from error
    if backbone is None:
        loaded = _read_backbone(folder, name, values, head, limits, loading)
    else:
        loaded = backbone
        check_width(head, backbone)
    checkpoint.check_digest(folder, values)
    return ModelParts(loaded, head, prior, estimators, uncertainty, critiqued)


def check_width(head: FrozenHead, backbone: Backbone) -> None:
    """Raises InputError for a head that is not as wide as the backbone's states."""
    if head.config.hidden_size != backbone.hidden_size:
        reject("head.hidden_size", head.config.hidden_size, f"the backbone's {backbone.hidden_size}")


def _read_backbone(
    folder: Path,
    name: str,
    values: Mapping[str, Any],
    head: FrozenHead,
    limits: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> Backbone:
    try:
        config = BackboneConfig.from_dict(values["backbone"])
        if not config.name and not values.get("embedded"):
            raise CheckpointError(
                f"path: got {name!r}, whose hidden states come from a server, expected "
                "backbone=Backbone.from_server(...)"
            )
        if "split_special_tokens" not in values["backbone"]:
            log.warning("%s was saved by an earlier rmcore, which fed other tokens: fit it again", name)
        if values.get("embedded"):
            config = replace(config, name=str(folder / "backbone"), revision=None)
        config = replace(config, **limits)
        loaded = Backbone.from_pretrained(config, expected_files=values.get("backbone_files"), **loading)
        check_width(head, loaded)
    except (InputError, KeyError, TypeError) as error:
        if limits and isinstance(error, InputError) and str(error).startswith("max_length: "):
            raise  # the caller's own
        raise CheckpointError(f"{name}: got a backbone section that does not fit ({error})") from error
    if config.date is None and loaded.config.date is not None:
        log.warning(
            "%s: its chat template asks what day it is, and the folder, of an older rmcore, does not say: "
            "it is told %s. Save the model again to keep that",
            name,
            loaded.config.date,
        )
    return loaded
