"""What torchrun started ends with it, whatever it is at; what somebody else started goes on."""

from __future__ import annotations

import importlib.util
import os
import signal
import time

from support.warm import WarmPython

from rmcore._base import launcher

LAUNCHER = """
import os, signal, sys, time
from rmcore._base import launcher

launcher._LOOK_S, launcher._FAREWELL_S, launcher._KILL_S = 0.02, 0.1, 0.2
for kind in sys.argv[1:]:
    if os.fork() == 0:
        if kind == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if kind == "late":  # its launcher is gone before it asks who that was
            born_of = os.getppid()
            print("started", flush=True)
            while os.getppid() == born_of:
                time.sleep(0.02)
            print(f"late: {launcher.Launcher().gone}", flush=True)
        launcher.end_with_launcher()
        if kind != "late":
            print("started", flush=True)
        time.sleep(2 if kind == "alone" else 100)
        print(f"{kind} went on", flush=True)
        os._exit(0)
for kind in sys.argv[1:]:
    os.wait()
"""


def ends(warm_python: WarmPython, *kinds: str, **environment: str) -> tuple[str, str]:
    """Streams of a launcher with workers of such kinds that is killed when all have started; until all have ended."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")} | environment
    launcher = warm_python.start(LAUNCHER, *kinds, env=env, modules=("rmcore._base.launcher",))
    assert launcher.stdout is not None
    for _ in kinds:
        assert launcher.stdout.readline() == "started\n"
    begun = time.monotonic()
    launcher.send_signal(signal.SIGKILL)
    out, errors = launcher.communicate(60)
    assert time.monotonic() - begun < 40, "they sleep for 100 s"
    return out, errors.replace(str(launcher.pid), "PID")


def test_a_worker_ends_with_its_torchrun_wherever_it_is(warm_python: WarmPython):
    out, errors = ends(warm_python, "busy", "deaf", "late", TORCHELASTIC_RUN_ID="none")
    assert out == "late: True\n"
    assert errors == 3 * "the launcher (process PID) ended, and so does this worker\n"


def test_what_torchrun_did_not_start_goes_on_alone(warm_python: WarmPython):
    assert ends(warm_python, "alone") == ("alone went on\n", "")


def test_where_nothing_forks_it_is_imported_all_the_same(monkeypatch):
    monkeypatch.delattr(os, "register_at_fork")
    found = importlib.util.find_spec(launcher.__name__)
    found.loader.exec_module(importlib.util.module_from_spec(found))
