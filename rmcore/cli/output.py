"""Where results go: a file that is never half there, or stdout as a stream.

A file's results are written to ``NAME.partial`` beside it, which takes the name when the command has come to the end of
its input. After an error or an interrupt the partial file stays, with every result up to there, and whatever had the
name before is as it was. ``--resume`` goes on with it. Results are JSON Lines; of a NAME that ends in ``.parquet`` the
partial file is, and the file that it becomes is a table of the same rows.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Protocol, TypeAlias

from rmcore._base.errors import DataError, RmcoreError, reject
from rmcore._base.files import atomic_file, is_inside, replace_file, same_file
from rmcore.cli.checks import check_writable
from rmcore.cli.console import notes
from rmcore.cli.records import Chain, json_line

if TYPE_CHECKING:
    from rmcore.engine.group_score import GroupScore
    from rmcore.engine.selection import Measure
    from rmcore.model.data import Group

__all__ = ["Line", "Output", "Run", "check_apart", "check_file", "json_line", "opened_output", "use_utf8"]

Line: TypeAlias = "Callable[[Group, GroupScore], dict[str, Any] | None]"
"""What is written of a group; nothing for None."""


class Run(Protocol):
    """Scores all groups and writes a line of each."""

    def __call__(self, line: Line, *, measure: Measure = "u") -> None:
        """Raise InputError, before anything is scored, where the model's uncertainty does not tell the ``measure``."""


_FORMATS = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), "-o - and a pipe into the program that compresses"),
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".arrow", ".feather"), "NAME.parquet, or a NAME that ends in .jsonl"),
}
"""Endings of names that say another format than what is written, with the remedy."""


@dataclass
class Output:
    """An open output.

    Attributes:
        stream: where lines go.
        name: the file's, for errors.
        last: the last result that was there already, where an earlier run is gone on with.
        count: results in it.
        chain: of the digests of its results; None for what carries none.
        old: the file of the results that were there already, and how many bytes they are.
        rewritten: the stream of :meth:`rewrite`, which is closed in the end.
    """

    stream: IO[str]
    name: str = "-"
    last: dict[str, Any] | None = None
    count: int = 0
    chain: Chain | None = None
    old: tuple[Path, int] | None = None
    rewritten: IO[str] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record as a line. Raises RmcoreError where that cannot be done: a full disk, say."""
        line = json_line(record if self.chain is None else self.chain.add(record))
        with _named(self.name):
            self.stream.write(line)
        self.count += 1

    def flush(self) -> None:
        """Have everything written seen by others. Raises as :meth:`write`."""
        with _named(self.name):
            self.stream.flush()

    def rewrite(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Put other results in the place of those that were there already, which stay as they are until all is written.

        Raises RmcoreError as :meth:`write`.
        """
        assert self.old is not None, "no results were there"
        file, _ = self.old
        work = file.with_name(f"{file.name}.again")
        self.chain, self.count = None if self.chain is None else Chain(self.chain.run), 0
        with _named(self.name):
            stream = work.open("w+", encoding="utf-8", newline="\n")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
                for result in results:
                    stream.write(json_line(result if self.chain is None else self.chain.add(result)))
                    self.count += 1
                stream.flush()
                replace_file(work, file)
            except BaseException:
                stream.close()
                work.unlink(missing_ok=True)
                raise
        self.stream.close()
        self.stream = self.rewritten = stream

    def done(self) -> Iterator[dict[str, Any]]:
        """The results that were there already."""
        if self.old is None:
            return
        file, size = self.old
        with file.open("rb") as stream:
            while stream.tell() < size:
                yield json.loads(stream.readline())


