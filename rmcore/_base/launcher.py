"""The process that started this one, where that is torchrun: its workers end with it.

Who the parent is, is looked up when rmcore is imported. Later would be too late: a worker whose torchrun died while it
loaded a model has another parent by then, init mostly, which lives for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

__all__ = ["Launcher", "end_with_launcher"]

_LOOK_S = 0.5
_FAREWELL_S = 10.0
"""Seconds for a worker whose launcher is gone to end by itself: who meets or waits for other ranks tells them why."""
_KILL_S = 30.0
"""Seconds from SIGTERM to SIGKILL, as torchrun itself waits."""

_parent = os.getppid()


def _forked() -> None:
    global _parent
    _parent = os.getppid()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_forked)


class Launcher:
    """The process that started this one, where that is torchrun. Others may go on alone."""

    def __init__(self) -> None:
        self._process = _parent if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def known(self) -> bool:
        """Whether torchrun started this process."""
        return self._process is not None

    @property
    def gone(self) -> bool:
        """Whether it ended, so that this process has another parent."""
        return self._process is not None and os.getppid() != self._process

    def __str__(self) -> str:
        return f"the launcher (process {self._process})"


def end_with_launcher() -> None:
    """From now on have this process end, by SIGTERM, soon after its torchrun did, whatever it is at by then.

    Nothing for a process that torchrun did not start. :class:`~rmcore.head.ranks.Ranks` do so anyhow; this is for the
    time before, in which a worker may load a model or wait for a file for minutes.
    """
    launcher = Launcher()
    if launcher.known:
        threading.Thread(target=_end_with, args=(launcher,), name="rmcore launcher", daemon=True).start()


def _end_with(launcher: Launcher) -> None:
    while not launcher.gone:
        time.sleep(_LOOK_S)
    time.sleep(_FAREWELL_S)
    sys.stderr.write(f"{launcher} ended, and so does this worker\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_KILL_S)
    os.kill(os.getpid(), signal.SIGKILL)  # somebody has a handler of SIGTERM that does not end it
