"""The examples that run a trainer's own code: what they name exists, and where the trainers are they end well."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.pages import ROOT, python_problems

SCRIPTS = {"openrlhf_servers.py": "openrlhf", "verl_reward_loop.py": "verl"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_they_name_exists(script):
    problems = python_problems((ROOT / "examples" / script).read_text())
    others = ("no module trl_rloo", "no module openrlhf", "no module verl", "no module ray", "no module hydra")
    assert [one for one in problems if not one.startswith((*others, "no module tensordict"))] == []


@pytest.mark.trainers
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("script", "package"), SCRIPTS.items())
def test_they_run(script, package):
    pytest.importorskip(package, reason=f"{package} is not installed (make test-trainers)")
    command = [sys.executable, str(ROOT / "examples" / script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    assert "largest difference" in told.stdout
