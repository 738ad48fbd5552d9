"""Serving what another process learns: its journal is looked at, and each version that becomes current is served."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rmcore.engine.learning.journal import LINES, Versions
from rmcore.engine.learning.learner import read_version
from rmcore.head.frozen import FrozenHead
from rmcore.ops.dispatch import Backend

__all__ = ["JournalWatch", "following", "served_from"]

log = logging.getLogger(__name__)


class JournalWatch:
    """Says which version of a journal is current, and reads it again only where its file has changed.

    Args:
        path: the journal's folder.

    Raises CheckpointError, as :meth:`current` does, where the journal is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._seen: tuple[int, int] | None = None
        self._current: int | None = None

    def current(self) -> int | None:
        """The number of the current version; None while there is none."""
        try:
            found = (self.path / LINES).stat()
        except FileNotFoundError:
            return self._current
        if (found.st_mtime_ns, found.st_size) != self._seen:
            versions = Versions(self.path)
            self._current = versions.current if versions.versions else None
            self._seen = found.st_mtime_ns, found.st_size
        return self._current


class ServesHeads(Protocol):
    """What of a :class:`~rmcore.engine.engine.RewardEngine` is needed here."""

    head: FrozenHead
    backend: Backend

    def serve_head(self, head: FrozenHead, version: int) -> None:
        """Serve another version."""
        ...


def served_from(path: str | os.PathLike[str], engine: ServesHeads) -> Callable[[int], None]:
    """``publish`` of :func:`following` for an engine in this process; raises as ``read_version`` and ``serve_head``."""
    base = engine.head

    def publish(version: int) -> None:
        engine.serve_head(*read_version(base, path, version, backend=engine.backend))

    return publish


@contextmanager
def following(
    path: str | os.PathLike[str], publish: Callable[[int], None], *, every_s: float = 1.0
) -> Iterator[threading.Thread]:
    """Call ``publish(version)`` for the version that is current, and in a thread for each that becomes so later.

    What goes wrong later is logged and tried again; the version before goes on serving.

    Args:
        path: the journal's folder.
        publish: serves a version of this number.
        every_s: seconds from one look to the next.

    Raises what ``publish`` raises, and CheckpointError for a damaged journal, the first time.
    """
    watch, stop = JournalWatch(path), threading.Event()
    served = watch.current()
    if served is not None:
        publish(served)

    def look() -> None:
        nonlocal served
        while not stop.wait(every_s):
            try:
                version = watch.current()
                if version is not None and version != served:
                    publish(version)
                    served = version
                    log.info("serving version %d of the head", version)
            except Exception:  # a shared folder that is away, a version that another machine's arithmetic made
                log.exception("%s: version not served; the one before is", path)

    thread = threading.Thread(target=look, name="rmcore journal", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()
