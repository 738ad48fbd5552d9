"""Room for connections: every member that waits for its siblings has one, and each is an open file."""

from __future__ import annotations

import logging

from rmcore.integrations.server.settings import ServeSettings

__all__ = ["make_room"]

log = logging.getLogger(__name__)

_BESIDE = 1024
"""Connections that keep quiet, sockets to a judge, files."""


def make_room(settings: ServeSettings) -> None:
    """Raise this process's limit of open files to what the settings let in; a warning where it may not be as high.

    A server without room leaves connections unaccepted: members stand at the door until their group is scored without
    them. The usual limit, 1,024, is half of what a step of 128 prompts with 16 responses each has waiting at once.
    """
    try:
        import resource
    except ImportError:  # not Unix
        return
    needed = settings.max_members + settings.max_queue + _BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    if soft == endless or soft >= needed:
        return
    most = needed if hard == endless else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # some systems have limits below the one they tell
        most = soft
    if most < needed:
        log.warning(
            "this process may have %d open files, and max_members = %d and max_queue = %d let in more connections; "
            "raise the limit (ulimit -n), or lower those, or members may wait unseen until their groups are scored "
            "without them",
            most,
            settings.max_members,
            settings.max_queue,
        )
