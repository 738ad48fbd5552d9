"""The cluster of serve_ray: nodes of this machine, what runs on which, and how processes and whole nodes are killed."""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rmcore.engine.learning.follow import following
from rmcore.integrations.ray.serve import GroupServer, ServeScale
from rmcore.integrations.server import ServeSettings
from rmcore.judge.base import Verdict
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.testing import ReplayServer

from .serve_load import Soak

__all__ = ["kill_node", "kill_one", "processes", "running", "slow_judge", "started"]

_MEMORY = 100 * 2**20
_APPLICATION = "rmcore"


class _Silent(RecordedJudge):
    """Has no verdict on anything."""

    def lookup(self, *_: Any) -> Verdict:
        return Verdict.none("no_verdict")


def slow_judge(seconds: float) -> ReplayServer:
    """A judge that takes its time and then says nothing: batches last, and all preferences stay the head's."""
    return ReplayServer(_Silent({}), latency_s=seconds)


@contextmanager
def _cluster(nodes: int) -> Iterator[Any]:
    """One node where there is no cluster yet; with ``nodes``, a head without CPUs and so many others around it."""
    import ray

    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_SERVE_LOG_TO_STDERR": "0"}
    if not nodes and ray.is_initialized():
        yield None
        return
    with ExitStack() as stack:
        found, how = None, {"address": "local", "num_cpus": 4, "include_dashboard": False}
        if nodes:
            from ray.cluster_utils import Cluster

            head = {"num_cpus": 0, "object_store_memory": _MEMORY, "include_dashboard": False}
            found = Cluster(initialize_head=True, head_node_args=head)
            stack.callback(found.shutdown)
            for _ in range(nodes):
                found.add_node(num_cpus=4, object_store_memory=_MEMORY)
            how = {"address": found.address}
        ray.init(log_to_driver=False, logging_level="ERROR", **how)
        stack.callback(ray.shutdown)
        yield found


@contextmanager
def started(
    model: Path,
    journal: Path,
    soak: Soak,
    scale: ServeScale,
    *,
    nodes: int = 0,
    judge_url: str | None = None,
    share: float = 0.05,
    **settings: float,
) -> Iterator[tuple[GroupServer, str, Any]]:
    """A group server on a cluster of this machine, its URL, and the cluster where that has several ``nodes``.

    With ``judge_url`` the least certain ``share`` of each batch is asked of that judge; ``settings`` are the server's.
    """
    from rmcore.cli.on_ray import batch_routing, engine_of, shared_judge
    from rmcore.cli.options import Judging

    judging = Judging()
    if judge_url is not None:
        judging = Judging(judge_url=judge_url, judge_model="slow", judge_key_env="", budget=share, rank_by="u")
    with _cluster(nodes) as cluster, ExitStack() as stack:
        judge = None
        if judge_url is not None:
            judge = shared_judge(judging, None)
            stack.callback(judge.close)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        given: dict[str, Any] = {"port": port, "group_size": soak.group, "time_limit_s": soak.time_limit_s, **settings}
        device = {"backend": "auto", "device": "cpu"}
        make = functools.partial(engine_of, str(model), batch_routing(judging), device, judge)
        server = GroupServer(make, ServeSettings(**given), scale, model="tiny", journal=journal)
        stack.callback(server.serve.shutdown)
        stack.callback(server.stop)
        with following(journal, server.publish, every_s=0.5):
            yield server, server.start(), cluster


def running(server: GroupServer) -> dict[str, int]:
    """Replicas of the model by what Serve says they are doing."""
    states = server.serve.status().applications[server.name].deployments["Replica"].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items() if count}


def processes(deployment: str = "", node: str | None = None) -> list[int]:
    """Process numbers of what is alive of a deployment (of all whose names begin so), on one node or anywhere."""
    return sorted(number for name, at, number in _actors() if name.startswith(deployment) and node in (None, at))


def kill_one(deployment: str) -> None:
    """SIGKILL for one of them."""
    os.kill(processes(deployment)[0], signal.SIGKILL)


def kill_node(cluster: Any) -> list[str]:
    """SIGKILL for everything of a node that has a replica and an assembler; returns what of the server was on it.

    Raises RuntimeError where there is no such node.
    """
    where: dict[str, list[str]] = {}
    for name, node, _ in _actors():
        where.setdefault(node, []).append(name)
    for node in list(cluster.worker_nodes):
        names = sorted(where.get(node.node_id, []))
        if {"Replica", "Assembler"} <= {name.rstrip("0123456789") for name in names}:
            numbers = processes(node=node.node_id)
            cluster.remove_node(node, allow_graceful=False)
            for number in numbers:
                _end(number)
            return names
    raise RuntimeError(f"nodes: got {where}, expected one with a replica and an assembler")


def _end(number: int) -> None:
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:  # it has gone with its node
        pass


def _actors() -> list[tuple[str, str, int]]:
    """Deployment, node and process number of each process of the server that is alive."""
    from ray._private.state import actors  # the public way needs the dashboard

    prefix = f"ServeReplica:{_APPLICATION}:"
    return [
        (one["ActorClassName"].removeprefix(prefix), one["Address"]["NodeID"], one["Pid"])
        for one in actors().values()
        if one["ActorClassName"].startswith(prefix) and one["State"] == "ALIVE"
    ]
