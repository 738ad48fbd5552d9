"""OpenRLHF (read from 0.11.2): three ways to reach the group server, for ``--algo.advantage.estimator rloo``.

    --reward.remote_url http://127.0.0.1:8400/get_reward      no file at all, if the server needs no token
    --train.agent_func_path agent.py                          AgentExecutor = agent_executor("https://host:8400")
    --reward.remote_url reward.py                             reward_func = make_reward_func("https://host:8400")

OpenRLHF sends one response a call, without a group's name; the server (``rmcore serve --group-size n``) gathers the n
siblings by their prompt. Of several URLs (``--reward.remote_url A,B``) it takes them in turn, so siblings come to
different servers: those must know each other (``rmcore serve --peers A,B``). Our client sends the members of a group to
one server by itself.

OpenRLHF's own HTTP call sends no token and, after five tries, leaves the sample without a reward, which stops the run
somewhere else; the executor here sends the token and raises where the reward is missing.

A ``reward_func`` is called in a thread of the event loop's pool and keeps it until its siblings have come. If the pool
is smaller than the number of responses under way, threads can wait for siblings that get no thread. So
:func:`make_reward_func` widens the pool; prefer one of the other two ways.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from rmcore._base.errors import reject
from rmcore._base.loop import run_sync
from rmcore.integrations.client import GroupClient, ServerError

__all__ = ["agent_executor", "make_reward_func"]


def agent_executor(url: str | Sequence[str] | None = None, **options: Any) -> type:
    """The class OpenRLHF looks for in the file of ``--train.agent_func_path``, by the name ``AgentExecutor``.

    It is OpenRLHF's single-turn executor, but for the reward, which comes from the group server.

    Args:
        url: of the server, without a path; of several, all (:class:`~rmcore.integrations.client.GroupClient`). Default:
            the environment variable ``RMCORE_SERVE_URL``.
        options: further arguments of :class:`~rmcore.integrations.client.GroupClient`.

    Raises:
        InputError: no address, or an unusable option.
        ImportError: OpenRLHF is not installed.
    """
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    client = _client(url, options)
    failure: ContextVar[Exception | None] = ContextVar("failure", default=None)

    class AgentExecutor(SingleTurnAgentExecutor):  # type: ignore[misc,unused-ignore]
        """OpenRLHF's single-turn executor with rewards from the group server."""

        def __init__(self) -> None:
            super().__init__(list(client.urls))

        async def execute(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            """Generate one response and wait for its reward; raises where the parent would go on without one."""
            output: dict[str, Any] = await super().execute(*args, **kwargs)
            if output.get("reward") is None:
                raise failure.get() or ServerError("reward: got none, expected one from the group server")
            return output

        async def _fetch_rewards_via_http(
            self, queries_list: Sequence[str], prompts_list: Sequence[str], labels_list: object
        ) -> list[dict[str, Any]]:
            try:
                return [_first(await client.get_reward(queries_list, prompts_list))]
            except Exception as error:
                failure.set(error)  # the parent logs what it catches and goes on
                raise

    return AgentExecutor


def make_reward_func(
    url: str | Sequence[str] | None = None, *, threads: int = 1024, **options: Any
) -> Callable[..., dict[str, Any]]:
    """``reward_func(queries, prompts, labels)`` for the Python file of ``--reward.remote_url``.

    Args:
        url: of the server, without a path; of several, all (:class:`~rmcore.integrations.client.GroupClient`). Default:
            the environment variable ``RMCORE_SERVE_URL``.
        threads: at least as many as an engine has responses under way. OpenRLHF loads the file on its event loop,
            whose thread pool is then replaced by one of this size; off a loop it is ignored.
        options: further arguments of :class:`~rmcore.integrations.client.GroupClient`.

    Returns:
        A function that returns ``rewards`` and ``scores``, a list each with one value a query, and ``extra_logs``; for
        one query, the values themselves, as OpenRLHF's loop over single responses reads them.

    Raises:
        InputError: no address, or an unusable option.
    """
    if threads < 1:
        reject("threads", threads, "at least 1")
    client = _client(url, options)
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        loop.set_default_executor(ThreadPoolExecutor(threads, thread_name_prefix="rmcore reward"))

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: object = None, **_: object
    ) -> dict[str, Any]:
        reply = run_sync(client.get_reward(queries, prompts))
        return _first(reply) if len(queries) == 1 else reply

    return reward_func


def _client(url: str | Sequence[str] | None, options: dict[str, Any]) -> GroupClient:
    url = url or os.environ.get("RMCORE_SERVE_URL")
    if not url:
        reject("url", "nothing", "the address of rmcore serve", "Pass it or set RMCORE_SERVE_URL on every node")
    urls = url.split(",") if isinstance(url, str) else url
    return GroupClient([one.strip().removesuffix("/get_reward") for one in urls], **options)


def _first(reply: dict[str, Any]) -> dict[str, Any]:
    """A single response's values as OpenRLHF uses them."""
    return {"rewards": reply["rewards"][0], "scores": reply["scores"][0], "extra_logs": reply["extra_logs"]}
