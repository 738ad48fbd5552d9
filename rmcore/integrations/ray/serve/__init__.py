"""The group server on Ray Serve: ``rmcore serve --ray``.

    GroupServer   starts it on a cluster, changes its scale and the version of its head, drains and ends it
    ServeScale    how many processes of each kind

Needs ray: ``pip install 'rmcore[ray]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy

if TYPE_CHECKING:
    from rmcore.integrations.ray.serve.server import GroupServer, ServeScale

__all__ = ["GroupServer", "ServeScale"]

__getattr__, __dir__, _ = lazy.attach(__name__, {"rmcore.integrations.ray.serve.server": ("GroupServer", "ServeScale")})
