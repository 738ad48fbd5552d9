"""The tensors of a published model by name: read from safetensors, or from a ``.pt`` file that holds tensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmcore._base.errors import CheckpointError
from rmcore.model import hub
from rmcore.model.families.spec import Family

__all__ = ["EMBEDDED_HEAD", "LANGUAGE_HEAD", "Checkpoint", "TensorFiles"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDED_HEAD = "reward_head.safetensors"
"""Where the head's tensors are in a model folder with an embedded body."""
LANGUAGE_HEAD = "language_head.safetensors"
"""Where the language model's output weights are there, if it was used and they are not the embeddings."""


@dataclass(frozen=True)
class Checkpoint:
    """A published model's files, in a folder or on the hub at one commit.

    Args:
        name: folder or hub name.
        revision: the hub's commit; None for a folder.
        folder: where it is one.
        options: cache_dir and local_files_only of the hub.
    """

    name: str
    revision: str | None
    folder: Path | None
    options: Mapping[str, Any]

    def file(self, name: str) -> Path | None:
        """The local path of one of its files, downloaded if need be; None where it has no such file."""
        return hub.files_of(self.name, self.revision, self.options)(name)

    def config(self) -> dict[str, Any]:
        """``config.json``. Raises CheckpointError where there is none, or it is not JSON."""
        path = self.file("config.json")
        if path is None:
            raise CheckpointError(f"backbone: got {self.name!r}, which has no config.json")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"backbone: got {self.name!r} with a config.json that is no JSON ({error})"
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(f"backbone: got {self.name!r} with a config.json that is no object")
        return values

    def tensors(self) -> TensorFiles:
        """The tensors of its safetensors files. Raises CheckpointError where it has none, or a file is damaged."""
        files = TensorFiles(self.name)
        index = self.file(_INDEX)
        if index is not None:
            try:
                placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                shards = sorted(set(placed.values()))
            except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index}: not an index of safetensors files ({error!r})") from error
            for shard in shards:
                files.add(self._wanted(shard), body=True)
            absent = sorted(set(placed) - set(files.names))
            if absent:
                raise CheckpointError(f"{index}: names {absent[0]!r}, which {placed[absent[0]]} does not have")
        else:
            files.add(self._wanted(_SINGLE), body=True)
        extra = self.file(EMBEDDED_HEAD)
        if extra is not None:
            files.add(extra)
        return files

    def further(self, files: TensorFiles, family: Family) -> None:
        """Add what the family keeps in files of its own, where they are there."""
        for name, prefix in family.files:
            path = self.file(name)
            if path is not None:
                files.add(path, prefix)

    def _wanted(self, name: str) -> Path:
        path = self.file(name)
        if path is None:
            raise CheckpointError(
                f"backbone: got {self.name!r} without {name}: it has no safetensors file, and weights in other formats "
                "may run code, so they are not read"
            )
        return path


class TensorFiles:
    """Tensors by name in several files; read one at a time, the rest of a file stays on disk."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._loaded: dict[str, Tensor] = {}
        self._body: set[str] = set()

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._shapes)

    @property
    def extra(self) -> list[str]:
        """Names of the tensors that are in none of the files transformers reads, sorted."""
        return sorted(set(self._shapes) - self._body)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return self._shapes[name]

    def add(self, path: Path, prefix: str = "", *, body: bool = False) -> None:
        """Add a file's tensors, their names after ``prefix``; ``body`` for a file that transformers reads too.

        Raises CheckpointError for one that is not readable.
        """
        if path.suffix == ".pt":
            self._add_pt(path, prefix)
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    self._shapes[prefix + name] = tuple(file.get_slice(name).get_shape())
                    self._where[prefix + name] = path
                    if body:
                        self._body.add(prefix + name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"backbone: {path}: not a readable safetensors file ({error})") from error

    def _add_pt(self, path: Path, prefix: str) -> None:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle of anything else, a damaged archive
            first = (str(error).strip() or repr(error)).splitlines()[0][:200]
            raise CheckpointError(
                f"backbone: {path}: not a file of tensors alone, and others may run code, so it is not read ({first})"
            ) from error
        if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
            raise CheckpointError(f"backbone: {path}: got no state dictionary of tensors")
        for name, value in values.items():
            self._loaded[prefix + str(name)] = value
            self._shapes[prefix + str(name)] = tuple(value.shape)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if name in self._loaded:
            return self._loaded[name]
        from safetensors import safe_open

        with safe_open(self._where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