@contextmanager
def _named(out: str) -> Iterator[None]:
    """What goes wrong in writing says where. A reader of ours that went away is no error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RmcoreError(f"--out: got {out!r}, which cannot be written to: {error.strerror or error}") from error


def check_file(
    out: str,
    *,
    inputs: Iterable[str | Path | None] = (),
    overwrite: bool = False,
    resume: bool = False,
    resumable: bool = True,
    rows: bool = True,
) -> None:
    """Refuse, before any work is done, an output that would destroy something.

    ``resumable`` says whether the command has a --resume to speak of, ``rows`` whether :func:`opened_output` writes it.

    Raises:
        InputError: it is one of the ``inputs``; it, or what an interrupted run left of it, exists and neither
            ``overwrite`` nor ``resume`` says what to do; it is a folder, or cannot be made.
    """
    inputs = list(inputs)
    check_apart("--out", out, inputs)
    if out == "-":
        if resume:
            reject("--resume", "results that go to stdout", "a file: -o NAME")
        return
    path = Path(out)
    _check_name(path)
    if rows and path.suffix in _FORMATS:
        reject("--out", f"{out!r}", "a name of what is written, JSON Lines or Parquet", f"Use {_FORMATS[path.suffix]}")
    if _descriptor(out) is not None or _streams(path):
        if resume:
            reject("--resume", f"{out!r}, which is no regular file", "a file that results are kept in")
        return
    if path.is_dir() or out.endswith(("/", os.sep)):
        reject("--out", f"{out!r}, a folder", "a file's name")
    if overwrite and resume:
        reject("--overwrite, --resume", "both", "at most one")
    partial = _partial(path)
    check_apart("--out", partial, inputs)
    if resume and path.suffix == ".parquet" and path.exists():
        reject("--resume", f"{out!r}, a whole Parquet file", "one that is not there yet, or JSON Lines")
    for file in (path, partial):
        check_writable(file, "--out")
    if resume and path.exists() and partial.exists() and not _continues(path, partial):
        reject(
            "--resume",
            f"{out!r} beside {partial.name!r}",
            "one of them: the file is whole, the other an interrupted run's",
            "Remove one, or begin anew with --overwrite",
        )
    if overwrite or resume:
        return
    if path.exists():
        more = ", --resume adds what is missing" if resumable else ""
        reject("--out", f"{out!r}, which exists", "a new name", f"--overwrite replaces it{more}")
    if partial.exists():
        reject(
            "--out",
            f"{out!r}, of which an interrupted run left {partial.name!r}",
            "a new name",
            "--resume goes on with it, --overwrite begins anew",
        )


def check_apart(option: str, out: str | Path | None, inputs: Iterable[str | Path | None]) -> None:
    """Refuse a place to write to that is one of the ``inputs`` or in one, by links and redirections too."""
    for given in inputs:
        if out is None or given is None:
            continue
        if _one_file(str(out), str(given)):
            reject(option, repr(str(out)), f"another place than {str(given)!r}, which is read")
        if str(out) != "-" and os.path.isdir(given) and is_inside(out, given):
            reject(option, repr(str(out)), f"a place outside the folder {str(given)!r}, which is read")


@contextmanager
def opened_output(out: str, *, resume: bool = False) -> Iterator[Output]:
    """Where results go: a file, or stdout for ``-``. :func:`check_file` comes first.

    Raises:
        InputError: another process is writing to it.
        DataError: with ``resume``, what is there is not a command's output.
    """
    path, descriptor = Path(out), _descriptor(out)
    if out == "-" or descriptor == 1:
        yield Output(sys.stdout)
        return
    if descriptor is not None or _streams(path):
        output = Output(open(out if descriptor is None else os.dup(descriptor), "w", encoding="utf-8"), out)  # noqa: SIM115
        try:
            yield output
            output.flush()
        finally:
            with suppress(OSError):  # what could not be written has been told
                output.stream.close()
        return
    partial = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as raw:
        try:
            fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reject("--out", f"{out!r}, which another process is writing", "a file of its own")
        raw.seek(0)
        fresh = not (resume and raw.read(1))
        try:
            last, count = _begin(path, raw, resume)
        except DataError:
            if not os.fstat(raw.fileno()).st_size:  # it was made here, and would stand beside the file
                partial.unlink()
            raise
        stream = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
        output = Output(stream, out, last, count, old=(partial, os.fstat(raw.fileno()).st_size))
        try:
            yield output
            output.flush()
            _still_there(output.stream, partial)
        except BaseException:
            same = output.count == count and output.rewritten is None
            if not (fresh and same):
                with suppress(OSError, ValueError, RmcoreError):  # what went wrong is on its way already
                    output.flush()
                    _still_there(output.stream, partial)
            _keep(output, path, partial, nothing=fresh and same)
            raise
        finally:
            if output.rewritten is not None:
                with suppress(OSError):  # what could not be written has been told
                    output.rewritten.close()
        if path.suffix == ".parquet":
            _write_parquet(partial, path)
        else:
            replace_file(partial, path)


def _still_there(stream: IO[Any], partial: Path) -> None:
    """Write a partial file again where somebody removed it, or its folder, from under us: its results are still had.

    Raises RmcoreError where another file has taken its place, naming the one that the results are in.
    """
    try:
        if os.path.samestat(os.fstat(stream.fileno()), partial.stat()):
            return
        place = partial.with_name(f"{partial.name}.{secrets.token_hex(4)}")
    except FileNotFoundError:
        place = partial
    with _named(str(place)), atomic_file(place) as work, work.open("wb") as copy:
        at = 0
        while block := os.pread(stream.fileno(), 1 << 20, at):
            copy.write(block)
            at += len(block)
    if place != partial:
        raise RmcoreError(
            f"--out: another program has put a file in the place of {partial}, which is left as it is; the results are "
            f"in {place}"
        )
    notes.print(f"rmcore: {partial} was removed while it was written, and is there again", markup=False)


_ROWS_AT_ONCE = 1000


def _write_parquet(partial: Path, path: Path) -> None:
    """Make a Parquet file of JSON Lines: once through them for the types, once for the rows."""
    from rmcore._base.lines import optional_module

    arrow = optional_module("pyarrow", path, "a Parquet file to write")
    parquet = optional_module("pyarrow.parquet", path, "a Parquet file to write")

    def tables(schema: Any) -> Iterator[Any]:
        with partial.open("rb") as stream:
            while rows := [json.loads(line) for line in itertools.islice(stream, _ROWS_AT_ONCE)]:
                yield arrow.Table.from_pylist(rows, schema=schema)

    schema = arrow.unify_schemas(
        [arrow.schema([]), *(table.schema for table in tables(None))], promote_options="permissive"
    )
    with atomic_file(path) as work, parquet.ParquetWriter(work, schema) as writer:
        for table in tables(schema):
            writer.write_table(table)
    partial.unlink()


def use_utf8() -> None:
    """Have stdout in UTF-8 whatever the locale; what neither it nor stderr can show is shown as its escape."""
    for stream, encoding in ((sys.stdout, "utf-8"), (sys.stderr, None)):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _check_name(path: Path) -> None:
    """Raises InputError for a name that no file can have, itself or while it is partial."""
    try:
        os.lstat(_partial(path) if path.name else path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, a loop of links, a NUL
        reject("--out", repr(str(path))[:200], f"a file's name: {getattr(error, 'strerror', None) or error}")


def _begin(path: Path, partial: BinaryIO, resume: bool) -> tuple[dict[str, Any] | None, int]:
    """The last result and the number of results of a run that is gone on with; its file ends with a whole line."""
    if not resume:
        partial.truncate(0)
        return None, 0
    partial.seek(0)
    data = partial.read()
    file, copied = _partial(path), not data and path.exists()
    if copied:
        file, data = path, path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    last, count = None, 0
    for count, line in enumerate(whole.splitlines(), 1):
        last = _result(line, last, f"{file}: line {count}")
    if copied:
        partial.write(whole)
    partial.truncate(len(whole))  # half a line, where the run was killed
    return last, count


def _result(line: bytes, before: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """One result of a run that is gone on with. A damaged one would be missing for good: what is behind it counts."""
    try:
        result = json.loads(line.decode())
        if not isinstance(result, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise DataError(
            f"{where}: not a result that --resume can go on from ({error}). Cut the file off before that line and "
            "--resume again, or begin anew with --overwrite"
        ) from error
    at, last = result.get("line"), before.get("line") if before else None
    if isinstance(at, int) and isinstance(last, int) and at <= last:
        raise DataError(
            f"{where}: the result of the input's line {at} behind that of line {last}: not one run's results"
        )
    return result


def _keep(output: Output, path: Path, partial: Path, *, nothing: bool) -> None:
    """Say what an error has left; ``nothing`` new is no file."""
    count = output.count
    try:
        output.flush()
    except RmcoreError:  # a full disk, say: the error is on its way already, and not all that was written is there
        count = partial.read_bytes().count(b"\n")
    if nothing:
        partial.unlink(missing_ok=True)
        return
    before = f"; {path} is as it was" if path.exists() else ""
    said = f"{partial} has the {count} results before the error, --resume goes on with them{before}"
    notes.print(said, markup=False, highlight=False, soft_wrap=True)


def _continues(path: Path, partial: Path) -> bool:
    """Whether an interrupted run was going on with the whole file, some of whose results it may have mended."""
    whole = path.read_bytes()
    with partial.open("rb") as stream:
        if stream.read(len(whole)) == whole:
            return True
        stream.seek(0)
        return all(_same_place(line, stream.readline()) for line in whole.splitlines())


def _same_place(one: bytes, other: bytes) -> bool:
    """Whether two results are of the same line of the input, by the same run's options."""
    try:
        (line, run), again = ((r["line"], r["digest"].partition("-")[0]) for r in map(json.loads, (one, other)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return (line, run) == again


def _descriptor(out: str) -> int | None:
    """The number of an open file of this process where ``out`` names one (/dev/stdout), which may be a regular one."""
    if out in ("/dev/stdout", "/dev/stderr"):
        return 1 if out == "/dev/stdout" else 2
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", out)
    return None if found is None else int(found[1])


def _streams(path: Path) -> bool:
    """Whether it is a device or a pipe, which nothing can take the place of."""
    try:
        return not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode))
    except OSError:
        return False


def _one_file(out: str, given: str) -> bool:
    if "-" not in (out, given):
        return not given.startswith("hf://") and same_file(out, given)
    try:
        one, other = (_status(name, stream) for name, stream in ((out, sys.stdout), (given, sys.stdin)))
    except (OSError, ValueError):  # no such file, or no descriptor behind a stream
        return False
    return stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)


def _status(name: str, stream: IO[str]) -> os.stat_result:
    return os.fstat(stream.fileno()) if name == "-" else os.stat(name)
