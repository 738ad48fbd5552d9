"""A PostgreSQL server of the tests' own: in a temporary folder, on a unix socket, gone with the process.

The programs come from the system's packages (``apt-get install postgresql``). The server refuses to run as root, so as
root it runs as the user ``postgres``, or ``nobody``.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["PostgresServer", "postgres_server"]


def _program(name: str) -> str | None:
    """The newest of the server's programs: on the path, or where Debian and Red Hat keep them."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: float(p.parts[-3]))
    candidates = [str(installed[-1])] if installed else []
    return next(iter(candidates), None) or shutil.which(name)


class PostgresServer:
    """A server that can be stopped, started, killed and frozen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._user: dict[str, object] = {}
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        os.chmod(folder, 0o755)
        programs = {name: _program(name) for name in ("initdb", "postgres")}
        if None in programs.values():
            pytest.skip("no PostgreSQL on this machine: apt-get install postgresql")
        self._postgres = str(programs["postgres"])
        command = [programs["initdb"], "-D", self.data, "-E", "UTF8", "--locale=C", "-A", "trust", "-U", "admin", "-N"]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._user)
        hba = self.data / "pg_hba.conf"
        hba.write_text("local all secretive scram-sha-256\n" + hba.read_text())

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = {"listen_addresses": "", "unix_socket_directories": self.folder, "fsync": "off"}
        settings |= {"max_connections": 60, "shared_buffers": "32MB", "autovacuum": "off"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [self._postgres, "-D", self.data, *options], stdout=log, stderr=log, cwd="/", **self._user
            )
        self.wait()

    def wait(self) -> None:
        """Until it answers."""
        import psycopg

        until = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: SIGINT ends its sessions first, SIGQUIT is a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def url(self, database: str, user: str = "admin") -> str:
        """Of a database."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """It is stopped, and started again at the end."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._count += 1
        name = f"t{self._count}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, query: str, url: str | None = None) -> list[tuple[object, ...]]:
        """Run one statement."""
        import psycopg

        with psycopg.connect(url or self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(query)
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It hangs: connections stay open and nothing is answered."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        pids = [self._process.pid, *map(int, children.read_text().split())]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server; skips the test, saying why, where there is none to be had."""
    pytest.importorskip("psycopg", reason="no psycopg: pip install 'rmcore[postgres]'")
    # Not in pytest's folders: those are for their owner alone, and the path of a socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="rmcore-pg-"))
    try:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)  # nothing in it is worth a checkpoint
    finally:
        shutil.rmtree(folder, ignore_errors=True)
