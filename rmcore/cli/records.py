"""A result as a line, and the digest by which a later run knows it again.

Results of groups carry a ``digest``, ``RUN-CHAIN``. RUN is of what decides a row besides its group: the command with
its options, and the model. CHAIN is of the result before it, of the group it was made of and of the result itself: so a
result that was changed, moved or is of another text is found, and so is one that is gone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["Chain", "json_line", "run_digest"]

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
    from rmcore.head.checkpoint import CONFIG_FILE
    from rmcore.model.hub import folder_of

    folder = folder_of(model, expected=f"a folder with {CONFIG_FILE}")
    file = None if folder is None else folder / CONFIG_FILE
    # The file holds the digests of all the others.
    what = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else model
    told = json.dumps([what, dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:8]
