"""Chat completions over HTTP within limits: rates, concurrency, retries, a breaker, deadlines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy

if TYPE_CHECKING:
    from rmcore._base.client.limits import RateLimits
    from rmcore._base.client.options import ClientOptions
    from rmcore.judge.client.chat_client import ChatClient

__all__ = ["ChatClient", "ClientOptions", "RateLimits"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.judge.client.chat_client": ("ChatClient",),
        "rmcore._base.client.limits": ("RateLimits",),
        "rmcore._base.client.options": ("ClientOptions",),
    },
)
