"""Runs the steps of ``make gpu-check``, each with a limit, so that whatever happens what was found is on disk.

Of the standard library alone, like all of :mod:`bench.gpu_check`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .gpu_build import architecture, assemble, build_command, commit, extension_loads, pybind11_folder
from .gpu_report import LIMITS, report

__all__ = ["Run", "Step", "run"]

GRACE_S = 5.0


@dataclass(frozen=True)
class Step:
    """A command with a limit: its failure ``disqualifies`` a backend, or it ``needs`` one that is not."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    disqualifies: str = ""
    needs: str = ""
    environment: dict[str, str] = field(default_factory=dict)


class Run:
    """The two files of a run, and the tree its steps import."""

    def __init__(self, out: Path, total_s: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.rows, self.log = out / "rows.jsonl", out / "log.txt"
        self.ends = time.monotonic() + total_s
        self.out_of_the_running: set[str] = set()
        self.failed: list[str] = []

    def write(self, **row: Any) -> None:
        """A row of the runner's own, on disk when this returns."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def step(self, step: Step, tree: Path) -> None:
        """Run one step to its end or its limit, and note what came of it."""
        left = self.ends - time.monotonic()
        skipped = f"{step.needs} failed its smoke test" if step.needs in self.out_of_the_running else ""
        skipped = skipped or ("no time left" if left < 10 else "")
        if skipped:
            self.write(step=step.name, skipped=skipped)
            if step.disqualifies:  # what was not shown to be right is timed no more than what is wrong
                self.out_of_the_running.add(step.disqualifies)
            return
        began = time.monotonic()
        rows_before = self.rows.stat().st_size if self.rows.exists() else 0
        print(f"[{step.name}] ...", flush=True)
        code = self._process(step, tree, min(step.limit_s, left - GRACE_S))
        seconds = round(time.monotonic() - began, 1)
        self.write(step=step.name, rc=code, seconds=seconds)
        print(f"[{step.name}] rc={code} {seconds} s", flush=True)
        if code:
            self.failed.append(step.name)
            print(self._tail(), flush=True)
        if step.disqualifies and (code or not _all_right(self.rows, rows_before)):
            self.out_of_the_running.add(step.disqualifies)
            self.write(step=step.name, disqualified=step.disqualifies)

    def _process(self, step: Step, tree: Path, limit_s: float) -> int:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(tree),
            "RMCORE_GPU_ROWS": str(self.rows),
            "OUT": str(self.rows.parent),
            "RMCORE_COMMIT": commit(),
            "RMCORE_SELF_CHECK": "0",  # the steps are the check
            **step.environment,
        }
        with self.log.open("ab") as log:
            log.write(f"=== {step.name}: {' '.join(step.command)}\n".encode())
            log.flush()
            try:
                process = subprocess.Popen(
                    step.command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n".encode())
                return 127
            code = 124
            try:
                code = process.wait(timeout=max(1.0, limit_s))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)  # so that it reports what it has
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE_S)
            finally:
                with suppress(ProcessLookupError):  # children too: a sanitizer's, pytest's workers
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return code

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-8:]
        return "\n".join("    " + line[:200] for line in lines)


def _all_right(rows: Path, start: int) -> bool:
    """Whether the rows after byte ``start`` hold at least one result, and no failed, non-finite or unstable one."""
    found = []
    with rows.open("rb") as file:
        file.seek(start)
        for line in file:  # one that was being written when its process was killed says nothing, and stops nothing
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    cases = [row for row in found if "err_g" in row]
    within = all(c["err_g"] < LIMITS["err_g"] and c["err_v"] < LIMITS["err_v"] for c in cases)
    right = within and all(c["finite"] and c["bits_repeat"] for c in cases)
    return bool(cases) and right and not any("failed" in row for row in found)


def run(steps: Sequence[Step], out: Path, total_s: float) -> int:
    """Assemble the tree, make sure of ``_cuda``, run the steps, print the table; 0 only if every step passed."""
    check = Run(out, total_s)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        tree = Path(folder)
        assemble(tree)
        cuda = any("cuda" in step.command for step in steps)
        if cuda and not extension_loads(tree):
            check.write(step="extension", carried=False)
            build = tree / "build"
            commands = build_command(build, sys.executable, architecture(), pybind11_folder(), cpu=False)
            for k, command in enumerate(commands):
                check.step(Step(f"build-{k}", 180, tuple(command)), tree)
            for path in build.rglob("_cuda*.so"):
                shutil.copy(path, tree / "rmcore")
        for step in steps:
            check.step(step, tree)
    report(check.rows, None)
    return int(bool(check.failed))
