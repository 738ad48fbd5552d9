"""Serving what another process learns: its journal is looked at, and each version that becomes current is served."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rmcore.engine.learning.journal import LINES, Versions

__all__ = ["JournalWatch", "following"]

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
