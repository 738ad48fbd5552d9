"""Who holds claims: one writer of one process, and whether that process is known to be gone.

On Linux a death on the same machine is seen at once, since the boot, the space of process ids, the process id and the
process's start time together name a process for good. Elsewhere only the heartbeat tells.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Owner", "is_dead"]


@dataclass(frozen=True, slots=True)
class Owner:
    """A writer of this process; make one with :meth:`new`."""

    host: str
    pid: int
    started: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def new(cls) -> Owner:
        """Another owner, of this process."""
        pid = os.getpid()
        return cls(_host(), pid, _started(pid))


def is_dead(host: str, pid: int, started: str) -> bool:
    """Whether a process is known to be gone. Where that cannot be known, it is not."""
    if not host or host != _host():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    now = _started(pid)
    return bool(now) and now != started


def _host() -> str:
    """A name for "this boot of this machine, and this space of process ids"; empty where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot; empty if that cannot be seen, ``dead`` for a zombie."""
    try:
        # The name before the last parenthesis may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "dead" if fields[0] in (b"Z", b"X") else fields[19].decode("ascii")
    except (OSError, IndexError, ValueError):
        return ""
