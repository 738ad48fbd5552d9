"""A PEFT adapter that is a repository of its own on the hub, without a model beside it.

It is loaded from its folder in the cache, as one on disk is, and keeps its hub name and commit; so does the model that
it belongs to (:data:`~rmcore.model.folder_files.BASE`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import CheckpointError
from rmcore.model.folder_files import DECIDING
from rmcore.model.hub import files_of, folder_of, hub_failure

if TYPE_CHECKING:
    from rmcore.model.backbone_config import BackboneConfig
    from rmcore.model.loading import Options

__all__ = ["HubAdapter", "hub_adapter"]


@dataclass(frozen=True)
class HubAdapter:
    """An adapter of the hub: its configuration by hub name and commit, and by the folder it is read from."""

    named: BackboneConfig
    local: BackboneConfig

    def by_name(self, loaded: BackboneConfig) -> BackboneConfig:
        """What a backbone loaded from the folder is configured by, under its hub name and commit."""
        return replace(loaded, name=self.named.name, revision=self.named.revision)


def hub_adapter(config: BackboneConfig, options: Options) -> HubAdapter | None:
    """The adapter that a hub name is, downloaded; None for a folder, and for a repository with a model.

    Raises CheckpointError: the repository cannot be had, or its model is in a folder of the machine it was trained on.
    """
    if folder_of(config.name, config.revision) is not None:
        return None
    files = files_of(config.name, config.revision, options.hub)
    if files("config.json") is not None or (told := files("adapter_config.json")) is None:
        return None
    base = _base(told)
    if not isinstance(base, str) or not base or os.path.isdir(base) or base.startswith((".", "/", "~")) or "\\" in base:
        raise CheckpointError(
            f"backbone: got {config.name!r} on the hub, an adapter of {base!r}, expected one whose adapter_config.json "
            "names its model by a hub name. Download it (hf download), name that model in its adapter_config.json, and "
            "give its folder"
        )
    folder = _downloaded(config, options)
    return HubAdapter(
        named=replace(config, revision=folder.name),  # the cache's layout: snapshots/<commit>
        local=replace(config, name=str(folder), revision=None),
    )


def _base(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"backbone: got {str(path)!r}, which is no adapter's configuration ({error})") from error
    return found.get("base_model_name_or_path") if isinstance(found, dict) else None


def _downloaded(config: BackboneConfig, options: Options) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(config.name, revision=config.revision, allow_patterns=list(DECIDING), **options.hub)
        )
    except Exception as error:
        told = hub_failure(error, config.name, config.revision)
        if told is None:
            raise
        raise told from error
