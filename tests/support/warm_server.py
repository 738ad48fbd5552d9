"""What ``support.warm`` starts: waits with imported modules, and forks a process for whoever asks over its socket.

A request is one message: JSON, with the three standard streams as file descriptors. The process it starts is forked
from a process that has run nothing and has one thread, and goes on from here as a script of its own would: its
environment, folder, streams and arguments are the request's, and it ends as Python ends. A minder, forked in between,
waits for it and writes its process id and then its exit status to the socket.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

LONGEST = 1 << 20


def asked(listener: socket.socket) -> dict[str, Any]:
    """Serve until standard input ends, which ends the server; returns in each new process, with what it is to be."""
    minders = set()
    while True:
        ended = sys.stdin in select.select([sys.stdin, listener], [], [])[0]
        minders -= {minder for minder in minders if os.waitpid(minder, 0 if ended else os.WNOHANG)[0]}
        if ended:
            os._exit(0)
        connection, _ = listener.accept()
        message, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
        request: dict[str, Any] = json.loads(message)
        for name in request["modules"]:
            importlib.import_module(name)
        minder = os.fork()
        if minder == 0:
            listener.close()
            child = os.fork()
            if child == 0:
                connection.close()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return request
            for stream in (0, 1, 2, *streams):
                os.close(stream)
            connection.sendall(f"{child}\n".encode())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            connection.sendall(f"{status}\n".encode())
            os._exit(0)
        minders.add(minder)
        for stream in streams:
            os.close(stream)
        connection.close()


def become(request: dict[str, Any]) -> None:
    """Take the request's environment, folder and arguments, and run its module or its code as ``__main__``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    # The server's own streams, which stay in sys.__stdin__ and its like, know whether their files could seek.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(write_through=True)
    sys.argv = ["-c", *request["arguments"]]
    if request["module"]:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    else:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    door = socket.socket(fileno=int(sys.argv[1]))
    become(asked(door))
