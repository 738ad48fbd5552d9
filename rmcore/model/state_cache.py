"""Hidden states that were computed before, in a file: what was encoded once is not encoded again.

One SQLite file an encoder (:attr:`Backbone.identity <rmcore.model.backbone.Backbone.identity>`), one row a text: a
digest of its token ids, and its pooled state in float32. Texts themselves are not in it. States are written after each
forward pass, so an interrupted run goes on where it was. A cache that fails (a full disk, a damaged file) is left alone
and said so; it never ends a run.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmcore._base.cache import cache_folder

__all__ = ["MAX_BYTES", "StateCache"]

MAX_BYTES = 8 * 2**30
"""Most bytes of all states together. The encoders that were used longest ago make room."""

_ASKED = 500
"""Keys of one query, below SQLite's limit on parameters."""

log = logging.getLogger(__name__)


class StateCache:
    """The states of one encoder.

    Args:
        folder: of the caches of all encoders.
        identity: of the encoder.
        width: of a state.
        max_bytes: most bytes of all files in ``folder`` together.
    """

    def __init__(self, folder: Path, identity: str, width: int, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = folder / f"{identity}.sqlite"
        self.width = width
        self.max_bytes = max_bytes
        self.written = 0
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_room()
            self._database = self._open()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    @classmethod
    def default(cls, identity: str | None, width: int) -> StateCache | None:
        """The cache in rmcore's cache folder; None where caching is off, or an encoder has no identity."""
        home = cache_folder()
        return None if home is None or identity is None else cls(home / "states", identity, width)

    def read(self, texts: Sequence[tuple[int, ...]]) -> tuple[list[int], Tensor]:
        """(indices of the token sequences that are known, their states (n, width) float32)."""
        keys = [_key(ids) for ids in texts]
        place = {key: k for k, key in enumerate(keys)}
        indices: list[int] = []
        rows: list[np.ndarray] = []
        with self._lock:
            try:
                for start in range(0, len(keys) if self._database is not None else 0, _ASKED):
                    asked = keys[start : start + _ASKED]
                    assert self._database is not None
                    query = f"SELECT key, state FROM states WHERE key IN ({','.join('?' * len(asked))})"  # noqa: S608
                    for key, blob in self._database.execute(query, asked):
                        if len(blob) == 4 * self.width:
                            indices.append(place[key])
                            rows.append(np.frombuffer(blob, dtype="<f4"))
            except sqlite3.Error as error:
                self._give_up(error)
                indices, rows = [], []
        return indices, torch.from_numpy(np.stack(rows).copy()) if rows else torch.empty(0, self.width)

    def write(self, texts: Sequence[tuple[int, ...]], states: Tensor) -> None:
        """Keep the states (n, width) of token sequences; those with NaN or Inf are not."""
        values = states.detach().to("cpu", torch.float32).numpy()
        rows = [
            (_key(ids), value.astype("<f4").tobytes())
            for ids, value in zip(texts, values, strict=True)
            if np.isfinite(value).all()
        ]
        with self._lock:
            if self._database is None:
                return
            try:
                (pages,) = self._database.execute("PRAGMA page_count").fetchone()
                (size,) = self._database.execute("PRAGMA page_size").fetchone()
                if pages * size + 4 * self.width * len(rows) > self.max_bytes:
                    raise OSError(f"it has its {self.max_bytes} bytes")
                with self._database:
                    self._database.executemany("INSERT OR REPLACE INTO states VALUES (?, ?)", rows)
                self.written += len(rows)
            except (OSError, sqlite3.Error) as error:
                self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, no space, no rights: the file is not to blame
                raise
            log.warning("%s: not a cache of states (%s), so it is begun anew", self.path, error)
            for end in ("", "-wal", "-shm"):
                Path(f"{self.path}{end}").unlink(missing_ok=True)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=2.0, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(
                "CREATE TABLE IF NOT EXISTS states (key BLOB PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID"
            )
            database.execute("SELECT key, state FROM states LIMIT 1").fetchone()
        except BaseException:
            database.close()
            raise
        self.path.touch()  # used now: others make room first
        return database

    def _make_room(self) -> None:
        files = [file for file in self.path.parent.glob("*.sqlite*") if not file.name.startswith(self.path.name)]
        stats = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in files)
        total = sum(size for _, size, _ in stats)
        for _, size, file in stats:
            if total <= self.max_bytes // 2:  # the other half is this encoder's
                return
            file.unlink(missing_ok=True)
            total -= size

    def _give_up(self, error: Exception) -> None:
        log.warning("%s: encoded states are not kept from here on: %s", self.path, error)
        if self._database is not None:
            self._database.close()
            self._database = None


def _key(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()
