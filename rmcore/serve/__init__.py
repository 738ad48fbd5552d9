"""``rmcore serve``: groups of responses over HTTP, for trainers that cannot hold the reward model themselves.

Needs fastapi and uvicorn: ``pip install 'rmcore[serve]'``. See :mod:`rmcore.serve.server`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rmcore.serve.server import create_app, run
    from rmcore.serve.settings import ServeSettings

__all__ = ["ServeSettings", "create_app", "run"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the command line imports this package to list its options.
    if name not in __all__:
        raise AttributeError(f"module 'rmcore.serve' has no attribute {name!r}")
    from rmcore.serve import server

    return getattr(server, name)
