"""The arguments of :class:`~rmcore.judge.chat.ChatJudge`, checked and made into what it uses."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rmcore._base.client.options import ClientOptions
from rmcore._base.errors import JudgeError
from rmcore.judge.client.chat_client import ChatClient
from rmcore.judge.client.completions import CompletionFunction
from rmcore.judge.client.exchange import FunctionExchange

if TYPE_CHECKING:
    from rmcore.judge.store.store import VerdictStore

__all__ = ["check_extra", "make_client", "open_store", "refuse", "store_error"]

_RESERVED = frozenset({"model", "messages", "stream", "n"})


def make_client(
    base_url: str | None, api_key_env: str | None, complete: CompletionFunction | None, options: ClientOptions
) -> ChatClient:
    """The client of an endpoint or of a completion function."""
    if not isinstance(options, ClientOptions):
        raise JudgeError(f"client: got {type(options).__name__}, expected ClientOptions")
    if (base_url is None) == (complete is None):
        raise JudgeError(f"base_url, complete: got {'neither' if complete is None else 'both'}, expected one of them")
    if complete is not None:
        return ChatClient(FunctionExchange(complete), options)
    assert base_url is not None
    return ChatClient.over_http(base_url, api_key_env, options)


def refuse(unknown: Mapping[str, object]) -> None:
    """TypeError for keyword arguments that there are not, or not any more."""
    moved = [name for name in unknown if name in {option.name for option in fields(ClientOptions)}]
    if moved:
        names = ", ".join(f"{name}=..." for name in moved)
        raise TypeError(f"ChatJudge: {', '.join(moved)} moved into the client's options: client=ClientOptions({names})")
    if unknown:
        raise TypeError(f"ChatJudge: got unexpected keyword arguments {', '.join(unknown)}")


def open_store(store: VerdictStore | str | Path | None, deadline_s: float | None) -> VerdictStore | None:
    """The store, opened if it is a path. Without one, sqlite is not even imported."""
    if store is None:
        return None
    from rmcore.judge.store.store import VerdictStore

    if isinstance(store, (str, Path)):
        return VerdictStore(store) if deadline_s is None else VerdictStore(store, open_s=min(deadline_s, 30.0))
    if not isinstance(store, VerdictStore):
        raise JudgeError(f"store: got {type(store).__name__}, expected a VerdictStore, a path or None")
    return store


def store_error() -> type[Exception]:
    """The error of stores, imported only where there may be one."""
    from rmcore.judge.store.store import StoreError

    return StoreError


def check_extra(extra: Mapping[str, object], taken: Collection[str]) -> dict[str, object]:
    """``extra`` as plain JSON values, if it leaves alone the fields that the judge sets itself."""
    clash = sorted((_RESERVED | set(taken)) & set(extra))
    if clash:
        raise JudgeError(f"extra_body: got {', '.join(clash)}, expected fields that the judge does not set itself")
    try:
        plain: dict[str, object] = json.loads(json.dumps(dict(extra), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise JudgeError(f"extra_body: got values that are no JSON ({type(error).__name__})") from None
    return plain
