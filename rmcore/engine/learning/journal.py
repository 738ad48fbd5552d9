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

What no crash leaves behind is damage, and refused by file and line: opening writes nothing into what it refuses.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rmcore._base.errors import CheckpointError, InputError
from rmcore._base.files import atomic_file, digest_file, sync_path
from rmcore._base.json_members import unique_members
from rmcore._base.version import __version__

__all__ = ["Journal", "Version", "Versions"]

log = logging.getLogger(__name__)

LINES = "journal.jsonl"
FORMAT = "rmcore-journal"
FORMAT_VERSION = 1

_BEGINS = b'{"event"'
_TENSORS = re.compile(r"(?:update|snapshot)-(\d{6,})\.safetensors")


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
        self._whole = 0
        self._torn = 0
        self._known: tuple[int, int] | None = None
        """Bytes of whole lines; of the beginning of one behind them; the file, where there is one, by device and
        number."""
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
        file, content = self.path / LINES, b""
        # Before the lines: whoever writes meanwhile may write more of both.
        names = os.listdir(self.path) if self.path.is_dir() else []
        if file.exists():
            try:
                content, state = file.read_bytes(), file.stat()
            except OSError as error:
                raise CheckpointError(f"{file}: not readable ({error.strerror or error})") from error
            self._known = state.st_dev, state.st_ino
        whole, newline, rest = content.rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        for number, text in enumerate(lines, 1):
            try:
                read = text.decode("utf-8-sig" if number == 1 else "utf-8")
                line = json.loads(read, object_pairs_hook=unique_members)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{file}:{number}: got a line that is not JSON ({error})") from error
            self._take(line, f"{file}:{number}")
        # A crash leaves the beginning of a line as it is written here, or zeros that never were overwritten.
        if rest.strip(b"\0") and not (rest + _BEGINS[len(rest) :]).startswith(_BEGINS):
            got = f"{rest[:40]!r}, and no line's end"
            raise CheckpointError(f"{file}:{len(lines) + 1}: got {got}, expected a line of a journal")
        self._whole, self._torn = len(content) - len(rest), len(rest)
        self._check_files(file, names)

    def _check_files(self, file: Path, names: list[str]) -> None:
        """Raise if there are tensors of versions later than the one that a crash could have begun."""
        due = len(self.versions)
        found = [match for name in names if (match := _TENSORS.fullmatch(name))]
        latest = max(found, key=lambda match: int(match[1]), default=None)
        if latest is not None and int(latest[1]) > due:
            raise CheckpointError(
                f"{file}: got lines of {due} versions beside {latest[0]}, expected those up to that file's. Lines are "
                "missing at its end: copy the folder again"
            )

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
        elif found.parent != self.current:
            # An update is always of the version that was current: a line before this one is missing or elsewhere.
            refuse(f"{where}.parent", found.parent, f"{self.current}, the version that was current")
        elif (more := found.count - self.versions[found.parent].count) != found.report.get("pairs", more):
            refuse(f"{where}.count", found.count, f"its parent's {self.versions[found.parent].count} and its pairs")
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
        InputError: another process, or another learner of this one, writes to it, or it is no folder to write in.
        CheckpointError: it is damaged in a way no crash explains, foreign, or of another format version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            self._lock = (Path(path) / "lock").open("a")
        except OSError as error:
            said = f"{str(path)!r} ({error.strerror or error})"
            raise InputError(f"journal: got {said}, expected a folder that can be written to") from error
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
        if self._torn:
            said = "the last line was cut off by a crash (%d bytes); it never happened"
            log.warning(f"%s: {said}", self.path / LINES, self._torn)

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

        self._check_unchanged()
        with atomic_file(self.path / name) as work:
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, work)
        return digest_file(self.path / name)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._check_unchanged()
        data = (json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n").encode()
        with (self.path / LINES).open("ab", buffering=0) as stream:
            size = self._whole
            try:
                if self._torn:
                    stream.truncate(size)
                    self._torn = 0
                if stream.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "only part of a line could be written", str(self.path / LINES))
                os.fsync(stream.fileno())
                sync_path(self.path)
            except BaseException:
                # Half a line must not be glued to the next one, nor a version stand on disk that nobody knows of.
                stream.truncate(size)
                raise
            state = os.fstat(stream.fileno())
            self._whole, self._known = size + len(data), (state.st_dev, state.st_ino)

    def _check_unchanged(self) -> None:
        """Raise unless the file of lines is the one that was read, as it was left."""
        self._check_open()
        file = self.path / LINES
        try:
            state = file.stat()
        except FileNotFoundError:
            if self._known is None and self.path.is_dir():
                return
            raise CheckpointError(
                f"{file}: gone since the journal was opened. The head of version {self.current} is kept in this "
                "process: save the model, and begin a journal of its own for it"
            ) from None
        if self._known != (state.st_dev, state.st_ino) or state.st_size != self._whole + self._torn:
            raise CheckpointError(
                f"{file}: changed by somebody else since the journal was opened ({state.st_size} bytes, expected "
                f"{self._whole + self._torn}, or another file). Nothing was written. Put the file back as it was"
            )

    def _check_open(self) -> None:
        if self.closed:
            raise InputError(f"journal: got {str(self.path)!r}, which was closed, expected an open one")
