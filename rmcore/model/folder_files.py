"""The files that decide what a backbone's folder computes, by sha256: a saved model is for these and no others.

Whole files are digested, weights too, since a sample would miss a tensor that was overwritten in place. That is paid
once: the digest of a large file is kept in the cache (:mod:`rmcore._base.cache`) under its device, inode, size and
times of change, of which the last (ctime) cannot be set back by a program that writes to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rmcore._base.cache import cache_folder
from rmcore._base.errors import CheckpointError
from rmcore._base.files import digest_file

__all__ = ["BASE", "DECIDING", "check_files", "folder_digests"]

# What transformers reads of a folder: configuration, weights, adapters, tokenizers of all kinds, chat templates.
DECIDING = (
    *("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("*tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*vocab*", "merges.txt", "*.model"),
    "*_layer.pt",  # the heads of a family of reward models, tensors alone
    *("*.codes", "*.spm", "*.tiktoken", "*.tokenizer", "tekken.json", "dict.txt", "emoji.json", "byte_maps.json"),
    *("normalizer.json", "word_*.json", "chat_template*", "*.jinja", "additional_chat_templates/*.jinja"),
)
_logger = logging.getLogger(__name__)

BASE = "base_model"
"""Under which name the model that an adapter belongs to is told: a file of its folder behind it, or a hub's commit."""
_LARGE = 32 * 2**20
_SETTLED_S = 2.0
"""A file changed less than this ago is not cached: another change could bear the same time stamp."""


def folder_digests(folder: Path, *, code: bool = False, gguf: str | None = None) -> dict[str, str]:
    """sha256 by name of the files that decide what a backbone loaded from a folder computes.

    They are those in it, whatever the case of their names (not all file systems tell cases apart), shards that an index
    names elsewhere and, of an adapter alone, those of the model it belongs to (:data:`BASE`): where that is on the hub,
    its name instead, to which the caller adds a commit.

    Args:
        folder: as ``from_pretrained`` of transformers takes it.
        code: Python files too, for a backbone that runs them.
        gguf: the GGUF file that has its weights.
    """
    patterns = (*DECIDING, *(["*.py"] if code else []))
    names = [file.name for file in folder.iterdir() if file.is_file()]
    names += [f"additional_chat_templates/{file.name}" for file in folder.glob("additional_chat_templates/*")]
    deciding = {name for name in names if any(fnmatchcase(name.lower(), pattern) for pattern in patterns)}
    deciding |= {name for name in (gguf, *_shards(folder)) if name is not None and (folder / name).is_file()}
    chosen = sorted(deciding)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves the interpreter to others
        found = dict(zip(chosen, pool.map(lambda name: _digest(folder / name), chosen), strict=True))
    return found | _base_of(folder)


def _shards(folder: Path) -> set[str]:
    """The files that the indices of a folder name; they may lie in another one."""
    placed: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        shards = _json(index).get("weight_map")
        placed |= {name for name in shards.values() if isinstance(name, str)} if isinstance(shards, dict) else set()
    return placed


def _base_of(folder: Path) -> dict[str, str]:
    """What transformers loads below an adapter without a model beside it: by the name in its configuration."""
    alone = not (folder / "config.json").is_file()
    name = _json(folder / "adapter_config.json").get("base_model_name_or_path") if alone else None
    if not isinstance(name, str) or not name:
        return {}
    if not os.path.isdir(name):
        return {BASE: name}
    if os.path.samefile(name, folder):
        return {}
    if not os.path.isabs(name):
        _logger.warning(
            "%s: its adapter_config.json names the model below it by the relative path %r: from another folder than "
            "%s it is not found. An absolute path is",
            folder,
            name,
            os.getcwd(),
        )
    return {f"{BASE}/{file}": digest for file, digest in folder_digests(Path(name)).items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # whoever reads the folder says what is wrong with it
        return {}
    return values if isinstance(values, dict) else {}


def check_files(folder: Path, recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Hold a folder's files against those a model was saved with.

    Raises CheckpointError, which names the files that are missing, changed or new.
    """
    if not any(name.split("/")[0] == BASE for name in recorded):  # earlier folders say nothing of an adapter's base
        found = {name: digest for name, digest in found.items() if name.split("/")[0] != BASE}
    missing = sorted(set(recorded) - set(found))
    changed = sorted(name for name in set(recorded) & set(found) if recorded[name] != found[name])
    new = sorted(set(found) - set(recorded))
    told = [
        f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''} {what}"
        for names, what in ((missing, "missing"), (changed, "changed"), (new, "new"))
        if names
    ]
    if told:
        raise CheckpointError(
            f"backbone: got {str(folder)!r} with {'; '.join(told)} since the model was saved, expected the backbone it "
            "was fitted on. Put the files back, or train again"
        )


def _digest(file: Path) -> str:
    stat = file.stat()
    cache = cache_folder()
    if stat.st_size < _LARGE or cache is None or time.time() - stat.st_ctime < _SETTLED_S:
        return digest_file(file)
    known = (os.path.realpath(file), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    kept = cache / "digests" / hashlib.sha256(repr(known).encode()).hexdigest()
    try:
        text = kept.read_text(encoding="ascii")
        if len(text) == 64:
            return text
    except (OSError, ValueError):
        pass
    digest = digest_file(file)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(digest, encoding="ascii")
    except OSError:  # a cache that cannot be written costs time, no more
        pass
    return digest
