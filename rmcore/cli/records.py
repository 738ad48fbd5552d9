"""A result as a line, and the digest by which a later run knows it again.

Results of groups carry a ``digest``, ``RUN-CHAIN``. RUN is of what decides a row besides its group: the command with
its options, and the model. CHAIN is of the result before it, of the group it was made of and of the result itself: so a
result that was changed, moved or is of another text is found, and so is one that is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmcore._base.files import digest_file

__all__ = ["Chain", "json_line", "model_identity", "run_digest", "settings_digest"]

_HALF = re.compile("[\ud800-\udfff]")


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON in readable characters; half a surrogate pair, which UTF-8 has not, as its escape."""
    text = json.dumps(record, allow_nan=False, ensure_ascii=False)
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text) + "\n"


class Chain:
    """The digests of one file's results, one after the other.

    Args:
        run: of :func:`run_digest`.
    """

    def __init__(self, run: str) -> None:
        self.run, self._last = run, ""

    def add(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A result whose ``digest`` is its group's, as it is written: with the chain's."""
        self._last = hashlib.sha256(f"{self.run}{self._last}{json_line(record)}".encode()).hexdigest()[:16]
        return {**record, "digest": f"{self.run}-{self._last}"}


def run_digest(model: str, settings: Mapping[str, Any]) -> str:
    """Of what decides results besides their groups: a model's folder or name, and options as plain values."""
    return settings_digest(model_identity(model), settings)


def settings_digest(identity: str, settings: Mapping[str, Any]) -> str:
    """Of a model's :func:`model_identity` and options as plain values: 8 hex characters."""
    told = json.dumps([identity, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def model_identity(model: str) -> str:
    """What tells a model from any other of its name: the contents of its files, or the hub's commit of it.

    A name of the hub is looked up in the cache, where whoever loaded it has left it.
    """
    from rmcore.head.checkpoint import CONFIG_FILE
    from rmcore.model.hub import folder_of

    if os.path.isfile(model):  # a GGUF file
        return digest_file(Path(model))
    folder = folder_of(model, expected=f"a folder with {CONFIG_FILE}")
    if folder is None:
        return f"{model}@{_commit(model, None)}"
    file = folder / CONFIG_FILE
    if not file.is_file():
        return json.dumps(_files(folder), sort_keys=True)
    content = file.read_bytes()
    return hashlib.sha256(content).hexdigest() + _backbone(content)


def _backbone(content: bytes) -> str:
    """Of a backbone what the model's own file leaves open: it holds the digests of all files, or the hub's commit."""
    try:
        values = json.loads(content)
        known, named = values.get("backbone_files"), values["backbone"]
        name, revision = named.get("name"), named.get("revision")
    except (ValueError, KeyError, AttributeError, TypeError):  # no model, which loading it says
        return ""
    if known or values.get("embedded") or not isinstance(name, str) or not name or os.path.isfile(name):
        return ""
    if os.path.isdir(name):
        return json.dumps(_files(Path(name)), sort_keys=True)
    return f"{name}@{_commit(name, revision)}"


def _files(folder: Path) -> dict[str, str]:
    from rmcore.model.folder_files import folder_digests

    return folder_digests(folder)


def _commit(name: str, revision: str | None) -> str:
    """The commit that a revision of a model was when it came into the cache; the revision where it is not there."""
    from rmcore._base.errors import CheckpointError
    from rmcore.head.checkpoint import CONFIG_FILE
    from rmcore.model.hub import file_of

    for file in (CONFIG_FILE, "config.json"):
        try:
            found = file_of(name, file, revision=revision, cache_dir=None, local_files_only=True)
        except CheckpointError:  # no name that the hub can have
            break
        if found is not None:  # the cache's layout: snapshots/<commit>/<file>
            return found.parent.name
    return str(revision)
