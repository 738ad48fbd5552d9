"""A Python that imports rmcore from where it is told to, also where an editable installation would answer first."""

from __future__ import annotations

import sys

__all__ = ["command"]

# An editable installation puts a finder before the path that knows the checkout's files only.
_FORGET = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Scikit' not in type(f).__name__]; "


def command(code: str) -> list[str]:
    """The command that runs ``code`` with PYTHONPATH and the current folder deciding what rmcore is."""
    return [sys.executable, "-c", _FORGET + code]
