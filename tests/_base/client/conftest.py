"""Virtual time."""

from __future__ import annotations

from support.clocks import untimed, virtual

__all__ = ["virtual"]

untimed()
