"""Where rmcore keeps what it can compute again: ``RMCORE_CACHE``, a folder or ``off``; by default the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]

_OFF = {"off", "0", "no", "false"}


def cache_folder() -> Path | None:
    """The cache's folder, which may not exist yet; None where ``RMCORE_CACHE`` is ``off``, or nobody's home is known.

    Unset or empty it is ``rmcore`` in ``XDG_CACHE_HOME``, else in ``~/.cache``. What lies in it may be deleted at any
    time.
    """
    named = os.environ.get("RMCORE_CACHE", "")
    if named.lower() in _OFF:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.expanduser(named or os.path.join(home, "rmcore"))
    # No HOME and a user that the system does not know, as in containers: nothing is written to a folder called "~".
    return None if folder.startswith("~") else Path(folder)
