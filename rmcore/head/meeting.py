"""How the processes that a launcher started find each other: all within a bounded time, or an error that names who is
missing.

torch's own rendezvous waits for half an hour, and says how many came, not who. Here each rank writes its name to the
job's store and looks for those of the others, while the launcher lives.
"""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from rmcore._base.errors import RankError, reject
from rmcore._base.launcher import Launcher

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["meet"]

_LOOK = 0.5
"""Seconds between two looks at who has come."""
_TRY = 5.0
"""Seconds of an attempt to reach the store; between two, the launcher is looked at."""
_TORCHS_OWN = timedelta(minutes=30)
"""How long its store and its default group wait once all have met; that is not ours to change."""


def meet(within: float) -> None:
    """Initialise ``torch.distributed`` over gloo from the environment, as torchrun sets it.

    Args:
        within: seconds until all ranks must have come.

    Raises:
        RankError: ranks did not come in time (``ranks`` are those), the job's store does not answer, or torchrun ended.
        InputError: the environment lacks what torchrun sets, or ``within`` is not positive.
    """
    if not within > 0:
        reject("meet_within", within, "a positive number of seconds")
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    launcher, deadline = Launcher(), time.monotonic() + within
    try:
        store = dist.PrefixStore("rmcore/job", _store(rank, port, launcher, deadline, within))  # type: ignore[attr-defined]
        _roll_call(store, rank, size, launcher, deadline, within)
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=left)
    except RankError:
        raise
    except RuntimeError as error:
        _check(launcher)
        raise RankError(f"the job's store or one of its ranks went while they met ({error})") from error
    group = dist.group.WORLD
    assert group is not None
    store.set_timeout(_TORCHS_OWN)
    group._get_backend(torch.device("cpu"))._set_default_timeout(_TORCHS_OWN)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        reject(name, repr(value), "a number in the environment, as torchrun sets it")
    return int(value)


def _store(rank: int, port: int, launcher: Launcher, deadline: float, within: float) -> Store:
    """The job's: torchrun keeps it, or else rank 0 does."""
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        reject("MASTER_ADDR", "nothing", "a host in the environment, as torchrun sets it")
    keeper = _keeps(rank)
    while True:
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]
                host,
                port,
                None,
                is_master=keeper,
                timeout=timedelta(seconds=min(_TRY, max(1.0, deadline - time.monotonic()))),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            _check(launcher)
            if keeper or time.monotonic() > deadline:
                who = "could not be made" if keeper else f"did not answer within {within:g} s, so its keeper is gone"
                raise RankError(f"the job's store at {host}:{port} {who} ({error})", (0,)) from error


def _roll_call(store: Store, rank: int, size: int, launcher: Launcher, deadline: float, within: float) -> None:
    """Come, and wait until all have. Whose time is up first says so to all, who then end alike."""
    store.set(f"here/{rank}", "")
    while True:
        missing = [other for other in range(size) if not store.check([f"here/{other}"])]
        if missing and time.monotonic() > deadline:
            store.compare_set("missing", "", json.dumps(missing))
        if store.check(["missing"]):
            missing = json.loads(store.get("missing"))
            if _keeps(rank):
                time.sleep(4 * _LOOK)  # the others must have read it before the store goes
            who = ", ".join(map(str, missing))
            raise RankError(
                f"of {size} ranks {who} did not come within {within:g} s (RMCORE_MEET_WITHIN)", tuple(missing)
            )
        if not missing:
            return
        _check(launcher)
        time.sleep(_LOOK)


def _keeps(rank: int) -> bool:
    """Whether this rank keeps the store. torchrun does it itself, and says so."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _check(launcher: Launcher) -> None:
    if launcher.gone:
        raise RankError(f"{launcher} ended while its ranks met, and so they do")
