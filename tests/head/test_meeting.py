"""How ranks meet: within a bounded time, or with an error that names who is missing; and no rank outlives torchrun."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.warm import WarmPython

from rmcore._base.errors import InputError, RankError
from rmcore.head.ranks import Ranks

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)

MODULES = ("torch", "torch.distributed", "rmcore.head.ranks")
LAUNCHER = """
import os, sys, time
from rmcore._base.errors import RankError
from rmcore.head.ranks import Ranks

for rank in map(int, sys.argv[2].split(",")):
    if os.fork() == 0:
        os.environ["RANK"] = str(rank)
        try:
            with Ranks.here(patience=1.2, meet_within=float(sys.argv[1])) as ranks:
                print(f"{rank} met {ranks.size - 1} more", flush=True)
                time.sleep(100)
        except RankError as error:
            print(f"{rank}: {error.ranks} {error}", flush=True)
        os._exit(0)
print("started", flush=True)
if len(sys.argv) > 3:  # as torchrun does: stays until its ranks have ended
    time.sleep(100)
"""
"""``LAUNCHER within ranks [stays]``. Its output ends when all of its ranks have."""


def environment(size: int, **more: str) -> dict[str, str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}


def test_who_does_not_come_is_named_by_all_who_did(warm_python: WarmPython):
    begun = time.monotonic()
    out, errors = warm_python.start(LAUNCHER, 3, "0,2", modules=MODULES, env=environment(4)).communicate(60)
    assert time.monotonic() - begun < 30
    for rank in (0, 2):
        assert f"{rank}: (1, 3) of 4 ranks 1, 3 did not come within 3 s (RMCORE_MEET_WITHIN)" in out, errors


def test_a_store_that_nobody_keeps_is_no_reason_to_wait(monkeypatch):
    for name, value in environment(2, RANK="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"store at 127\.0\.0\.1:\d+ did not answer within 1 s") as caught:
        Ranks.here(meet_within=1)
    assert caught.value.ranks == (0,)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "", "RANK: got '', expected a number in the environment, as torchrun sets it"),
        ("MASTER_PORT", "http", "MASTER_PORT: got 'http', expected a number"),
        ("MASTER_ADDR", "", "MASTER_ADDR: got nothing, expected a host"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, name, value, said):
    for key, given in {**environment(2, RANK="1"), name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(InputError, match=re.escape(said)):
        Ranks.here()


def test_no_rank_outlives_its_torchrun(warm_python: WarmPython):
    env = environment(3, TORCHELASTIC_RUN_ID="none")
    meeting = warm_python.start(LAUNCHER, 90, "0,1", "stays", modules=MODULES, env=env)
    env = environment(2, TORCHELASTIC_RUN_ID="none")
    working = warm_python.start(LAUNCHER, 90, "0,1", "stays", modules=MODULES, env=env)
    for launcher, lines in ((meeting, 1), (working, 3)):
        assert launcher.stdout is not None
        seen = [launcher.stdout.readline() for _ in range(lines)]
        assert "started\n" in seen
        assert len([line for line in seen if "met 1 more" in line]) == lines - 1
    for launcher in (meeting, working):
        os.kill(launcher.pid, signal.SIGKILL)
    begun = time.monotonic()
    out, _ = meeting.communicate(60)
    for rank in (0, 1):
        assert re.search(rf"{rank}: \(\) the launcher \(process {meeting.pid}\) ended while its ranks met", out)
    working.communicate(60)
    assert time.monotonic() - begun < 30, "they sleep for 100 s"


WORKER = """
import os, sys, time
from rmcore.head.ranks import Ranks, end_with_launcher

end_with_launcher()
print(os.getpid(), flush=True)
if os.environ["RANK"] == "1":
    time.sleep(100)
Ranks.here(meet_within=90)
"""


@pytest.mark.distributed
def test_a_killed_torchrun_leaves_nobody_waiting(tmp_path: Path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", str(tmp_path / "worker.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as torchrun:
        assert torchrun.stdout is not None
        assert torchrun.stderr is not None
        assert all(torchrun.stdout.readline().strip().isdecimal() for _ in range(2))
        time.sleep(5)  # rank 0 waits for rank 1
        torchrun.kill()
        begun = time.monotonic()
        said = ""
        while "errors.RankError: " not in said and time.monotonic() - begun < 60:
            said = torchrun.stderr.readline()
        # Its end is that of all who write to it: rank 1 too, which sleeps and never comes to where the ranks meet.
        assert torchrun.stdout.read() == ""
    why = r"the launcher \(process \d+\) ended|the job's store or one of its ranks went"
    assert re.search(rf"errors\.RankError: ({why})", said)
    assert time.monotonic() - begun < 60
