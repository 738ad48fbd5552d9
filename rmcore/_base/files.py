"""Files that are written whole or not at all, and the checks before one is replaced."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rmcore._base.errors import reject

__all__ = ["atomic_file", "atomic_folder", "digest_file", "replace_file", "same_file", "sync_path", "write_atomic"]

StrPath = str | os.PathLike[str]


@contextmanager
def atomic_file(path: StrPath) -> Iterator[Path]:
    """A new file's path that takes ``path``'s place only if the block succeeds, also after a power cut.

    The file lies in the same folder, which is made if there is none. An error in the block leaves ``path`` as it was.
    Its permissions are those that any new file has (the umask), whatever library wrote it, or those of a ``path`` that
    is replaced.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield work
        if not target.exists():
            _open_up(work, _usual_mode(target.parent))
        replace_file(work, target)
    finally:
        work.unlink(missing_ok=True)


def write_atomic(path: StrPath, data: bytes | str) -> None:
    """Write a file, text in UTF-8: a reader sees the old one or the new one, whole."""
    with atomic_file(path) as work:
        work.write_bytes(data.encode() if isinstance(data, str) else data)


def replace_file(work: Path, target: Path) -> None:
    """Put a finished file in ``target``'s place, written through to the disk.

    A link stays a link to the file that is replaced, and that file's permissions are kept.
    """
    target = target.resolve()
    with suppress(FileNotFoundError):
        work.chmod(stat.S_IMODE(target.stat().st_mode))
    sync_path(work)
    os.replace(work, target)
    sync_path(target.parent)


@contextmanager
def atomic_folder(path: StrPath, *, marker: str) -> Iterator[Path]:
    """A new folder that takes ``path``'s place only if the block succeeds; a reader never sees a half-written one.

    Raises InputError where ``path`` is neither a new or empty folder nor one with a file called ``marker``: nothing of
    somebody else's is replaced.
    """
    target = Path(path).resolve()
    if target.exists() and not (target / marker).is_file() and (not target.is_dir() or any(target.iterdir())):
        reject("path", repr(str(target)), "a new or empty folder, or one that rmcore wrote")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    work = target.with_name(f".{target.name}.{mark}.tmp")
    work.mkdir()
    try:
        yield work
        mode = work.stat().st_mode & 0o666
        for file in work.rglob("*"):
            if file.is_file():
                _open_up(file, mode)
                sync_path(file)
        old = target.with_name(f".{target.name}.{mark}.old")
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(work, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        sync_path(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _usual_mode(folder: Path) -> int:
    """The permissions of a new file there; the umask itself cannot be read without a moment in which it is another."""
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        probe.touch(exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def _open_up(file: Path, mode: int) -> None:
    """Give a file at least these permissions: safetensors, for one, makes files that nobody else may read."""
    own = stat.S_IMODE(file.stat().st_mode)
    if own | mode != own:
        file.chmod(own | mode)


def same_file(a: StrPath, b: StrPath) -> bool:
    """Whether two paths are one file, by links too; where one of them does not exist, whether they would be."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def is_inside(path: StrPath, folder: StrPath) -> bool:
    """Whether ``path``, which need not exist, is below ``folder``, by links too."""
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return outer in inner.parents


def digest_file(file: Path) -> str:
    """Hex sha256 of a file's contents."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Have a file, or a folder's list of names, written through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
