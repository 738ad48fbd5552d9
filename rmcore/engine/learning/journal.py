"""The journal of a head that learns: every update on disk, in order, so that any version can be had again.

A folder::

    journal.jsonl                  one JSON object a line: "open", then "update" and "revert" as they happened
    update-000001.safetensors      the judged rows, labels and weights of version 1, and β after it
    snapshot-000000.safetensors    Σ w φφᵀ (packed lower tiles) and β of version 0; then of every n-th version
    lock                           held by the one process that may write

Versions are numbered from 0, the head as it was given, and never reused; each names its parent, so a revert loses
nothing. A tensor file is complete under its final name before its line is written, and a line counts once its newline
is on disk: whatever a crash leaves behind is either a whole version or none. Files are named by their sha256 in the
line that refers to them, and every version by the digest of its state. No pickle.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rmcore._base.errors import CheckpointError, InputError
from rmcore._base.files import atomic_file, digest_file, sync_path
from rmcore._base.version import __version__

__all__ = ["Journal", "Version", "Versions"]

log = logging.getLogger(__name__)

LINES = "journal.jsonl"
FORMAT = "rmcore-journal"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Version:
    """One state of the head.

    Attributes:
        number: of the version; 0 is the head as it was given.
        parent: the version it was learned from, None for 0.
        state: hex sha256 of β and the posterior.
        count: data in the posterior.
        report: what the update did, JSON values.
        file: the update's tensors, empty for 0.
        sha256: of that file.
        snapshot: file with the whole state, empty where there is none.
        snapshot_sha256: of that file.
    """

    number: int
    parent: int | None
    state: str
    count: int
    report: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    sha256: str = ""
    snapshot: str = ""
    snapshot_sha256: str = ""


class Versions:
    """Reads what is in the folder now, whoever writes to it meanwhile.

    Args:
        path: the folder. One that is empty, or not there, has no versions.

    Raises CheckpointError where it is damaged in a way no crash explains, foreign, or of another format version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.versions: list[Version] = []
        self.current = 0
        self.identity: dict[str, Any] = {}
        """What the head of this journal is, as :meth:`Journal.begin` was told."""
        self._read()

    def update_tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of an update, checked against their digest."""
        return self._read_tensors(self.versions[number].file, self.versions[number].sha256)

    def snapshot_tensors(self, number: int) -> dict[str, Tensor]:
        """The whole state of a version that has a snapshot, checked against its digest."""
        return self._read_tensors(self.versions[number].snapshot, self.versions[number].snapshot_sha256)

    def _read_tensors(self, name: str, sha256: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / name
        if not file.is_file() or digest_file(file) != sha256:
            raise CheckpointError(f"{file}: missing, or its sha256 differs from the journal's. Copy the folder again")
        try:
            return load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not readable ({error})") from error

    def _read(self) -> None:
        file = self.path / LINES
        content = file.read_bytes() if file.is_file() else b""
        whole, newline, rest = content.rpartition(b"\n")
        if rest:
            self._cut_off(len(content) - len(rest), len(rest))
        if not newline:
            return
        for number, text in enumerate(whole.split(b"\n"), 1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{file}:{number}: got a line that is not JSON ({error})") from error
            self._take(line, f"{file}:{number}")

    def _cut_off(self, size: int, more: int) -> None:
        """What to do with the beginning of a line: here nothing, somebody may be writing the rest of it."""

    def _take(self, line: Any, where: str) -> None:
        """Apply one line, called ``where`` in errors, to what is known."""
        from rmcore._base.states import checked, refuse
        from rmcore.engine.learning import schema

        event = line.get("event") if isinstance(line, Mapping) else None
        if event not in ("open", "update", "revert"):
            refuse(where, line, "an object whose event is open, update or revert")
        if event == "open" and (line.get("format"), line.get("format_version")) != (FORMAT, FORMAT_VERSION):
            # Before the other fields, which another version may have changed.
            got = f"{line.get('format')!r} version {line.get('format_version')!r}"
            raise CheckpointError(f"{where}: got {got}, expected {FORMAT!r} {FORMAT_VERSION}")
        found, number = checked(schema.LINES[event], line, where), len(self.versions)
        if isinstance(found, schema.RevertLine):
            if found.version >= number:
                refuse(f"{where}.version", found.version, f"one of the {number} versions before it")
            self.current = found.version
            return
        if isinstance(found, schema.OpenLine):
            if number:
                refuse(where, "a second beginning", f"version {number}")
            self.identity = dict(found.head)
            version = Version(0, None, found.state, found.count)
        elif found.version != number or found.parent >= number:
            refuse(where, f"version {found.version} of {found.parent}", f"a later one: version {number} was due")
        else:
            version = Version(number, found.parent, found.state, found.count, found.report, found.file, found.sha256)
        self.versions.append(
            replace(version, snapshot=found.snapshot or "", snapshot_sha256=found.snapshot_sha256 or "")
        )
        self.current = number


class Journal(Versions):
    """Opens or creates the folder, takes its lock, and reads what is there.

    Args:
        path: the folder; made if missing.

    Raises:
        InputError: another process, or another learner of this one, writes to it.
        CheckpointError: it is damaged in a way no crash explains, foreign, or of another format version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        self._lock = (Path(path) / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(
                f"journal: got {str(path)!r}, which another learner has open, expected a folder of its own. "
                "Close that one first"
            ) from None
        try:
            super().__init__(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock back. Closing twice is fine."""
        self._lock.close()

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._lock.closed

    # -- writing -----------------------------------------------------------------------------------------------------

    def begin(self, identity: dict[str, Any], state: str, count: int, snapshot: Mapping[str, Tensor]) -> None:
        """Write version 0."""
        name = "snapshot-000000.safetensors"
        sha256 = self._write_tensors(name, snapshot)
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "rmcore_version": __version__, "head": identity}
        line = {"event": "open", **head, "state": state, "count": count, "snapshot": name, "snapshot_sha256": sha256}
        self._append(line)
        self._take(line, "journal")

    def add(
        self,
        state: str,
        count: int,
        report: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        snapshot: Mapping[str, Tensor] | None,
    ) -> Version:
        """Write a version whose parent is the current one, and make it current."""
        number = len(self.versions)
        name = f"update-{number:06d}.safetensors"
        line: dict[str, Any] = {"event": "update", "version": number, "parent": self.current, "state": state}
        line |= {"count": count, "file": name, "sha256": self._write_tensors(name, tensors), "report": dict(report)}
        if snapshot is not None:
            line["snapshot"] = f"snapshot-{number:06d}.safetensors"
            line["snapshot_sha256"] = self._write_tensors(line["snapshot"], snapshot)
        self._append(line)
        self._take(line, "journal")
        return self.versions[-1]

    def revert(self, number: int) -> None:
        """Note that version ``number`` is current from now on."""
        line = {"event": "revert", "version": number}
        self._append(line)
        self._take(line, "journal")

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        from safetensors.torch import save_file

        self._check_open()
        with atomic_file(self.path / name) as work:
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, work)
        return digest_file(self.path / name)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._check_open()
        data = (json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n").encode()
        with (self.path / LINES).open("ab", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            try:
                if stream.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "only part of a line could be written", str(self.path / LINES))
                os.fsync(stream.fileno())
                sync_path(self.path)
            except BaseException:
                # Half a line must not be glued to the next one, nor a version stand on disk that nobody knows of.
                stream.truncate(size)
                raise

    def _check_open(self) -> None:
        if self.closed:
            raise InputError(f"journal: got {str(self.path)!r}, which was closed, expected an open one")

    def _cut_off(self, size: int, more: int) -> None:
        """Take the beginning of a line away: a crash cut it off, and nobody else writes."""
        file = self.path / LINES
        log.warning("%s: the last line was cut off by a crash (%d bytes); it never happened", file, more)
        with file.open("r+b") as stream:
            stream.truncate(size)
            os.fsync(stream.fileno())
