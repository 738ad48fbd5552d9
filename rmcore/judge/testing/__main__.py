"""``python -m rmcore.judge.testing``: print the base URL, serve until a signal ends it. Exit code 2: a bad file."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence

from rmcore._base.arguments import real, whole
from rmcore._base.errors import InputError
from rmcore.judge.recorded import RecordedJudge
from rmcore.judge.testing.server import ReplayServer

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rmcore.judge.testing",
        description="Serve recorded verdicts as an OpenAI-compatible endpoint on 127.0.0.1.",
    )
    parser.add_argument("verdicts", help="JSON Lines (or .gz): prompt, first, second, verdict, and optionally order")
    parser.add_argument("--port", type=whole(least=0, most=65_535), default=0, help="default: a free one")
    parser.add_argument("--latency", type=real(least=0), default=0.0, metavar="SECONDS", help="time each answer takes")
    options = parser.parse_args(argv)
    try:
        server = ReplayServer(
            RecordedJudge.from_file(options.verdicts), latency_s=options.latency, port=options.port
        ).start()
    except (InputError, OSError) as error:
        parser.error(str(error))
    done = threading.Event()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: done.set())
    with server:
        print(server.base_url, flush=True)
        done.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
