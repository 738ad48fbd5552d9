"""Processes of their own without seconds of imports each: forked from one that has imported torch already.

For tests of what happens between processes: kills, signals, pipes, locks, files; and, with ``torch_python``, of what
is imported beyond torch. A test of how Python starts (its locale) needs a fresh interpreter, as does one of what rmcore
reads from the environment while it is imported.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

__all__ = ["MODEL", "WarmProcess", "WarmPython"]

MODEL = (
    "rmcore.cli.build_engine",
    "rmcore.engine.engine",
    "rmcore.model.reward_model",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
)
"""What a command that loads a model imports."""


class WarmProcess:
    """What the tests use of ``subprocess.Popen``: text streams, signals, an exit status."""

    def __init__(self, connection: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self._told = connection.makefile("r")
        self._connection = connection
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        """The exit status, minus the signal's number for a killed process; None while it runs."""
        return self._status(0)

    def wait(self, timeout: float = 120) -> int:
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("a warm process", timeout)
        return status

    def _status(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = int(self._told.readline())
            self._told.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """All that is left of both streams, once the process has ended."""
        read = {}

        def drain(name: str, stream: IO[str]) -> None:
            read[name] = stream.read()
            stream.close()

        streams = {"out": self.stdout, "err": self.stderr}
        threads = [threading.Thread(target=drain, args=item, daemon=True) for item in streams.items() if item[1]]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        return read.get("out", ""), read.get("err", "")


class WarmPython:
    """The process that the others are forked from, started when the first is asked for."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory()  # a socket's name must be short

    def start(
        self,
        code: str = "",
        *arguments: object,
        module: str = "",
        modules: Sequence[str] = ("torch",),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | IO[str] = subprocess.DEVNULL,
        stdout: int | IO[str] = subprocess.PIPE,
        stderr: int | IO[str] = subprocess.PIPE,
    ) -> WarmProcess:
        """Run ``python -c code arguments``, or ``python -m module arguments``; ``modules`` are imported before."""
        request = {
            "code": code,
            "module": module,
            "modules": modules,
            "arguments": [str(argument) for argument in arguments],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address())
        ours: list[IO[str] | None] = []
        theirs, made = [], []
        for stream, mode in ((stdin, "r"), (stdout, "w"), (stderr, "w")):
            reader = None
            if stream == subprocess.PIPE:
                end, number = os.pipe()
                reader = os.fdopen(end, encoding="utf-8")
                made.append(number)
            elif stream == subprocess.DEVNULL:
                number = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
                made.append(number)
            else:
                number = stream if isinstance(stream, int) else stream.fileno()
            ours.append(reader)
            theirs.append(number)
        socket.send_fds(connection, [json.dumps(request).encode()], theirs)
        for number in made:
            os.close(number)
        return WarmProcess(connection, ours[1], ours[2])

    def _address(self) -> str:
        address = f"{self._folder.name}/door"
        if self._server is None:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen()
                command = [sys.executable, str(Path(__file__).with_name("warm_server.py")), str(listener.fileno())]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                self._server = subprocess.Popen(
                    command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], env=environment
                )
        return address

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(60)  # with the processes it started
        self._folder.cleanup()


@pytest.fixture(scope="session")
def torch_python() -> Iterator[WarmPython]:
    """For tests of what rmcore imports: its processes have imported torch and nothing else."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    python = WarmPython()
    yield python
    python.close()
