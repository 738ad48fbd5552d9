"""``rmcore serve``: groups of responses over HTTP, for trainers that cannot hold the reward model themselves.

Needs fastapi, uvicorn and prometheus-client: ``pip install 'rmcore[serve]'``.
See :mod:`rmcore.integrations.server.server`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy

if TYPE_CHECKING:
    from rmcore.integrations.server.server import create_app, run
    from rmcore.integrations.server.settings import ServeSettings

__all__ = ["ServeSettings", "create_app", "run"]


# Loaded on first use: the command line imports this package to list its options.
__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.integrations.server.server": ("create_app", "run"),
        "rmcore.integrations.server.settings": ("ServeSettings",),
    },
)
