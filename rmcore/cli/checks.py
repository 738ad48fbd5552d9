"""What can be found wrong before a model is loaded, and what is said of work that ended early."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmcore._base.errors import BackendError, CheckpointError, InputError, reject
from rmcore._base.files import is_inside, same_file

if TYPE_CHECKING:
    from rmcore.model.backbone import Backbone
    from rmcore.ops.dispatch import Backend

__all__ = [
    "Kept",
    "check_backend",
    "check_device",
    "check_folder",
    "check_model_folder",
    "check_parent",
    "check_readable",
    "check_writable",
    "save_or_say",
]


def check_device(name: str | None) -> None:
    """Raises InputError for a device this machine does not have."""
    from rmcore.model.devices import checked_device

    try:
        checked_device(name)
    except InputError as error:
        raise InputError(f"--{error}") from error


def check_backend(model: str, backend: Backend, device: str | None) -> None:
    """Raises BackendError where the kernels asked for cannot run a saved model's head here."""
    from rmcore.head.checkpoint import read_config
    from rmcore.model.devices import checked_device
    from rmcore.model.hub import folder_of
    from rmcore.ops.dispatch import explain

    if backend == "auto":
        return
    import torch

    folder = folder_of(model, expected="a folder with rmcore.json")
    head: Any = {} if folder is None else read_config(folder).get("head")
    head = head if isinstance(head, dict) else {}
    mode = (head.get("config") or {}).get("mode", "difference")
    dtype = getattr(torch, str(head.get("dtype", "float16")), torch.float16)
    op = "pair_variance" if mode == "difference" else "score"
    explanation = explain(op, checked_device(device), dtype, backend)
    if explanation.backend == "none":
        raise BackendError(f"--backend: got {backend!r}, which cannot run here: {explanation.reasons[backend]}")


def check_parent(path: Path, option: str) -> None:
    """Raises InputError where a file or folder cannot be made at ``path``."""
    place = Path(os.path.abspath(path)).parent
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is a file")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reject(option, repr(str(path)), f"a place that can be written to: {error.strerror or error}")


def check_readable(path: str) -> None:
    """Raises OSError where a file to be read cannot be; a stream or a data set of the hub is not looked at."""
    if path == "-" or path.startswith("hf://"):
        return
    status = os.stat(path)  # raises what is wrong with the name
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    if stat.S_ISDIR(status.st_mode) and not os.listdir(path):
        reject("the input", f"{path!r}, an empty folder", "a file, or a folder as Dataset.save_to_disk writes it")


def check_writable(path: Path | None, option: str) -> None:
    """Raises InputError where a file that is kept over runs cannot be read, made or replaced."""
    if path is None:
        return
    if path.is_dir():
        reject(option, f"{str(path)!r}, a folder", "a file's name")
    check_parent(path, option)
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        reject(option, repr(str(path)), "a file that can be read and written to: permission denied")


def check_folder(path: Path | None, option: str) -> None:
    """Raises InputError where a folder for results is a file, or cannot be made."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        reject(option, f"{str(path)!r}, a file", "a folder, there already or not")
    check_parent(path, option)
    if path.is_dir() and not os.access(path, os.W_OK):
        reject(option, repr(str(path)), "a folder that can be written to: permission denied")


def check_model_folder(path: Path, *, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Raises InputError where a model cannot be saved as ``path``, or would destroy one of ``inputs``, or, without
    ``overwrite``, another model.
    """
    from rmcore.head.checkpoint import CONFIG_FILE

    for given in inputs:
        if same_file(path, given):
            reject("--out", repr(str(path)), f"another place than {given!r}, which is read")
        if os.path.exists(given) and is_inside(given, path):
            reject("--out", repr(str(path)), f"another folder than that of {given!r}, which is read")
    if path.exists() and not (path / CONFIG_FILE).is_file() and (not path.is_dir() or any(path.iterdir())):
        reject("--out", repr(str(path)), "a new or empty folder, or with --overwrite one that rmcore wrote")
    if (path / CONFIG_FILE).is_file() and not overwrite:
        reject("--out", f"{str(path)!r}, which exists", "a new folder", "--overwrite replaces it")
    check_parent(path, "--out")


class Kept:
    """What is kept of a command that ends early: the states its backbone has encoded so far, and a judge's verdicts."""

    def __init__(self) -> None:
        self.backbone: Backbone | None = None
        self.store: str | None = None
        """Of verdicts, where one is used."""

    def use(self, backbone: Backbone, *, cache: bool) -> None:
        """Take encoded states from the cache, and put them there, unless ``cache`` is off."""
        self.backbone = backbone
        if cache:
            backbone.use_state_cache()

    def __str__(self) -> str:
        """One sentence, for when the command was interrupted."""
        if self.backbone is None:
            return "nothing was done yet"
        cache = self.backbone.state_cache
        known = 0 if cache is None else cache.written + self.backbone.stats.cached
        verdicts = "" if self.store is None else f"verdicts are kept in {self.store}"
        if cache is None or not known:
            return verdicts or "nothing is kept"
        verdicts = f", and {verdicts}" if verdicts else ""
        return f"{known} encoded texts are kept in {cache.path}{verdicts}: the same command goes on from there"


def save_or_say(out: Path, save: Callable[[Path], None], kept: Kept) -> None:
    """Save a fitted model; where ``out`` cannot be written (a full disk), save it elsewhere and say where.

    Raises CheckpointError in that case.
    """
    try:
        save(out)
    except OSError as error:
        why = f"--out: got {str(out)!r}, which cannot be written ({error.strerror or error})"
        spare = Path(tempfile.mkdtemp(prefix="rmcore-")) / (out.name or "model")
        try:
            save(spare)
        except OSError:
            raise CheckpointError(f"{why}, nor can {spare.parent}. The model is lost; {kept}") from error
        raise CheckpointError(f"{why}. The model is in {spare} instead") from error
