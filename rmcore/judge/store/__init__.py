"""Every call to a judge on disk: asked once, kept with its costs, found again after a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy

if TYPE_CHECKING:
    from rmcore.judge.store.prices import Price, PriceTable
    from rmcore.judge.store.store import StoreError, VerdictStore

__all__ = ["Price", "PriceTable", "StoreError", "VerdictStore"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.judge.store.prices": (
            "Price",
            "PriceTable",
        ),
        "rmcore.judge.store.store": (
            "StoreError",
            "VerdictStore",
        ),
    },
)
