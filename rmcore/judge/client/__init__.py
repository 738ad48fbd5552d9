"""Chat completions over HTTP within limits: rates, concurrency, retries, a breaker, deadlines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rmcore._base import lazy

if TYPE_CHECKING:
    from rmcore.judge.client.chat_client import ChatClient
    from rmcore.judge.client.limits import RateLimits
    from rmcore.judge.client.options import ClientOptions

__all__ = ["ChatClient", "ClientOptions", "RateLimits"]

__getattr__, __dir__, _ = lazy.attach(
    __name__,
    {
        "rmcore.judge.client.chat_client": ("ChatClient",),
        "rmcore.judge.client.limits": ("RateLimits",),
        "rmcore.judge.client.options": ("ClientOptions",),
    },
)
