"""A cluster of two nodes on this machine, and a judge's server that replays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from support.groups import verdicts_of

from rmcore.judge.testing import ReplayServer


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes; this process is connected to them."""
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'rmcore[ray]')")
    from ray.cluster_utils import Cluster

    os.environ["OMP_NUM_THREADS"] = "1"
    node = {"num_cpus": 3, "object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found.add_node(**node)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def replay() -> Iterator[Any]:
    """``replay(groups)``: a server that knows the verdicts on all their pairs."""
    servers: list[ReplayServer] = []

    def started(groups: list[dict[str, Any]]) -> ReplayServer:
        servers.append(ReplayServer(verdicts_of(groups), latency_s=0.002).start())
        return servers[-1]

    yield started
    for server in servers:
        server.stop()
